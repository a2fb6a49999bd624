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
  Rows next;
  int64_t row_bytes;  // of the weights at hand
  int panel, num_panels;
  int64_t column_bytes = 0;  // before the columns at hand

  Ahead from(int64_t bytes) const {
    Ahead moved = *this;
    moved.column_bytes = bytes;
    return moved;
  }

  // Whether this panel requests during a multiplication of weight rows, counted by `number`.
  bool has_turn(int64_t number) const { return number % num_panels == panel; }

  // Where to request while `weights`, which begin at row w, are multiplied: their own place, which
  // costs little, if it is another panel's turn.
  const char* of(const void* weights, int64_t w) const {
    const int64_t offset = w * row_bytes + column_bytes;
    return has_turn(w) && offset < next.bytes ? next.begin + offset
                                              : static_cast<const char*>(weights);
  }
};

}  // namespace sere::moe
