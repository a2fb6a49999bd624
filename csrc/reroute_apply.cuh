// Apply: rewrite the slots, fill padding rows, count. A slot moves exactly if its expert is in no
// primary slot and no threshold keeps it, so ranks matter to the vote only.
#pragma once

#include "reroute_block.cuh"

namespace sere {

enum class Outcome { kStays, kMoves, kCritical };

// P is not empty. `id` becomes the slot's expert.
SERE_DEVICE Outcome resolve(const Shared& s, const Params& p, float threshold, int& id) {
  if (!is_expert(id, p.experts) || has(s.primary, id)) return Outcome::kStays;
  if (threshold > 0.0f && is_critical(s.best_similarity[id], threshold)) return Outcome::kCritical;
  id = s.best[id];
  return Outcome::kMoves;
}

SERE_DEVICE int lowest_primary(const Shared& s) {
  int word = 0;
  while (s.primary[word] == 0) ++word;
  return word * 32 + lowest_bit(s.primary[word]);
}

// What slot k of a padding row becomes; P is not empty.
SERE_DEVICE int padding_id(const Shared& s, const Params& p, int k) {
  if (s.first_usable == kNoRow) return lowest_primary(s);
  int id = s.padding[k];
  const int c = class_of(s.control, p.row_class, s.first_usable);
  resolve(s, p, s.control.threshold[c], id);
  return id;
}

// An expert that stays active without being in P.
SERE_DEVICE void count_kept(Shared& s, Tally& tally, int id) {
  const uint32_t bit = 1u << (id & 31);
  if (atomic_or(&s.mine_kept[id >> 5], bit) & bit) return;
  if (atomic_or(&tally.kept[id >> 5], bit) & bit) return;
  atomic_add(&tally.kept_experts, 1);
}

// kStores: the ids of this block's rows have not been written yet, so all of them are.
template <bool kStores>
SERE_DEVICE void apply(Shared& s, const Params& p, const Rows& rows, const Held& held,
                       Tally& tally) {
  const bool has_primary = s.primaries > 0, counts = p.counters != nullptr;
  int moved = 0, critical = 0;
#pragma unroll
  for (int pass = 0; pass < kHeldSlots; ++pass) {
    if (pass >= rows.passes) continue;
    const Slot slot = slot_of(p, rows, pass);
    Outcome outcome = Outcome::kStays;
    if (slot.exists) {
      const int before = held.id[pass];
      int id = before;
      if (has_primary && slot.row >= rows.valid) {
        id = padding_id(s, p, slot.k);
      } else if (has_primary) {
        const float threshold = s.control.threshold[class_of_slot(s, held, pass)];
        outcome = resolve(s, p, threshold, id);
        if (outcome == Outcome::kCritical && counts) count_kept(s, tally, id);
      }
      if (kStores || id != before) p.ids[slot.row * p.id_stride + slot.k] = id;
      if (outcome == Outcome::kMoves && p.scale != nullptr) {
        p.weights[slot.row * p.weight_stride + slot.k] *=
            p.scale[int64_t(before) * p.experts + id];
      }
    }
    if (counts) {
      moved += count_bits(ballot(outcome == Outcome::kMoves));
      critical += count_bits(ballot(outcome == Outcome::kCritical));
    }
  }
  if (lane_index() == 0) {
    if (moved != 0) atomic_add(&tally.rerouted, moved);
    if (critical != 0) atomic_add(&tally.critical, critical);
  }
}

SERE_DEVICE void store_ids(const Params& p, const Rows& rows, const Held& held) {
#pragma unroll
  for (int pass = 0; pass < kHeldSlots; ++pass) {
    const Slot slot = slot_of(p, rows, pass);
    if (pass < rows.passes && slot.exists) {
      p.ids[slot.row * p.id_stride + slot.k] = held.id[pass];
    }
  }
}

// By the block that has the whole tally.
SERE_DEVICE void add_counters(const Shared& s, const Params& p, const Rows& rows,
                              const Tally& tally) {
  int64_t step = 0;
  switch (thread_index()) {
    case kForwards: step = rows.valid > 0; break;
    case kRows: step = rows.valid; break;
    case kActiveBefore: step = s.present; break;
    // With primaries, what is active afterwards is those and the critical experts.
    case kActiveAfter: step = s.primaries > 0 ? s.primaries + tally.kept_experts : s.present; break;
    case kRerouted: step = tally.rerouted; break;
    case kCritical: step = tally.critical; break;
    default: return;
  }
  if (step != 0) atomic_add(&p.counters[thread_index()], step);
}

}  // namespace sere
