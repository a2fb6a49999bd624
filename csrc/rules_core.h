// What the rules beside re-routing decide: set A from the whole batch, then one row at a time.
// Semantics: docs/semantics.md, "Rules beside similarity"; oracle: tests/ops/rules_oracle.py.
// Weights are summed slot after slot in float32 as the torch reference does, so that both give the
// same bits: compile without contraction of a * b + c.
#pragma once

#include <algorithm>
#include <cmath>

#include "reroute_distinct.h"

namespace sere {

// sere_sglang/ops/rules_call.py
enum class Rule : int { kSimilarity, kPiggyback, kBudget, kTopk, kEnergy };
constexpr float kFixedOne = 4294967296.0f;         // 2^32: FRACTION_BITS
constexpr float kLargestTerm = 17592186044416.0f;  // 2^44: LARGEST_TERM

struct RuleProblem {
  const int32_t* ids;           // [T, K]
  const float* weights;         // [T, K]
  const float* scores;          // [T, E] or null
  const float* similarity;      // [E, E] or null
  const uint8_t* is_protected;  // [T] or null
  const uint8_t* is_fast;       // [T] or null
  int rows, valid, top_k, experts;
  Rule rule;
  int keep, fast_keep;  // S, k0 or 1
  int budget;
  bool warmup, truncate;
  int64_t loss_limit;
  float threshold, fill_weight, renormalize;
  // Out: copies of ids and weights, to be changed; zeros.
  int32_t* new_ids;
  float* new_weights;
  uint8_t* active;  // [E]
  float* lost;      // [T, E]

  bool keeps_row(int row) const { return is_protected != nullptr && is_protected[row] != 0; }
  bool is_fast_row(int row) const { return is_fast != nullptr && is_fast[row] != 0; }
  int sure_slots(int row) const { return is_fast_row(row) ? fast_keep : keep; }
  const int32_t* row_ids(int row) const { return ids + int64_t(row) * top_k; }
  const float* row_weights(int row) const { return weights + int64_t(row) * top_k; }
  const float* row_scores(int row) const { return scores + int64_t(row) * experts; }
};

// To nearest, ties to even; scaling by a power of two is exact.
inline int64_t fixed_point(float value) {
  const float scaled = value * kFixedOne;
  return int64_t(std::nearbyint(scaled < kLargestTerm ? scaled : kLargestTerm));
}

inline float ratio(float above, float below, float otherwise) {
  return below == 0.0f ? otherwise : above / below;
}

// A set of experts that is also listed, lowest id first, once `list` was called.
struct ExpertSet {
  uint8_t has[kMaxExperts];
  int32_t ids[kMaxExperts];
  uint32_t words[kExpertWords];
  int count = 0;

  explicit ExpertSet(int experts) { std::memset(has, 0, experts); }

  void list(int experts) {
    count = 0;
    std::memset(words, 0, sizeof(words));
    for (int e = 0; e < experts; ++e) {
      ids[count] = e;
      count += has[e];
      words[e >> 5] |= uint32_t(has[e]) << (e & 31);
    }
  }
  ExpertBits bits() const { return {words, kExpertWords}; }
};

// One row while it gets its new experts.
struct NewRow {
  int32_t ids[kMaxTopK];
  float weights[kMaxTopK];
  uint32_t taken;  // bit k: slot k is decided

