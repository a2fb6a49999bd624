// From Python's tensors to the arguments of the rules' kernels.
#pragma once

#include "reroute_launch.h"
#include "rules_block.cuh"

namespace sere {

// Dtypes, shapes and devices were checked by sere_sglang.ops.
inline RuleParams make_rule_params(
    TensorView ids, TensorView weights, const Optional<TensorView>& scores, TensorView block,
    int64_t experts, const Optional<TensorView>& expert_loss,
    const Optional<TensorView>& row_class, const Optional<TensorView>& counters,
    const Optional<TensorView>& lost, const Optional<TensorView>& lost_experts,
    const Optional<TensorView>& active, const Optional<TensorView>& scratch) {
  RuleParams p;
  set_routing(p, ids, weights, experts, row_class, counters);
  p.group_bits = kRowBits;
  p.scores = pointer<const float>(scores);
  p.expert_loss = pointer<const float>(expert_loss);
  p.block = static_cast<const int32_t*>(block.data_ptr());
  p.active = pointer<uint8_t>(active);
  p.lost = pointer<float>(lost);
  p.lost_experts = pointer<int32_t>(lost_experts);
  p.scratch = pointer<RuleScratch>(scratch);
  p.quads = p.experts % 4 == 0 && is_aligned(p.scores, sizeof(Quad<float>));
  return p;
}

}  // namespace sere
