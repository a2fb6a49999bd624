// What a token lost is made up for: output += lost[t, e] (U_e V_e^T x_t + b_e), row by row.
// Reference: sere_sglang/ops/surrogates.py.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <vector>

#include "cpu_moe_common.h"

namespace sere::moe {

using tvm::ffi::TensorView;

struct Surrogates {
  const bf16* inward;   // [experts, rank, hidden], V^T
  const bf16* outward;  // [experts, rank, hidden], U^T
  const bf16* bias;     // [experts, hidden]
  int64_t experts, rank, hidden;
};

// sum += weight * (U_e V_e^T x + b_e)
inline void add_one(const Surrogates& s, int64_t expert, float weight, const float* x, float* sum) {
  const bf16* bias = s.bias + expert * s.hidden;
#pragma omp simd
  for (int64_t h = 0; h < s.hidden; ++h) sum[h] += weight * to_float(bias[h]);
  for (int64_t r = 0; r < s.rank; ++r) {
    const int64_t at = (expert * s.rank + r) * s.hidden;
    const bf16 *in = s.inward + at, *out = s.outward + at;
    float product = 0.0f;
#pragma omp simd reduction(+ : product)
    for (int64_t h = 0; h < s.hidden; ++h) product += to_float(in[h]) * x[h];
    product *= weight;
#pragma omp simd
    for (int64_t h = 0; h < s.hidden; ++h) sum[h] += product * to_float(out[h]);
  }
}

template <typename T>
void run(const Surrogates& s, T* output, const T* input, const float* lost, int64_t rows,
         float scale) {
#pragma omp parallel
  {
    std::vector<float> x(s.hidden), sum(s.hidden);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < rows; ++row) {
      bool any = false;
      for (int64_t e = 0; e < s.experts; ++e) {
        const float weight = lost[row * s.experts + e];
        if (weight == 0.0f) continue;
        if (!any) {
          for (int64_t h = 0; h < s.hidden; ++h) {
            x[h] = to_float(input[row * s.hidden + h]);
            sum[h] = to_float(output[row * s.hidden + h]);
          }
        }
        any = true;
        add_one(s, e, scale * weight, x.data(), sum.data());
      }
      for (int64_t h = 0; any && h < s.hidden; ++h) {
        output[row * s.hidden + h] = from_float<T>(sum[h]);
      }
    }
  }
}

// Arguments were checked by sere_sglang.ops.surrogates.
void compensate(TensorView output, TensorView input, TensorView lost, TensorView inward,
                TensorView outward, TensorView bias, double scale) {
  const Surrogates s = {static_cast<const bf16*>(inward.data_ptr()),
                        static_cast<const bf16*>(outward.data_ptr()),
                        static_cast<const bf16*>(bias.data_ptr()),
                        inward.size(0),
                        inward.size(1),
                        output.size(1)};
  const auto* weights = static_cast<const float*>(lost.data_ptr());
  const int64_t rows = output.size(0);
  if (output.dtype().bits == 16) {
    run(s, static_cast<bf16*>(output.data_ptr()), static_cast<const bf16*>(input.data_ptr()),
        weights, rows, float(scale));
  } else {
    run(s, static_cast<float*>(output.data_ptr()), static_cast<const float*>(input.data_ptr()),
        weights, rows, float(scale));
  }
}

}  // namespace sere::moe

TVM_FFI_DLL_EXPORT_TYPED_FUNC(compensate, sere::moe::compensate);
