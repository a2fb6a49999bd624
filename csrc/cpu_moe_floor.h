// What this machine can do at most, to hold the runner against: loops that only read memory, and
// loops that only multiply and add. The caller times them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu_moe_common.h"
#include "cpu_moe_vector.h"

namespace sere::moe {

// Memory that is read from its begin to its end.
struct Span {
  const char* begin;
  size_t bytes;
};

inline constexpr size_t kReadBlock = 64 << 10;  // what a thread takes at a time
inline constexpr int kReadChains = 8;
inline constexpr int kMultiplyChains = 12;  // three times the latency of the slowest FMA

// Adds up whole vectors, so that no load can be left out; what is left of a block is not read. As
// many bytes are requested, where `ahead` points.
inline Words sum_block(const Span& block, const char* ahead) {
  Words sums[kReadChains] = {};
  constexpr size_t kStep = sizeof(sums);
  for (size_t at = 0; at + kStep <= block.bytes; at += kStep) {
    for (size_t line = 0; line < kStep; line += 64) __builtin_prefetch(ahead + at + line, 0, 2);
    for (int i = 0; i < kReadChains; ++i) {
      sums[i] += load_as<Words>(block.begin + at + i * sizeof(Words));
    }
  }
  for (int i = 1; i < kReadChains; ++i) sums[0] += sums[i];
  return sums[0];
}

// Every thread takes the next block as it is done, and requests it while it reads the one before:
// what the runner does, without the arithmetic. The result keeps the loads alive.
inline uint32_t read_spans(const std::vector<Span>& spans) {
  std::vector<Span> blocks;
  for (const Span& span : spans) {
    for (size_t at = 0; at < span.bytes; at += kReadBlock) {
      blocks.push_back({span.begin + at, std::min(kReadBlock, span.bytes - at)});
    }
  }
  uint32_t total = 0;
  std::atomic<size_t> next{0};
#pragma omp parallel reduction(+ : total)
  {
    size_t b = next++;
    while (b < blocks.size()) {
      const size_t following = next++;
      const Words sums = sum_block(blocks[b], blocks[std::min(following, blocks.size() - 1)].begin);
      for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
      b = following;
    }
  }
  return total;
}

// Every thread multiplies and adds float32 registers, `steps` times each of its chains. Returns the
// number of operations: two per lane, chain, step and thread.
inline int64_t multiply_add_registers(int64_t steps) {
  const int threads = omp_get_max_threads();
  volatile float kept = 0.5f;
#pragma omp parallel num_threads(threads)
  {
    const Floats factor = broadcast(kept), summand = broadcast(kept * 0.25f);
    Floats chains[kMultiplyChains];
    for (int i = 0; i < kMultiplyChains; ++i) chains[i] = summand + float(i);
    for (int64_t step = 0; step < steps; ++step) {
      for (int i = 0; i < kMultiplyChains; ++i)
        chains[i] = multiply_add(chains[i], factor, summand);
    }
    for (int i = 1; i < kMultiplyChains; ++i) chains[0] += chains[i];
    if (chains[0][0] < 0.0f) kept = chains[0][0];
  }
  return 2 * int64_t{kLanes} * kMultiplyChains * steps * threads;
}

}  // namespace sere::moe
