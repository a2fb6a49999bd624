// The tile instructions of AMX in plain C++, for processors without: what the engine of tiles computes,
// not how fast. Included before cpu_moe_amx.h.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace amx_emulator {

inline thread_local uint32_t tiles[8][16][16];

inline void load(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * stride, 64);
  }
}

inline void store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile][row], 64);
  }
}

// c[m][n] += the products of the pairs a[m][k] and b[k][n], over k.
inline void multiply(int c, int a, int b) {
  const auto low = [](uint32_t word) { return std::bit_cast<float>(word << 16); };
  const auto high = [](uint32_t word) { return std::bit_cast<float>(word & 0xffff0000u); };
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum = std::bit_cast<float>(tiles[c][m][n]);
      for (int k = 0; k < 16; ++k) {
        sum += low(tiles[a][m][k]) * low(tiles[b][k][n]);
        sum += high(tiles[a][m][k]) * high(tiles[b][k][n]);
      }
      tiles[c][m][n] = std::bit_cast<uint32_t>(sum);
    }
  }
}

}  // namespace amx_emulator

#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(tile) std::memset(amx_emulator::tiles[tile], 0, sizeof(amx_emulator::tiles[tile]))
#define _tile_loadd(tile, from, stride) amx_emulator::load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx_emulator::store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulator::multiply(c, a, b)
