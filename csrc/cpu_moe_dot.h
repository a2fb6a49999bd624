// CPU fused MoE for few rows per expert and any sizes: dot products of two weight rows with up to
// four token rows at a time, so that a weight is read from memory once.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "cpu_moe_common.h"

namespace sere::moe::dot {

inline constexpr int kRows = 4;
inline constexpr int kWeights = 2;

#ifdef __AVX512BF16__
inline constexpr bool kNativeBf16 = true;
#else
inline constexpr bool kNativeBf16 = false;
#endif

// Token rows stay bfloat16 only where the machine multiplies it; else converting them once is cheap.
template <typename T>
using RowOf = std::conditional_t<kNativeBf16, T, float>;

#ifdef __AVX512F__
inline constexpr int kLanes = 16;
#else
inline constexpr int kLanes = 8;
#endif
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

inline Floats load(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

// sums[w][r] = sum over k of weights[w][k] * rows[r][k], in float32.
template <int W, int R, typename T, typename Row>
inline void dots(const T* const* weights, const Row* const* rows, int64_t n,
                 float sums[kWeights][kRows]) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<Row, bf16>) {
    __m512 acc[W][R];
    for (auto& of_weight : acc) {
      for (__m512& value : of_weight) value = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < n; k += 32) {
      const __mmask32 inside = n - k >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - k)) - 1;
      __m512bh w[W];
      for (int i = 0; i < W; ++i) {
        w[i] = (__m512bh)_mm512_maskz_loadu_epi16(inside, weights[i] + k);
      }
      for (int r = 0; r < R; ++r) {
        const __m512bh x = (__m512bh)_mm512_maskz_loadu_epi16(inside, rows[r] + k);
        for (int i = 0; i < W; ++i) acc[i][r] = _mm512_dpbf16_ps(acc[i][r], w[i], x);
      }
    }
    for (int i = 0; i < W; ++i) {
      for (int r = 0; r < R; ++r) sums[i][r] = _mm512_reduce_add_ps(acc[i][r]);
    }
    return;
  }
#endif
  Floats acc[W][R] = {};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    Floats w[W];
    for (int i = 0; i < W; ++i) w[i] = load(weights[i] + k);
    for (int r = 0; r < R; ++r) {
      const Floats x = load(rows[r] + k);
      for (int i = 0; i < W; ++i) acc[i][r] += w[i] * x;
    }
  }
  for (int i = 0; i < W; ++i) {
    for (int r = 0; r < R; ++r) {
      float sum = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) sum += acc[i][r][lane];
      for (int64_t rest = k; rest < n; ++rest) {
        sum += to_float(weights[i][rest]) * to_float(rows[r][rest]);
      }
      sums[i][r] = sum;
    }
  }
}

template <int W, typename T, typename Row>
inline void dots(int count, const T* const* weights, const Row* const* rows, int64_t n,
                 float sums[kWeights][kRows]) {
  switch (count) {
    case 1: return dots<W, 1>(weights, rows, n, sums);
    case 2: return dots<W, 2>(weights, rows, n, sums);
    case 3: return dots<W, 3>(weights, rows, n, sums);
    default: return dots<W, 4>(weights, rows, n, sums);
  }
}

struct Workspace {
  Routing routing;
  Scratch rows, inter;
};

// The token rows as the dot products want them.
template <typename T>
const RowOf<T>* token_rows(const Problem<T>& p, int64_t first_token, int64_t num_tokens,
                           Workspace& workspace) {
  const T* hidden = p.hidden + first_token * p.hidden_size;
  if constexpr (std::is_same_v<RowOf<T>, T>) {
    return hidden;
  } else {
    float* rows = workspace.rows.get<float>(num_tokens * p.hidden_size);
    for (int64_t i = 0; i < num_tokens * p.hidden_size; ++i) rows[i] = to_float(hidden[i]);
    return rows;
  }
}

