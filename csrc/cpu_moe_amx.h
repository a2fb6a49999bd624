// AMX tiles for the CPU MoE: configuration, layout of the right operand, products.
//
// Products are transposed, weight rows times token columns: then weights are the tile operand that
// is read in place, and only the tokens, which are small, are repacked.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "cpu_moe_common.h"

namespace sere::moe::amx {

inline constexpr int kTile = 16;        // rows of a tile, and 32-bit columns
inline constexpr int kTileDepth = 32;   // bfloat16 columns of a tile
inline constexpr int kTileWords = 256;  // 32-bit words of a tile

// The kernel must allow a process the tile state once.
inline bool available() {
  static const bool allowed = [] {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
}

inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_per_row[tile] = 64;
    config.rows[tile] = kTile;
  }
  _tile_loadconfig(&config);
}

// rows[i] holds 16 words; afterwards rows[j] holds word j of each.
inline void transpose(__m512i rows[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Columns 4 q to 4 q + 3 of a tile of 16 rows, as rows of 16 words: words of four rows that are four
// apart meet in a register, so that what follows stays within its quarters.
inline void four_columns(const float* tile, int q, __m512 columns[4]) {
  __m512 t[4], u[4];
  for (int i = 0; i < 4; ++i) {
    const float* from = tile + i * kTile + 4 * q;
    t[i] = _mm512_castps128_ps512(_mm_load_ps(from));
    t[i] = _mm512_insertf32x4(t[i], _mm_load_ps(from + 4 * kTile), 1);
    t[i] = _mm512_insertf32x4(t[i], _mm_load_ps(from + 8 * kTile), 2);
    t[i] = _mm512_insertf32x4(t[i], _mm_load_ps(from + 12 * kTile), 3);
  }
  for (int i = 0; i < 4; i += 2) {
    u[i] = _mm512_unpacklo_ps(t[i], t[i + 1]);
    u[i + 1] = _mm512_unpackhi_ps(t[i], t[i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const __m512d low = _mm512_castps_pd(u[i]), high = _mm512_castps_pd(u[i + 2]);
    columns[2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
    columns[2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
  }
}

// c[a][b] = 16 weight rows from left + 16 a, times block b of 16 tokens, for kBlocks blocks. Weights
// at `ahead`, unless null, are requested meanwhile, as many as there are at `left`.
template <int kBlocks>
inline void multiply(const bf16* left, const uint32_t* right, int64_t depth, const char* ahead,
                     float c[2][2][kTileWords]) {
  const int64_t left_stride = depth * sizeof(bf16);
  const bf16* left_1 = left + kTile * depth;
  const uint32_t* right_1 = right + depth / 2 * kTile;
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (kBlocks == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    _tile_loadd(6, right + k / 2 * kTile, 64);
    _tile_loadd(4, left + k, left_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left_1 + k, left_stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kBlocks == 2) {
      _tile_loadd(7, right_1 + k / 2 * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    // In the order of memory, a tile's bytes at a step.
    for (int line = 0; ahead && line < 2 * kTile; ++line) {
      __builtin_prefetch(ahead + k * (2 * kTile) * sizeof(bf16) + line * 64, 0, 2);
    }
  }
  _tile_stored(0, c[0][0], 64);
  _tile_stored(2, c[1][0], 64);
  if constexpr (kBlocks == 2) {
    _tile_stored(1, c[0][1], 64);
    _tile_stored(3, c[1][1], 64);
  }
}

}  // namespace sere::moe::amx
