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
  static constexpr int64_t kPanelBytes = 32 << 10;
  static constexpr int kStep = kParts * kLanes;

  // Part of a step, for a tile of kSums.
  template <int kPart, int kSums>
  static Floats weight(const T* from) {
    if constexpr (std::is_same_v<T, float>) {
      return load(from + kPart * kLanes);
    } else {
      return kPart == 0 ? even<kSums>(from) : odd<kSums>(from);
    }
  }
  template <int kPart>
  static Floats row(const float* from) {
    return load(from + kPart * kLanes);
  }
  static Floats multiply_add(Floats sum, Floats w, Floats x) { return accumulate(sum, w, x); }

  // Where column k of a row is.
  static int64_t position(int64_t k) {
    if constexpr (std::is_same_v<T, float>) return k;
    return k / kStep * kStep + k % 2 * kLanes + k % kStep / 2;
  }
  static void pack(const T* from, int64_t depth, float* to) {
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep) {
      store(to + k, weight<0, 1>(from + k));
      store(to + k + kLanes, weight<1, 1>(from + k));
    }
    for (; k < depth; ++k) to[position(k)] = to_float(from[k]);
  }
  static void pack(const float* from, int64_t begin, int64_t count, float* to) {
    if constexpr (std::is_same_v<T, float>) {
      std::copy_n(from, count, to + begin);
    } else {
      int64_t i = 0;
      for (; i < count && (begin + i) % kStep != 0; ++i) to[position(begin + i)] = from[i];
      for (; i + kStep <= count; i += kStep) {
        for (int lane = 0; lane < kLanes; ++lane) {
          to[begin + i + lane] = from[i + 2 * lane];
          to[begin + i + lane + kLanes] = from[i + 2 * lane + 1];
        }
      }
      for (; i < count; ++i) to[position(begin + i)] = from[i];
    }
  }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16 products, added to float32 sums.
struct NativeBf16 {
  using Weight = bf16;
  using Row = bf16;
  static constexpr int kParts = 1;
  static constexpr int64_t kPanelBytes = 24 << 10;
  static constexpr int kStep = 2 * kLanes;

  template <int kPart, int kSums>
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
    for (int64_t i = 0; i < count; i += kLanes) {
      const __mmask16 lanes = count - i < kLanes ? (1u << (count - i)) - 1 : 0xffffu;
      const __m256bh values = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, from + i));
      _mm256_mask_storeu_epi16(to + begin + i, lanes, (__m256i)values);
    }
  }
};
#endif

// Columns whose products are summed up in registers; the sums of blocks are added up one by one. Of
// token rows so wide that the first-level cache does not hold a panel, a block is multiplied with
// all weight rows before the next one.
template <typename Math>
inline int64_t depth_block(int64_t depth) {
  constexpr int64_t kMost = 4096 / sizeof(typename Math::Row);
  const int64_t blocks = std::max<int64_t>(1, (depth + kMost - 1) / kMost);
  return ((depth + blocks - 1) / blocks + Math::kStep - 1) / Math::kStep * Math::kStep;
}

// The operands of a multiplication: out[r * out_stride + w] = weight row w times token row r.
// Weight rows are `depth` apart, `columns` of them are multiplied, `block` at a time, and are added
// to `out` unless they are the first. Token rows are zero from there to the next step.
template <typename Math>
struct Operands {
  const typename Math::Weight* weights;
  int64_t num_weights, depth, columns, block;
  const typename Math::Row* const* rows;
  bool first;
  float* out;
  int64_t out_stride;
};

