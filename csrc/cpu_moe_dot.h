// CPU fused MoE for few rows per expert and any sizes: dot products of weight rows with up to four
// token rows at a time, so that a weight is read from memory once.
#pragma once

#include <algorithm>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "cpu_moe_common.h"

namespace sere::moe::dot {

inline constexpr int kRows = 4;

// sums[r] = sum over k of weight[k] * rows[r][k], in float32.
template <int R, typename T>
inline void dots(const T* weight, const T* const* rows, int64_t n, float* sums) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bf16>) {
    __m512 acc[R];
    for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= n; k += 32) {
      const __m512bh w = (__m512bh)_mm512_loadu_si512(weight + k);
      for (int r = 0; r < R; ++r) {
        acc[r] = _mm512_dpbf16_ps(acc[r], w, (__m512bh)_mm512_loadu_si512(rows[r] + k));
      }
    }
    if (k < n) {
      const __mmask32 rest = (__mmask32{1} << (n - k)) - 1;
      const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(rest, weight + k);
      for (int r = 0; r < R; ++r) {
        const __m512bh x = (__m512bh)_mm512_maskz_loadu_epi16(rest, rows[r] + k);
        acc[r] = _mm512_dpbf16_ps(acc[r], w, x);
      }
    }
    for (int r = 0; r < R; ++r) sums[r] = _mm512_reduce_add_ps(acc[r]);
    return;
  }
#endif
  constexpr int kLanes = 16;  // fixed order of summation, and a shape every compiler vectorises
  float lanes[R][kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    for (int r = 0; r < R; ++r) {
      const T* row = rows[r] + k;
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) lanes[r][l] += to_float(weight[k + l]) * to_float(row[l]);
    }
  }
  for (; k < n; ++k) {
    for (int r = 0; r < R; ++r) lanes[r][0] += to_float(weight[k]) * to_float(rows[r][k]);
  }
  for (int r = 0; r < R; ++r) {
    sums[r] = 0.0f;
    for (int l = 0; l < kLanes; ++l) sums[r] += lanes[r][l];
  }
}

template <typename T>
inline void dots(int count, const T* weight, const T* const* rows, int64_t n, float* sums) {
  switch (count) {
    case 1: return dots<1>(weight, rows, n, sums);
    case 2: return dots<2>(weight, rows, n, sums);
    case 3: return dots<3>(weight, rows, n, sums);
    default: return dots<4>(weight, rows, n, sums);
  }
}

struct Workspace {
  Routing routing;
  Scratch inter;
};

template <typename T, Activation kActivation>
void run(const Problem<T>& p, int64_t first_token, int64_t num_tokens, Workspace& workspace) {
  Routing& routing = workspace.routing;
  routing.build(p, first_token, num_tokens);
  const int64_t num_active = routing.active.size();
  const int64_t hidden_size = p.hidden_size, inter_size = p.inter_size;
  T* inter = workspace.inter.get<T>(routing.token.size() * inter_size);  // [position, inter_size]

  const int64_t inter_chunk = chunk_size(inter_size, 8, std::max<int64_t>(num_active, 1), 256);
  const int64_t inter_chunks = (inter_size + inter_chunk - 1) / inter_chunk;
  const int64_t hidden_chunk = chunk_size(hidden_size, 16, 1, 64);
  const int64_t hidden_chunks = (hidden_size + hidden_chunk - 1) / hidden_chunk;

#pragma omp parallel
  {
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_active * inter_chunks; ++item) {
      const auto& expert = routing.active[item / inter_chunks];
      const T* gate = p.w13 + int64_t{expert.id} * 2 * inter_size * hidden_size;
      const T* up = gate + inter_size * hidden_size;
      const float* bias = p.w13_bias ? p.w13_bias + int64_t{expert.id} * 2 * inter_size : nullptr;
      const int64_t begin = item % inter_chunks * inter_chunk;
      const int64_t end = std::min(begin + inter_chunk, inter_size);
      for (int64_t i = begin; i < end; ++i) {
        for (int32_t b = 0; b < expert.num_blocks; ++b) {
          const RowBlock& block = routing.blocks[expert.first_block + b];
          for (int32_t r0 = 0; r0 < block.count; r0 += kRows) {
            const int count = std::min(kRows, block.count - r0);
            const T* rows[kRows];
            for (int r = 0; r < count; ++r) {
              rows[r] = p.hidden + routing.token[block.first + r0 + r] * hidden_size;
            }
            float g[kRows], u[kRows];
            dots(count, gate + i * hidden_size, rows, hidden_size, g);
            dots(count, up + i * hidden_size, rows, hidden_size, u);
            for (int r = 0; r < count; ++r) {
              if (bias) {
                g[r] += bias[i];
                u[r] += bias[inter_size + i];
              }
              inter[(block.first + r0 + r) * inter_size + i] =
                  from_float<T>(activate<kActivation>(g[r]) * u[r]);
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
        for (int64_t h = begin; h < end; ++h) {
          for (int32_t b = 0; b < expert.num_blocks; ++b) {
            const RowBlock& block = routing.blocks[expert.first_block + b];
            for (int32_t r0 = 0; r0 < block.count; r0 += kRows) {
              const int count = std::min(kRows, block.count - r0);
              const int64_t position = block.first + r0;
              const T* rows[kRows];
              for (int r = 0; r < count; ++r) rows[r] = inter + (position + r) * inter_size;
              float dot[kRows];
              dots(count, down + h * inter_size, rows, inter_size, dot);
              for (int r = 0; r < count; ++r) {
                if (bias) dot[r] += bias[h];
                const int64_t row = routing.token[position + r] - first_token;
                sums[row * hidden_chunk + h - begin] += routing.weight[position + r] * dot[r];
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
