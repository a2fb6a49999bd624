// The rules beside re-routing, in place. Called by sere_sglang/ops/cuda/rules.py.
#include "rules_kernels.cuh"
#include "rules_launch.h"

namespace sere {

template <int kSpans>
void run_rules(const Launcher& launcher, const Plan& plan, const RuleParams& p) {
  switch (plan.form) {
    case kBlock: launcher.run(rule_kernel<kSpans, false>, p); break;
    case kCluster: launcher.run(rule_kernel<kSpans, true>, p); break;
    case kGrid:
      launcher.zero(p.scratch, sizeof(RuleScratch));
      launcher.run<false>(rule_vote_grid_kernel, p);
      launcher.run(rule_fill_grid_kernel<kSpans>, p);
      break;
  }
}

void rules(TensorView ids, TensorView weights, Optional<TensorView> scores, TensorView block,
           int64_t experts, Optional<TensorView> expert_loss, Optional<TensorView> row_class,
           Optional<TensorView> counters, Optional<TensorView> lost,
           Optional<TensorView> lost_experts, Optional<TensorView> active,
           Optional<TensorView> scratch, int64_t form, int64_t blocks, int64_t threads,
           bool overlaps) {
  const RuleParams p = make_rule_params(ids, weights, scores, block, experts, expert_loss,
                                        row_class, counters, lost, lost_experts, active, scratch);
  const int spans = spans_of(p.experts);
  const Plan plan =
      make_plan(p, p.scratch != nullptr, form, blocks, threads, overlaps, threads_for(spans));
  const Launcher launcher(ids.device(), plan);
  with_spans(spans, [&](auto n) { run_rules<decltype(n)::value>(launcher, plan, p); });
}

}  // namespace sere

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rules, sere::rules);
