// Re-routing of chosen experts, in place. Called by sere_sglang/ops/cuda/reroute.py.
#include "reroute_kernels.cuh"
#include "reroute_launch.h"

namespace sere {

void reroute(TensorView ids, Optional<TensorView> weights, TensorView similarity,
             Optional<TensorView> neighbors, Optional<TensorView> scale, TensorView control,
             Optional<TensorView> row_class, Optional<TensorView> counters, bool distinct,
             Optional<TensorView> scratch, int64_t search, int64_t form, int64_t blocks,
             int64_t threads, bool overlaps) {
  const Params p = make_params(ids, weights, similarity, neighbors, scale, control, row_class,
                               counters, distinct, scratch, search);
  const Plan plan = make_plan(p, p.scratch != nullptr, form, blocks, threads, overlaps);
  const Launcher launcher(ids.device(), plan);
  switch (plan.form) {
    case kBlock: launcher.run(reroute_kernel<false>, p); break;
    case kCluster: launcher.run(reroute_kernel<true>, p); break;
    case kGrid:
      launcher.zero(p.scratch, sizeof(GridScratch));
      launcher.run<false>(vote_grid_kernel, p);
      launcher.run(apply_grid_kernel, p);
      break;
  }
}

}  // namespace sere

TVM_FFI_DLL_EXPORT_TYPED_FUNC(reroute, sere::reroute);
