// What AVX2 with FMA does in its own way. Included by cpu_moe_vector.h.
#pragma once

#include <immintrin.h>

namespace sere::moe {

// Rows at a time, and for so many of them, weight rows at a time: with 16 registers, up to twelve
// sums, and at least the eight that hide the latency of two FMA units.
inline constexpr int kTileRows = 4;
inline constexpr int tile_weights(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 3; }

template <typename Vector>
inline void keep_in_register(Vector& value) {
  asm("" : "+x"(value));
}

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

// The even elements of 16 bfloat16, then the odd ones. A byte shuffle, unlike a shift, does not
// need the ports of the FMA units.
inline Floats even(const bf16* from) {
  const __m256i bytes = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13,
                                         -1, -1, 0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)from), bytes));
}
inline Floats odd(const bf16* from) {
  const __m256 words = _mm256_loadu_ps((const float*)from);
  return _mm256_and_ps(words, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000u))));
}

// Lane i is the sum of the lanes of v[i], each in the same order.
inline Quad sum4(const Floats v[4]) {
  const __m256 ab = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]);
  const __m256 cd = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
  const __m256 sums = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  return _mm256_castps256_ps128(sums) + _mm256_extractf128_ps(sums, 1);
}

}  // namespace sere::moe
