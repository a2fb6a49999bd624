// The routed slots of some tokens, sorted by expert and cut into panels of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu_moe_common.h"

namespace sere::moe {

// Rows of one expert that are multiplied together.
struct Panel {
  int32_t first;  // into Routing::token
  int32_t count;
};

// Only experts that have rows; a slot of weight 0, as re-routing leaves it where slots met, is none.
// A row's place within its expert follows from its token and slot.
struct Routing {
  struct Expert {
    int32_t id;
    int32_t first_panel, num_panels;
  };
  std::vector<Expert> active;  // by id
  std::vector<Panel> panels;
  std::vector<int32_t> token;  // row of Problem::hidden, by sorted position
  std::vector<float> weight;

  // Panels have up to `most` rows, about as many each: but for the last, a multiple of `unit`.
  template <typename T>
  void build(const Problem<T>& p, int64_t first_token, int64_t num_tokens, int most, int unit) {
    std::vector<int32_t>& next = positions_;
    next.assign(p.experts + 1, 0);
    const int32_t* ids = p.ids + first_token * p.top_k;
    const float* weights = p.weights + first_token * p.top_k;
    const int64_t num_slots = num_tokens * p.top_k;
    const auto counts = [&](int64_t s) { return is_expert(p, ids[s]) && weights[s] != 0.0f; };
    for (int64_t s = 0; s < num_slots; ++s) {
      if (counts(s)) ++next[ids[s] + 1];
    }
    active.clear();
    panels.clear();
    for (int64_t e = 0; e < p.experts; ++e) {
      const int32_t rows = next[e + 1];
      if (rows > 0) add_expert(int32_t(e), next[e], rows, most, unit);
      next[e + 1] += next[e];
    }
    token.resize(next[p.experts]);
    weight.resize(next[p.experts]);
    for (int64_t s = 0; s < num_slots; ++s) {
      if (!counts(s)) continue;
      const int32_t position = next[ids[s]]++;
      token[position] = int32_t(first_token + s / p.top_k);
      weight[position] = weights[s];
    }
  }

 private:
  template <typename T>
  static bool is_expert(const Problem<T>& p, int32_t id) {
    return id >= 0 && id < p.experts;
  }

  void add_expert(int32_t id, int32_t first, int32_t rows, int most, int unit) {
    const int32_t first_panel = int32_t(panels.size());
    for (int32_t done = 0, left = (rows + most - 1) / most; done < rows; --left) {
      const int32_t size = ((rows - done + left - 1) / left + unit - 1) / unit * unit;
      panels.push_back({first + done, std::min(size, rows - done)});
      done += size;
    }
    active.push_back({id, first_panel, int32_t(panels.size()) - first_panel});
  }

  std::vector<int32_t> positions_;
};

}  // namespace sere::moe
