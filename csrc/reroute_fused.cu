// Softmax top-k of router logits and re-routing, in one launch for decode sizes. Called by
// sere_sglang/ops/fused.py.
#include "reroute_kernels.cuh"
#include "reroute_launch.h"

namespace sere {

template <int kSpans>
void run_fused(const Launcher& launcher, const Plan& plan, const Params& p, const Router& router) {
  if (plan.threads > fused_threads(kSpans)) {
    TVM_FFI_THROW(ValueError) << "re-routing: at most " << fused_threads(kSpans) << " threads for "
                              << p.experts << " experts";
  }
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
  const Plan plan = make_plan(p, form, blocks, threads, overlaps);

  Router router;
  const DLDataType type = logits.dtype();
  router.type = type.bits == 32 ? kFloat32 : type.code == kDLBfloat ? kBFloat16 : kFloat16;
  router.logits = logits.data_ptr();
  router.logit_stride = logits.stride(0);
  router.quads = p.experts % 4 == 0 && router.logit_stride % 4 == 0 &&
                 is_aligned(router.logits, type.bits / 8 * 4);
  router.renormalize = renormalize;

  const Launcher launcher(ids.device(), plan);
  const int spans = (p.experts + kQuadSpan - 1) / kQuadSpan;
  if (spans <= 1) {
    run_fused<1>(launcher, plan, p, router);
  } else if (spans <= 2) {
    run_fused<2>(launcher, plan, p, router);
  } else if (spans <= 4) {
    run_fused<4>(launcher, plan, p, router);
  } else {
    run_fused<8>(launcher, plan, p, router);
  }
}

}  // namespace sere

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused, sere::fused);
