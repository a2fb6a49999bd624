// CPU fused MoE on AMX tiles, bfloat16, for any number of rows per expert.
//
// It computes transposed products, weight rows times token columns: then weights are the tile
// operand that is read in place, and only the tokens, which are small, are repacked.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define SERE_MOE_AMX 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

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

// Token rows to the tile layout of a right operand: words [depth / 2, 16 tokens].
inline void pack(const Problem<bf16>& p, const Routing& routing, const RowBlock& block,
                 uint32_t* packed) {
  for (int64_t k = 0; k < p.hidden_size; k += kTileDepth) {
    __m512i rows[kTile];
    for (int r = 0; r < kTile; ++r) {
      rows[r] = r < block.count
                    ? _mm512_loadu_si512(
                          p.hidden + routing.token[block.first + r] * p.hidden_size + k)
                    : _mm512_setzero_si512();
    }
    transpose(rows);
    for (int r = 0; r < kTile; ++r) {
      _mm512_store_si512(packed + (k / 2 + r) * kTile, rows[r]);
    }
  }
}

// c[a][b] = 16 rows at left_a (leading dimension depth) times block b of 16 tokens; kBlocks of them.
template <int kBlocks>
inline void multiply(const bf16* left_0, const bf16* left_1, const uint32_t* right, int64_t depth,
                     float c[2][2][kTileWords]) {
  const int64_t left_stride = depth * sizeof(bf16);
  const uint32_t* right_1 = right + depth / 2 * kTile;
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (kBlocks == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    _tile_loadd(6, right + k / 2 * kTile, 64);
    _tile_loadd(4, left_0 + k, left_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left_1 + k, left_stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kBlocks == 2) {
      _tile_loadd(7, right_1 + k / 2 * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c[0][0], 64);
  _tile_stored(2, c[1][0], 64);
  if constexpr (kBlocks == 2) {
    _tile_stored(1, c[0][1], 64);
    _tile_stored(3, c[1][1], 64);
  }
}

// exp with a relative error near 1e-7, below what rounding to bfloat16 hides.
inline __m512 exp(__m512 x) {
  const __m512 clamped =
      _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(clamped, _mm512_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), clamped);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.0f / 720);
  for (const float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(coefficient));
  }
  return _mm512_scalef_ps(y, n);
}

template <Activation kActivation>
inline __m512 activate(__m512 x) {
  __m512 y = x;
  if constexpr (kActivation == Activation::kGeluTanh) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    y = _mm512_mul_ps(_mm512_set1_ps(1.5957691216057308f),
                      _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x));
  }
  const __m512 e = exp(_mm512_sub_ps(_mm512_setzero_ps(), y));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// Two rows of float32 to one row of bfloat16 pairs, the right operand's layout.
inline __m512i interleave(__m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// act(gate) * up for 16 intermediate columns of one block; bias points at those columns, or null.
template <Activation kActivation>
inline void store_inter(const float* gate, const float* up, const float* gate_bias,
                        const float* up_bias, uint32_t* inter) {
  __m512 row[2];
  for (int i = 0; i < kTile; ++i) {
    __m512 g = _mm512_load_ps(gate + i * kTile);
    __m512 u = _mm512_load_ps(up + i * kTile);
    if (gate_bias) {
      g = _mm512_add_ps(g, _mm512_set1_ps(gate_bias[i]));
      u = _mm512_add_ps(u, _mm512_set1_ps(up_bias[i]));
    }
    row[i % 2] = _mm512_mul_ps(activate<kActivation>(g), u);
    if (i % 2) _mm512_store_si512(inter + i / 2 * kTile, interleave(row[0], row[1]));
  }
}

// Adds a block's 16 output columns, weighted, to its tokens' sums.
inline void add_output(const float* tile, const float* bias, const Routing& routing,
                       const RowBlock& block, int64_t first_token, float* sums, int64_t stride) {
  __m512i rows[kTile];
  for (int r = 0; r < kTile; ++r) rows[r] = _mm512_load_si512(tile + r * kTile);
  transpose(rows);
  const __m512 offset = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
  for (int r = 0; r < block.count; ++r) {
    const int32_t position = block.first + r;
    float* sum = sums + (routing.token[position] - first_token) * stride;
    const __m512 value = _mm512_add_ps(_mm512_castsi512_ps(rows[r]), offset);
    const __m512 weight = _mm512_set1_ps(routing.weight[position]);
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(value, weight, _mm512_loadu_ps(sum)));
  }
}

struct Workspace {
  Routing routing;
  Scratch packed, inter;
};

