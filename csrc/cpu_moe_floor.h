// What this machine can do at most, to hold the runner against: loops that only read memory, and
// loops that only multiply and add. The caller times them.
#pragma once

#include <algorithm>
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

inline constexpr size_t kReadBlock = 64 << 10;   // what a thread takes at a time
inline constexpr size_t kReadAhead = 1 << 10;    // bytes; farther gained nothing
inline constexpr int kReadChains = 8;
inline constexpr int kMultiplyChains = 12;       // three times the latency of the slowest FMA

// Adds up whole vectors, so that no load can be left out; what is left of a block is not read.
inline Words sum_block(const char* from, size_t bytes) {
  Words sums[kReadChains] = {};
  constexpr size_t kStep = sizeof(sums);
  for (size_t at = 0; at + kStep <= bytes; at += kStep) {
    for (size_t line = 0; line < kStep; line += 64) {
      __builtin_prefetch(from + at + kReadAhead + line);
    }
    for (int i = 0; i < kReadChains; ++i) {
      sums[i] += load_as<Words>(from + at + i * sizeof(Words));
    }
  }
  for (int i = 1; i < kReadChains; ++i) sums[0] += sums[i];
  return sums[0];
}

// Every thread reads its share of the spans, blocks in turn. The result keeps the loads alive.
inline uint32_t read_spans(const std::vector<Span>& spans) {
  std::vector<Span> blocks;
  for (const Span& span : spans) {
    for (size_t at = 0; at < span.bytes; at += kReadBlock) {
      blocks.push_back({span.begin + at, std::min(kReadBlock, span.bytes - at)});
    }
  }
  uint32_t total = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : total)
  for (size_t b = 0; b < blocks.size(); ++b) {
    const Words sums = sum_block(blocks[b].begin, blocks[b].bytes);
    for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
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
      for (int i = 0; i < kMultiplyChains; ++i) chains[i] = multiply_add(chains[i], factor, summand);
    }
    for (int i = 1; i < kMultiplyChains; ++i) chains[0] += chains[i];
    if (chains[0][0] < 0.0f) kept = chains[0][0];
  }
  return 2 * int64_t{kLanes} * kMultiplyChains * steps * threads;
}

}  // namespace sere::moe
