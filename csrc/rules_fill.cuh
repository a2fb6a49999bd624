// Fill: what rows hold of A, in which slot and with which weight; padding rows; what is counted.
#pragma once

#include "reroute_best.cuh"
#include "reroute_vote.cuh"
#include "rules_block.cuh"

namespace sere {

// The wanted slots get the row's best of A by score that no kept slot holds, with their scores for
// weights. Returns which slots got one. By a whole warp.
template <int kSpans>
SERE_DEVICE uint32_t put_next_best(const RuleShared& s, const RuleParams& p, const RuleRow& row,
                                   uint32_t kept, uint32_t wanted) {
  RowKeys<kSpans> keys;
#pragma unroll
  for (int span = 0; span < kSpans; ++span) {
    const int at = span * kQuadSpan + lane_index() * 4;
    const Quad<float> quad = load_four(row.scores, at, p.experts, p.quads);
    const uint32_t members = s.members[at >> 5] >> (at & 31);
#pragma unroll
    for (int i = 0; i < 4; ++i) keys.at[span][i] = members >> i & 1 ? ordered_key(quad.at[i]) : 0;
  }
  for (; kept != 0; kept &= kept - 1) {
    const int id = row.own[first_bit(kept)];
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (span * kQuadSpan + lane_index() * 4 + i == id) keys.at[span][i] = 0;
      }
    }
  }
  Match mine = first_best(keys);
  uint32_t found = 0;
  for (; wanted != 0; wanted &= wanted - 1) {
    const Match best = take_best(keys, mine);
    if (best.key == 0) break;  // A has no more
    const int slot = first_bit(wanted);
    found |= 1u << slot;
    if (lane_index() == slot) {
      row.ids[slot] = best.id;
      row.weights[slot] = from_key(best.key);
    }
  }
  return found;
}

// A row with slots that may change, `live`, by its warp. `held` becomes what the slot holds then.
template <int kSpans>
SERE_DEVICE void fill_row(RuleShared& s, const RuleParams& p, int at, uint32_t live,
                          uint32_t own_in, RoutedSlot& held) {
  const RuleBlock& o = s.options;
  const int t = thread_index(), first = t & ~31, lane = lane_index();
  s.row_own[t] = held.id;
  s.row_old[t] = held.weight;
  RuleRow row = {s.row_own + first,
                 s.row_old + first,
                 nullptr,
                 s.row_id + first,
                 s.row_weight + first,
                 p.top_k,
                 live,
                 own_in,
                 0};
  if (p.scores != nullptr) row.scores = p.scores + int64_t(at) * p.experts;
  if (o.rule == Rule::kTopk) {
    const int rank = rank_in_row(p, held.weight, lane, held.counts);
    row.sure = ballot(held.counts && rank < sure_slots(o, held.row_kind));
  }
  sync_warp();
  const uint32_t wanted = row.scores != nullptr ? wanted_slots(o, row) : 0;
  uint32_t found = 0;
  if (wanted != 0) found = put_next_best<kSpans>(s, p, row, kept_slots(o, row), wanted);
  sync_warp();
  if (lane == 0) settle_row(o, {s.members, num_words(p.experts)}, row, found);
  sync_warp();
  if (live >> lane & 1) {
    held.id = s.row_id[t];
    held.weight = s.row_weight[t];
  }
}

