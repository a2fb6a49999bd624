// The re-routing kernels: vote, gather, match and apply, which meet at block barriers.
//
// Forms: one block (decode sizes), one cluster that pools the votes through distributed shared
// memory, and for large inputs a grid in two launches that pools them in device memory. Each with
// ids as input, or with router logits whose softmax top-k is taken first.
#pragma once

#include "reroute_apply.cuh"
#include "reroute_match.cuh"
#include "reroute_topk.cuh"
#include "reroute_vote.cuh"

namespace sere {

// From the slots that the block holds to the end. `kFused`: they are not in p.ids yet.
template <bool kCluster, bool kFused>
SERE_DEVICE void reroute_held(Shared& s, const Params& p, Rows& rows, const Held& held) {
  if (!is_active(s.control, p.top_k)) {  // the same in every block
    if constexpr (kFused) store_ids(p, rows, held);
    return;
  }
  rows.valid = valid_rows(s.control, p.rows);
  vote(s, p, rows, held, kFused || p.weights == nullptr);
  if constexpr (kCluster) {
    gather_own(s, p, rows, held);
    gather_peers(s, p, rows, num_blocks());
    list_own(s, p);
  } else {
    gather_block(s, p, rows, held);
  }
  match(s, p);
  if (kCluster && has_threshold(s.control) && (p.distinct || p.counters != nullptr)) {
    gather_kept(s, p, num_blocks());
  }
  Tally& tally = kCluster ? *peer(&s.tally, 0) : s.tally;
  apply<kFused>(s, p, rows, held, tally);
  if constexpr (kCluster) {
    sync_cluster();  // no block may leave while another reads its votes or adds to its tally
  } else if (p.counters != nullptr) {
    sync_block();
  }
  if (p.counters != nullptr && block_index() == 0) add_counters(s, p, rows, s.tally);
}

// One block, or with kCluster the one cluster of the grid.
template <bool kCluster>
SERE_KERNEL(kMaxThreads)
reroute_kernel(SERE_PARAMS Params p) {
  SERE_SHARED(Shared, s);
  prefetch_tables(p);
  wait_for_prior_kernels();
  let_next_kernel_start();
  Rows rows = rows_of_block(p, block_index(), num_blocks());
  Held held;
  const int32_t control_word = load_control(p);
  load_slots(p, rows, held);
  load_classes(p, rows, held);
  clear(s, p, control_word);
  sync_block();
  reroute_held<kCluster, false>(s, p, rows, held);
}

template <int kSpans>
SERE_DEVICE Rows start_fused(Shared& s, const Params& p, const Router& router, Held& held) {
  wait_for_prior_kernels();
  let_next_kernel_start();
  const Rows rows = rows_of_block(p, block_index(), num_blocks());
  const int32_t control_word = load_control(p);
  load_classes(p, rows, held);
  select_slots<kSpans>(router, p, rows, held);
  clear(s, p, control_word);
  sync_block();
  return rows;
}

template <int kSpans, bool kCluster>
SERE_KERNEL(threads_for(kSpans))
fused_kernel(SERE_PARAMS Params p, SERE_PARAMS Router router) {
  SERE_SHARED(Shared, s);
  prefetch_tables(p);
  Held held;
  Rows rows = start_fused<kSpans>(s, p, router, held);
  reroute_held<kCluster, true>(s, p, rows, held);
}

// Once all blocks have voted: the ids of the first usable row, which its owner is going to rewrite
// while others' padding rows copy them.
SERE_DEVICE void publish_grid_padding(const Params& p) {
  // A fused launch has just stored the ids.
  if (!is_last_block(&p.scratch->blocks_voted) || thread_index() >= p.top_k) return;
  const int from_end = atomic_max(&p.scratch->usable_from_end, 0);
  if (from_end == 0) return;
  const int32_t* ids = p.ids + (p.rows - from_end) * p.id_stride;
  p.scratch->padding[thread_index()] = load_racing(ids + thread_index());
}

// Grid form, first launch: pool the votes in p.scratch.
SERE_DEVICE void vote_in_grid(Shared& s, const Params& p, Rows& rows, const Held& held,
                              bool is_ranked) {
  if (!is_active(s.control, p.top_k)) return;
  rows.valid = valid_rows(s.control, p.rows);
  vote(s, p, rows, held, is_ranked);
  gather_own(s, p, rows, held);
  for (int word = warp_index(); word < num_words(p.experts); word += num_warps()) {
    for (int c = 0; c < num_classes(s.control); ++c) {
      const uint32_t present = ballot(s.seen[word * 32 + lane_index()][c] != 0);
      if (lane_index() == 0 && present) atomic_or(&p.scratch->present[c][word], present);
    }
    if (lane_index() == 0 && s.mine_primary[word]) {
      atomic_or(&p.scratch->primary[word], s.mine_primary[word]);
    }
  }
  if (!has_padding(p, rows)) return;
  if (thread_index() == 0 && s.usable != kNoRow) {
    atomic_max(&p.scratch->usable_from_end, p.rows - s.usable);
  }
  publish_grid_padding(p);
}

SERE_KERNEL(kGridThreads) vote_grid_kernel(SERE_PARAMS Params p) {
  SERE_SHARED(Shared, s);
  wait_for_prior_kernels();
  let_next_kernel_start();
  Rows rows = rows_of_block(p, block_index(), num_blocks());
  Held held;
  const int32_t control_word = load_control(p);
  load_slots(p, rows, held);
  load_classes(p, rows, held);
  clear(s, p, control_word);
  sync_block();
  vote_in_grid(s, p, rows, held, p.weights == nullptr);
}

template <int kSpans>
SERE_KERNEL(threads_for(kSpans))
fused_vote_grid_kernel(SERE_PARAMS Params p, SERE_PARAMS Router router) {
  SERE_SHARED(Shared, s);
  Held held;
  Rows rows = start_fused<kSpans>(s, p, router, held);
  store_ids(p, rows, held);
  vote_in_grid(s, p, rows, held, true);
}

// The pooled votes, and the row that padding rows copy. Ends with a barrier.
SERE_DEVICE void gather_grid(Shared& s, const Params& p, const Rows& rows, const Held& held) {
  for (int word = thread_index(); word < num_words(p.experts); word += num_threads()) {
    s.primary[word] = s.active[word] = p.scratch->primary[word];
    uint32_t present = 0;
    for (int c = 0; c < kMaxClasses; ++c) present |= p.scratch->present[c][word];
    atomic_add(&s.primaries, count_bits(s.primary[word]));
    atomic_add(&s.present, count_bits(present));
  }
  // Which experts are critical is for every block to know, so each looks them all up.
  const bool needs_all = has_threshold(s.control) && (p.distinct || p.counters != nullptr);
  for (int expert = thread_index(); needs_all && expert < p.experts; expert += num_threads()) {
    for (int c = 0; c < num_classes(s.control); ++c) {
      if (has(p.scratch->present[c], expert)) s.seen[expert][c] = 1;
    }
  }
#pragma unroll
  for (int pass = 0; pass < kHeldSlots; ++pass) {
    const Slot slot = slot_of(p, rows, pass);
    const bool counts = pass < rows.passes && slot.exists && slot.row < rows.valid;
    if (counts && is_expert(held.id[pass], p.experts)) {
      s.seen[held.id[pass]][class_of_slot(s, held, pass)] = 1;
    }
  }
  const int from_end = p.scratch->usable_from_end;
  if (pads_here(rows) && from_end > 0) {
    const int usable = p.rows - from_end;
    if (thread_index() == 0) s.first_usable = usable;
    if (thread_index() < p.top_k) {
      const int id = p.scratch->padding[thread_index()];
      s.padding[thread_index()] = id;
      if (is_expert(id, p.experts)) s.seen[id][class_of(s.control, p.row_class, usable)] = 1;
    }
  }
  sync_block();
}

// Adds this block's tally to the grid's; the last block to do so adds the counters.
SERE_DEVICE void count_in_grid(Shared& s, const Params& p, const Rows& rows) {
  Tally& all = p.scratch->tally;
  if (thread_index() == 0) {
    if (s.tally.rerouted) atomic_add(&all.rerouted, s.tally.rerouted);
    if (s.tally.critical) atomic_add(&all.critical, s.tally.critical);
  }
  if (!is_last_block(&p.scratch->blocks_done) || thread_index() >= kNumCounters) return;
  Tally total;  // through the atomics' path: other blocks wrote these while this one ran
  total.rerouted = atomic_add(&all.rerouted, 0);
  total.critical = atomic_add(&all.critical, 0);
  add_counters(s, p, rows, total);
}

// Grid form, second launch; the ids and weights of either first launch are in device memory.
SERE_KERNEL(kGridThreads) apply_grid_kernel(SERE_PARAMS Params p) {
  SERE_SHARED(Shared, s);
  wait_for_prior_kernels();
  let_next_kernel_start();
  Rows rows = rows_of_block(p, block_index(), num_blocks());
  Held held;
  const int32_t control_word = load_control(p);
  load_slots(p, rows, held);
  load_classes(p, rows, held);
  clear(s, p, control_word);
  sync_block();
  if (!is_active(s.control, p.top_k)) return;
  rows.valid = valid_rows(s.control, p.rows);
  gather_grid(s, p, rows, held);
  list_own(s, p);
  match(s, p);
  apply<false>(s, p, rows, held, s.tally);
  if (p.counters == nullptr) return;
  sync_block();
  count_in_grid(s, p, rows);
}

}  // namespace sere