template <typename T, Activation kActivation>
void run(const Problem<T>& p, int64_t first_token, int64_t num_tokens, Workspace& workspace) {
  using Row = RowOf<T>;
  Routing& routing = workspace.routing;
  routing.build(p, first_token, num_tokens);
  const int64_t num_active = routing.active.size();
  const int64_t hidden_size = p.hidden_size, inter_size = p.inter_size;
  const Row* hidden = token_rows(p, first_token, num_tokens, workspace);
  Row* inter = workspace.inter.get<Row>(routing.token.size() * inter_size);  // [position, inter]

  const int64_t inter_chunk = chunk_size(inter_size, 8, std::max<int64_t>(num_active, 1), 256);
  const int64_t inter_chunks = (inter_size + inter_chunk - 1) / inter_chunk;
  const int64_t hidden_chunk = chunk_size(hidden_size, 16, 1, 64);
  const int64_t hidden_chunks = (hidden_size + hidden_chunk - 1) / hidden_chunk;

#pragma omp parallel
  {
    float sum_of[kWeights][kRows];

#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_active * inter_chunks; ++item) {
      const auto& expert = routing.active[item / inter_chunks];
      const T* gate = p.w13 + int64_t{expert.id} * 2 * inter_size * hidden_size;
      const T* up = gate + inter_size * hidden_size;
      const float* bias = p.w13_bias ? p.w13_bias + int64_t{expert.id} * 2 * inter_size : nullptr;
      const int64_t begin = item % inter_chunks * inter_chunk;
      const int64_t end = std::min(begin + inter_chunk, inter_size);
      for (int64_t i = begin; i < end; ++i) {
        const T* const weights[kWeights] = {gate + i * hidden_size, up + i * hidden_size};
        const float gate_bias = bias ? bias[i] : 0.0f;
        const float up_bias = bias ? bias[inter_size + i] : 0.0f;
        for (int32_t b = 0; b < expert.num_blocks; ++b) {
          const RowBlock& block = routing.blocks[expert.first_block + b];
          for (int32_t r0 = 0; r0 < block.count; r0 += kRows) {
            const int count = std::min(kRows, block.count - r0);
            const int64_t position = block.first + r0;
            const Row* rows[kRows];
            for (int r = 0; r < count; ++r) {
              rows[r] = hidden + (routing.token[position + r] - first_token) * hidden_size;
            }
            dots<2>(count, weights, rows, hidden_size, sum_of);
            for (int r = 0; r < count; ++r) {
              const float value =
                  activate<kActivation>(sum_of[0][r] + gate_bias) * (sum_of[1][r] + up_bias);
              inter[(position + r) * inter_size + i] = from_float<Row>(value);
            }
          }
        }
      }
    }

    // Every item owns some columns of the output, so experts add up without locks.
    thread_local Scratch sum_scratch;
    float* sums = sum_scratch.get<float>(num_tokens * hidden_chunk);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < hidden_chunks; ++item) {
      const int64_t begin = item * hidden_chunk;
      const int64_t end = std::min(begin + hidden_chunk, hidden_size);
      std::fill_n(sums, num_tokens * hidden_chunk, 0.0f);
      for (const auto& expert : routing.active) {
        const T* down = p.w2 + int64_t{expert.id} * hidden_size * inter_size;
        const float* bias = p.w2_bias ? p.w2_bias + int64_t{expert.id} * hidden_size : nullptr;
        for (int64_t h = begin; h < end; h += kWeights) {
          const int columns = int(std::min<int64_t>(kWeights, end - h));
          const T* const weights[kWeights] = {down + h * inter_size, down + (h + 1) * inter_size};
          for (int32_t b = 0; b < expert.num_blocks; ++b) {
            const RowBlock& block = routing.blocks[expert.first_block + b];
            for (int32_t r0 = 0; r0 < block.count; r0 += kRows) {
              const int count = std::min(kRows, block.count - r0);
              const int64_t position = block.first + r0;
              const Row* rows[kRows];
              for (int r = 0; r < count; ++r) rows[r] = inter + (position + r) * inter_size;
              if (columns == 2) {
                dots<2>(count, weights, rows, inter_size, sum_of);
              } else {
                dots<1>(count, weights, rows, inter_size, sum_of);
              }
              for (int r = 0; r < count; ++r) {
                const int64_t row = routing.token[position + r] - first_token;
                float* sum = sums + row * hidden_chunk + h - begin;
                for (int c = 0; c < columns; ++c) {
                  const float offset = bias ? bias[h + c] : 0.0f;
                  sum[c] += routing.weight[position + r] * (sum_of[c][r] + offset);
                }
              }
            }
          }
        }
      }
      for (int64_t t = 0; t < num_tokens; ++t) {
        T* out = p.out + (first_token + t) * hidden_size;
        for (int64_t h = begin; h < end; ++h) {
          out[h] = from_float<T>(sums[t * hidden_chunk + h - begin]);
        }
      }
    }
  }
}

}  // namespace sere::moe::dot
