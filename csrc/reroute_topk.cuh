// Softmax top-k of a row of router logits by one warp. Ranks logits, lowest expert first on a tie:
// softmax keeps the order, and so does SGLang's router kernel.
#pragma once

#include "reroute_block.cuh"
#include "reroute_match.cuh"

namespace sere {

enum LogitType : int { kFloat32, kBFloat16, kFloat16 };

struct Router {
  const void* logits;  // [rows, experts], rows logit_stride apart
  int64_t logit_stride;
  LogitType type;
  bool quads;  // rows are aligned for loads of four
  bool renormalize;
};

// A lane holds experts lane * 4 + i of every span of 128.
template <int kSpans>
struct LogitKeys {
  uint32_t at[kSpans][4];  // 0: no such expert
};

SERE_DEVICE uint32_t logit_key(float logit) {
  return ordered_key(logit == logit ? logit : -1e30f);  // NaN ranks where SGLang ranks it
}

template <int kSpans>
SERE_DEVICE void load_keys(const Router& router, int row, int experts, LogitKeys<kSpans>& keys) {
#pragma unroll
  for (int span = 0; span < kSpans; ++span) {
    const int at = span * kQuadSpan + lane_index() * 4;
    float logit[4];
    if (router.type == kFloat32) {
      const float* from = static_cast<const float*>(router.logits) + row * router.logit_stride;
      const Quad<float> quad = load_four(from, at, experts, router.quads);
#pragma unroll
      for (int i = 0; i < 4; ++i) logit[i] = quad.at[i];
    } else {
      const uint16_t* from =
          static_cast<const uint16_t*>(router.logits) + row * router.logit_stride;
      const Quad<uint16_t> quad = load_four(from, at, experts, router.quads);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logit[i] = router.type == kFloat16 ? from_half(quad.at[i]) : from_bfloat16(quad.at[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) keys.at[span][i] = at + i < experts ? logit_key(logit[i]) : 0;
  }
}

// This lane's best expert behind `last` in the order of (key descending, id ascending).
template <int kSpans>
SERE_DEVICE Match next_best(const LogitKeys<kSpans>& keys, const Match& last) {
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

SERE_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) value += shuffle_xor(value, mask);
  return value;
}

// Lane k gets the row's k-th expert and its weight.
template <int kSpans>
SERE_DEVICE void select_top(const LogitKeys<kSpans>& keys, int top_k, bool renormalize, int& id,
                            float& weight) {
  Match mine = next_best(keys, {~0u, -1}), won = {0, -1};
  uint32_t highest = 0;
  for (int k = 0; k < top_k; ++k) {
    const uint32_t key = warp_max(mine.key);
    const uint32_t lanes = ballot(mine.key == key);
    int winner = lowest_bit(lanes);
    if (kSpans > 1 &&
        (lanes & (lanes - 1)) != 0) {  // of one span, the lowest lane is the lowest id
      const uint32_t lowest = warp_min(mine.key == key ? uint32_t(mine.id) : uint32_t(kMaxExperts));
      winner = lowest_bit(ballot(mine.key == key && uint32_t(mine.id) == lowest));
    }
    const int expert = shuffle(mine.id, winner);
    if (lane_index() == k) won = {key, expert};
    if (lane_index() == winner) mine = next_best(keys, mine);
    if (k == 0) highest = key;
  }
  const float top = from_key(highest);
  float sum = 0.0f;
#pragma unroll
  for (int span = 0; span < kSpans; ++span) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = keys.at[span][i];
      if (key != 0) sum += exponential(from_key(key) - top);
    }
  }
  sum = warp_sum(sum);
  id = won.id;
  weight = lane_index() < top_k ? exponential(from_key(won.key) - top) / sum : 0.0f;
  if (renormalize) {
    const float total = warp_sum(weight);
    weight /= total > 0.0f ? total : 1.0f;
  }
}

// The slots of this block, a row per warp and pass. Their weights are written at once: from here
// on only the order of the slots matters.
template <int kSpans>
SERE_DEVICE void select_slots(const Router& router, const Params& p, const Rows& rows, Held& held) {
#pragma unroll
  for (int pass = 0; pass < kHeldSlots; ++pass) {
    held.id[pass] = -1;
    const Slot slot = slot_of(p, rows, pass);
    if (pass >= rows.passes || slot.row >= rows.end) continue;
    LogitKeys<kSpans> keys;
    load_keys(router, slot.row, p.experts, keys);
    float weight;
    select_top(keys, p.top_k, router.renormalize, held.id[pass], weight);
    if (slot.exists) p.weights[slot.row * p.weight_stride + slot.k] = weight;
  }
}

}  // namespace sere
