// Vote and gather: which experts the rows use, which of them their primary slots use. A flag per
// expert, set by plain stores (all write the same value, so no atomics); flags become bitmaps by
// ballot. Then P over all rows, and the list of the experts that may move.
#pragma once

#include "reroute_block.cuh"

namespace sere {

// Rank of this lane's slot among the `width` lanes of its row: weight descending, ties by slot.
SERE_DEVICE int rank_in_row(const Routing& p, float weight, int k, bool counts) {
  const int width = 1 << p.group_bits;
  const float before = shuffle(weight, k > 0 ? k - 1 : 0, width);
  // Routers hand over sorted slots; then one step is enough.
  if (ballot(counts && k > 0 && before < weight) == 0) return k;
  int rank = 0;
  for (int other = 0; other < p.top_k; ++other) {
    const float theirs = shuffle(weight, other, width);
    rank += theirs > weight || (theirs == weight && other < k);
  }
  return rank;
}

SERE_DEVICE void vote(Shared& s, const Params& p, const Rows& rows, const Held& held,
                      bool is_ranked) {
  const int width = 1 << p.group_bits;
#pragma unroll
  for (int pass = 0; pass < kHeldSlots; ++pass) {
    if (pass >= rows.passes) continue;
    const Slot slot = slot_of(p, rows, pass);
    const bool counts = slot.exists && slot.row < rows.valid;
    const int id = held.id[pass];
    const int rank = is_ranked ? slot.k : rank_in_row(p, held.weight[pass], slot.k, counts);
    if (counts && is_expert(id, p.experts)) {
      const int c = class_of_slot(s, held, pass);
      s.seen[id][c] = 1;
      const int votes = s.control.primary_k[c];
      if (rank < (votes < 1 ? 1 : votes)) s.voted[id] = 1;
    }
    if (has_padding(p, rows)) {  // its rows will need one to copy
      const uint32_t holes = ballot(counts && id < 0);
      const uint32_t group = (width == 32 ? ~0u : (1u << width) - 1) << (lane_index() & -width);
      const uint32_t whole = ballot(counts && slot.k == 0 && (holes & group) == 0);
      if (lane_index() == 0 && whole != 0) {
        atomic_min(&s.usable, slot.row + (lowest_bit(whole) >> p.group_bits));
      }
    }
  }
}

// After the vote's barrier: the ids of the block's first usable row, for all to see.
SERE_DEVICE void publish_padding(const Shared& s, const Params& p, const Rows& rows,
                                 const Held& held, int32_t* to) {
  if (!has_padding(p, rows) || s.usable == kNoRow) return;
#pragma unroll
  for (int pass = 0; pass < kHeldSlots; ++pass) {
    const Slot slot = slot_of(p, rows, pass);
    if (pass < rows.passes && slot.exists && slot.row == s.usable) to[slot.k] = held.id[pass];
  }
}

SERE_DEVICE uint32_t voted_of_word(const Shared& s, int word) {
  return ballot(s.voted[word * 32 + lane_index()] != 0);
}
SERE_DEVICE uint32_t seen_of_word(const Shared& s, int word) {
  return ballot(*reinterpret_cast<const uint32_t*>(s.seen[word * 32 + lane_index()]) != 0);
}

// The calling warp lists its word's experts that may move, in any order.
SERE_DEVICE void list_candidates(Shared& s, uint32_t candidates, int word) {
  int at = 0;
  if (lane_index() == 0 && candidates) at = atomic_add(&s.listed, count_bits(candidates));
  at = shuffle(at, 0);
  if (candidates >> lane_index() & 1) {
    s.list[at + count_bits(candidates & ((1u << lane_index()) - 1))] =
        uint16_t(word * 32 + lane_index());
  }
}

// One block: flags -> P, the list, and the ids that padding rows copy. Ends with a barrier.
SERE_DEVICE void gather_block(Shared& s, const Params& p, const Rows& rows, const Held& held) {
  sync_block();
  for (int word = warp_index(); word < num_words(p.experts); word += num_warps()) {
    const uint32_t primary = voted_of_word(s, word), present = seen_of_word(s, word);
    if (lane_index() == 0) {
      s.primary[word] = s.active[word] = primary;
      atomic_add(&s.primaries, count_bits(primary));
      atomic_add(&s.present, count_bits(present));
    }
    list_candidates(s, present & ~primary, word);
  }
  publish_padding(s, p, rows, held, s.padding);
  if (thread_index() == 0) s.first_usable = s.usable;
  sync_block();
}

// What this block voted, for its peers or the grid. Ends without a barrier.
SERE_DEVICE void gather_own(Shared& s, const Params& p, const Rows& rows, const Held& held) {
  sync_block();
  for (int word = warp_index(); word < num_words(p.experts); word += num_warps()) {
    const uint32_t primary = voted_of_word(s, word), present = seen_of_word(s, word);
    if (lane_index() == 0) {
      s.mine_primary[word] = primary;
      s.mine_present[word] = present;
    }
  }
  publish_padding(s, p, rows, held, s.mine_padding);
}

// What all blocks of the cluster voted. Ends with a barrier of this block.
SERE_DEVICE void gather_peers(Shared& s, const Params& p, const Rows& rows, int blocks) {
  sync_cluster();
  // A warp takes a word, its lanes the blocks: every remote load is under way at once.
  for (int word = warp_index(); word < num_words(p.experts); word += num_warps()) {
    uint32_t primary = 0, present = 0;
    if (lane_index() < blocks) {
      const Shared& theirs = *peer(&s, lane_index());
      primary = theirs.mine_primary[word];
      present = theirs.mine_present[word];
    }
    primary = warp_or(primary);
    present = warp_or(present);
    if (lane_index() == 0) {
      s.primary[word] = s.active[word] = primary;
      atomic_add(&s.primaries, count_bits(primary));
      atomic_add(&s.present, count_bits(present));
    }
  }
  if (pads_here(rows) && warp_index() == 0) {
    const int usable = lane_index() < blocks ? peer(&s, lane_index())->usable : kNoRow;
    const int first = int(warp_min(uint32_t(usable)));
    if (lane_index() == 0) s.first_usable = first;
    if (first != kNoRow && lane_index() < p.top_k) {
      const int owner = first / rows_per_block(p.rows, blocks);
      const int id = peer(&s, owner)->mine_padding[lane_index()];
      s.padding[lane_index()] = id;
      const int c = class_of(s.control, p.row_class, first);
      if (is_expert(id, p.experts)) s.seen[id][c] = 1;  // it is looked up here too
    }
  }
  sync_block();
}

// The critical experts of all blocks' rows. Ends with a barrier of this block.
SERE_DEVICE void gather_kept(Shared& s, const Params& p, int blocks) {
  sync_cluster();
  for (int word = warp_index(); word < num_words(p.experts); word += num_warps()) {
    const bool is_peer = lane_index() < blocks;
    const uint32_t kept = warp_or(is_peer ? peer(&s, lane_index())->mine_kept[word] : 0);
    if (lane_index() == 0) s.active[word] = s.primary[word] | kept;
  }
  sync_block();
}

// The experts of this block's own rows, and of the row its padding rows copy. Ends with a barrier.
SERE_DEVICE void list_own(Shared& s, const Params& p) {
  for (int word = warp_index(); word < num_words(p.experts); word += num_warps()) {
    list_candidates(s, seen_of_word(s, word) & ~s.primary[word], word);
  }
  sync_block();
}

}  // namespace sere
