// Products of blocks of weight rows with token rows: tiles whose sums stay in registers.
//
// A register's lanes are weight rows, so that nothing is left to add up at a tile's end, and each of its
// sums goes over a row's columns one by one: a token row's result does not depend on its company.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu_moe_ahead.h"
#include "cpu_moe_blocks.h"
#include "cpu_moe_vector.h"

namespace sere::moe {

// How a line of a block is multiplied. `Row` is the element of a token row; kParts registers come of
// a register of weights, each for one column of the line, or one for all.
//
// In float32, those of a bfloat16 line are the low and the high halves of its words.
template <typename T>
struct Float32 {
  using Weight = T;
  using Row = float;
  static constexpr int kParts = kLineColumns<T>;

  // For a tile of kSums.
  template <int kPart, int kSums>
  static Floats weight(const T* from) {
    if constexpr (std::is_same_v<T, float>) {
      return load(from);
    } else {
      return kPart == 0 ? low_halves<kSums>(from) : high_halves<kSums>(from);
    }
  }
  template <int kPart>
  static Floats row(const float* from) {
    return broadcast_from(from + kPart);
  }
  static Floats multiply_add(Floats sum, Floats w, Floats x) { return accumulate(sum, w, x); }

  static void store_row(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16 products, added to float32 sums.
struct NativeBf16 {
  using Weight = bf16;
  using Row = bf16;
  static constexpr int kParts = 1;

  template <int kPart, int kSums>
  static __m512bh weight(const bf16* from) {
    return (__m512bh)_mm512_loadu_si512(from);
  }
  template <int kPart>
  static __m512bh row(const bf16* from) {
    return (__m512bh)_mm512_set1_epi32(load_as<int32_t>(from));
  }
  static Floats multiply_add(Floats sum, __m512bh w, __m512bh x) {
    return _mm512_dpbf16_ps(sum, w, x);
  }

  static void store_row(const float* from, int64_t count, bf16* to) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const __mmask16 lanes = count - i < kLanes ? (1u << (count - i)) - 1 : 0xffffu;
      const __m256bh values = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, from + i));
      _mm256_mask_storeu_epi16(to + i, lanes, (__m256i)values);
    }
  }
};
#endif

// One or two blocks of weight rows, over all of their columns: out[s][r * out_stride + i] = row i of
// block s times token row r. Token rows have as many columns as the blocks.
template <typename Math>
struct Operands {
  const typename Math::Weight* blocks[2];
  int64_t num_lines;
  const typename Math::Row* const* rows;
  float* out[2];
  int64_t out_stride;
};

// kRows token rows with kBlocks blocks. Meanwhile weights that come next are requested, as many lines
// of each block as are multiplied, or this panel's share of them.
template <typename Math, int kBlocks, int kRows>
[[gnu::noinline]] void multiply_tile(const Operands<Math>& o, const Ahead& ahead) {
  using T = typename Math::Weight;
  constexpr int kVectors = kBlockRows / kLanes * kBlocks, kSums = kRows * kVectors;
  constexpr int kColumns = kLineColumns<T>, kLine = kBlockRows * kColumns;
  constexpr int kSecondLevel = 2;
  const T* weights[kBlocks];
  const char* next[kBlocks];
  const typename Math::Row* x[kRows];
  const int64_t share = (o.num_lines + ahead.num_panels - 1) / ahead.num_panels;
  for (int s = 0; s < kBlocks; ++s) {
    weights[s] = o.blocks[s];
    const char* begin = ahead.next[s].begin;
    // Where nothing comes next, weights at hand are requested, which costs little.
    next[s] = (begin ? begin : (const char*)o.blocks[s]) + ahead.panel * share * kLineBytes;
  }
  for (int r = 0; r < kRows; ++r) x[r] = o.rows[r];

  Floats sums[kSums];
  unrolled<kSums>([&]<int i>() __attribute__((always_inline)) { sums[i] = Floats{}; });
  int until_turn = 1;
  for (int64_t line = 0; line < o.num_lines; ++line) {
    if (--until_turn == 0) {
      until_turn = ahead.num_panels;
      unrolled<kBlocks>([&]<int s>() __attribute__((always_inline)) {
        __builtin_prefetch(next[s], 0, kSecondLevel);
        next[s] += kLineBytes;
      });
    }
    unrolled<Math::kParts>([&]<int kPart>() __attribute__((always_inline)) {
      decltype(Math::template weight<kPart, kSums>(weights[0])) values[kVectors];
      unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
        constexpr int kBlock = v * kLanes / kBlockRows, kFirst = v * kLanes % kBlockRows;
        const T* from = weights[kBlock] + line * kLine + kFirst * kColumns;
        values[v] = Math::template weight<kPart, kSums>(from);
        keep_in_register(values[v]);
      });
      unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
        auto value = Math::template row<kPart>(x[r] + line * kColumns);
        keep_in_register(value);  // else a compiler may load it again for every weight
        unrolled<kVectors>([&]<int v>() __attribute__((always_inline)) {
          Floats& sum = sums[r * kVectors + v];
          sum = Math::multiply_add(sum, values[v], value);
        });
      });
    });
  }
  unrolled<kSums>([&]<int i>() __attribute__((always_inline)) {
    constexpr int r = i / kVectors, v = i % kVectors;
    constexpr int kBlock = v * kLanes / kBlockRows, kFirst = v * kLanes % kBlockRows;
    store(o.out[kBlock] + r * o.out_stride + kFirst, sums[i]);
  });
}

// Of one or two blocks; at once, where there are registers for their sums.
template <typename Math, int kRows>
inline void multiply_blocks(const Operands<Math>& o, const Ahead& ahead) {
  if constexpr (kRows <= kRowsOfTwoBlocks) {
    if (o.blocks[1]) return multiply_tile<Math, 2, kRows>(o, ahead);
  }
  multiply_tile<Math, 1, kRows>(o, ahead);
  if (!o.blocks[1]) return;
  const Operands<Math> second{{o.blocks[1]}, o.num_lines, o.rows, {o.out[1]}, o.out_stride};
  Ahead second_ahead = ahead;
  second_ahead.next[0] = ahead.next[1];
  multiply_tile<Math, 1, kRows>(second, second_ahead);
}

template <typename Math>
inline void multiply_panel(const Operands<Math>& o, int num_rows, const Ahead& ahead) {
  const auto run = [&]<int kRows>() {
    if constexpr (kRows <= kTileRows) multiply_blocks<Math, kRows>(o, ahead);
  };
  switch (num_rows) {
    case 1: return run.template operator()<1>();
    case 2: return run.template operator()<2>();
    case 3: return run.template operator()<3>();
    case 4: return run.template operator()<4>();
    case 5: return run.template operator()<5>();
    case 6: return run.template operator()<6>();
    case 7: return run.template operator()<7>();
    case 8: return run.template operator()<8>();
  }
}

}  // namespace sere::moe
