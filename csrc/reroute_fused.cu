// Softmax top-k of router logits and re-routing, in one launch for decode sizes. Called by
// sere_sglang/ops/fused.py.
#include "reroute_kernels.cuh"
#include "reroute_launch.h"

namespace sere {

template <int kSpans>
void run_fused(const Launcher& launcher, const Plan& plan, const Params& p, const Router& router) {
  switch (plan.form) {
    case kBlock: launcher.run(fused_kernel<kSpans, false>, p, router); break;
    case kCluster: launcher.run(fused_kernel<kSpans, true>, p, router); break;
    case kGrid:
      launcher.zero(p.scratch, sizeof(GridScratch));
      launcher.run<false>(fused_vote_grid_kernel<kSpans>, p, router);
      launcher.run(apply_grid_kernel, p);
      break;
  }
}

void fused(TensorView logits, bool renormalize, TensorView ids, TensorView weights,
           TensorView similarity, Optional<TensorView> neighbors, Optional<TensorView> scale,
           TensorView control, Optional<TensorView> row_class, Optional<TensorView> counters,
           bool distinct, Optional<TensorView> scratch, int64_t search, int64_t form,
           int64_t blocks, int64_t threads, bool overlaps) {
  Params p = make_params(ids, weights, similarity, neighbors, scale, control, row_class, counters,
                         distinct, scratch, search);
  p.group_bits = 5;  // a warp ranks a row's logits, and keeps its slots
  const int spans = spans_of(p.experts);
  const Plan plan =
      make_plan(p, p.scratch != nullptr, form, blocks, threads, overlaps, threads_for(spans));

  const Router router = make_router(logits, renormalize);
  const Launcher launcher(ids.device(), plan);
  with_spans(spans, [&](auto n) { run_fused<decltype(n)::value>(launcher, plan, p, router); });
}

}  // namespace sere

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused, sere::fused);
