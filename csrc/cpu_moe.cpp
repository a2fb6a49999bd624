// CPU fused MoE of one layer: out[t] = sum over slots of weight * down(act(gate(x)) * up(x)).
// Loops over active experts only; negative ids and slots of weight 0 are none. Surrogates make up for
// what tokens lost of others.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <algorithm>
#include <mutex>
#include <string>

#include "cpu_moe_blocks.h"
#include "cpu_moe_common.h"
#include "cpu_moe_floor.h"
#include "cpu_moe_run.h"
#include "cpu_moe_tile.h"
#include "cpu_moe_vector_engine.h"

#ifdef __AMX_BF16__
#include "cpu_moe_amx_engine.h"
#endif

namespace sere::moe {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr int64_t kTokensAtOnce = 1024;  // bounds the scratch memory of a long prefill

void check(bool holds, const std::string& what) {
  if (!holds) TVM_FFI_THROW(ValueError) << "cpu_moe: " << what;
}

void check_tensor(const TensorView& t, const char* name, std::initializer_list<int64_t> shape,
                  DLDataType dtype) {
  const DLDataType actual = t.dtype();
  check(t.device().device_type == kDLCPU, std::string(name) + " must be on the CPU");
  check(actual.code == dtype.code && actual.bits == dtype.bits && actual.lanes == dtype.lanes,
        std::string(name) + " has the wrong dtype");
  bool same = t.ndim() == int(shape.size());
  int axis = 0;
  for (int64_t size : shape) same = same && t.size(axis++) == size;
  check(same, std::string(name) + " has the wrong shape");
  check(t.numel() == 0 || t.IsContiguous(), std::string(name) + " must be contiguous");
}

const float* bias_pointer(const Optional<TensorView>& bias, const char* name, int64_t experts,
                          int64_t width) {
  if (!bias.has_value()) return nullptr;
  check_tensor(bias.value(), name, {experts, width}, {kDLFloat, 32, 1});
  return static_cast<const float*>(bias.value().data_ptr());
}

// AMD (Zen 4) multiplies pairs of bfloat16 twice as fast as float32, an Intel Xeon half as fast: both
// measured. The choice is the machine's, not a measurement's, so that equal servers give equal results.
bool multiplies_bf16_fast() {
#ifdef __AVX512BF16__
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

template <typename Engine>
void run_with(const Problem<typename Engine::Weight>& p) {
  static Workspace<Engine> workspace;
  for (int64_t first = 0; first < p.tokens; first += kTokensAtOnce) {
    const int64_t count = std::min(kTokensAtOnce, p.tokens - first);
    run(p, first, count, workspace);
  }
}

// Whether the weights of such a layer are read in blocks: AMX tiles read rows.
bool reads_blocks([[maybe_unused]] bool is_bf16, [[maybe_unused]] int64_t hidden_size,
                  [[maybe_unused]] int64_t inter_size) {
#ifdef __AMX_BF16__
  return !(is_bf16 && hidden_size % amx::kTileDepth == 0 && inter_size % amx::kTileDepth == 0);
#else
  return true;
#endif
}

template <typename T>
void run_best(const Problem<T>& p) {
  // One call at a time: the workspace is shared, and OpenMP uses every core anyway.
  static std::mutex one_call;
  std::lock_guard<std::mutex> lock(one_call);
  if constexpr (std::is_same_v<T, bf16>) {
#ifdef __AMX_BF16__
    if (!reads_blocks(true, p.hidden_size, p.inter_size)) return run_with<amx::Engine>(p);
#endif
#ifdef __AVX512BF16__
    if (multiplies_bf16_fast()) return run_with<VectorEngine<NativeBf16>>(p);
#endif
  }
  run_with<VectorEngine<Float32<T>>>(p);
}

// lost: float32 [tokens, experts] or none; the other tensors are bfloat16.
Surrogates surrogates_of(const Optional<TensorView>& lost, const Optional<TensorView>& inward,
                         const Optional<TensorView>& outward, const Optional<TensorView>& bias,
                         int64_t tokens, int64_t hidden_size, double scale) {
  if (!lost.has_value()) return {};
  check(inward.has_value() && outward.has_value() && bias.has_value(), "lost needs surrogates");
  check(inward.value().ndim() == 3, "surrogate_in must have three dimensions");
  const int64_t experts = inward.value().size(0), rank = inward.value().size(1);
  constexpr DLDataType kBf16{kDLBfloat, 16, 1};
  check_tensor(lost.value(), "lost", {tokens, experts}, {kDLFloat, 32, 1});
  check_tensor(inward.value(), "surrogate_in", {experts, rank, hidden_size}, kBf16);
  check_tensor(outward.value(), "surrogate_out", {experts, rank, hidden_size}, kBf16);
  check_tensor(bias.value(), "surrogate_bias", {experts, hidden_size}, kBf16);
  return {.inward = static_cast<const bf16*>(inward.value().data_ptr()),
          .outward = static_cast<const bf16*>(outward.value().data_ptr()),
          .bias = static_cast<const bf16*>(bias.value().data_ptr()),
          .lost = static_cast<const float*>(lost.value().data_ptr()),
          .experts = experts,
          .rank = rank,
          .hidden_size = hidden_size,
          .scale = float(scale)};
}

template <typename T>
void dispatch(const TensorView& hidden, const TensorView& w13, const TensorView& w2,
              const Optional<TensorView>& w13_bias, const Optional<TensorView>& w2_bias,
              const TensorView& ids, const TensorView& weights, const TensorView& out,
              int64_t inter_size, int64_t activation, DLDataType dtype,
              const Surrogates& surrogates) {
  check(hidden.ndim() == 2 && ids.ndim() == 2 && w2.ndim() == 3, "wrong number of dimensions");
  const int64_t tokens = hidden.size(0), hidden_size = hidden.size(1);
  const int64_t experts = w2.size(0), top_k = ids.size(1);
  const int64_t hidden_depth = whole_blocks(hidden_size), inter_depth = whole_blocks(inter_size);
  check_tensor(hidden, "hidden", {tokens, hidden_size}, dtype);
  check_tensor(w13, "w13", {experts, 2 * inter_depth, hidden_depth}, dtype);
  check_tensor(w2, "w2", {experts, hidden_depth, inter_depth}, dtype);
  check_tensor(ids, "topk_ids", {tokens, top_k}, {kDLInt, 32, 1});
  check_tensor(weights, "topk_weights", {tokens, top_k}, {kDLFloat, 32, 1});
  check_tensor(out, "out", {tokens, hidden_size}, dtype);
  check(activation == int64_t(Activation::kSilu) || activation == int64_t(Activation::kGeluTanh),
        "unknown activation");
  run_best(Problem<T>{
      .hidden = static_cast<const T*>(hidden.data_ptr()),
      .w13 = static_cast<const T*>(w13.data_ptr()),
      .w2 = static_cast<const T*>(w2.data_ptr()),
      .w13_bias = bias_pointer(w13_bias, "w13_bias", experts, 2 * inter_size),
      .w2_bias = bias_pointer(w2_bias, "w2_bias", experts, hidden_size),
      .ids = static_cast<const int32_t*>(ids.data_ptr()),
      .weights = static_cast<const float*>(weights.data_ptr()),
      .out = static_cast<T*>(out.data_ptr()),
      .tokens = tokens,
      .top_k = top_k,
      .experts = experts,
      .hidden_size = hidden_size,
      .inter_size = inter_size,
      .activation = Activation{activation},
      .surrogates = surrogates,
  });
}

// The system must allow a process the tile registers once.
bool prepare_process() {
#ifdef __AMX_BF16__
  return amx::available();
#else
  return true;
#endif
}

// Weights are as `pack` leaves them where `reads_blocks`, and padded to multiples of 16.
void fused_moe(TensorView hidden, TensorView w13, TensorView w2, Optional<TensorView> w13_bias,
               Optional<TensorView> w2_bias, TensorView ids, TensorView weights, TensorView out,
               int64_t inter_size, int64_t activation, Optional<TensorView> lost,
               Optional<TensorView> surrogate_in, Optional<TensorView> surrogate_out,
               Optional<TensorView> surrogate_bias, double scale) {
  check(hidden.ndim() == 2, "hidden must have two dimensions");
  const Surrogates surrogates = surrogates_of(lost, surrogate_in, surrogate_out, surrogate_bias,
                                              hidden.size(0), hidden.size(1), scale);
  const DLDataType dtype = hidden.dtype();
  const auto run = [&]<typename T>() {
    dispatch<T>(hidden, w13, w2, w13_bias, w2_bias, ids, weights, out, inter_size, activation, dtype,
                surrogates);
  };
  if (dtype.code == kDLBfloat && dtype.bits == 16) return run.template operator()<bf16>();
  if (dtype.code == kDLFloat && dtype.bits == 32) return run.template operator()<float>();
  check(false, "hidden must be bfloat16 or float32");
}

// In place: [matrices, rows, depth], multiples of 16, from rows to blocks or back.
void pack(TensorView weights, bool back) {
  check(weights.ndim() == 3 && weights.IsContiguous(), "weights must be contiguous, of three dimensions");
  const int64_t rows = weights.size(0) * weights.size(1), depth = weights.size(2);
  check(weights.size(1) % kBlockRows == 0 && depth % kBlockRows == 0, "sizes must be multiples of 16");
  const int64_t words = depth * weights.dtype().bits / 32;
  pack_blocks(static_cast<uint32_t*>(weights.data_ptr()), rows, words, back);
}

// Reads every byte of the weights of these experts (int32 [n]), all threads together.
int64_t read_experts(TensorView w13, TensorView w2, TensorView ids) {
  std::vector<Span> spans;
  for (const TensorView& w : {w13, w2}) {
    check(w.ndim() == 3 && w.IsContiguous(), "weights must be contiguous with three dimensions");
    const size_t bytes = size_t(w.size(1) * w.size(2) * w.dtype().bits / 8);
    for (int64_t i = 0; i < ids.size(0); ++i) {
      const int32_t id = static_cast<const int32_t*>(ids.data_ptr())[i];
      check(id >= 0 && id < w.size(0), "no such expert");
      spans.push_back({static_cast<const char*>(w.data_ptr()) + id * bytes, bytes});
    }
  }
  return read_spans(spans);
}

}  // namespace sere::moe

TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare_process, sere::moe::prepare_process);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused_moe, sere::moe::fused_moe);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(reads_blocks, sere::moe::reads_blocks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack, sere::moe::pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_experts, sere::moe::read_experts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(multiply_add, sere::moe::multiply_add_registers);
