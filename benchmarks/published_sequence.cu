// The yardsticks of benchmarks/op.py: the scan of the published re-routing kernel, written from its
// description, and an empty kernel. A C++ compiler builds the scan for the CPU, for the tests.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <tvm/ffi/extra/c_env_api.h>
#define BOTH __host__ __device__ inline
#else
#define BOTH inline
#endif

namespace {

using tvm::ffi::TensorView;

struct Problem {
  const int64_t* ids;       // [rows, top_k], best first
  const bool* mask;         // [experts], whether an expert is primary
  const float* similarity;  // [experts, experts]
  int32_t* out;             // [rows, top_k]
  int rows, top_k, primary_k, experts;
  float threshold;
};

// One slot: its expert stays if it is primary, else every expert is looked at, one after another.
BOTH void scan_slot(const Problem& p, int slot) {
  const int64_t id = p.ids[slot];
  int64_t chosen = id;
  if (slot % p.top_k >= p.primary_k && !p.mask[id]) {
    float best = -1.0f;
    for (int expert = 0; expert < p.experts; ++expert) {
      const float similarity = p.similarity[id * p.experts + expert];
      if (p.mask[expert] && similarity > best) {
        best = similarity;
        chosen = expert;
      }
    }
    if (best < p.threshold) chosen = id;
  }
  p.out[slot] = static_cast<int32_t>(chosen);
}

#ifdef __CUDACC__
__global__ void scan_kernel(const __grid_constant__ Problem p) {
  const int slot = blockIdx.x * blockDim.x + threadIdx.x;
  if (slot < p.rows * p.top_k) scan_slot(p, slot);
}

__global__ void empty_kernel() {}

cudaStream_t stream_of(const TensorView& tensor) {
  const DLDevice device = tensor.device();
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
}

void empty(TensorView on_device) {
  empty_kernel<<<1, 32, 0, stream_of(on_device)>>>();
  check_launch();
}
#endif

void scan(TensorView ids, TensorView mask, TensorView similarity, TensorView out, int64_t primary_k,
          double threshold) {
  Problem p;
  p.ids = static_cast<const int64_t*>(ids.data_ptr());
  p.mask = static_cast<const bool*>(mask.data_ptr());
  p.similarity = static_cast<const float*>(similarity.data_ptr());
  p.out = static_cast<int32_t*>(out.data_ptr());
  p.rows = static_cast<int>(ids.size(0));
  p.top_k = static_cast<int>(ids.size(1));
  p.primary_k = static_cast<int>(primary_k);
  p.experts = static_cast<int>(similarity.size(0));
  p.threshold = static_cast<float>(threshold);
  const int slots = p.rows * p.top_k;
  if (slots == 0) return;
#ifdef __CUDACC__
  constexpr int kThreads = 256;
  scan_kernel<<<(slots + kThreads - 1) / kThreads, kThreads, 0, stream_of(ids)>>>(p);
  check_launch();
#else
  for (int slot = 0; slot < slots; ++slot) scan_slot(p, slot);
#endif
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(scan, scan);
#ifdef __CUDACC__
TVM_FFI_DLL_EXPORT_TYPED_FUNC(empty, empty);
#endif
