// Softmax top-k of router logits ahead of a rule, in the same launch. The scores of all experts go
// through memory to the rule, since a block's rows are more than its registers hold.
#pragma once

#include "reroute_topk.cuh"
#include "rules_kernels.cuh"

namespace sere {

// Writes the ids and weights of this block's rows, a row per warp and pass, and `scores`
// [rows, experts] where the rule takes them. Ends with a barrier.
template <int kSpans>
SERE_DEVICE void select_rows(const RuleShared& s, const Router& router, const RuleParams& p,
                             const Rows& rows, float* scores) {
  const bool stores = takes_scores(s.options);
  for (int pass = 0; pass < rows.passes; ++pass) {
    const Slot slot = slot_of(p, rows, pass);
    if (slot.row >= rows.end) continue;  // the same in all lanes of the warp
    RowKeys<kSpans> keys;
    load_keys(router, slot.row, p.experts, keys);
    int id;
    float weight;
    const Softmax softmax = select_top(keys, p.top_k, router.renormalize, id, weight);
    if (slot.exists) {
      p.ids[slot.row * p.id_stride + slot.k] = id;
      p.weights[slot.row * p.weight_stride + slot.k] = weight;
    }
    if (!stores) continue;
    float* row = scores + int64_t(slot.row) * p.experts;
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int expert = span * kQuadSpan + lane_index() * 4 + i;
        if (expert < p.experts) row[expert] = softmax.of(keys.at[span][i]);
      }
    }
  }
  sync_block();
}

// One block, or with kCluster the one cluster of the grid.
template <int kSpans, bool kCluster>
SERE_KERNEL(threads_for(kSpans))
rule_fused_kernel(SERE_PARAMS RuleParams p, SERE_PARAMS Router router, float* scores) {
  SERE_SHARED(RuleShared, s);
  const Rows rows = start(s, p);
  select_rows<kSpans>(s, router, p, rows, scores);
  if (!is_off(s)) rule_rows<kSpans, kCluster>(s, p, rows);
}

// Grid form, first launch; rule_fill_grid_kernel is the second.
template <int kSpans>
SERE_KERNEL(kGridThreads)
rule_fused_vote_grid_kernel(SERE_PARAMS RuleParams p, SERE_PARAMS Router router, float* scores) {
  SERE_SHARED(RuleShared, s);
  const Rows rows = start(s, p);
  select_rows<kSpans>(s, router, p, rows, scores);
  if (!is_off(s)) rule_vote_in_grid(s, p, rows);
}

}  // namespace sere