  void put(int slot, int32_t id, float weight) {
    ids[slot] = id;
    weights[slot] = weight;
    taken |= 1u << slot;
  }
  bool holds(int32_t id, int top_k) const {
    for (int k = 0; k < top_k; ++k) {
      if (taken >> k & 1 && ids[k] == id) return true;
    }
    return false;
  }
  float sum(int top_k) const {
    float total = 0.0f;
    for (int k = 0; k < top_k; ++k) total += taken >> k & 1 ? weights[k] : 0.0f;
    return total;
  }
};

// ---- set A

// Experts in a row's sure slots, if they `count`, and all of protected rows; `used`: of any slot.
inline void vote(const RuleProblem& p, bool count, ExpertSet& in, ExpertSet& used) {
  for (int row = 0; row < p.valid; ++row) {
    const int32_t* ids = p.row_ids(row);
    uint32_t chosen = 0xffffffffu;
    if (!p.keeps_row(row)) {
      chosen = count ? primary_slots(p.row_weights(row), p.top_k, p.sure_slots(row)) : 0;
    }
    for (int k = 0; k < p.top_k; ++k) {
      if (!is_expert(ids[k], p.experts)) continue;
      used.has[ids[k]] = 1;
      in.has[ids[k]] |= chosen >> k & 1;
    }
  }
}

// The first `count` of `ids` by value, ties by the lowest id.
template <typename Before>
void sort_first(int32_t* ids, int size, int count, Before before) {
  std::partial_sort(ids, ids + std::min(count, size), ids + size, before);
}

inline void add_within_budget(const RuleProblem& p, ExpertSet& in) {
  int64_t sums[kMaxExperts] = {};
  for (int row = 0; row < p.valid; ++row) {
    if (p.is_fast_row(row)) continue;
    const float* scores = p.row_scores(row);
    for (int e = 0; e < p.experts; ++e) sums[e] += fixed_point(scores[e]);
  }
  int32_t others[kMaxExperts];
  int size = 0;
  for (int e = 0; e < p.experts; ++e) {
    others[size] = e;
    size += !in.has[e];
  }
  const int room = std::max(0, p.budget - (p.experts - size));
  sort_first(others, size, room,
             [&](int32_t a, int32_t b) { return sums[a] != sums[b] ? sums[a] > sums[b] : a < b; });
  for (int i = 0; i < std::min(room, size); ++i) in.has[others[i]] = 1;
}

inline void add_within_loss(const RuleProblem& p, const ExpertSet& used, ExpertSet& in) {
  int64_t energy[kMaxExperts] = {};
  for (int row = 0; row < p.valid; ++row) {
    if (p.keeps_row(row) || p.is_fast_row(row)) continue;
    const int32_t* ids = p.row_ids(row);
    const float* weights = p.row_weights(row);
    for (int k = 0; k < p.top_k; ++k) {
      if (is_expert(ids[k], p.experts)) energy[ids[k]] += fixed_point(weights[k] * weights[k]);
    }
  }
  int32_t droppable[kMaxExperts];
  int size = 0;
  for (int e = 0; e < p.experts; ++e) {
    droppable[size] = e;
    size += used.has[e] && !in.has[e];
  }
  sort_first(droppable, size, size, [&](int32_t a, int32_t b) {
    return energy[a] != energy[b] ? energy[a] < energy[b] : a < b;
  });
  int64_t spent = 0;
  int drops = 0;
  while (drops < size && (spent += energy[droppable[drops]]) <= p.loss_limit) ++drops;
  for (int i = drops; i < size; ++i) in.has[droppable[i]] = 1;
}

// ---- what a row holds, in which slot and with which weight

// `slots`, in slot order, get the row's best of A by score that it does not hold yet, times factor.
inline void put_next_best(const RuleProblem& p, const ExpertSet& a, const float* scores,
                          uint32_t slots, NewRow& row) {
  const int wanted = __builtin_popcount(slots);
  int32_t best[kMaxTopK];
  int found = 0;
  const uint32_t before = row.taken;
  for (int i = 0; i < a.count && wanted > 0; ++i) {
    const int32_t id = a.ids[i];
    if (found == wanted && !(scores[id] > scores[best[found - 1]])) continue;
    if (before != 0 && row.holds(id, p.top_k)) continue;
    int at = found < wanted ? found++ : found - 1;
    for (; at > 0 && scores[id] > scores[best[at - 1]]; --at) best[at] = best[at - 1];
    best[at] = id;
  }
  for (int k = 0, i = 0; k < p.top_k && i < found; ++k) {
    if (!(slots >> k & 1)) continue;
    row.put(k, best[i], scores[best[i]]);
    ++i;
  }
}

// Times (original mass / new mass)^exponent, unless the row kept all its slots.
inline void scale(NewRow& row, int top_k, float mass, float exponent, bool lossless) {
  if (exponent == 0.0f || lossless) return;
  float factor = ratio(mass, row.sum(top_k), 1.0f);
  if (exponent != 1.0f) factor = std::pow(std::max(factor, 0.0f), exponent);
  for (int k = 0; k < top_k; ++k) row.weights[k] *= factor;
}

}  // namespace sere
