// 16-byte vectors in the compiler's own terms. Included by cpu_moe_vector.h.
#pragma once

namespace sere::moe {

// Rows at a time, and for so many of them, weight rows at a time: as for 16 registers.
inline constexpr int kTileRows = 4;
inline constexpr int tile_weights(int rows, int) { return rows == 1 ? 8 : rows == 2 ? 4 : 3; }

template <typename Vector>
inline void keep_in_register(Vector&) {}

inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats accumulate(Floats sum, Floats a, Floats b) { return multiply_add(a, b, sum); }

// The even elements of 8 bfloat16, then the odd ones.
template <int>
inline Floats even(const bf16* from) {
  return (Floats)(load_as<Words>(from) << 16);
}
template <int>
inline Floats odd(const bf16* from) {
  return (Floats)(load_as<Words>(from) & 0xffff0000u);
}

// Lane 0 is the sum of the lanes of a, lane 1 of b and so on, each in the same order.
inline Quad sum4(Floats a, Floats b, Floats c, Floats d) {
  const auto sum = [](Floats v) { return (v[0] + v[1]) + (v[2] + v[3]); };
  return Quad{sum(a), sum(b), sum(c), sum(d)};
}

}  // namespace sere::moe
