// Weights that a thread reads next, requested while it multiplies what it has.
#pragma once

#include <cstdint>

namespace sere::moe {

// Consecutive weight rows in memory.
struct Rows {
  const char* begin = nullptr;
  int64_t bytes = 0;
};

// Several panels of token rows pass over the same weights; each requests its part of what is next,
// so that memory is busy all the time, and also where arithmetic takes longer than reading.
struct Ahead {
  Rows next[2];  // of gate and up rows, or of what stands for them
  int panel, num_panels;

  // Whether this panel requests during a tile's multiplication; `number` counts them.
  bool has_turn(int64_t number) const {
    return uint32_t(number) % uint32_t(num_panels) == uint32_t(panel);
  }
};

}  // namespace sere::moe
