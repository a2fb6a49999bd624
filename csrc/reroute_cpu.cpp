// Re-routing on the CPU, in place: the twin of the CUDA kernel, used by SGLang's CPU engine.
// One thread: a decode batch takes microseconds, less than waking a second one.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "reroute_distinct.h"

namespace sere {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

struct Best {
  float similarity;
  int32_t id;
};

// Highest similarity within the listed primaries, lowest id on a tie (the list ascends).
Best best_primary(const float* row, const int32_t* primaries, int count) {
  // Two passes, so that the first one vectorizes: a maximum, then where it is.
  float highest = row[primaries[0]];
#pragma omp simd reduction(max : highest)
  for (int i = 0; i < count; ++i)
    highest = row[primaries[i]] > highest ? row[primaries[i]] : highest;
  int at = 0;
  while (at < count - 1 && row[primaries[at]] != highest) ++at;
  return {highest, primaries[at]};
}

// The same from the row's neighbours, sorted by similarity, ties by id: a few steps, unless P is
// small.
Best first_primary(const float* row, const int16_t* neighbors, const uint8_t* primary,
                   int experts) {
  int at = 0;
  while (at < experts - 1 && !primary[neighbors[at]]) ++at;
  return {row[neighbors[at]], neighbors[at]};
}

struct Problem {
  int32_t* ids;
  float* weights;  // may be null
  int64_t id_stride, weight_stride;
  int rows, top_k, experts;
  const float* similarity;
  const int16_t* neighbors;  // may be null
  const float* scale;        // may be null
  const uint8_t* row_class;  // may be null
  int64_t* counters;         // may be null
  bool distinct;             // needs weights
};

// Of a forward, by expert. A byte each: setting one waits for no earlier value of its neighbours.
struct Experts {
  uint8_t used[kMaxExperts];  // bit c: by a row of class c
  uint8_t primary[kMaxExperts];
  Best best[kMaxExperts];         // what stands in for it, if it is used and not primary
  uint32_t active[kExpertWords];  // A: primary, or critical to a row that uses it
  int num_used, num_active;
  uint8_t held[kMaxExperts];  // all 0 between two rows
};

void clear(Experts& of, int experts) {
  std::memset(of.used, 0, experts);
  std::memset(of.primary, 0, experts);
  std::memset(of.active, 0, sizeof(of.active));
  std::memset(of.held, 0, experts);
  of.num_used = of.num_active = 0;
}

void vote(const Problem& p, const Control& control, int valid, Experts& of) {
  for (int row = 0; row < valid; ++row) {
    const int32_t* ids = p.ids + row * p.id_stride;
    const float* weights = p.weights ? p.weights + row * p.weight_stride : nullptr;
    const int c = class_of(control, p.row_class, row);
    const uint32_t chosen = primary_slots(weights, p.top_k, control.primary_k[c]);
    for (int k = 0; k < p.top_k; ++k) {
      if (!is_expert(ids[k], p.experts)) continue;
      of.used[ids[k]] |= 1 << c;
      of.primary[ids[k]] |= chosen >> k & 1;
    }
  }
}

// Stand-ins of all that may move, and A. An expert is critical to rows of one class and moves in
// those of another; P is not empty.
void match(const Problem& p, const Control& control, const int32_t* primaries, int num_primaries,
           Experts& of) {
  for (int e = 0; e < p.experts; ++e) {
    of.num_used += of.used[e] != 0;
    bool stays = of.primary[e];
    if (of.used[e] && !stays) {
      const int64_t at = int64_t(e) * p.experts;
      of.best[e] = p.neighbors
                       ? first_primary(p.similarity + at, p.neighbors + at, of.primary, p.experts)
                       : best_primary(p.similarity + at, primaries, num_primaries);
      for (int c = 0; c < num_classes(control); ++c) {
        stays |= of.used[e] >> c & 1 && is_critical(of.best[e].similarity, control.threshold[c]);
      }
    }
    of.active[e >> 5] |= uint32_t(stays) << (e & 31);
    of.num_active += stays;
  }
}

bool holds_one_twice(const int32_t* ids, int top_k, int experts, uint8_t* held) {
  bool twice = false;
  for (int k = 0; k < top_k; ++k) {
    if (!is_expert(ids[k], experts)) continue;
    twice |= held[ids[k]];
    held[ids[k]] = 1;
  }
  for (int k = 0; k < top_k; ++k) {
    if (is_expert(ids[k], experts)) held[ids[k]] = 0;
  }
  return twice;
}

void run(const Problem& p, const Control& control) {
  if (!is_active(control, p.top_k)) return;
  const int valid = valid_rows(control, p.rows);
  Experts of;
  clear(of, p.experts);
  vote(p, control, valid, of);
  int32_t primaries[kMaxExperts];
  int num_primaries = 0;
  for (int e = 0; e < p.experts; ++e) {
    primaries[num_primaries] = e;
    num_primaries += of.primary[e];
  }
  if (num_primaries == 0) {
    for (int e = 0; e < p.experts; ++e) of.num_used += of.used[e] != 0;
    of.num_active = of.num_used;
  } else {
    match(p, control, primaries, num_primaries, of);
  }
  const ExpertBits a = {of.active, (p.experts + 31) / 32};
  int64_t rerouted = 0, critical = 0;
  const int32_t* usable = nullptr;  // first row that padding rows can copy
  int32_t own[kMaxTopK];
  for (int row = 0; row < valid && num_primaries > 0; ++row) {
    int32_t* ids = p.ids + row * p.id_stride;
    float* weights = p.weights ? p.weights + row * p.weight_stride : nullptr;
    const float threshold = control.threshold[class_of(control, p.row_class, row)];
    bool whole = true, moved = false;
    for (int k = 0; k < p.top_k; ++k) {
      const int id = own[k] = ids[k];
      whole &= id >= 0;
      // An expert in a primary slot is primary, so ranks do not matter any more.
      if (!is_expert(id, p.experts) || of.primary[id]) continue;
      const Best& best = of.best[id];
      if (is_critical(best.similarity, threshold)) {
        ++critical;
      } else {
        ++rerouted;
        moved = true;
        ids[k] = best.id;
        if (weights && p.scale) weights[k] *= p.scale[int64_t(id) * p.experts + best.id];
      }
    }
    if (p.distinct && moved && holds_one_twice(ids, p.top_k, p.experts, of.held)) {
      const uint32_t live = live_slots(ids, p.top_k, p.experts);
      const uint32_t taken = merge_slots(p.top_k, live, ids, weights);
      fill_free_slots(a, p.top_k, live, taken, own, ids, weights);
    }
    if (whole && usable == nullptr) usable = ids;
  }
  for (int row = valid; row < p.rows && num_primaries > 0; ++row) {
    int32_t* ids = p.ids + row * p.id_stride;
    for (int k = 0; k < p.top_k; ++k) ids[k] = usable ? usable[k] : primaries[0];
    if (p.distinct && usable == nullptr) fill_padding_slots(a, p.top_k, ids);
  }
  if (p.counters) {
    p.counters[kForwards] += valid > 0;
    p.counters[kRows] += valid;
    p.counters[kActiveBefore] += of.num_used;
    p.counters[kActiveAfter] += of.num_active;
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
             Optional<TensorView> neighbors, Optional<TensorView> scale, TensorView control,
             Optional<TensorView> row_class, Optional<TensorView> counters, bool distinct) {
  Problem p;
  p.ids = static_cast<int32_t*>(ids.data_ptr());
  p.weights = pointer<float>(weights);
  p.id_stride = ids.stride(0);
  p.weight_stride = weights.has_value() ? weights.value().stride(0) : 0;
  p.rows = int(ids.size(0));
  p.top_k = int(ids.size(1));
  p.experts = int(similarity.size(0));
  p.similarity = static_cast<const float*>(similarity.data_ptr());
  p.neighbors = pointer<const int16_t>(neighbors);
  p.scale = pointer<const float>(scale);
  p.row_class = pointer<const uint8_t>(row_class);
  p.counters = pointer<int64_t>(counters);
  p.distinct = distinct;
  if (p.experts > kMaxExperts || p.top_k > kMaxTopK) {
    TVM_FFI_THROW(ValueError) << "reroute: at most 1024 experts and top-32";
  }
  Control words;
  std::memcpy(&words, control.data_ptr(), sizeof(words));
  run(p, words);
}

}  // namespace sere

TVM_FFI_DLL_EXPORT_TYPED_FUNC(reroute, sere::reroute);
