// Softmax top-k of a row of router logits by one warp. Ranks logits, lowest expert first on a tie:
// softmax keeps the order, and so does SGLang's router kernel.
#pragma once

#include "reroute_best.cuh"

namespace sere {

enum LogitType : int { kFloat32, kBFloat16, kFloat16 };

struct Router {
  const void* logits;  // [rows, experts], rows logit_stride apart
  int64_t logit_stride;
  LogitType type;
  bool quads;  // rows are aligned for loads of four
  bool renormalize;
};

SERE_DEVICE uint32_t logit_key(float logit) {
  return ordered_key(logit == logit ? logit : -1e30f);  // NaN ranks where SGLang ranks it
}

template <int kSpans>
SERE_DEVICE void load_keys(const Router& router, int row, int experts, RowKeys<kSpans>& keys) {
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

// What a row's logits are divided by, in every lane.
struct Softmax {
  float top, sum;

  SERE_DEVICE float of(uint32_t key) const { return exponential(from_key(key) - top) / sum; }
};

// Lane k gets the row's k-th expert and its weight.
template <int kSpans>
SERE_DEVICE Softmax select_top(const RowKeys<kSpans>& keys, int top_k, bool renormalize, int& id,
                               float& weight) {
  Match mine = first_best(keys), won = {0, -1};
  uint32_t highest = 0;
  for (int k = 0; k < top_k; ++k) {
    const Match best = take_best(keys, mine);
    if (lane_index() == k) won = best;
    if (k == 0) highest = best.key;
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
  const Softmax softmax = {top, warp_sum(sum)};
  id = won.id;
  weight = lane_index() < top_k ? softmax.of(won.key) : 0.0f;
  if (renormalize) {
    const float total = warp_sum(weight);
    weight /= total > 0.0f ? total : 1.0f;
  }
  return softmax;
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
    RowKeys<kSpans> keys;
    load_keys(router, slot.row, p.experts, keys);
    float weight;
    select_top(keys, p.top_k, router.renormalize, held.id[pass], weight);
    if (slot.exists) p.weights[slot.row * p.weight_stride + slot.k] = weight;
  }
}

}  // namespace sere
