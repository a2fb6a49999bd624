// Vote and choose: which experts the rows use, what those weigh, and which of them are in A. A flag
// per expert, set by plain stores; sums are integers, so that it does not matter who adds first.
#pragma once

#include "reroute_best.cuh"
#include "reroute_vote.cuh"
#include "rules_block.cuh"

namespace sere {

SERE_DEVICE bool is_rule(const RuleShared& s, Rule rule) { return s.options.rule == rule; }
SERE_DEVICE bool has_sums(const RuleShared& s) {
  return is_rule(s, Rule::kBudget) || is_rule(s, Rule::kEnergy);
}

// Under `budget`: a thread adds up an expert's scores over every so many of the block's rows.
SERE_DEVICE void add_scores(const RuleShared& s, const RuleParams& p, const Rows& rows,
                            Votes& votes) {
  const int columns = num_words(p.experts) * 32;
  const int groups = columns < num_threads() ? num_threads() / columns : 1;
  const int group = thread_index() / columns;
  if (group >= groups) return;
  const int end = rows.end < rows.valid ? rows.end : rows.valid;
  for (int expert = thread_index() % columns; expert < p.experts; expert += num_threads()) {
    int64_t sum = 0;
    for (int row = rows.first + group; row < end; row += groups) {
      if (!scores_count(kind_of(s, p, row))) continue;
      sum += fixed_point(p.scores[int64_t(row) * p.experts + expert]);
    }
    if (sum != 0) atomic_add(&votes.sums[expert], sum);
  }
}

// What this block's rows say, into `votes`. Ends with a barrier.
SERE_DEVICE void vote(RuleShared& s, const RuleParams& p, const Rows& rows, Votes& votes) {
  const bool sure_votes = sure_slots_vote(s.options);
  const float* expert_loss = expert_loss_of(s, p);
  for (int pass = 0; pass < rows.passes; ++pass) {
    const Slot slot = slot_of(p, rows, pass);
    const RoutedSlot held = load_routed(s, p, slot, rows.valid);
    const int rank = rank_in_row(p, held.weight, slot.k, held.counts);
    if (held.routed) {
      const bool is_sure = sure_votes && rank < sure_slots(s.options, held.row_kind);
      s.used[held.id] = 1;
      if (is_sure || (held.row_kind & kProtectedRow)) s.at_once[held.id] = 1;
      if (is_rule(s, Rule::kEnergy) && weights_count(held.row_kind)) {
        atomic_add(&votes.sums[held.id], lost_energy(held.weight, expert_loss, held.id));
      }
    }
    const bool has_holes = ballot(held.counts && !held.routed) != 0;
    if (lane_index() == 0 && held.counts && !has_holes) {
      atomic_max(&votes.usable_from_end, p.rows - slot.row);
    }
  }
  if (is_rule(s, Rule::kBudget) && p.scores != nullptr) add_scores(s, p, rows, votes);
  sync_block();
  for (int word = warp_index(); word < num_words(p.experts); word += num_warps()) {
    const uint32_t used = ballot(s.used[word * 32 + lane_index()] != 0);
    const uint32_t at_once = ballot(s.at_once[word * 32 + lane_index()] != 0);
    if (lane_index() == 0) {
      votes.used[word] = used;
      votes.at_once[word] = at_once;
    }
  }
  sync_block();
}

// What all blocks of the cluster voted. Ends with a barrier of this block.
SERE_DEVICE void pool_in_cluster(RuleShared& s, const RuleParams& p) {
  sync_cluster();
  const int blocks = num_blocks();
  // A warp takes a word, its lanes the blocks: every remote load is under way at once.
  for (int word = warp_index(); word < num_words(p.experts); word += num_warps()) {
    const bool is_peer = lane_index() < blocks;
    const uint32_t used = warp_or(is_peer ? peer(&s, lane_index())->mine.used[word] : 0);
    const uint32_t at_once = warp_or(is_peer ? peer(&s, lane_index())->mine.at_once[word] : 0);
    if (lane_index() == 0) {
      s.votes.used[word] = used;
      s.votes.at_once[word] = at_once;
    }
  }
  for (int e = thread_index(); has_sums(s) && e < p.experts; e += num_threads()) {
    int64_t sum = 0;
    for (int rank = 0; rank < blocks; ++rank) sum += peer(&s, rank)->mine.sums[e];
    s.votes.sums[e] = sum;
  }
  if (thread_index() < blocks) {
    atomic_max(&s.votes.usable_from_end, peer(&s, thread_index())->mine.usable_from_end);
  }
  sync_block();
}

// Adds this block's votes to the grid's.
SERE_DEVICE void pool_in_grid(const RuleShared& s, const RuleParams& p) {
  Votes& all = p.scratch->votes;
  for (int word = thread_index(); word < num_words(p.experts); word += num_threads()) {
    if (s.mine.used[word]) atomic_or(&all.used[word], s.mine.used[word]);
    if (s.mine.at_once[word]) atomic_or(&all.at_once[word], s.mine.at_once[word]);
  }
  for (int e = thread_index(); has_sums(s) && e < p.experts; e += num_threads()) {
    if (s.mine.sums[e] != 0) atomic_add(&all.sums[e], s.mine.sums[e]);
  }
  if (thread_index() == 0 && s.mine.usable_from_end != 0) {
    atomic_max(&all.usable_from_end, s.mine.usable_from_end);
  }
}

// The grid's votes, once all blocks have added theirs. Ends with a barrier.
SERE_DEVICE void load_pool(RuleShared& s, const RuleParams& p) {
  const Votes& all = p.scratch->votes;
  for (int word = thread_index(); word < num_words(p.experts); word += num_threads()) {
    s.votes.used[word] = load_racing(&all.used[word]);
    s.votes.at_once[word] = load_racing(&all.at_once[word]);
  }
  for (int e = thread_index(); has_sums(s) && e < p.experts; e += num_threads()) {
    s.votes.sums[e] = load_racing(&all.sums[e]);
  }
  if (thread_index() == 0) s.votes.usable_from_end = load_racing(&all.usable_from_end);
  sync_block();
}

// Whether an expert that is not in A at once joins it: a warp compares it with all others. No sort:
// that it is among the first to be loaded, or not among those to be dropped, takes a sum alone.
SERE_DEVICE bool joins(const RuleShared& s, const RuleParams& p, int expert, int64_t most) {
  const Votes& v = s.votes;
  const bool drops = is_rule(s, Rule::kEnergy);
  int64_t before = 0;
  for (int other = lane_index(); other < p.experts; other += 32) {
    if (has(v.at_once, other)) continue;
    if (!drops) {
      before += loads_before(v.sums, other, expert);
    } else if (has(v.used, other) && (other == expert || drops_before(v.sums, other, expert))) {
      before += v.sums[other];
    }
  }
  before = warp_sum(before);
  return drops ? before > most : before < most;
}

// A, of the votes of all rows. Ends with a barrier.
SERE_DEVICE void choose(RuleShared& s, const RuleParams& p, int valid) {
  const Votes& v = s.votes;
  if (thread_index() < kExpertWords) s.members[thread_index()] = v.at_once[thread_index()];
  sync_block();
  if (has_sums(s) && !is_empty(v.used)) {
    const bool drops = is_rule(s, Rule::kEnergy);
    // What may be dropped, or how many more are loaded.
    const int64_t most = drops ? loss_limit(s.options, valid)
                               : s.options.budget - warp_sum(count_bits(v.at_once[lane_index()]));
    for (int expert = warp_index(); expert < p.experts; expert += num_warps()) {
      if (has(v.at_once, expert) || (drops && !has(v.used, expert))) continue;
      if (joins(s, p, expert, most) && lane_index() == 0) {
        atomic_or(&s.members[expert >> 5], 1u << (expert & 31));
      }
    }
  }
  sync_block();
}

}  // namespace sere
