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
      for (int64_t r = 0; r < s_.rank; ++r) {
        const bf16* inward = s_.inward + (e.id * s_.rank + r) * s_.hidden_size;
        inner_[i * s_.rank + r] = slots_[i].weight * dot(inward, x.data(), s_.hidden_size);
      }
    }
  }

  // Once all are projected: `columns` of the hidden size from `begin` on, to sums [tokens, stride].
  void add(int64_t begin, int64_t columns, int64_t stride, float* sums) const {
    for (const Expert& e : experts_) {
      const bf16* bias = s_.bias + e.id * s_.hidden_size + begin;
      const bf16* outward = s_.outward + e.id * s_.rank * s_.hidden_size + begin;
      for (int32_t i = e.first; i < e.first + e.count; ++i) {
        float* sum = sums + slots_[i].token * stride;
        add_scaled(slots_[i].weight, bias, columns, sum);
        for (int64_t r = 0; r < s_.rank; ++r) {
          add_scaled(inner_[i * s_.rank + r], outward + r * s_.hidden_size, columns, sum);
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

  static float dot(const bf16* a, const float* b, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += to_float(a[i]) * b[i];
    return sum;
  }

  static void add_scaled(float factor, const bf16* from, int64_t columns, float* sum) {
#pragma omp simd
    for (int64_t h = 0; h < columns; ++h) sum[h] += factor * to_float(from[h]);
  }

  Surrogates s_{};
  int64_t first_token_ = 0;
  std::vector<Expert> experts_;
  std::vector<Slot> slots_;
  std::vector<float> inner_;  // [slot, rank]
  std::vector<int32_t> next_;
};

}  // namespace sere::moe
