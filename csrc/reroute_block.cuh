// What a thread block of the re-routing kernels works on: its arguments, its share of the rows, the
// slots that its threads hold in registers, and what it keeps in shared memory.
#pragma once

#include "reroute_core.h"
#include "reroute_device.h"

namespace sere {

constexpr int kMaxThreads = 1024;
constexpr int kGridThreads = 512;  // of a block in the grid form
constexpr int kHeldSlots = 4;      // per thread, in registers from the first load to the last store
constexpr int kMaxCluster = 8;
constexpr int kNoRow = 0x7fffffff;

enum Search : int { kSearchAuto, kSearchRows, kSearchNeighbors };

// What the blocks of a forward count together.
struct Tally {
  int rerouted;
  int critical;
};

// Device memory of the grid form, zero at the start.
struct GridScratch {
  uint32_t primary[kExpertWords];
  uint32_t present[kMaxClasses][kExpertWords];
  int32_t padding[kMaxTopK];  // ids of the first usable row
  int usable_from_end;        // rows - first usable row; 0: none
  int blocks_voted, blocks_done;
  Tally tally;
};
static_assert(sizeof(GridScratch) <= 1024, "what sere_sglang/ops/cuda/reroute.py allocates");

// The routed rows that a kernel changes in place, and how they lie among its threads.
struct Routing {
  int32_t* ids;              // [rows, top_k], rows id_stride apart
  float* weights;            // likewise, or null: slots are ranked already
  const uint8_t* row_class;  // [rows] or null
  int64_t* counters;         // or null
  int64_t id_stride;
  int64_t weight_stride;
  int rows;
  int top_k;
  int experts;
  int group_bits;  // a row takes 2^group_bits lanes, at least top_k
};

struct Params : Routing {
  const float* similarity;   // [experts, experts]
  const int16_t* neighbors;  // [experts, experts] or null
  const float* scale;        // [experts, experts] or null; needs weights
  const int32_t* control;
  GridScratch* scratch;  // grid form only
  Search search;
  bool distinct;  // no expert twice in a row; needs weights
  bool quads;     // rows of the tables are aligned for loads of four
};

struct Shared {
  Control control;
  uint32_t primary[kExpertWords];       // P
  uint32_t mine_primary[kExpertWords];  // this block's votes, read by its peers
  uint32_t mine_present[kExpertWords];
  uint32_t mine_kept[kExpertWords];  // critical experts of this block's rows
  uint32_t active[kExpertWords];     // A: P and the critical experts of all rows
  int primaries, present;            // experts in P, experts used by valid rows
  int usable;                        // first row that padding rows can copy, in this block
  int first_usable;                  // ... and in the whole forward
  int listed;
  Tally tally;
  int32_t mine_padding[kMaxTopK];  // ids of row `usable`, read by this block's peers
  int32_t padding[kMaxTopK];       // ids of row `first_usable`
  alignas(16) uint8_t voted[kMaxExperts];
  alignas(16) uint8_t seen[kMaxExperts][kMaxClasses];  // in use, by rows of a class
  uint16_t list[kMaxExperts];                          // experts that may move
  int16_t best[kMaxExperts];                           // by expert, for those in the list
  float best_similarity[kMaxExperts];
  int32_t row_own[kMaxThreads];  // rows in which slots met, by thread
  int32_t row_id[kMaxThreads];
  float row_weight[kMaxThreads];
};

SERE_DEVICE int lane_index() { return thread_index() & 31; }
SERE_DEVICE int warp_index() { return thread_index() >> 5; }
SERE_DEVICE int num_warps() { return num_threads() >> 5; }
SERE_DEVICE int num_words(int experts) { return (experts + 31) / 32; }

// Rows [first, end) belong to this block; it takes them in passes of `per_pass`.
struct Rows {
  int first, end, per_pass, passes;
  int valid;  // of the whole forward; known once the control block is
};

SERE_HD int rows_per_block(int rows, int blocks) { return (rows + blocks - 1) / blocks; }

SERE_DEVICE Rows rows_of_block(const Routing& p, int rank, int blocks) {
  const int share = rows_per_block(p.rows, blocks), per_pass = num_threads() >> p.group_bits;
  const int first = rank * share < p.rows ? rank * share : p.rows;
  const int end = p.rows - first < share ? p.rows : first + share;
  return {first, end, per_pass, (end - first + per_pass - 1) / per_pass, 0};
}

SERE_DEVICE bool has_padding(const Routing& p, const Rows& rows) { return rows.valid < p.rows; }
SERE_DEVICE bool pads_here(const Rows& rows) { return rows.end > rows.valid; }

// Slot of this thread in a pass; the lanes of a row are neighbours.
struct Slot {
  int row, k;
  bool exists;
};

SERE_DEVICE Slot slot_of(const Routing& p, const Rows& rows, int pass) {
  const int k = thread_index() & ((1 << p.group_bits) - 1);
  const int row = rows.first + pass * rows.per_pass + (thread_index() >> p.group_bits);
  return {row, k, row < rows.end && k < p.top_k};
}

// Always indexed by unrolled loops over passes, so that they stay in registers.
struct Held {
  int id[kHeldSlots];
  float weight[kHeldSlots];
  uint32_t classes;  // a byte per pass, as stored
};

SERE_DEVICE int class_of_slot(const Shared& s, const Held& held, int pass) {
  return clamp_class(s.control, held.classes >> 8 * pass & 0xff);
}

// All loads are under way before the first one is used.
SERE_DEVICE void load_slots(const Params& p, const Rows& rows, Held& held) {
#pragma unroll
  for (int pass = 0; pass < kHeldSlots; ++pass) {
    const Slot slot = slot_of(p, rows, pass);
    const bool exists = slot.exists && pass < rows.passes;
    held.id[pass] = exists ? p.ids[slot.row * p.id_stride + slot.k] : -1;
    held.weight[pass] =
        exists && p.weights != nullptr ? p.weights[slot.row * p.weight_stride + slot.k] : 0.0f;
  }
}

SERE_DEVICE void load_classes(const Params& p, const Rows& rows, Held& held) {
  held.classes = 0;
  if (p.row_class == nullptr) return;
#pragma unroll
  for (int pass = 0; pass < kHeldSlots; ++pass) {
    const Slot slot = slot_of(p, rows, pass);
    if (slot.exists && pass < rows.passes) {
      held.classes |= uint32_t(p.row_class[slot.row]) << 8 * pass;
    }
  }
}

// Whether every other block of the grid has come here already; what those wrote is visible then.
SERE_DEVICE bool is_last_block(int* arrived) {
  fence_device();
  sync_block();
  const bool is_last =
      elect_any_block(thread_index() == 0 && atomic_add(arrived, 1) == num_blocks() - 1);
  if (is_last) fence_device();
  return is_last;
}

SERE_DEVICE int32_t load_control(const Params& p) {
  return thread_index() < int(sizeof(Control) / 4) ? p.control[thread_index()] : 0;
}

// Ends without a barrier.
SERE_DEVICE void clear(Shared& s, const Params& p, int32_t control_word) {
  const int t = thread_index();
  for (int word = t; word < num_words(p.experts) * 8; word += num_threads()) {
    reinterpret_cast<uint32_t*>(s.voted)[word] = 0;
  }
  for (int expert = t; expert < num_words(p.experts) * 32; expert += num_threads()) {
    *reinterpret_cast<uint32_t*>(s.seen[expert]) = 0;
  }
  for (int word = t; word < kExpertWords; word += num_threads()) {
    s.primary[word] = s.mine_primary[word] = s.mine_present[word] = s.mine_kept[word] = 0;
  }
  if (t == 0) {
    s.primaries = s.present = s.listed = 0;
    s.usable = s.first_usable = kNoRow;
    s.tally.rerouted = s.tally.critical = 0;
  }
  if (t < int(sizeof(Control) / 4)) reinterpret_cast<int32_t*>(&s.control)[t] = control_word;
}

}  // namespace sere
