// The kernels of the rules beside re-routing: vote, choose and fill, which meet at block barriers.
//
// Forms as those of re-routing: one block (decode sizes), one cluster that pools the votes through
// distributed shared memory, and for large inputs a grid in two launches that pools them in device
// memory. One block finishes: it fills padding rows and adds the counters.
#pragma once

#include "rules_choose.cuh"
#include "rules_fill.cuh"

namespace sere {

// From rows that are in device memory to the end.
template <int kSpans, bool kCluster>
SERE_DEVICE void rule_rows(RuleShared& s, const RuleParams& p, const Rows& rows) {
  vote(s, p, rows, kCluster ? s.mine : s.votes);
  if constexpr (kCluster) pool_in_cluster(s, p);
  choose(s, p, rows.valid);
  RuleTally& tally = kCluster ? *peer(&s.tally, 0) : s.tally;
  fill<kSpans>(s, p, rows, tally);
  sync_block();
  add_loaded(s, p, tally);
  if constexpr (kCluster) {
    sync_cluster();  // no block may leave while another reads its votes; all have added their tally
  } else {
    sync_block();
  }
  if (block_index() == 0) finish(s, p, rows.valid);
}

// One block, or with kCluster the one cluster of the grid.
template <int kSpans, bool kCluster>
SERE_KERNEL(threads_for(kSpans))
rule_kernel(SERE_PARAMS RuleParams p) {
  SERE_SHARED(RuleShared, s);
  const Rows rows = start(s, p);
  if (!is_off(s)) rule_rows<kSpans, kCluster>(s, p, rows);
}

// Grid form, first launch: the votes; the last block to vote chooses A.
SERE_DEVICE void rule_vote_in_grid(RuleShared& s, const RuleParams& p, const Rows& rows) {
  vote(s, p, rows, s.mine);
  pool_in_grid(s, p);
  if (!is_last_block(&p.scratch->blocks_voted)) return;
  load_pool(s, p);
  choose(s, p, rows.valid);
  if (thread_index() < kExpertWords) {
    p.scratch->members[thread_index()] = s.members[thread_index()];
  }
}

SERE_KERNEL(kGridThreads) rule_vote_grid_kernel(SERE_PARAMS RuleParams p) {
  SERE_SHARED(RuleShared, s);
  const Rows rows = start(s, p);
  if (!is_off(s)) rule_vote_in_grid(s, p, rows);
}

// Grid form, second launch: the rows; the last block to fill its own finishes.
template <int kSpans>
SERE_KERNEL(kGridThreads)
rule_fill_grid_kernel(SERE_PARAMS RuleParams p) {
  SERE_SHARED(RuleShared, s);
  const Rows rows = start(s, p);
  if (is_off(s)) return;
  if (thread_index() < kExpertWords) {
    s.members[thread_index()] = p.scratch->members[thread_index()];
  }
  sync_block();
  fill<kSpans>(s, p, rows, s.tally);
  sync_block();
  RuleTally& all = p.scratch->tally;
  add_loaded(s, p, all);
  if (thread_index() == 0) {
    if (s.tally.moved != 0) atomic_add(&all.moved, s.tally.moved);
    if (s.tally.lost != 0) atomic_add(&all.lost, s.tally.lost);
  }
  if (!is_last_block(&p.scratch->blocks_done)) return;
  load_pool(s, p);
  if (thread_index() < kExpertWords) {
    s.tally.loaded[thread_index()] = load_racing(&all.loaded[thread_index()]);
  }
  if (thread_index() == 0) {
    s.tally.moved = load_racing(&all.moved);
    s.tally.lost = load_racing(&all.lost);
  }
  sync_block();
  finish(s, p, rows.valid);
}

}  // namespace sere
