// What a thread block of the rules' kernels works on: its arguments, what blocks pool, and what it
// keeps in shared memory. A warp takes a row, a lane a slot.
#pragma once

#include "reroute_block.cuh"
#include "rules_core.h"

namespace sere {

constexpr int kRowBits = 5;  // Routing::group_bits: a row's lanes are a warp

// What rows say about the experts: those of a block, or all.
struct Votes {
  int64_t sums[kMaxExperts];       // under `budget` and `energy`, in fixed point
  uint32_t used[kExpertWords];     // in some valid row's slot
  uint32_t at_once[kExpertWords];  // in A whatever the sums are
  int usable_from_end;             // rows - first row that padding can copy; 0: none
};

// What the blocks of a forward count together.
struct RuleTally {
  int64_t lost;                   // squared weight, in fixed point
  uint32_t loaded[kExpertWords];  // experts of slots whose weight is not 0
  int moved;
};

// Device memory of the grid form, zero at the start.
struct RuleScratch {
  Votes votes;
  RuleTally tally;
  uint32_t members[kExpertWords];  // A
  int blocks_voted, blocks_done;
};
static_assert(sizeof(RuleScratch) <= 9216, "what sere_sglang/ops/cuda/rules.py allocates");

struct RuleParams : Routing {
  const float* scores;       // [rows, experts] or null
  const float* expert_loss;  // [experts] or null
  const int32_t* block;      // a RuleBlock
  uint8_t* active;           // [experts], zeros, or null
  float* lost;               // [rows, top_k], zeros, or null; with it
  int32_t* lost_experts;     // likewise
  RuleScratch* scratch;      // grid form only
  bool quads;                // rows of scores are aligned for loads of four
};

struct RuleShared {
  Votes mine;   // of this block's rows, read by its peers
  Votes votes;  // of all rows
  RuleTally tally;
  RuleBlock options;
  uint32_t members[kExpertWords];         // A
  alignas(16) uint8_t used[kMaxExperts];  // flags of this block's rows
  alignas(16) uint8_t at_once[kMaxExperts];
  alignas(16) uint8_t loaded[kMaxExperts];
  int32_t row_own[kMaxThreads];  // of the warps' rows, by thread: before the rule
  float row_old[kMaxThreads];
  int32_t row_id[kMaxThreads];  // ... and after it
  float row_weight[kMaxThreads];
};

SERE_DEVICE void clear(Votes& votes, int experts) {
  for (int expert = thread_index(); expert < experts; expert += num_threads()) {
    votes.sums[expert] = 0;
  }
  for (int word = thread_index(); word < kExpertWords; word += num_threads()) {
    votes.used[word] = votes.at_once[word] = 0;
  }
  if (thread_index() == 0) votes.usable_from_end = 0;
}

// The rows of this block, once the rule block has been read. Ends with a barrier.
SERE_DEVICE Rows start(RuleShared& s, const RuleParams& p) {
  wait_for_prior_kernels();
  let_next_kernel_start();
  const int t = thread_index();
  const int32_t option_word = t < int(sizeof(RuleBlock) / 4) ? p.block[t] : 0;
  clear(s.mine, p.experts);
  clear(s.votes, p.experts);
  for (int expert = t; expert < num_words(p.experts) * 32; expert += num_threads()) {
    s.used[expert] = s.at_once[expert] = s.loaded[expert] = 0;
  }
  for (int word = t; word < kExpertWords; word += num_threads()) {
    s.members[word] = s.tally.loaded[word] = 0;
  }
  if (t == 0) {
    s.tally.lost = 0;
    s.tally.moved = 0;
  }
  if (t < int(sizeof(RuleBlock) / 4)) reinterpret_cast<int32_t*>(&s.options)[t] = option_word;
  sync_block();
  Rows rows = rows_of_block(p, block_index(), num_blocks());
  rows.valid = valid_rows(s.options.num_valid, p.rows);
  return rows;
}

// The same in every block.
SERE_DEVICE bool is_off(const RuleShared& s) { return s.options.rule == Rule::kSimilarity; }

// Bits of RowKind.
SERE_DEVICE int kind_of(const RuleShared& s, const RuleParams& p, int row) {
  return p.row_class != nullptr && (s.options.flags & kHasClasses) ? p.row_class[row] : 0;
}

// For lost_energy. It says what surrogates leave, so it holds where they make up for what is lost.
SERE_DEVICE const float* expert_loss_of(const RuleShared& s, const RuleParams& p) {
  return s.options.flags & kWritesLost ? p.expert_loss : nullptr;
}

// Of all words of a set, by a whole warp: a lane takes a word.
static_assert(kExpertWords == 32, "a word per lane");
SERE_DEVICE bool is_empty(const uint32_t* set) { return ballot(set[lane_index()] != 0) == 0; }

// A slot of a valid row; the lanes beyond hold -1.
struct RoutedSlot {
  bool counts;  // exists, in a valid row
  bool routed;  // ... and holds an expert
  int id;
  float weight;
  int row_kind;
};

SERE_DEVICE RoutedSlot load_routed(const RuleShared& s, const RuleParams& p, const Slot& slot,
                                   int valid) {
  RoutedSlot held = {slot.exists && slot.row < valid, false, -1, 0.0f, 0};
  if (!held.counts) return held;
  held.id = p.ids[slot.row * p.id_stride + slot.k];
  held.weight = p.weights[slot.row * p.weight_stride + slot.k];
  held.row_kind = kind_of(s, p, slot.row);
  held.routed = is_expert(held.id, p.experts);
  return held;
}

}  // namespace sere
