// What a token lost is made up for behind any runner: output += lost[t, e] (U_e V_e^T x_t + b_e).
// The CPU runner of this library adds it itself (cpu_moe_run.h).
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <vector>

#include "cpu_moe_surrogates.h"

namespace sere::moe {

using tvm::ffi::TensorView;

constexpr int64_t kColumns = 64;  // of the output, a unit of work

template <typename T>
void run(const Surrogates& s, T* output, const T* input, int64_t rows) {
  Losses losses;
  losses.build(s, 0, rows);
  if (losses.num_experts() == 0) return;
#pragma omp parallel
  {
#pragma omp for schedule(dynamic)
    for (int64_t e = 0; e < losses.num_experts(); ++e) losses.project(e, input);
    std::vector<float> sums(rows * kColumns);
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < s.hidden_size; begin += kColumns) {
      const int64_t columns = std::min(kColumns, s.hidden_size - begin);
      const auto of_output = [&](auto&& move) {
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t i = 0; i < columns; ++i) {
            move(output[row * s.hidden_size + begin + i], sums[row * kColumns + i]);
          }
        }
      };
      of_output([](T value, float& sum) { sum = to_float(value); });
      losses.add(begin, columns, kColumns, sums.data());
      of_output([](T& value, float sum) { value = from_float<T>(sum); });
    }
  }
}

// Arguments were checked by sere_sglang.ops.surrogates.
void compensate(TensorView output, TensorView input, TensorView lost, TensorView inward,
                TensorView outward, TensorView bias, double scale) {
  const Surrogates s = {.inward = static_cast<const bf16*>(inward.data_ptr()),
                        .outward = static_cast<const bf16*>(outward.data_ptr()),
                        .bias = static_cast<const bf16*>(bias.data_ptr()),
                        .lost = static_cast<const float*>(lost.data_ptr()),
                        .experts = inward.size(0),
                        .rank = inward.size(1),
                        .hidden_size = output.size(1),
                        .scale = float(scale)};
  const int64_t rows = output.size(0);
  if (output.dtype().bits == 16) {
    run(s, static_cast<bf16*>(output.data_ptr()), static_cast<const bf16*>(input.data_ptr()), rows);
  } else {
    run(s, static_cast<float*>(output.data_ptr()), static_cast<const float*>(input.data_ptr()),
        rows);
  }
}

}  // namespace sere::moe

TVM_FFI_DLL_EXPORT_TYPED_FUNC(compensate, sere::moe::compensate);
