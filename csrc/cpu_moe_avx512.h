// What AVX-512 does in its own way. Included by cpu_moe_vector.h.
#pragma once

#include <immintrin.h>

namespace sere::moe {

// Token rows of a tile at most, and with two blocks of weight rows: many, because widening a weight
// takes the ports of the FMA units, and no more than there are registers for their addresses.
inline constexpr int kTileRows = 8;
inline constexpr int kRowsOfTwoBlocks = 8;

template <typename Vector>
inline void keep_in_register(Vector& value) {
  asm("" : "+v"(value));
}

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats accumulate(Floats sum, Floats a, Floats b) { return multiply_add(a, b, sum); }

inline Floats broadcast_from(const float* from) { return _mm512_set1_ps(*from); }

// The low halves of 16 words, as float32, and the high ones.
template <int>
inline Floats low_halves(const bf16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(from), 16));
}
template <int>
inline Floats high_halves(const bf16* from) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from), high));
}

}  // namespace sere::moe
