// 16-byte vectors in the compiler's own terms. Included by cpu_moe_vector.h.
#pragma once

namespace sere::moe {

// Token rows of a tile at most, and with two blocks of weight rows: as for NEON's 32 registers.
inline constexpr int kTileRows = 4;
inline constexpr int kRowsOfTwoBlocks = 2;

template <typename Vector>
inline void keep_in_register(Vector&) {}

inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats accumulate(Floats sum, Floats a, Floats b) { return multiply_add(a, b, sum); }

inline Floats broadcast_from(const float* from) { return broadcast(*from); }

// The low halves of 4 words, as float32, and the high ones.
template <int>
inline Floats low_halves(const bf16* from) { return (Floats)(load_as<Words>(from) << 16); }
template <int>
inline Floats high_halves(const bf16* from) {
  return (Floats)(load_as<Words>(from) & 0xffff0000u);
}

}  // namespace sere::moe
