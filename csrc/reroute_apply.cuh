// Apply: rewrite the slots, fill padding rows, count. A slot moves exactly if its expert is in no
// primary slot and no threshold keeps it, so ranks matter to the vote only.
#pragma once

#include "reroute_block.cuh"
#include "reroute_distinct.h"

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

// Rows in which slots met, as rule 8 of docs/semantics.md wants them; all lanes of a warp call this,
// a row's at once. `own`: what the slot held; `id`, `weight`: what it holds after re-routing, and
// then in the end. Returns whether the weight is a new one. Most rows cost a few shuffles.
SERE_DEVICE bool keep_distinct(Shared& s, const Params& p, const Slot& slot, bool pads, bool moved,
                               bool scaled, int own, int& id, float& weight) {
  const uint32_t moves = ballot(moved);
  if (moves == 0) return false;
  const int width = 1 << p.group_bits, first_lane = lane_index() & -width;
  bool meets = false;
  for (int other = 0; other < p.top_k; ++other) {
    const int theirs = shuffle(id, other, width);
    meets |= other < slot.k && theirs == id;
  }
  const bool is_live = slot.exists && is_expert(id, p.experts);
  const uint32_t met = ballot(meets && is_live);
  if (met == 0) return false;
  const uint32_t live = ballot(is_live) >> first_lane;
  const uint32_t group = (width == 32 ? ~0u : (1u << width) - 1) << first_lane;
  const bool changes = slot.exists && (met & group) != 0 && (moves & group) != 0;
  const int t = thread_index();
  if (changes) {
    if (!pads && !scaled) weight = p.weights[slot.row * p.weight_stride + slot.k];
    s.row_own[t] = own;
    s.row_id[t] = id;
    s.row_weight[t] = weight;
  }
  sync_warp();
  if (changes && slot.k == 0) {
    const uint32_t slots = live & (width == 32 ? ~0u : (1u << width) - 1);
    const uint32_t taken = merge_slots(p.top_k, slots, s.row_id + t, s.row_weight + t);
    fill_free_slots({s.active, num_words(p.experts)}, p.top_k, slots, taken, s.row_own + t,
                    s.row_id + t, s.row_weight + t);
  }
  sync_warp();
  if (!changes) return false;
  id = s.row_id[t];
  weight = s.row_weight[t];
  return !pads;
}

// What a padding row's slot holds where there is no row to copy; as keep_distinct.
SERE_DEVICE void pad_with_lowest(Shared& s, const Params& p, const Slot& slot, bool pads, int& id) {
  if (pads) id = lowest_primary(s);
  if (!p.distinct) return;
  if (pads && slot.k == 0) {
    fill_padding_slots({s.active, num_words(p.experts)}, p.top_k, s.row_id + thread_index());
  }
  sync_warp();
  if (pads) id = s.row_id[thread_index()];
  sync_warp();
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
    int id = held.id[pass];
    float weight = 0.0f;
    bool new_weight = false;
    if (has_primary) {
      const bool pads = slot.exists && slot.row >= rows.valid;
      int c = class_of_slot(s, held, pass);
      if (pads && s.first_usable != kNoRow) {  // as that row
        id = s.padding[slot.k];
        c = class_of(s.control, p.row_class, s.first_usable);
      }
      const int own = id;
      if (slot.exists) outcome = resolve(s, p, s.control.threshold[c], id);
      const bool moves = outcome == Outcome::kMoves;
      if (pads) outcome = Outcome::kStays;  // not counted
      if (moves && !pads && p.scale != nullptr) {
        weight =
            p.weights[slot.row * p.weight_stride + slot.k] * p.scale[int64_t(own) * p.experts + id];
        new_weight = true;
      }
      if (p.distinct) {
        new_weight |= keep_distinct(s, p, slot, pads, moves, new_weight, own, id, weight);
      }
      if (pads_here(rows) && s.first_usable == kNoRow) pad_with_lowest(s, p, slot, pads, id);
    }
    if (slot.exists) {
      if (kStores || id != held.id[pass]) p.ids[slot.row * p.id_stride + slot.k] = id;
      if (new_weight) p.weights[slot.row * p.weight_stride + slot.k] = weight;
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
    case kActiveAfter:
      step = s.primaries > 0 ? 0 : s.present;
      for (int word = 0; word < num_words(p.experts) && s.primaries > 0; ++word) {
        step += count_bits(s.active[word]);
      }
      break;
    case kRerouted: step = tally.rerouted; break;
    case kCritical: step = tally.critical; break;
    default: return;
  }
  if (step != 0) atomic_add(&p.counters[thread_index()], step);
}

}  // namespace sere
