// Re-routing on the CPU, in place: the twin of the CUDA kernel, used by SGLang's CPU engine.
// One thread: a decode batch takes microseconds, less than waking a second one.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <bit>

#include "reroute_core.h"

namespace sere {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

struct Best {
  float similarity;
  int32_t id;  // -1: not looked up yet
};

// Highest similarity within the listed primaries, lowest id on a tie (the list ascends).
Best best_primary(const float* row, const int32_t* primaries, int count) {
  // Two passes, so that the first one vectorizes: a maximum, then where it is.
  float highest = row[primaries[0]];
#pragma omp simd reduction(max : highest)
  for (int i = 0; i < count; ++i) highest = row[primaries[i]] > highest ? row[primaries[i]] : highest;
  int at = 0;
  while (row[primaries[at]] != highest) ++at;
  return {highest, primaries[at]};
}

int count_members(const uint32_t* set) {
  int count = 0;
  for (int word = 0; word < kExpertWords; ++word) count += std::popcount(set[word]);
  return count;
}

void add(uint32_t* set, int id) { set[id >> 5] |= 1u << (id & 31); }

struct Problem {
  int32_t* ids;
  float* weights;  // may be null
  int64_t id_stride, weight_stride;
  int rows, top_k, experts;
  const float* similarity;
  const float* scale;         // may be null
  const uint8_t* row_class;   // may be null
  int64_t* counters;          // may be null
};

void run(const Problem& p, const Control& control) {
  if (!is_active(control, p.top_k)) return;
  const int valid = valid_rows(control, p.rows);
  uint32_t primary[kExpertWords] = {}, before[kExpertWords] = {}, after[kExpertWords] = {};
  for (int row = 0; row < valid; ++row) {
    const int32_t* ids = p.ids + row * p.id_stride;
    const float* weights = p.weights ? p.weights + row * p.weight_stride : nullptr;
    const int s = control.primary_k[class_of(control, p.row_class, row)];
    const uint32_t chosen = primary_slots(weights, p.top_k, s);
    for (int k = 0; k < p.top_k; ++k) {
      if (!is_expert(ids[k], p.experts)) continue;
      add(before, ids[k]);
      if (chosen >> k & 1) add(primary, ids[k]);
    }
  }
  int32_t primaries[kMaxExperts];
  int count = 0;
  for (int word = 0; word < kExpertWords; ++word) {
    for (uint32_t bits = primary[word]; bits; bits &= bits - 1) {
      primaries[count++] = word * 32 + std::countr_zero(bits);
    }
  }
  Best best[kMaxExperts];
  for (int e = 0; e < p.experts; ++e) best[e].id = -1;
  int64_t rerouted = 0, critical = 0;
  const int32_t* usable = nullptr;  // first row that padding rows can copy
  for (int row = 0; row < valid; ++row) {
    int32_t* ids = p.ids + row * p.id_stride;
    float* weights = p.weights ? p.weights + row * p.weight_stride : nullptr;
    const int c = class_of(control, p.row_class, row);
    const uint32_t chosen = primary_slots(weights, p.top_k, control.primary_k[c]);
    bool whole = true;
    for (int k = 0; k < p.top_k; ++k) {
      const int id = ids[k];
      whole &= id >= 0;
      if (!is_expert(id, p.experts)) continue;
      if (!(chosen >> k & 1) && count > 0 && !has(primary, id)) {
        if (best[id].id < 0) {
          best[id] = best_primary(p.similarity + int64_t(id) * p.experts, primaries, count);
        }
        if (is_critical(best[id].similarity, control.threshold[c])) {
          ++critical;
        } else {
          ++rerouted;
          ids[k] = best[id].id;
          if (weights && p.scale) weights[k] *= p.scale[int64_t(id) * p.experts + best[id].id];
        }
      }
      add(after, ids[k]);
    }
    if (whole && usable == nullptr) usable = ids;
  }
  if (count > 0) {
    for (int row = valid; row < p.rows; ++row) {
      int32_t* ids = p.ids + row * p.id_stride;
      for (int k = 0; k < p.top_k; ++k) ids[k] = usable ? usable[k] : primaries[0];
    }
  }
  if (p.counters) {
    p.counters[kForwards] += valid > 0;
    p.counters[kRows] += valid;
    p.counters[kActiveBefore] += count_members(before);
    p.counters[kActiveAfter] += count_members(after);
    p.counters[kRerouted] += rerouted;
    p.counters[kCritical] += critical;
  }
}

template <typename T>
T* pointer(const Optional<TensorView>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor.value().data_ptr()) : nullptr;
}

// Arguments were checked by sere_sglang.ops.reroute_.
void reroute(TensorView ids, Optional<TensorView> weights, TensorView similarity,
             Optional<TensorView> scale, TensorView control, Optional<TensorView> row_class,
             Optional<TensorView> counters) {
  Problem p;
  p.ids = static_cast<int32_t*>(ids.data_ptr());
  p.weights = pointer<float>(weights);
  p.id_stride = ids.stride(0);
  p.weight_stride = weights.has_value() ? weights.value().stride(0) : 0;
  p.rows = int(ids.size(0));
  p.top_k = int(ids.size(1));
  p.experts = int(similarity.size(0));
  p.similarity = static_cast<const float*>(similarity.data_ptr());
  p.scale = pointer<const float>(scale);
  p.row_class = pointer<const uint8_t>(row_class);
  p.counters = pointer<int64_t>(counters);
  if (p.experts > kMaxExperts || p.top_k > kMaxTopK) {
    TVM_FFI_THROW(ValueError) << "reroute: at most 1024 experts and top-32";
  }
  Control words;
  std::memcpy(&words, control.data_ptr(), sizeof(words));
  run(p, words);
}

}  // namespace sere

TVM_FFI_DLL_EXPORT_TYPED_FUNC(reroute, sere::reroute);
