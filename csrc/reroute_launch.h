// From Python's tensors to a kernel launch: on the current stream of their device, or in the
// emulator where no nvcc compiles this. Nothing here allocates.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <type_traits>

#include "reroute_topk.cuh"

namespace sere {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

// sere_sglang/ops/cuda/plan.py
enum Form : int { kBlock, kCluster, kGrid };

struct Plan {
  Form form;
  int blocks, threads;
  bool overlaps;  // may start before the kernels ahead of it have finished
};

#ifdef __CUDACC__

class Launcher {
 public:
  Launcher(DLDevice device, const Plan& plan) : device_(device), plan_(plan) {
    check(cudaGetDevice(&caller_device_));
    if (caller_device_ != device.device_id) check(cudaSetDevice(device.device_id));
    stream_ = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  }
  ~Launcher() {
    if (caller_device_ != device_.device_id) cudaSetDevice(caller_device_);
  }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  void zero(void* at, size_t bytes) const { check(cudaMemsetAsync(at, 0, bytes, stream_)); }

  // Behind a memset there is nothing to overlap with.
  template <bool kFollowsKernel = true, typename... Args>
  void run(void (*kernel)(Args...), const Args&... args) const {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = plan_.blocks;
    config.blockDim = plan_.threads;
    config.stream = stream_;
    config.attrs = attributes;
    if (kFollowsKernel && plan_.overlaps) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (plan_.form == kCluster) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(plan_.blocks), 1, 1};
    }
    check(cudaLaunchKernelEx(&config, kernel, args...));
  }

 private:
  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    TVM_FFI_THROW(RuntimeError) << "re-routing kernel: " << cudaGetErrorString(error);
  }

  DLDevice device_;
  Plan plan_;
  int caller_device_ = 0;
  cudaStream_t stream_ = nullptr;
};

#else

class Launcher {
 public:
  Launcher(DLDevice, const Plan& plan) : plan_(plan) {}

  void zero(void* at, size_t bytes) const { std::memset(at, 0, bytes); }

  template <bool kFollowsKernel = true, typename... Args>
  void run(void (*kernel)(Args...), const Args&... args) const {
    static unsigned seed = 0;
    const int cluster = plan_.form == kCluster ? plan_.blocks : 1;
    emulation::launch(kernel, plan_.blocks, plan_.threads, cluster, ++seed, args...);
  }

 private:
  Plan plan_;
};

#endif

template <typename T>
T* pointer(const Optional<TensorView>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor.value().data_ptr()) : nullptr;
}

inline bool is_aligned(const void* at, size_t bytes) {
  return reinterpret_cast<uintptr_t>(at) % bytes == 0;
}

// Dtypes, shapes and devices were checked by sere_sglang.ops.
inline void set_routing(Routing& p, TensorView ids, const Optional<TensorView>& weights,
                        int64_t experts, const Optional<TensorView>& row_class,
                        const Optional<TensorView>& counters) {
  p.ids = static_cast<int32_t*>(ids.data_ptr());
  p.weights = pointer<float>(weights);
  p.row_class = pointer<const uint8_t>(row_class);
  p.counters = pointer<int64_t>(counters);
  p.id_stride = ids.stride(0);
  p.weight_stride = weights.has_value() ? weights.value().stride(0) : 0;
  p.rows = int(ids.size(0));
  p.top_k = int(ids.size(1));
  p.experts = int(experts);
  if (experts > kMaxExperts || p.top_k > kMaxTopK) {
    TVM_FFI_THROW(ValueError) << "re-routing: at most 1024 experts and top-32";
  }
  p.group_bits = 0;
  while (1 << p.group_bits < p.top_k) ++p.group_bits;
}

inline Params make_params(TensorView ids, const Optional<TensorView>& weights,
                          TensorView similarity, const Optional<TensorView>& neighbors,
                          const Optional<TensorView>& scale, TensorView control,
                          const Optional<TensorView>& row_class,
                          const Optional<TensorView>& counters, bool distinct,
                          const Optional<TensorView>& scratch, int64_t search) {
  Params p;
  set_routing(p, ids, weights, similarity.size(0), row_class, counters);
  p.similarity = static_cast<const float*>(similarity.data_ptr());
  p.neighbors = pointer<const int16_t>(neighbors);
  p.scale = p.weights != nullptr ? pointer<const float>(scale) : nullptr;
  p.control = static_cast<const int32_t*>(control.data_ptr());
  p.scratch = pointer<GridScratch>(scratch);
  p.search = Search(search);
  p.distinct = distinct && p.weights != nullptr;
  p.quads = p.experts % 4 == 0 && is_aligned(p.similarity, sizeof(Quad<float>)) &&
            is_aligned(p.neighbors, sizeof(Quad<int16_t>));
  return p;
}

// Of logits [rows, experts] with unit stride within a row.
inline Router make_router(TensorView logits, bool renormalize) {
  const DLDataType type = logits.dtype();
  Router router;
  router.type = type.bits == 32 ? kFloat32 : type.code == kDLBfloat ? kBFloat16 : kFloat16;
  router.logits = logits.data_ptr();
  router.logit_stride = logits.stride(0);
  router.quads = logits.size(1) % 4 == 0 && router.logit_stride % 4 == 0 &&
                 is_aligned(router.logits, type.bits / 8 * 4);
  router.renormalize = renormalize;
  return router;
}

// `most_threads`: of a block, in the forms other than the grid.
inline Plan make_plan(const Routing& p, bool has_scratch, int64_t form, int64_t blocks,
                      int64_t threads, bool overlaps, int most_threads = kMaxThreads) {
  const Plan plan = {Form(form), int(blocks), int(threads), overlaps};
  const int per_pass = plan.threads >> p.group_bits;
  const int most = plan.form == kGrid ? kGridThreads : most_threads;
  const bool fits = plan.threads > 0 && plan.threads <= most && plan.threads % 32 == 0 &&
                    plan.blocks > 0 && (plan.form != kBlock || plan.blocks == 1) &&
                    (plan.form != kCluster || plan.blocks <= kMaxCluster) &&
                    (plan.form != kGrid || has_scratch) &&
                    rows_per_block(p.rows, plan.blocks) <= per_pass * kHeldSlots;
  if (!fits) {
    TVM_FFI_THROW(ValueError) << "re-routing: " << p.rows << " rows of top-" << p.top_k << " of "
                              << p.experts << " experts do not fit form " << form << " of "
                              << blocks << " blocks with " << threads << " threads";
  }
  return plan;
}

// Spans of a row of so many experts (reroute_best.cuh), rounded up to what kernels are made for.
inline int spans_of(int experts) {
  const int spans = (experts + kQuadSpan - 1) / kQuadSpan;
  return spans <= 2 ? spans : spans <= 4 ? 4 : 8;
}

// Calls `run` with it as a constant.
template <typename Run>
void with_spans(int spans, const Run& run) {
  switch (spans) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 4: return run(std::integral_constant<int, 4>());
    default: return run(std::integral_constant<int, 8>());
  }
}

}  // namespace sere
