// Softmax top-k of router logits and a rule beside re-routing, in one launch for decode sizes. Called
// by sere_sglang/ops/cuda/rules_fused.py.
#include "rules_fused.cuh"
#include "rules_launch.h"

namespace sere {

template <int kSpans>
void run_rules_fused(const Launcher& launcher, const Plan& plan, const RuleParams& p,
                     const Router& router, float* scores) {
  switch (plan.form) {
    case kBlock: launcher.run(rule_fused_kernel<kSpans, false>, p, router, scores); break;
    case kCluster: launcher.run(rule_fused_kernel<kSpans, true>, p, router, scores); break;
    case kGrid:
      launcher.zero(p.scratch, sizeof(RuleScratch));
      launcher.run<false>(rule_fused_vote_grid_kernel<kSpans>, p, router, scores);
      launcher.run(rule_fill_grid_kernel<kSpans>, p);
      break;
  }
}

void rules_fused(TensorView logits, bool renormalize, TensorView ids, TensorView weights,
                 TensorView scores, TensorView block, Optional<TensorView> expert_loss,
                 Optional<TensorView> row_class, Optional<TensorView> counters,
                 Optional<TensorView> lost, Optional<TensorView> lost_experts,
                 Optional<TensorView> active, Optional<TensorView> scratch, int64_t form,
                 int64_t blocks, int64_t threads, bool overlaps) {
  const RuleParams p =
      make_rule_params(ids, weights, scores, block, logits.size(1), expert_loss, row_class,
                       counters, lost, lost_experts, active, scratch);
  const int spans = spans_of(p.experts);
  const Plan plan =
      make_plan(p, p.scratch != nullptr, form, blocks, threads, overlaps, threads_for(spans));
  const Router router = make_router(logits, renormalize);
  float* to = static_cast<float*>(scores.data_ptr());
  const Launcher launcher(ids.device(), plan);
  with_spans(spans,
             [&](auto n) { run_rules_fused<decltype(n)::value>(launcher, plan, p, router, to); });
}

}  // namespace sere

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rules_fused, sere::rules_fused);
