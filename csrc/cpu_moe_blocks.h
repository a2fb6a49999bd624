// The order of weights that vector instructions read: blocks of 16 rows, each line by line. A line is
// 64 bytes, a word of 32 bits of each row: a column of float32, or two columns of bfloat16.
//
// A block is where its rows were, so that a matrix is packed and unpacked in place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu_moe_common.h"

namespace sere::moe {

inline constexpr int64_t kBlockRows = 16;
inline constexpr int64_t kLineBytes = 64;
template <typename T>
inline constexpr int kLineColumns = int(kLineBytes / (kBlockRows * sizeof(T)));

// What sizes are padded to with zeros before they are packed.
inline int64_t whole_blocks(int64_t size) { return (size + kBlockRows - 1) / kBlockRows * kBlockRows; }

// Rows to blocks, or back. rows: a multiple of kBlockRows; words: 32 bits, in a row.
inline void pack_blocks(uint32_t* matrix, int64_t rows, int64_t words, bool back) {
#pragma omp parallel
  {
    std::vector<uint32_t> block(kBlockRows * words);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += kBlockRows) {
      uint32_t* at = matrix + first * words;
      std::copy_n(at, kBlockRows * words, block.begin());
      for (int64_t k = 0; k < words; ++k) {
        for (int64_t r = 0; r < kBlockRows; ++r) {
          const int64_t in_rows = r * words + k, in_lines = k * kBlockRows + r;
          if (back) {
            at[in_rows] = block[in_lines];
          } else {
            at[in_lines] = block[in_rows];
          }
        }
      }
    }
  }
}

}  // namespace sere::moe
