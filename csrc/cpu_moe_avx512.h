// What AVX-512 does in its own way. Included by cpu_moe_vector.h.
#pragma once

#include <immintrin.h>

namespace sere::moe {

// Rows at a time, and for so many of them, weight rows at a time. Many rows, because widening a
// weight takes the ports of the FMA units; two weight rows, because memory gives most where few
// of its rows are read at once, and sixteen sums hide the latency. Three where arithmetic sets the
// pace: a token row's load then serves more of them.
inline constexpr int kTileRows = 8;
inline constexpr int tile_weights(int rows, int parts) { return parts == 2 && rows > 4 ? 3 : 2; }

template <typename Vector>
inline void keep_in_register(Vector& value) {
  asm("" : "+v"(value));
}

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats accumulate(Floats sum, Floats a, Floats b) { return multiply_add(a, b, sum); }

// The even elements of 32 bfloat16, then the odd ones.
template <int>
inline Floats even(const bf16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(from), 16));
}
template <int>
inline Floats odd(const bf16* from) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from), high));
}

// Lane 0 is the sum of the lanes of a, lane 1 of b and so on, each in the same order. Blends run on
// either port, where shuffles have one.
inline Quad sum4(Floats a, Floats b, Floats c, Floats d) {
  const __m512i crossed =
      _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
  const auto pair = [&](__m512 a, __m512 b) {  // lanes a0 + a1, b0 + b1, a2 + a3, b2 + b3, ...
    return _mm512_mask_blend_ps(0xaaaa, a, b) + _mm512_permutex2var_ps(a, crossed, b);
  };
  const __m512 ab = pair(a, b), cd = pair(c, d);
  const __m512 sums = _mm512_mask_blend_ps(0xcccc, ab, cd) + _mm512_shuffle_ps(ab, cd, 0x4e);
  const __m256 half = _mm512_castps512_ps256(sums) + _mm512_extractf32x8_ps(sums, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

}  // namespace sere::moe
