// What the rules beside re-routing decide, an expert or a row at a time: shared by the CPU
// (rules_batch.h) and the CUDA kernels (rules_kernels.cuh).
// Semantics: docs/semantics.md, "Rules beside similarity"; oracle: tests/ops/rules_oracle.py.
// Weights are summed slot after slot in float32 and rounded after each operation as the torch
// reference does, so that all give the same bits: compile without contraction of a * b + c.
#pragma once

#include <cmath>

#include "reroute_distinct.h"

namespace sere {

// sere_sglang/ops/rules_call.py
enum class Rule : int32_t { kSimilarity, kPiggyback, kBudget, kTopk, kEnergy };
constexpr float kFixedOne = 4294967296.0f;         // 2^32: FRACTION_BITS
constexpr float kLargestTerm = 17592186044416.0f;  // 2^44: LARGEST_TERM

// sere_sglang/ops/rule_block.py
enum RuleFlag { kWarmup = 1, kTruncate = 2, kWritesLost = 4, kHasClasses = 8 };
enum RowKind { kProtectedRow = 1, kFastRow = 2 };

struct RuleBlock {
  Rule rule;
  int32_t num_valid;
  int32_t keep, fast_keep;  // S, k0 or 1: of normal rows, of fast ones
  int32_t budget;
  int32_t flags;
  double loss;
  float fill_weight, renormalize;
  int32_t reserved[6];
};
static_assert(sizeof(RuleBlock) == 64, "16 words");

// ---- numbers

// To nearest, ties to even; scaling by a power of two is exact.
SERE_HD int64_t fixed_point(float value) {
  const float scaled = multiply_rounded(value, kFixedOne);
  const float term = scaled < kLargestTerm ? scaled : kLargestTerm;
#ifdef __CUDA_ARCH__
  return __float2ll_rn(term);
#else
  return int64_t(std::nearbyint(term));
#endif
}

// What losing a slot costs under `energy`: its squared weight, times `expert_loss` [experts] where
// there is one.
SERE_HD int64_t lost_energy(float weight, const float* expert_loss, int expert) {
  const float square = multiply_rounded(weight, weight);
  return fixed_point(expert_loss == nullptr ? square
                                            : multiply_rounded(square, expert_loss[expert]));
}

// What `energy` may drop in units of the sums, rounded down; exact, the loss being a float32.
SERE_HD int64_t loss_limit(const RuleBlock& o, int valid) {
  return int64_t(o.loss * valid * double(kFixedOne));
}

SERE_HD float ratio(float above, float below, float otherwise) {
  return below == 0.0f ? otherwise : above / below;
}

// ---- set A

// Whether a row's sure slots put their experts into A.
SERE_HD bool sure_slots_vote(const RuleBlock& o) {
  return o.rule != Rule::kBudget || (o.flags & kWarmup) != 0;
}

SERE_HD int sure_slots(const RuleBlock& o, int row_kind) {
  const int slots = row_kind & kFastRow ? o.fast_keep : o.keep;
  return slots < 1 ? 1 : slots;
}

// Whose weights count in the sums of `energy`, and whose scores in those of `budget`.
SERE_HD bool weights_count(int row_kind) { return (row_kind & (kProtectedRow | kFastRow)) == 0; }
SERE_HD bool scores_count(int row_kind) { return (row_kind & kFastRow) == 0; }

// The order in which `budget` loads experts, and that in which `energy` drops them.
SERE_HD bool loads_before(const int64_t* sums, int a, int b) {
  return sums[a] != sums[b] ? sums[a] > sums[b] : a < b;
}
SERE_HD bool drops_before(const int64_t* sums, int a, int b) {
  return sums[a] != sums[b] ? sums[a] < sums[b] : a < b;
}

// ---- what a row holds, in which slot and with which weight

// A row that a rule may change; in a mask bit k is slot k.
struct RuleRow {
  const int32_t* own;  // [top_k], before the rule
  const float* old;
  const float* scores;  // [experts], or null
  int32_t* ids;         // [top_k], after it
  float* weights;
  int top_k;
  uint32_t live;    // slots that hold an expert
  uint32_t own_in;  // ... that is in A
  uint32_t sure;    // slots that are sure of theirs; `topk` alone asks
};

// Whether a row takes the best of A instead of those that it has.
SERE_HD bool reorders(const RuleBlock& o) {
  return o.rule == Rule::kPiggyback || (o.rule == Rule::kBudget && !(o.flags & kTruncate));
}

// Whether it looks at scores at all.
SERE_HD bool takes_scores(const RuleBlock& o) {
  return reorders(o) || o.rule == Rule::kBudget ||
         (o.rule == Rule::kEnergy && o.fill_weight > 0.0f);
}

// Slots that keep their expert.
SERE_HD uint32_t kept_slots(const RuleBlock& o, const RuleRow& row) {
  if (reorders(o)) return 0;
  return o.rule == Rule::kTopk ? row.sure & row.live : row.own_in;
}

// Slots that get, in slot order, the row's best of A by score that it does not hold.
SERE_HD uint32_t wanted_slots(const RuleBlock& o, const RuleRow& row) {
  if (reorders(o)) return row.live;
  const bool tops_up = o.rule == Rule::kEnergy && o.fill_weight > 0.0f;
  return tops_up ? row.live & ~kept_slots(o, row) : 0;
}

SERE_HD float sum_slots(const float* values, uint32_t slots, int top_k) {
  float total = 0.0f;
  for (int k = 0; k < top_k; ++k) {
    if (slots >> k & 1) total = add_rounded(total, values[k]);
  }
  return total;
}

SERE_HD void multiply_slots(float* values, uint32_t slots, int top_k, float factor) {
  for (int k = 0; k < top_k; ++k) {
    if (slots >> k & 1) values[k] = multiply_rounded(values[k], factor);
  }
}

// `found`, some of the wanted slots: where ids and weights are the best of A and their scores
// already. Settles the others, and what all of them weigh.
SERE_HD void settle_row(const RuleBlock& o, const ExpertBits& a, const RuleRow& row,
                        uint32_t found) {
  const int top_k = row.top_k;
  const uint32_t kept = kept_slots(o, row), taken = kept | found;
  const float mass = sum_slots(row.old, row.live, top_k);
  for (int k = 0; k < top_k; ++k) {
    if (!(kept >> k & 1)) continue;
    row.ids[k] = row.own[k];
    row.weights[k] = row.old[k];
  }
  if (reorders(o)) {
    multiply_slots(row.weights, found, top_k,
                   ratio(mass, sum_slots(row.weights, found, top_k), 0.0f));
  } else {
    if (found != 0) {
      float total = 0.0f;
      for (int k = 0; k < top_k; ++k) {
        if (row.live >> k & 1) total = add_rounded(total, row.scores[row.own[k]]);
      }
      multiply_slots(row.weights, found, top_k, ratio(mass, total, 0.0f));
      multiply_slots(row.weights, found, top_k, o.fill_weight);
    }
    // Times (original mass / new mass)^exponent, unless the row kept all its slots.
    const float exponent = o.rule == Rule::kEnergy ? o.renormalize : 1.0f;
    if (exponent != 0.0f && kept != row.live) {
      float factor = ratio(mass, sum_slots(row.weights, taken, top_k), 1.0f);
      if (exponent != 1.0f) factor = powf(factor < 0.0f ? 0.0f : factor, exponent);
      multiply_slots(row.weights, taken, top_k, factor);
    }
  }
  fill_free_slots(a, top_k, row.live, taken, row.own, row.ids, row.weights);
}

}  // namespace sere
