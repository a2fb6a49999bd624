// `apply_rule` on the CPU. One thread: a decode batch takes microseconds.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "rules_batch.h"

namespace sere {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

// Where an expert outside P goes, or itself if it is critical; looked up once for each.
struct StandIns {
  int32_t ids[kMaxExperts];

  explicit StandIns(int experts) { std::fill(ids, ids + experts, -1); }

  int32_t of(const RuleProblem& p, const ExpertSet& primaries, int32_t id) {
    if (primaries.has[id]) return id;
    if (ids[id] >= 0) return ids[id];
    const float* similar = p.similarity + int64_t(id) * p.experts;
    int32_t best = primaries.ids[0];
    for (int i = 1; i < primaries.count; ++i) {
      if (similar[primaries.ids[i]] > similar[best]) best = primaries.ids[i];
    }
    return ids[id] = is_critical(similar[best], p.threshold) ? id : best;
  }
};

// A, and for `similarity` the stand-ins that its rows take.
void choose(const RuleProblem& p, ExpertSet& a, StandIns& stand_ins) {
  ExpertSet used(p.experts);
  vote(p, a, used);
  used.list(p.experts);
  if (used.count == 0) return;
  if (p.is_rule(Rule::kBudget)) add_within_budget(p, a);
  if (p.is_rule(Rule::kEnergy)) add_within_loss(p, used, a);
  a.list(p.experts);
  if (!p.is_rule(Rule::kSimilarity) || a.count == 0) return;
  // The critical experts join after all have looked for a stand-in among the primary ones.
  for (int i = 0; i < used.count; ++i) stand_ins.of(p, a, used.ids[i]);
  for (int i = 0; i < used.count; ++i) {
    a.has[used.ids[i]] |= stand_ins.ids[used.ids[i]] == used.ids[i];
  }
  a.list(p.experts);
}

void fill_row(const RuleProblem& p, const ExpertSet& a, const StandIns& stand_ins, int at) {
  const int top_k = p.top_k;
  int32_t ids[kMaxTopK];
  float weights[kMaxTopK];
  RuleRow row = {p.row_ids(at), p.row_weights(at), p.row_scores(at), ids, weights, top_k, 0, 0, 0};
  const int32_t* own = row.own;
  for (int k = 0; k < top_k; ++k) {
    if (!is_expert(own[k], p.experts)) continue;
    row.live |= 1u << k;
    row.own_in |= uint32_t(a.has[own[k]]) << k;
    if (!a.has[own[k]]) p.lost[int64_t(at) * p.experts + own[k]] = row.old[k];
  }
  if (p.is_rule(Rule::kSimilarity)) {
    for (int k = 0; k < top_k; ++k) {
      if (!(row.live >> k & 1)) continue;
      ids[k] = a.has[own[k]] ? own[k] : stand_ins.ids[own[k]];
      weights[k] = row.old[k];
    }
    const uint32_t taken = merge_slots(top_k, row.live, ids, weights);
    fill_free_slots(a.bits(), top_k, row.live, taken, own, ids, weights);
  } else {
    if (p.is_rule(Rule::kTopk)) {
      row.sure = primary_slots(row.old, top_k, sure_slots(p.options, p.kind_of(at)));
    }
    const uint32_t wanted = wanted_slots(p.options, row);
    const uint32_t kept = kept_slots(p.options, row);
    settle_row(p.options, a.bits(), row, wanted ? put_next_best(a, row, kept, wanted) : 0);
  }
  for (int k = 0; k < top_k; ++k) {
    if (!(row.live >> k & 1)) continue;
    p.new_ids[int64_t(at) * top_k + k] = ids[k];
    p.new_weights[int64_t(at) * top_k + k] = weights[k];
  }
}

// Padding rows repeat the first valid row without an empty slot, or hold A's lowest.
void fill_padding(const RuleProblem& p, const ExpertSet& a) {
  int32_t ids[kMaxTopK];
  float weights[kMaxTopK] = {};
  fill_padding_slots(a.bits(), p.top_k, ids);
  for (int row = 0; row < p.valid; ++row) {
    const int32_t* from = p.new_ids + int64_t(row) * p.top_k;
    const auto held = [&](int32_t id) { return is_expert(id, p.experts); };
    if (!std::all_of(from, from + p.top_k, held)) continue;
    std::copy(from, from + p.top_k, ids);
    std::copy_n(p.new_weights + int64_t(row) * p.top_k, p.top_k, weights);
    break;
  }
  for (int row = p.valid; row < p.rows; ++row) {
    std::copy_n(ids, p.top_k, p.new_ids + int64_t(row) * p.top_k);
    std::copy_n(weights, p.top_k, p.new_weights + int64_t(row) * p.top_k);
  }
}

void run(const RuleProblem& p) {
  ExpertSet a(p.experts);
  StandIns stand_ins(p.experts);
  choose(p, a, stand_ins);
  if (a.count > 0) {
    for (int row = 0; row < p.valid; ++row) {
      if (!p.keeps_row(row)) fill_row(p, a, stand_ins, row);
    }
    fill_padding(p, a);
  }
  for (int64_t i = 0; i < int64_t(p.valid) * p.top_k; ++i) {
    if (is_expert(p.new_ids[i], p.experts)) p.active[p.new_ids[i]] = 1;
  }
}

// sere_sglang/ops/counters.py, and behind them the loss; the order of slots is that of the sum.
void add_counters(const RuleProblem& p, int64_t* counters) {
  ExpertSet used(p.experts), loaded(p.experts);
  int64_t moved = 0, lost = 0;
  for (int row = 0; row < p.valid; ++row) {
    const int32_t *own = p.row_ids(row), *now = p.new_ids + int64_t(row) * p.top_k;
    for (int k = 0; k < p.top_k; ++k) {
      if (!is_expert(own[k], p.experts)) continue;
      used.has[own[k]] = 1;
      // No runner of ours loads an expert for slots of weight 0.
      if (p.new_weights[int64_t(row) * p.top_k + k] != 0.0f) loaded.has[now[k]] = 1;
      moved += own[k] != now[k];
      if (p.is_fast_row(row)) continue;
      const float weight = p.lost[int64_t(row) * p.experts + own[k]];
      lost += lost_energy(weight, p.expert_loss, own[k]);
    }
  }
  used.list(p.experts);
  loaded.list(p.experts);
  counters[kForwards] += p.valid > 0;
  counters[kRows] += p.valid;
  counters[kActiveBefore] += used.count;
  counters[kActiveAfter] += loaded.count;
  counters[kRerouted] += moved;
  counters[kNumCounters] += p.valid > 0 ? lost / p.valid : 0;
}

template <typename T>
T* pointer(const Optional<TensorView>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor.value().data_ptr()) : nullptr;
}

