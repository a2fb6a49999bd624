// 16-byte vectors in the compiler's own terms. Included by cpu_moe_vector.h.
#pragma once

namespace sere::moe {

// Rows at a time, and for so many of them, weight rows at a time: as for 16 registers.
inline constexpr int kTileRows = 4;
inline constexpr int tile_weights(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 3; }

template <typename Vector>
inline void keep_in_register(Vector&) {}

inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

// The even elements of 8 bfloat16, then the odd ones.
inline Floats even(const bf16* from) { return (Floats)(load_as<Words>(from) << 16); }
inline Floats odd(const bf16* from) { return (Floats)(load_as<Words>(from) & 0xffff0000u); }

// Lane i is the sum of the lanes of v[i], each in the same order.
inline Quad sum4(const Floats v[4]) {
  Quad sums;
  for (int i = 0; i < 4; ++i) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
  return sums;
}

}  // namespace sere::moe