// This block's rows; `tally` gets what they moved and lost, s.loaded what they load.
template <int kSpans>
SERE_DEVICE void fill(RuleShared& s, const RuleParams& p, const Rows& rows, RuleTally& tally) {
  const bool some = !is_empty(s.members);
  int moved = 0;
  for (int pass = 0; pass < rows.passes; ++pass) {
    const Slot slot = slot_of(p, rows, pass);
    const RoutedSlot own = load_routed(s, p, slot, rows.valid);
    const bool changes = own.routed && some && !(own.row_kind & kProtectedRow);
    const bool is_lost = changes && !has(s.members, own.id);
    const uint32_t live = ballot(changes), own_in = ballot(changes && !is_lost);
    RoutedSlot held = own;
    if (live != 0) fill_row<kSpans>(s, p, slot.row, live, own_in, held);
    if (changes) {
      p.ids[slot.row * p.id_stride + slot.k] = held.id;
      p.weights[slot.row * p.weight_stride + slot.k] = held.weight;
    }
    if (held.routed) {
      if (p.active != nullptr) p.active[held.id] = 1;
      if (held.weight != 0.0f) s.loaded[held.id] = 1;
    }
    if (is_lost && p.lost != nullptr && (s.options.flags & kWritesLost)) {
      p.lost[int64_t(slot.row) * p.top_k + slot.k] = own.weight;
      p.lost_experts[int64_t(slot.row) * p.top_k + slot.k] = own.id;
    }
    if (p.counters != nullptr) {
      moved += count_bits(ballot(held.routed && held.id != own.id));
      if (is_lost && !(own.row_kind & kFastRow)) {
        atomic_add(&tally.lost, lost_energy(own.weight, expert_loss_of(s, p), own.id));
      }
    }
  }
  if (lane_index() == 0 && moved != 0) atomic_add(&tally.moved, moved);
}

// What the block's rows load, once they are all filled.
SERE_DEVICE void add_loaded(const RuleShared& s, const RuleParams& p, RuleTally& tally) {
  for (int word = warp_index(); word < num_words(p.experts); word += num_warps()) {
    const uint32_t loaded = ballot(s.loaded[word * 32 + lane_index()] != 0);
    if (lane_index() == 0 && loaded != 0) atomic_or(&tally.loaded[word], loaded);
  }
}

// Padding rows repeat the first valid row without an empty slot, or hold A's lowest. By one block,
// once all rows are filled.
SERE_DEVICE void fill_padding(RuleShared& s, const RuleParams& p, int valid) {
  if (valid >= p.rows || is_empty(s.members)) return;
  const int lane = lane_index(), from_end = s.votes.usable_from_end;
  if (warp_index() == 0) {
    const int64_t usable = p.rows - from_end;
    if (lane < p.top_k) {
      s.row_id[lane] = from_end > 0 ? load_racing(p.ids + usable * p.id_stride + lane) : 0;
      s.row_weight[lane] =
          from_end > 0 ? load_racing(p.weights + usable * p.weight_stride + lane) : 0.0f;
    }
    sync_warp();
    if (lane == 0 && from_end == 0) {
      fill_padding_slots({s.members, num_words(p.experts)}, p.top_k, s.row_id);
    }
  }
  sync_block();
  for (int row = valid + warp_index(); row < p.rows && lane < p.top_k; row += num_warps()) {
    p.ids[row * p.id_stride + lane] = s.row_id[lane];
    p.weights[row * p.weight_stride + lane] = s.row_weight[lane];
  }
}

SERE_DEVICE int size_of_set(const uint32_t* set) {
  int size = 0;
  for (int word = 0; word < kExpertWords; ++word) size += count_bits(set[word]);
  return size;
}

// By the block that has the whole tally and the votes of all rows.
SERE_DEVICE void finish(RuleShared& s, const RuleParams& p, int valid) {
  fill_padding(s, p, valid);
  if (p.counters == nullptr) return;
  int64_t step = 0;
  switch (thread_index()) {  // sere_sglang/ops/counters.py, and behind them the loss
    case kForwards: step = valid > 0; break;
    case kRows: step = valid; break;
    case kActiveBefore: step = size_of_set(s.votes.used); break;
    case kActiveAfter: step = size_of_set(s.tally.loaded); break;
    case kRerouted: step = s.tally.moved; break;
    case kNumCounters: step = valid > 0 ? s.tally.lost / valid : 0; break;
    default: return;
  }
  if (step != 0) atomic_add(&p.counters[thread_index()], step);
}

}  // namespace sere