// Arguments were checked by sere_sglang.ops.apply_rule.
void apply_rule(TensorView ids, TensorView weights, Optional<TensorView> scores,
                Optional<TensorView> similarity, Optional<TensorView> expert_loss,
                Optional<TensorView> is_protected, Optional<TensorView> is_fast,
                Optional<TensorView> counters, TensorView new_ids, TensorView new_weights,
                TensorView active, TensorView lost, int64_t rule, int64_t num_valid, int64_t keep,
                int64_t fast_keep, int64_t budget, bool warmup, bool truncate, int64_t loss_limit,
                double threshold, double fill_weight, double renormalize) {
  RuleProblem p;
  p.ids = static_cast<const int32_t*>(ids.data_ptr());
  p.weights = static_cast<const float*>(weights.data_ptr());
  p.scores = pointer<const float>(scores);
  p.similarity = pointer<const float>(similarity);
  p.expert_loss = pointer<const float>(expert_loss);
  p.is_protected = pointer<const uint8_t>(is_protected);
  p.is_fast = pointer<const uint8_t>(is_fast);
  p.rows = int(ids.size(0));
  p.valid = int(num_valid);
  p.top_k = int(ids.size(1));
  p.experts = int(active.size(0));
  p.options = {};
  p.options.rule = Rule(rule);
  p.options.keep = int(keep);
  p.options.fast_keep = int(fast_keep);
  p.options.budget = int(budget);
  p.options.flags = (warmup ? kWarmup : 0) | (truncate ? kTruncate : 0);
  p.options.fill_weight = float(fill_weight);
  p.options.renormalize = float(renormalize);
  p.loss_limit = loss_limit;
  p.threshold = float(threshold);
  p.new_ids = static_cast<int32_t*>(new_ids.data_ptr());
  p.new_weights = static_cast<float*>(new_weights.data_ptr());
  p.active = static_cast<uint8_t*>(active.data_ptr());
  p.lost = static_cast<float*>(lost.data_ptr());
  if (p.experts > kMaxExperts || p.top_k > kMaxTopK) {
    TVM_FFI_THROW(ValueError) << "apply_rule: at most 1024 experts and top-32";
  }
  run(p);
  if (counters.has_value()) add_counters(p, pointer<int64_t>(counters));
}

}  // namespace sere

TVM_FFI_DLL_EXPORT_TYPED_FUNC(apply_rule, sere::apply_rule);
