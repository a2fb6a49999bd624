// Dot products of weight rows with token rows: tiles whose sums stay in registers.
//
// A sum's lanes and order depend on the length of the rows alone, not on the tile it is part of, so
// a token row's result does not depend on its company.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu_moe_ahead.h"
#include "cpu_moe_vector.h"

namespace sere::moe {

// How a step along the rows is multiplied. `Row` is the element of a token row, packed once per
// layer; a step is kParts registers of it.
//
// In float32, a bfloat16 row has the even columns of each step, then the odd ones, as the registers
// of a weight come: two halves of a 32-bit word.
template <typename T>
struct Float32 {
  using Weight = T;
  using Row = float;
  static constexpr int kParts = 2;
  static constexpr int kStep = kParts * kLanes;

  template <int kPart>
  static Floats weight(const T* from) {
    if constexpr (std::is_same_v<T, float>) {
      return load(from + kPart * kLanes);
    } else {
      return kPart == 0 ? even(from) : odd(from);
    }
  }
  template <int kPart>
  static Floats row(const float* from) {
    return load(from + kPart * kLanes);
  }
  static Floats multiply_add(Floats sum, Floats w, Floats x) { return moe::multiply_add(w, x, sum); }

  // Where column k of a row is.
  static int64_t position(int64_t k) {
    if constexpr (std::is_same_v<T, float>) return k;
    return k / kStep * kStep + k % 2 * kLanes + k % kStep / 2;
  }
  static void pack(const T* from, int64_t depth, float* to) {
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep) {
      store(to + k, weight<0>(from + k));
      store(to + k + kLanes, weight<1>(from + k));
    }
    for (; k < depth; ++k) to[position(k)] = to_float(from[k]);
  }
  static void pack(const float* from, int64_t begin, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[position(begin + i)] = from[i];
  }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16 products, added to float32 sums.
struct NativeBf16 {
  using Weight = bf16;
  using Row = bf16;
  static constexpr int kParts = 1;
  static constexpr int kStep = 2 * kLanes;

  template <int kPart>
  static __m512bh weight(const bf16* from) {
    return (__m512bh)_mm512_loadu_si512(from);
  }
  template <int kPart>
  static __m512bh row(const bf16* from) {
    return (__m512bh)_mm512_loadu_si512(from);
  }
  static Floats multiply_add(Floats sum, __m512bh w, __m512bh x) {
    return _mm512_dpbf16_ps(sum, w, x);
  }

  static int64_t position(int64_t k) { return k; }
  static void pack(const bf16* from, int64_t depth, bf16* to) { std::copy_n(from, depth, to); }
  static void pack(const float* from, int64_t begin, int64_t count, bf16* to) {
    for (int64_t i = 0; i < count; ++i) to[begin + i] = from_float<bf16>(from[i]);
  }
};
#endif

// out[r * out_stride + w] = weight row w times token row r, for kWeights consecutive weight rows.
// Token rows are zero from `depth` to the next step. Meanwhile as many bytes are requested, where
// `ahead` points.
template <typename Math, int kWeights, int kRows>
inline void multiply_tile(const typename Math::Weight* weights, int64_t depth,
                          const typename Math::Row* const* rows, const void* ahead, float* out,
                          int64_t out_stride) {
  using T = typename Math::Weight;
  constexpr int kSums = (kWeights * kRows + 3) / 4 * 4;
  const int64_t whole = depth / Math::kStep * Math::kStep;
  const int64_t to_ahead = (const char*)ahead - (const char*)weights;
  const T* w_row[kWeights];
  const typename Math::Row* x_row[kRows];
  for (int w = 0; w < kWeights; ++w) w_row[w] = weights + w * depth;
  for (int r = 0; r < kRows; ++r) x_row[r] = rows[r];

  Floats sums[kSums] = {};
  const auto part = [&]<int kPart>(const T* const* from, int64_t k_from, int64_t k) {
    decltype(Math::template weight<kPart>(from[0])) values[kWeights];
#pragma GCC unroll 8
    for (int w = 0; w < kWeights; ++w) {
      values[w] = Math::template weight<kPart>(from[w] + k_from);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto x = Math::template row<kPart>(x_row[r] + k);
#pragma GCC unroll 8
      for (int w = 0; w < kWeights; ++w) {
        sums[r * kWeights + w] = Math::multiply_add(sums[r * kWeights + w], values[w], x);
      }
    }
  };
  const auto step = [&](const T* const* from, int64_t k_from, int64_t k) {
    part.template operator()<0>(from, k_from, k);
    if constexpr (Math::kParts == 2) part.template operator()<1>(from, k_from, k);
  };
  for (int64_t k = 0; k < whole; k += Math::kStep) {
    step(w_row, k, k);
#pragma GCC unroll 8
    for (int w = 0; w < kWeights; ++w) {
      __builtin_prefetch((const char*)(w_row[w] + k) + to_ahead, 0, 2);
    }
  }
  if (whole < depth) {
    T rest[kWeights][Math::kStep] = {};
    const T* rest_row[kWeights];
    for (int w = 0; w < kWeights; ++w) {
      std::copy_n(w_row[w] + whole, depth - whole, rest[w]);
      rest_row[w] = rest[w];
    }
    step(rest_row, 0, whole);
  }

  float totals[kSums];
  for (int i = 0; i < kSums; i += 4) sum4(sums + i, totals + i);
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWeights; ++w) out[r * out_stride + w] = totals[r * kWeights + w];
  }
}

// The same for any number of weight rows.
template <typename Math, int kRows>
inline void multiply_rows(const typename Math::Weight* weights, int64_t num_weights, int64_t depth,
                          const typename Math::Row* const* rows, const Ahead& ahead, float* out,
                          int64_t out_stride) {
  constexpr int kWeights = tile_weights(kRows);
  int64_t w = 0;
  for (; w + kWeights <= num_weights; w += kWeights) {
    const auto* from = weights + w * depth;
    multiply_tile<Math, kWeights, kRows>(from, depth, rows, ahead.of(from, w), out + w, out_stride);
  }
  for (; w < num_weights; ++w) {
    const auto* from = weights + w * depth;
    multiply_tile<Math, 1, kRows>(from, depth, rows, ahead.of(from, w), out + w, out_stride);
  }
}

template <typename Math>
inline void multiply_panel(const typename Math::Weight* weights, int64_t num_weights, int64_t depth,
                           const typename Math::Row* const* rows, int num_rows, const Ahead& ahead,
                           float* out, int64_t out_stride) {
  static_assert(kTileRows == 6);
  const auto run = [&]<int kRows>() {
    multiply_rows<Math, kRows>(weights, num_weights, depth, rows, ahead, out, out_stride);
  };
  switch (num_rows) {
    case 1: return run.template operator()<1>();
    case 2: return run.template operator()<2>();
    case 3: return run.template operator()<3>();
    case 4: return run.template operator()<4>();
    case 5: return run.template operator()<5>();
    default: return run.template operator()<6>();
  }
}

}  // namespace sere::moe
