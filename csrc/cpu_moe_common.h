// The CPU fused MoE: problem description, routed rows by expert, scratch memory, activations.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_max_threads() { return 1; }
#endif

namespace sere::moe {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

template <typename T>
inline T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {  // to nearest even; NaN stays NaN
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

enum class Activation : int64_t { kSilu = 0, kGeluTanh = 1 };

// Both activations are x * sigmoid(y(x)).
template <Activation kActivation>
inline float activate(float x) {
  float y = x;
  if constexpr (kActivation == Activation::kGeluTanh) {
    y = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // 2 * sqrt(2 / pi)
  }
  return x / (1.0f + std::exp(-y));
}

// One layer's call. All matrices are dense, rows of the last dimension contiguous.
template <typename T>
struct Problem {
  const T* hidden;          // [tokens, hidden_size]
  const T* w13;             // [experts, 2 * inter_size, hidden_size], gate rows then up rows
  const T* w2;              // [experts, hidden_size, inter_size]
  const float* w13_bias;    // [experts, 2 * inter_size] or null
  const float* w2_bias;     // [experts, hidden_size] or null
  const int32_t* ids;       // [tokens, top_k], negative: empty slot
  const float* weights;     // [tokens, top_k]
  T* out;                   // [tokens, hidden_size]
  int64_t tokens, top_k, experts, hidden_size, inter_size;
};

inline constexpr int kBlockRows = 16;  // rows of one AMX tile

// Up to kBlockRows routed rows of one expert.
struct RowBlock {
  int32_t expert;
  int32_t first;  // into Routing::token
  int32_t count;
};

// The routed slots of some tokens, sorted by expert; only experts that have any.
struct Routing {
  struct Expert {
    int32_t id;
    int32_t first_block, num_blocks;
  };
  std::vector<Expert> active;
  std::vector<RowBlock> blocks;
  std::vector<int32_t> token;  // row of Problem::hidden, by sorted position
  std::vector<float> weight;

  template <typename T>
  void build(const Problem<T>& p, int64_t first_token, int64_t num_tokens) {
    std::vector<int32_t>& next = positions_;
    next.assign(p.experts + 1, 0);
    const int32_t* ids = p.ids + first_token * p.top_k;
    const int64_t num_slots = num_tokens * p.top_k;
    for (int64_t s = 0; s < num_slots; ++s) {
      if (is_expert(p, ids[s])) ++next[ids[s] + 1];
    }
    active.clear();
    blocks.clear();
    for (int64_t e = 0; e < p.experts; ++e) {
      const int32_t rows = next[e + 1];
      if (rows > 0) {
        const int32_t num_blocks = (rows + kBlockRows - 1) / kBlockRows;
        active.push_back({int32_t(e), int32_t(blocks.size()), num_blocks});
        for (int32_t b = 0; b < num_blocks; ++b) {
          const int32_t done = b * kBlockRows;
          blocks.push_back({int32_t(e), next[e] + done, std::min(rows - done, kBlockRows)});
        }
      }
      next[e + 1] += next[e];
    }
    token.resize(next[p.experts]);
    weight.resize(next[p.experts]);
    for (int64_t s = 0; s < num_slots; ++s) {
      if (!is_expert(p, ids[s])) continue;
      const int32_t position = next[ids[s]]++;
      token[position] = int32_t(first_token + s / p.top_k);
      weight[position] = p.weights[first_token * p.top_k + s];
    }
  }

 private:
  template <typename T>
  static bool is_expert(const Problem<T>& p, int32_t id) {
    return id >= 0 && id < p.experts;
  }
  std::vector<int32_t> positions_;
};

// Grows and is kept, so that a decode step touches no fresh pages.
class Scratch {
 public:
  template <typename T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > capacity_) {
      memory_.reset(std::aligned_alloc(64, bytes));
      capacity_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t capacity_ = 0;
};

// The largest multiple of `unit` that cuts `size` into enough pieces, times `groups`, to go round.
inline int64_t chunk_size(int64_t size, int64_t unit, int64_t groups, int64_t most) {
  const int64_t wanted = 4 * int64_t{omp_get_max_threads()};
  int64_t chunk = (std::min(size, most) + unit - 1) / unit * unit;
  while (chunk > unit && groups * ((size + chunk - 1) / chunk) < wanted) {
    chunk = (chunk / 2 + unit - 1) / unit * unit;
  }
  return chunk;
}

}  // namespace sere::moe
