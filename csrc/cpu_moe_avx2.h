// What AVX2 with FMA does in its own way. Included by cpu_moe_vector.h.
#pragma once

#include <immintrin.h>

namespace sere::moe {

// Rows at a time, and for so many of them, weight rows at a time: with 16 registers, up to twelve
// sums. Where memory sets the pace, few weight rows: it gives most where few are read at once.
inline constexpr int kTileRows = 4;
inline constexpr int tile_weights(int rows, int) { return rows <= 3 ? 2 : 3; }

template <typename Vector>
inline void keep_in_register(Vector& value) {
  asm("" : "+x"(value));
}

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

// sum + a * b, in the place of sum and where it is written: a compiler that reorders these keeps more
// operands at once than there are registers.
inline Floats accumulate(Floats sum, Floats a, Floats b) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}

inline constexpr Words kHighHalves = Words{} + 0xffff0000u;

// The even elements of 16 bfloat16, then the odd ones. Beside twelve sums no register is left for a
// constant, nor for a weight that is loaded early.
template <int kSums>
inline Floats even(const bf16* from) {
  if constexpr (kSums < 12) return (Floats)(load_as<Words>(from) << 16);
  Floats words;
  asm volatile("vmovups %1, %0\n\tvpslld $16, %0, %0" : "=x"(words) : "m"(*(const __m256_u*)from));
  return words;
}
template <int kSums>
inline Floats odd(const bf16* from) {
  if constexpr (kSums < 12) return (Floats)(load_as<Words>(from) & kHighHalves);
  Floats words;
  asm volatile("vmovups %1, %0\n\tvandps %2, %0, %0"
               : "=&x"(words)
               : "m"(*(const __m256_u*)from), "m"(kHighHalves));
  return words;
}

// Lane 0 is the sum of the lanes of a, lane 1 of b and so on, each in the same order.
inline Quad sum4(Floats a, Floats b, Floats c, Floats d) {
  const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const __m256 sums = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  return _mm256_castps256_ps128(sums) + _mm256_extractf128_ps(sums, 1);
}

}  // namespace sere::moe
