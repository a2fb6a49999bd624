// Re-routing on the CPU, in place: the twin of the CUDA kernel, used by SGLang's CPU engine.
// One thread: a decode batch takes microseconds, less than waking a second one.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

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
  while (at < count - 1 && row[primaries[at]] != highest) ++at;
  return {highest, primaries[at]};
}

// The same from the row's neighbours, sorted by similarity, ties by id: a few steps, unless P is
// small.
Best first_primary(const float* row, const int16_t* neighbors, const uint8_t* primary, int experts) {
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
  const int16_t* neighbors;   // may be null
  const float* scale;         // may be null
  const uint8_t* row_class;   // may be null
  int64_t* counters;          // may be null
};

// Of a forward, by expert. A byte each: setting one waits for no earlier value of its neighbours.
struct Experts {
  uint8_t used[kMaxExperts], primary[kMaxExperts], kept[kMaxExperts];
  Best best[kMaxExperts];  // what stands in for it
};

void clear(Experts& of, int experts) {
  std::memset(of.used, 0, experts);
  std::memset(of.primary, 0, experts);
  std::memset(of.kept, 0, experts);
  for (int e = 0; e < experts; ++e) of.best[e].id = -1;
}

int count(const uint8_t* flags, int experts) {
  int sum = 0;
  for (int e = 0; e < experts; ++e) sum += flags[e];
  return sum;
}

void vote(const Problem& p, const Control& control, int valid, Experts& of) {
  for (int row = 0; row < valid; ++row) {
    const int32_t* ids = p.ids + row * p.id_stride;
    const float* weights = p.weights ? p.weights + row * p.weight_stride : nullptr;
    const int s = control.primary_k[class_of(control, p.row_class, row)];
    const uint32_t chosen = primary_slots(weights, p.top_k, s);
    for (int k = 0; k < p.top_k; ++k) {
      if (!is_expert(ids[k], p.experts)) continue;
      of.used[ids[k]] = 1;
      of.primary[ids[k]] |= chosen >> k & 1;
    }
  }
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
  int64_t rerouted = 0, critical = 0;
  const int32_t* usable = nullptr;  // first row that padding rows can copy
  for (int row = 0; row < valid && num_primaries > 0; ++row) {
    int32_t* ids = p.ids + row * p.id_stride;
    float* weights = p.weights ? p.weights + row * p.weight_stride : nullptr;
    const float threshold = control.threshold[class_of(control, p.row_class, row)];
    bool whole = true;
    for (int k = 0; k < p.top_k; ++k) {
      const int id = ids[k];
      whole &= id >= 0;
      // An expert in a primary slot is primary, so ranks do not matter any more.
      if (!is_expert(id, p.experts) || of.primary[id]) continue;
      const int64_t at = int64_t(id) * p.experts;
      Best& best = of.best[id];
      if (best.id < 0) {
        best = p.neighbors
                   ? first_primary(p.similarity + at, p.neighbors + at, of.primary, p.experts)
                   : best_primary(p.similarity + at, primaries, num_primaries);
      }
      if (is_critical(best.similarity, threshold)) {
        ++critical;
        of.kept[id] = 1;
      } else {
        ++rerouted;
        ids[k] = best.id;
        if (weights && p.scale) weights[k] *= p.scale[at + best.id];
      }
    }
    if (whole && usable == nullptr) usable = ids;
  }
  for (int row = valid; row < p.rows && num_primaries > 0; ++row) {
    int32_t* ids = p.ids + row * p.id_stride;
    for (int k = 0; k < p.top_k; ++k) ids[k] = usable ? usable[k] : primaries[0];
  }
  if (p.counters) {
    const int before = count(of.used, p.experts);
    p.counters[kForwards] += valid > 0;
    p.counters[kRows] += valid;
    p.counters[kActiveBefore] += before;
    // With primaries, what is active afterwards is those and the critical experts.
    p.counters[kActiveAfter] +=
        num_primaries > 0 ? num_primaries + count(of.kept, p.experts) : before;
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
             Optional<TensorView> row_class, Optional<TensorView> counters) {
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
  if (p.experts > kMaxExperts || p.top_k > kMaxTopK) {
    TVM_FFI_THROW(ValueError) << "reroute: at most 1024 experts and top-32";
  }
  Control words;
  std::memcpy(&words, control.data_ptr(), sizeof(words));
  run(p, words);
}

}  // namespace sere

TVM_FFI_DLL_EXPORT_TYPED_FUNC(reroute, sere::reroute);
