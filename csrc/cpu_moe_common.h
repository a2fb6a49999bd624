// The CPU fused MoE's problem, its number types, and memory that is kept between calls.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Low-rank stand-ins of a layer's experts, and what its tokens lost of those.
struct Surrogates {
  const bf16* inward;   // [experts, rank, hidden_size], V^T
  const bf16* outward;  // [experts, rank, hidden_size], U^T
  const bf16* bias;     // [experts, hidden_size]
  const float* lost;    // [tokens, experts], or null: nothing
  int64_t experts, rank, hidden_size;
  float scale;  // of what they add
};

// One layer's call. All matrices are dense, rows of the last dimension contiguous. Sizes of weights are
// those that cpu_moe_blocks.h pads them to; weights are in its order for the vector engine.
template <typename T>
struct Problem {
  const T* hidden;        // [tokens, hidden_size]
  const T* w13;           // [experts, 2 * inter_size, hidden_size], gate rows then up rows
  const T* w2;            // [experts, hidden_size, inter_size]
  const float* w13_bias;  // [experts, 2 * inter_size] or null
  const float* w2_bias;   // [experts, hidden_size] or null
  const int32_t* ids;     // [tokens, top_k], negative: empty slot
  const float* weights;   // [tokens, top_k]
  T* out;                 // [tokens, hidden_size]
  int64_t tokens, top_k, experts, hidden_size, inter_size;
  Activation activation;
  Surrogates surrogates = {};
};

// Grows and is kept, so that a decode step touches no fresh pages; large pages where they exist.
class Scratch {
 public:
  template <typename T>
  T* get(size_t count) {
    const size_t unit = count * sizeof(T) < kLargePage ? 64 : kLargePage;
    const size_t bytes = (count * sizeof(T) + unit - 1) / unit * unit;
    if (bytes > capacity_) {
      memory_.reset(std::aligned_alloc(unit, bytes));
      capacity_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      if (unit == kLargePage) madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  static constexpr size_t kLargePage = 2 << 20;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t capacity_ = 0;
};

}  // namespace sere::moe
