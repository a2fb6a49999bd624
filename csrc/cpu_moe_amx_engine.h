// The engine of AMX tiles: bfloat16, sizes that are multiples of 32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_moe_ahead.h"
#include "cpu_moe_amx.h"
#include "cpu_moe_routing.h"

namespace sere::moe::amx {

class Engine {
 public:
  using Weight = bf16;
  static constexpr int kPanelRows = 2 * kTile;
  static constexpr int kPanelUnit = kTile;
  static constexpr int64_t kStripRows = 0;  // a unit's
  static constexpr int64_t kMostUnitBytes = 64 << 10;

  struct Memory {
    Scratch hidden, inter;
  };

  Engine(const Problem<bf16>& p, const Routing& routing, int64_t, int64_t, Memory& memory)
      : p_(p), routing_(routing) {
    const int64_t panels = routing.panels.size();
    hidden_ = memory.hidden.get<uint32_t>(panels * kPanelRows * p.hidden_size / 2);
    inter_ = memory.inter.get<uint32_t>(panels * kPanelRows * p.inter_size / 2);
  }

  // Tiles are configured for as long as a thread is in a call: other code may use them between.
  struct Thread {
    alignas(64) float products[2][2][kTileWords];
  };
  struct Session {
    Session() { configure_tiles(); }
    ~Session() { _tile_release(); }
  };

  int64_t num_prepared() const { return routing_.panels.size(); }
  void prepare(int64_t index) {
    const Panel& panel = routing_.panels[index];
    uint32_t* to = hidden_ + index * kPanelRows * p_.hidden_size / 2;
    for (int first = 0; first < panel.count; first += kTile) {
      for (int64_t k = 0; k < p_.hidden_size; k += kTileDepth) {
        __m512i rows[kTile];
        for (int r = 0; r < kTile; ++r) {
          rows[r] =
              first + r < panel.count
                  ? _mm512_loadu_si512(p_.hidden + k +
                                       routing_.token[panel.first + first + r] * p_.hidden_size)
                  : _mm512_setzero_si512();
        }
        store_block(rows, to + block_words(p_.hidden_size) * (first / kTile) + k / 2 * kTile);
      }
    }
  }

  void multiply_hidden(const Strip<bf16>& strip, int64_t panel, const Ahead& ahead, Thread& thread,
                       float* const out[2], int64_t stride) const {
    multiply(strip, p_.hidden_size, hidden_ + panel * kPanelRows * p_.hidden_size / 2, panel, ahead,
             thread, out, stride);
  }

  void multiply_inter(const Strip<bf16>& strip, int64_t panel, const Ahead& ahead, Thread& thread,
                      float* const out[2], int64_t stride) const {
    multiply(strip, p_.inter_size, inter_ + panel * kPanelRows * p_.inter_size / 2, panel, ahead,
             thread, out, stride);
  }

  void store_inter(int64_t panel, int64_t begin, int64_t count, const float* values,
                   int64_t stride) {
    const int rows_here = routing_.panels[panel].count;
    uint32_t* to = inter_ + panel * kPanelRows * p_.inter_size / 2;
    for (int first = 0; first < rows_here; first += kTile) {
      for (int64_t k = 0; k < count; k += kTileDepth) {
        __m512i rows[kTile];
        for (int r = 0; r < kTile; ++r) {
          rows[r] = first + r < rows_here ? narrow(values + (first + r) * stride + k)
                                          : _mm512_setzero_si512();
        }
        store_block(rows,
                    to + block_words(p_.inter_size) * (first / kTile) + (begin + k) / 2 * kTile);
      }
    }
  }

 private:
  static int64_t block_words(int64_t depth) { return depth / 2 * kTile; }

  static __m512i narrow(const float* from) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + kTile), _mm512_loadu_ps(from));
  }

  // 16 rows of 16 words become the 16 words of each: a tile of the right operand.
  static void store_block(__m512i rows[kTile], uint32_t* to) {
    transpose(rows);
    for (int r = 0; r < kTile; ++r) _mm512_store_si512(to + r * kTile, rows[r]);
  }

  void multiply(const Strip<bf16>& strip, int64_t depth, const uint32_t* right, int64_t panel,
                const Ahead& ahead, Thread& thread, float* const out[2], int64_t stride) const {
    const int count = routing_.panels[panel].count;
    multiply(strip.first, strip.rows, depth, right, count, ahead, ahead.next[0], thread, out[0],
             stride);
    if (!strip.second) return;
    multiply(strip.second, strip.rows, depth, right, count, ahead, ahead.next[1], thread, out[1],
             stride);
  }

  void multiply(const bf16* weights, int64_t num_weights, int64_t depth, const uint32_t* right,
                int count, const Ahead& ahead, const Rows& rows_ahead, Thread& thread, float* out,
                int64_t stride) const {
    for (int64_t w = 0; w < num_weights; w += 2 * kTile) {
      const bf16* left = weights + w * depth;
      const int64_t offset = w * depth * int64_t{sizeof(bf16)};
      const bool requests = ahead.has_turn(w / (2 * kTile)) && offset < rows_ahead.bytes;
      const char* next = requests ? rows_ahead.begin + offset : nullptr;
      const int blocks = count > kTile ? 2 : 1;
      if (blocks == 2) {
        amx::multiply<2>(left, right, depth, next, thread.products);
      } else {
        amx::multiply<1>(left, right, depth, next, thread.products);
      }
      for (int half = 0; half < 2; ++half) {
        for (int block = 0; block < blocks; ++block) {
          const float* tile = thread.products[half][block];
          float* to = out + block * kTile * stride + w + half * kTile;
          const int rows_here = std::min(kTile, count - block * kTile);
          for (int q = 0; 4 * q < rows_here; ++q) {
            __m512 columns[4];
            four_columns(tile, q, columns);
            for (int i = 0; i < 4 && 4 * q + i < rows_here; ++i) {
              _mm512_storeu_ps(to + (4 * q + i) * stride, columns[i]);
            }
          }
        }
      }
    }
  }

  const Problem<bf16>& p_;
  const Routing& routing_;
  uint32_t* hidden_;  // [panel][block of 16 rows][hidden_size / 2][16 rows], pairs of bfloat16
  uint32_t* inter_;   // the same over the intermediate size
};

}  // namespace sere::moe::amx