// hidden_size and inter_size must be multiples of 32.
template <Activation kActivation>
void run(const Problem<bf16>& p, int64_t first_token, int64_t num_tokens, Workspace& workspace) {
  Routing& routing = workspace.routing;
  routing.build(p, first_token, num_tokens);
  const int64_t hidden_size = p.hidden_size, inter_size = p.inter_size;
  const int64_t num_active = routing.active.size(), num_blocks = routing.blocks.size();
  const int64_t packed_words = hidden_size / 2 * kTile, inter_words = inter_size / 2 * kTile;
  uint32_t* packed = workspace.packed.get<uint32_t>(num_blocks * packed_words);
  uint32_t* inter = workspace.inter.get<uint32_t>(num_blocks * inter_words);

  const int64_t inter_chunk = chunk_size(inter_size, kTile, std::max<int64_t>(num_active, 1), 256);
  const int64_t inter_chunks = (inter_size + inter_chunk - 1) / inter_chunk;
  const int64_t hidden_chunk = chunk_size(hidden_size, 2 * kTile, 1, 128);
  const int64_t hidden_chunks = (hidden_size + hidden_chunk - 1) / hidden_chunk;

#pragma omp parallel
  {
    alignas(64) float c[2][2][kTileWords];
    configure_tiles();

#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < num_blocks; ++b) {
      pack(p, routing, routing.blocks[b], packed + b * packed_words);
    }

#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_active * inter_chunks; ++item) {
      const auto& expert = routing.active[item / inter_chunks];
      const bf16* gate = p.w13 + int64_t{expert.id} * 2 * inter_size * hidden_size;
      const bf16* up = gate + inter_size * hidden_size;
      const float* bias = p.w13_bias ? p.w13_bias + int64_t{expert.id} * 2 * inter_size : nullptr;
      const int64_t begin = item % inter_chunks * inter_chunk;
      const int64_t end = std::min(begin + inter_chunk, inter_size);
      for (int64_t i = begin; i < end; i += kTile) {
        const float* gate_bias = bias ? bias + i : nullptr;
        const float* up_bias = bias ? bias + inter_size + i : nullptr;
        for (int32_t b = 0; b < expert.num_blocks; b += 2) {
          const int64_t block = expert.first_block + b;
          const int pair = std::min(2, expert.num_blocks - b);
          const uint32_t* right = packed + block * packed_words;
          const bf16* left_0 = gate + i * hidden_size;
          const bf16* left_1 = up + i * hidden_size;
          if (pair == 2) {
            multiply<2>(left_0, left_1, right, hidden_size, c);
          } else {
            multiply<1>(left_0, left_1, right, hidden_size, c);
          }
          for (int j = 0; j < pair; ++j) {
            uint32_t* to = inter + (block + j) * inter_words + i / 2 * kTile;
            store_inter<kActivation>(c[0][j], c[1][j], gate_bias, up_bias, to);
          }
        }
      }
    }

    // Every item owns some columns of the output, so experts add up without locks.
    thread_local Scratch sum_scratch;
    float* sums = sum_scratch.get<float>(num_tokens * hidden_chunk);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < hidden_chunks; ++item) {
      const int64_t begin = item * hidden_chunk;
      const int64_t width = std::min(hidden_chunk, hidden_size - begin);
      std::fill_n(sums, num_tokens * hidden_chunk, 0.0f);
      for (const auto& expert : routing.active) {
        const bf16* down = p.w2 + int64_t{expert.id} * hidden_size * inter_size;
        const float* bias = p.w2_bias ? p.w2_bias + int64_t{expert.id} * hidden_size : nullptr;
        for (int64_t h = begin; h < begin + width; h += 2 * kTile) {
          for (int32_t b = 0; b < expert.num_blocks; b += 2) {
            const int64_t block = expert.first_block + b;
            const int pair = std::min(2, expert.num_blocks - b);
            const uint32_t* right = inter + block * inter_words;
            const bf16* left_0 = down + h * inter_size;
            const bf16* left_1 = left_0 + kTile * inter_size;
            if (pair == 2) {
              multiply<2>(left_0, left_1, right, inter_size, c);
            } else {
              multiply<1>(left_0, left_1, right, inter_size, c);
            }
            for (int half = 0; half < 2; ++half) {
              const int64_t column = h + half * kTile;
              for (int j = 0; j < pair; ++j) {
                add_output(c[half][j], bias ? bias + column : nullptr, routing,
                           routing.blocks[block + j], first_token, sums + column - begin,
                           hidden_chunk);
              }
            }
          }
        }
      }
      for (int64_t t = 0; t < num_tokens; ++t) {
        const float* sum = sums + t * hidden_chunk;
        bf16* out = p.out + (first_token + t) * hidden_size + begin;
        for (int64_t h = 0; h < width; h += kTile) {
          const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sum + h));
          _mm256_storeu_si256((__m256i*)(out + h), rounded);
        }
      }
    }
    _tile_release();
  }
}

}  // namespace sere::moe::amx

#endif
