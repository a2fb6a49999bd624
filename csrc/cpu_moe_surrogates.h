// What tokens lost is made up for: out[t] += weight[t, e] (U_e V_e^T x_t + b_e), summed over the
// experts e that the batch did not load. Reference: sere_sglang/ops/surrogates.py.
//
// Sorted by expert, so that a surrogate is read from memory once: first what each V_e^T makes of its
// tokens, an expert a unit of work, then any columns of the sums, independent of each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu_moe_common.h"

namespace sere::moe {

// Of some tokens: the slots that lost their expert.
class Losses {
 public:
  void build(const Surrogates& s, int64_t first_token, int64_t num_tokens) {
    experts_.clear();
    if (s.lost == nullptr) return;
    s_ = s;
    first_token_ = first_token;
    next_.assign(s.experts + 1, 0);
    const float* lost = s.lost + first_token * s.experts;
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t e = 0; e < s.experts; ++e) next_[e + 1] += lost[t * s.experts + e] != 0.0f;
    }
    for (int64_t e = 0; e < s.experts; ++e) {
      if (next_[e + 1] > 0) experts_.push_back({int32_t(e), next_[e], next_[e + 1]});
      next_[e + 1] += next_[e];
    }
    if (experts_.empty()) return;
    slots_.resize(next_[s.experts]);
    inner_.resize(slots_.size() * s.rank);
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t e = 0; e < s.experts; ++e) {
        const float weight = lost[t * s.experts + e];
        if (weight != 0.0f) slots_[next_[e]++] = {int32_t(t), s.scale * weight};
      }
    }
  }

  int64_t num_experts() const { return int64_t(experts_.size()); }

  // V_e^T x, weighted, of every token that lost the expert. hidden: [tokens, hidden_size].
  template <typename T>
  void project(int64_t expert, const T* hidden) {
    thread_local std::vector<float> x;
    x.resize(s_.hidden_size);
    const Expert& e = experts_[expert];
    for (int32_t i = e.first; i < e.first + e.count; ++i) {
      const T* row = hidden + (first_token_ + slots_[i].token) * s_.hidden_size;
      std::transform(row, row + s_.hidden_size, x.begin(), [](T value) { return to_float(value); });
      const bf16* inward = s_.inward + e.id * s_.rank * s_.hidden_size;
      float* inner = inner_.data() + i * s_.rank;
      int64_t r = 0;
      for (; r + 4 <= s_.rank; r += 4) dots<4>(inward + r * s_.hidden_size, x.data(), inner + r);
      for (; r < s_.rank; ++r) dots<1>(inward + r * s_.hidden_size, x.data(), inner + r);
      for (r = 0; r < s_.rank; ++r) inner[r] *= slots_[i].weight;
    }
  }

  // Once all are projected: `columns` of the hidden size from `begin` on, to sums [tokens, stride].
  void add(int64_t begin, int64_t columns, int64_t stride, float* sums) const {
    for (const Expert& e : experts_) {
      for (int64_t at = 0; at < columns; at += kBlock) {
        const bf16* bias = s_.bias + e.id * s_.hidden_size + begin + at;
        const bf16* outward = s_.outward + e.id * s_.rank * s_.hidden_size + begin + at;
        for (int32_t i = e.first; i < e.first + e.count; ++i) {
          float* sum = sums + slots_[i].token * stride + at;
          if (at + kBlock <= columns) {
            add_columns(i, bias, outward, kBlock, sum);
          } else {
            add_columns(i, bias, outward, columns - at, sum);
          }
        }
      }
    }
  }

 private:
  struct Expert {
    int32_t id, first, count;  // into slots_
  };
  struct Slot {
    int32_t token;  // of those at hand
    float weight;
  };

  static constexpr int64_t kBlock = 64;  // columns whose sums stay in registers

  // Of kRows rows of V^T, 1 or 4, with one token: sums that do not wait for each other.
  template <int kRows>
  void dots(const bf16* rows, const float* x, float* out) const {
    const int64_t next = kRows == 4 ? s_.hidden_size : 0;
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t h = 0; h < s_.hidden_size; ++h) {
      a += to_float(rows[h]) * x[h];
      if constexpr (kRows == 4) {
        b += to_float(rows[next + h]) * x[h];
        c += to_float(rows[2 * next + h]) * x[h];
        d += to_float(rows[3 * next + h]) * x[h];
      }
    }
    const float sums[4] = {a, b, c, d};
    std::copy_n(sums, kRows, out);
  }

  // sum += weight * (U_e inner + b_e), `count` columns of it, where bias and outward begin.
  [[gnu::always_inline]] inline void add_columns(int32_t slot, const bf16* bias,
                                                 const bf16* outward, int64_t count,
                                                 float* sum) const {
    float added[kBlock];
    for (int64_t h = 0; h < count; ++h) added[h] = slots_[slot].weight * to_float(bias[h]);
    for (int64_t r = 0; r < s_.rank; ++r) {
      const float inner = inner_[slot * s_.rank + r];
      const bf16* row = outward + r * s_.hidden_size;
      for (int64_t h = 0; h < count; ++h) added[h] += inner * to_float(row[h]);
    }
    for (int64_t h = 0; h < count; ++h) sum[h] += added[h];
  }

  Surrogates s_{};
  int64_t first_token_ = 0;
  std::vector<Expert> experts_;
  std::vector<Slot> slots_;
  std::vector<float> inner_;  // [slot, rank]
  std::vector<int32_t> next_;
};

}  // namespace sere::moe
