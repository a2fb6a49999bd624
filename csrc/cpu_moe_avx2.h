// What AVX2 with FMA does in its own way. Included by cpu_moe_vector.h.
#pragma once

#include <immintrin.h>

namespace sere::moe {

// Token rows of a tile at most, and with two blocks of weight rows: of 16 registers twelve are sums,
// two weights and one a token row's value.
inline constexpr int kTileRows = 6;
inline constexpr int kRowsOfTwoBlocks = 2;

template <typename Vector>
inline void keep_in_register(Vector& value) {
  asm("" : "+x"(value));
}

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

// sum + a * b, in the place of sum and where it is written: a compiler that reorders these keeps more
// operands at once than there are registers. For the same reason what is below is loaded where it is
// written.
inline Floats accumulate(Floats sum, Floats a, Floats b) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}

inline Floats broadcast_from(const float* from) {
  Floats value;
  asm volatile("vbroadcastss %1, %0" : "=x"(value) : "m"(*from));
  return value;
}

inline constexpr Words kHighHalves = Words{} + 0xffff0000u;

// The low halves of 8 words, as float32, and the high ones, in a tile of kSums. Beside up to eight
// there are registers for the words from one to the other.
template <int kSums>
inline Floats low_halves(const bf16* from) {
  if constexpr (kSums <= 8) return (Floats)(load_as<Words>(from) << 16);
  Floats words;
  asm volatile("vmovups %1, %0\n\tvpslld $16, %0, %0" : "=x"(words) : "m"(*(const __m256_u*)from));
  return words;
}
template <int kSums>
inline Floats high_halves(const bf16* from) {
  if constexpr (kSums <= 8) return (Floats)(load_as<Words>(from) & kHighHalves);
  Floats words;
  asm volatile("vmovups %1, %0\n\tvandps %2, %0, %0"
               : "=&x"(words)
               : "m"(*(const __m256_u*)from), "m"(kHighHalves));
  return words;
}

}  // namespace sere::moe