// kWeights weight rows from row `w` on, kRows token rows. Meanwhile weights that come next are
// requested, as many as are multiplied.
template <typename Math, int kWeights, int kRows>
inline void multiply_tile(const Operands<Math>& o, int64_t w, const Ahead& ahead) {
  using T = typename Math::Weight;
  constexpr int kSums = kRows * kWeights, kQuads = (kSums + 3) / 4;
  constexpr int kStepsPerLine = std::max(1, 64 / (Math::kStep * int(sizeof(T))));
  constexpr int kLine = Math::kStep * kStepsPerLine;
  constexpr int kRequests = kWeights * kLine * int(sizeof(T)) / 64;
  const T* w_row[kWeights];
  const typename Math::Row* x_row[kRows];
  for (int i = 0; i < kWeights; ++i) w_row[i] = o.weights + (w + i) * o.depth;
  for (int r = 0; r < kRows; ++r) x_row[r] = o.rows[r];
  // As many bytes are requested as are multiplied, in a row, as a prefetcher likes best. A request is
  // dropped while too many are on their way, so that weights are requested twice: as part of
  // what comes next, and again while the tile before theirs is multiplied. Where nothing comes
  // next, weights at hand are requested, which costs little. The first-level cache is the panel's.
  constexpr int kSecondLevel = 2;
  const int64_t skipped = kWeights * ahead.column_bytes;
  const char* at_hand = (const char*)w_row[0] - ahead.column_bytes + skipped;
  const bool last = w + 2 * kWeights > o.num_weights;
  const char* soon = last ? at_hand : at_hand + kWeights * ahead.row_bytes;
  const int64_t turns = (o.columns / kLine + ahead.num_panels - 1) / ahead.num_panels;
  const int64_t next = w * ahead.row_bytes + skipped + ahead.panel * turns * kRequests * 64;
  const char* early = next < ahead.next.bytes ? ahead.next.begin + next : at_hand;
  int until_turn = 1;

  Floats sums[4 * kQuads];  // weight by weight of the first token row, then of the next
  const auto part = [&]<int kPart>(const T* const* from, int64_t k_from,
                                   int64_t k) __attribute__((always_inline)) {
    decltype(Math::template weight<kPart, kRows * kWeights>(from[0])) values[kWeights];
    unrolled<kWeights>([&]<int i>() __attribute__((always_inline)) {
      values[i] = Math::template weight<kPart, kRows * kWeights>(from[i] + k_from);
    });
    unrolled<kRows>([&]<int r>() __attribute__((always_inline)) {
      auto x = Math::template row<kPart>(x_row[r] + k);
      keep_in_register(x);  // else a compiler may load it again for every weight
      unrolled<kWeights>([&]<int i>() __attribute__((always_inline)) {
        Floats& sum = sums[r * kWeights + i];
        sum = Math::multiply_add(sum, values[i], x);
      });
    });
  };
  const auto step = [&](const T* const* from, int64_t k_from, int64_t k)
                        __attribute__((always_inline)) {
                          part.template operator()<0>(from, k_from, k);
                          if constexpr (Math::kParts == 2) {
                            // The registers are for sums: weights are read twice, not kept from one part to the next.
                            asm volatile("" : "+r"(k_from));
                            part.template operator()<1>(from, k_from, k);
                          }
                        };
  for (int64_t begin = 0; begin < o.columns; begin += o.block) {
    const int64_t end = std::min(begin + o.block, o.columns);
    unrolled<4 * kQuads>([&]<int i>() __attribute__((always_inline)) { sums[i] = Floats{}; });
    int64_t k = begin;
    for (; k + kLine <= end; k += kLine) {
      unrolled<kStepsPerLine>([&]<int i>() __attribute__((always_inline)) {
        step(w_row, k + i * Math::kStep, k + i * Math::kStep);
      });
      unrolled<kRequests>([&]<int i>() __attribute__((always_inline)) {
        __builtin_prefetch(soon + i * 64, 0, kSecondLevel);
      });
      soon += kRequests * 64;
      if (--until_turn == 0) {
        until_turn = ahead.num_panels;
        unrolled<kRequests>([&]<int i>() __attribute__((always_inline)) {
          __builtin_prefetch(early + i * 64, 0, kSecondLevel);
        });
        early += kRequests * 64;
      }
    }
    for (; k + Math::kStep <= end; k += Math::kStep) step(w_row, k, k);
    if (k < end) {
      T rest[kWeights][Math::kStep] = {};
      const T* rest_row[kWeights];
      for (int i = 0; i < kWeights; ++i) {
        std::copy_n(w_row[i] + k, end - k, rest[i]);
        rest_row[i] = rest[i];
      }
      step(rest_row, 0, k);
    }

    const bool first = o.first && begin == 0;
    unrolled<kQuads>([&]<int q>() __attribute__((always_inline)) {
      const Floats* four = sums + 4 * q;
      const Quad totals = sum4(four[0], four[1], four[2], four[3]);
      unrolled<4>([&]<int i>() __attribute__((always_inline)) {
        constexpr int kSum = 4 * q + i;
        if constexpr (kSum < kSums) {
          float& out = o.out[kSum / kWeights * o.out_stride + w + kSum % kWeights];
          out = first ? totals[i] : out + totals[i];
        }
      });
    });
  }
}

// All weight rows from row `w` on, kWeights at a time and the rest in smaller tiles.
template <typename Math, int kWeights, int kRows>
inline void multiply_rows(const Operands<Math>& o, int64_t w, const Ahead& ahead) {
  for (; w + kWeights <= o.num_weights; w += kWeights) {
    multiply_tile<Math, kWeights, kRows>(o, w, ahead);
  }
  if constexpr (kWeights > 1) multiply_rows<Math, kWeights / 2, kRows>(o, w, ahead);
}

// Weight rows at a time where several panels pass over them: then arithmetic sets the pace, however
// few token rows a panel has.
inline constexpr int kWeightsOfManyPanels = 3;

template <typename Math>
inline void multiply_panel(const Operands<Math>& o, int num_rows, const Ahead& ahead) {
  const auto run = [&]<int kRows>() {
    if constexpr (kRows <= kTileRows) {
      if (kRows > 1 && ahead.num_panels > 1) {
        return multiply_rows<Math, kWeightsOfManyPanels, kRows>(o, 0, ahead);
      }
      multiply_rows<Math, tile_weights(kRows, Math::kParts), kRows>(o, 0, ahead);
    }
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
