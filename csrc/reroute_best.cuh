// The best of a row of values, one after another, by one warp that holds the row in registers.
#pragma once

#include "reroute_match.cuh"

namespace sere {

// More values per lane, more registers.
constexpr int threads_for(int spans) { return spans > 2 ? kMaxThreads / 2 : kMaxThreads; }

// A lane holds experts lane * 4 + i of every span of 128.
template <int kSpans>
struct RowKeys {
  uint32_t at[kSpans][4];  // ordered_key of the value; 0: not to be had
};

// This lane's best expert behind `last` in the order of (key descending, id ascending).
template <int kSpans>
SERE_DEVICE Match next_best(const RowKeys<kSpans>& keys, const Match& last) {
  Match best = {0, kMaxExperts};
#pragma unroll
  for (int span = 0; span < kSpans; ++span) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = keys.at[span][i];
      const int id = span * kQuadSpan + lane_index() * 4 + i;
      const bool behind = key < last.key || (key == last.key && id > last.id);
      if (behind && key > best.key) best = {key, id};
    }
  }
  return best;
}

template <int kSpans>
SERE_DEVICE Match first_best(const RowKeys<kSpans>& keys) {
  return next_best(keys, {~0u, -1});
}

// The warp's best of its lanes' `mine`, which moves on in the lane that had it. Key 0: none left.
template <int kSpans>
SERE_DEVICE Match take_best(const RowKeys<kSpans>& keys, Match& mine) {
  const uint32_t key = warp_max(mine.key);
  const uint32_t lanes = ballot(mine.key == key);
  int winner = lowest_bit(lanes);
  if (kSpans > 1 && (lanes & (lanes - 1)) != 0) {  // of one span, the lowest lane is the lowest id
    const uint32_t lowest = warp_min(mine.key == key ? uint32_t(mine.id) : uint32_t(kMaxExperts));
    winner = lowest_bit(ballot(mine.key == key && uint32_t(mine.id) == lowest));
  }
  const Match best = {key, shuffle(mine.id, winner)};
  if (lane_index() == winner) mine = next_best(keys, mine);
  return best;
}

template <typename T>
SERE_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace sere
