// The rules beside re-routing on a CPU: set A from the whole batch, and a row's best of it.
#pragma once

#include <algorithm>

#include "rules_core.h"

namespace sere {

struct RuleProblem {
  const int32_t* ids;           // [T, K]
  const float* weights;         // [T, K]
  const float* scores;          // [T, E] or null
  const float* similarity;      // [E, E] or null
  const float* expert_loss;     // [E] or null
  const uint8_t* is_protected;  // [T] or null
  const uint8_t* is_fast;       // [T] or null
  int rows, valid, top_k, experts;
  RuleBlock options;
  int64_t loss_limit;
  float threshold;
  // Out: copies of ids and weights, to be changed; zeros.
  int32_t* new_ids;
  float* new_weights;
  uint8_t* active;  // [E]
  float* lost;      // [T, E]

  bool is_rule(Rule rule) const { return options.rule == rule; }
  bool keeps_row(int row) const { return is_protected != nullptr && is_protected[row] != 0; }
  bool is_fast_row(int row) const { return is_fast != nullptr && is_fast[row] != 0; }
  int kind_of(int row) const {
    return (keeps_row(row) ? kProtectedRow : 0) | (is_fast_row(row) ? kFastRow : 0);
  }
  const int32_t* row_ids(int row) const { return ids + int64_t(row) * top_k; }
  const float* row_weights(int row) const { return weights + int64_t(row) * top_k; }
  const float* row_scores(int row) const {
    return scores == nullptr ? nullptr : scores + int64_t(row) * experts;
  }
};

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

// Experts in a row's sure slots, if those vote, and all of protected rows; `used`: of any slot.
inline void vote(const RuleProblem& p, ExpertSet& in, ExpertSet& used) {
  const bool votes = sure_slots_vote(p.options);
  for (int row = 0; row < p.valid; ++row) {
    const int32_t* ids = p.row_ids(row);
    uint32_t chosen = 0xffffffffu;
    if (!p.keeps_row(row)) {
      const int sure = sure_slots(p.options, p.kind_of(row));
      chosen = votes ? primary_slots(p.row_weights(row), p.top_k, sure) : 0;
    }
    for (int k = 0; k < p.top_k; ++k) {
      if (!is_expert(ids[k], p.experts)) continue;
      used.has[ids[k]] = 1;
      in.has[ids[k]] |= chosen >> k & 1;
    }
  }
}

// The first `count` of `ids` in an order.
template <typename Before>
void sort_first(int32_t* ids, int size, int count, Before before) {
  std::partial_sort(ids, ids + std::min(count, size), ids + size, before);
}

inline void add_within_budget(const RuleProblem& p, ExpertSet& in) {
  int64_t sums[kMaxExperts] = {};
  for (int row = 0; row < p.valid; ++row) {
    if (!scores_count(p.kind_of(row))) continue;
    const float* scores = p.row_scores(row);
    for (int e = 0; e < p.experts; ++e) sums[e] += fixed_point(scores[e]);
  }
  int32_t others[kMaxExperts];
  int size = 0;
  for (int e = 0; e < p.experts; ++e) {
    others[size] = e;
    size += !in.has[e];
  }
  const int room = std::max(0, p.options.budget - (p.experts - size));
  sort_first(others, size, room, [&](int32_t a, int32_t b) { return loads_before(sums, a, b); });
  for (int i = 0; i < std::min(room, size); ++i) in.has[others[i]] = 1;
}

inline void add_within_loss(const RuleProblem& p, const ExpertSet& used, ExpertSet& in) {
  int64_t energy[kMaxExperts] = {};
  for (int row = 0; row < p.valid; ++row) {
    if (!weights_count(p.kind_of(row))) continue;
    const int32_t* ids = p.row_ids(row);
    const float* weights = p.row_weights(row);
    for (int k = 0; k < p.top_k; ++k) {
      if (!is_expert(ids[k], p.experts)) continue;
      energy[ids[k]] += lost_energy(weights[k], p.expert_loss, ids[k]);
    }
  }
  int32_t droppable[kMaxExperts];
  int size = 0;
  for (int e = 0; e < p.experts; ++e) {
    droppable[size] = e;
    size += used.has[e] && !in.has[e];
  }
  sort_first(droppable, size, size,
             [&](int32_t a, int32_t b) { return drops_before(energy, a, b); });
  int64_t spent = 0;
  int drops = 0;
  while (drops < size && (spent += energy[droppable[drops]]) <= p.loss_limit) ++drops;
  for (int i = drops; i < size; ++i) in.has[droppable[i]] = 1;
}

// The wanted slots get the row's best of A by score that no kept slot holds, with their scores for
// weights. Returns which slots got one.
inline uint32_t put_next_best(const ExpertSet& a, const RuleRow& row, uint32_t kept,
                              uint32_t wanted) {
  const int slots = __builtin_popcount(wanted);
  int32_t best[kMaxTopK];
  int found = 0;
  const auto is_held = [&](int32_t id) {
    for (int k = 0; k < row.top_k; ++k) {
      if (kept >> k & 1 && row.own[k] == id) return true;
    }
    return false;
  };
  for (int i = 0; i < a.count && slots > 0; ++i) {
    const int32_t id = a.ids[i];
    if (found == slots && !(row.scores[id] > row.scores[best[found - 1]])) continue;
    if (kept != 0 && is_held(id)) continue;
    int at = found < slots ? found++ : found - 1;
    for (; at > 0 && row.scores[id] > row.scores[best[at - 1]]; --at) best[at] = best[at - 1];
    best[at] = id;
  }
  uint32_t filled = 0;
  for (int i = 0; i < found; ++i, wanted &= wanted - 1) {
    const int slot = first_bit(wanted);
    row.ids[slot] = best[i];
    row.weights[slot] = row.scores[best[i]];
    filled |= 1u << slot;
  }
  return filled;
}

}  // namespace sere
