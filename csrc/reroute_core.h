// The decisions of re-routing, one token or expert at a time: shared by the CPU twin and the CUDA
// kernel, so that the algorithm itself is tested on machines without a GPU. No allocation, no
// library. Semantics: docs/semantics.md; oracle: tests/ops/oracle.py.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SERE_HD __host__ __device__ __forceinline__
#else
#define SERE_HD inline
#endif

namespace sere {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;
constexpr int kMaxClasses = 4;
constexpr int kExpertWords = kMaxExperts / 32;

// sere_sglang/ops/control.py
struct Control {
  int32_t enabled;
  int32_t num_valid;
  int32_t num_classes;
  int32_t reserved0;
  int32_t primary_k[kMaxClasses];
  float threshold[kMaxClasses];
  int32_t reserved1[4];
};
static_assert(sizeof(Control) == 64, "16 words");

// sere_sglang/ops/counters.py
enum Counter { kForwards, kRows, kActiveBefore, kActiveAfter, kRerouted, kCritical, kNumCounters };

SERE_HD int num_classes(const Control& c) {
  return c.num_classes < 1 ? 1 : c.num_classes > kMaxClasses ? kMaxClasses : c.num_classes;
}

// Whether this forward may change anything at all.
SERE_HD bool is_active(const Control& c, int top_k) {
  if (c.enabled == 0) return false;
  const int classes = num_classes(c);
  if (classes == 1) return c.primary_k[0] > 0 && c.primary_k[0] < top_k;
  bool some_class_moves = false;
  for (int i = 0; i < classes; ++i) some_class_moves |= c.primary_k[i] < top_k;
  return some_class_moves;
}

SERE_HD int valid_rows(int num_valid, int rows) {
  return num_valid < 0 || num_valid > rows ? rows : num_valid;
}
SERE_HD int valid_rows(const Control& c, int rows) { return valid_rows(c.num_valid, rows); }

// Classes beyond the block's are read as its last one.
SERE_HD int clamp_class(const Control& c, int row_class) {
  const int last = num_classes(c) - 1;
  return row_class < last ? row_class : last;
}

SERE_HD int class_of(const Control& c, const uint8_t* row_class, int row) {
  return row_class == nullptr ? 0 : clamp_class(c, row_class[row]);
}

// Bit k is set when slot k is one of the row's S best: weight descending, ties by slot order.
// Without weights the slots are ranked already.
SERE_HD uint32_t primary_slots(const float* weights, int top_k, int primary_k) {
  const uint32_t every = top_k >= 32 ? 0xffffffffu : (1u << top_k) - 1;
  const int s = primary_k < 1 ? 1 : primary_k;
  if (s >= top_k) return every;
  if (weights == nullptr) return (1u << s) - 1;
  uint32_t chosen = 0;
  for (int pick = 0; pick < s; ++pick) {
    int best = -1;
    for (int k = 0; k < top_k; ++k) {
      if (!(chosen >> k & 1) && (best < 0 || weights[k] > weights[best])) best = k;
    }
    chosen |= 1u << best;
  }
  return chosen;
}

SERE_HD bool is_expert(int id, int experts) { return id >= 0 && id < experts; }

SERE_HD bool has(const uint32_t* set, int id) { return set[id >> 5] >> (id & 31) & 1; }

// Floats as integers in the same order: larger float, larger key; -0 equals 0. No float has key 0.
SERE_HD uint32_t ordered_key(float value) {
  value += 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

SERE_HD float from_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// A stand-in that is below the row's threshold does not stand in: the expert is critical.
SERE_HD bool is_critical(float similarity, float threshold) {
  return threshold > 0.0f && similarity < threshold;
}

}  // namespace sere
