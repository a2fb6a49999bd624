// Match: the best primary of every listed expert, once per expert and not per slot. A warp reads
// the expert's row of the similarity matrix in coalesced steps, or its sorted neighbours until one
// of them is in P.
#pragma once

#include "reroute_block.cuh"

namespace sere {

constexpr int kMatchBatch = 4;     // experts whose first loads a warp has in flight together
constexpr int kQuadSpan = 4 * 32;  // elements that a warp loads at once

struct Match {
  uint32_t key;  // of the similarity
  int id;
};

SERE_DEVICE bool has_threshold(const Control& control) {
  bool any = false;
  for (int c = 0; c < num_classes(control); ++c) any |= control.threshold[c] > 0.0f;
  return any;
}

// A list's winner costs one more dependent load where there is a threshold; beyond one step a row
// costs more than that.
SERE_DEVICE bool uses_lists(const Params& p) {
  if (p.neighbors == nullptr || p.search == kSearchRows) return false;
  return p.search == kSearchNeighbors || p.experts > kQuadSpan;
}

// The tables are constant, so this may run before the kernels ahead of this one have finished.
SERE_DEVICE void prefetch_tables(const Params& p) {
  constexpr int kLine = 128, kLinesOfList = kQuadSpan * sizeof(int16_t) / kLine;
  if (uses_lists(p)) {  // what the first step of a search reads
    const int lines = p.experts < kQuadSpan ? 1 : kLinesOfList;
    for (int at = thread_index(); at < p.experts * lines; at += num_threads()) {
      prefetch(p.neighbors + at / lines * p.experts + at % lines * (kLine / 2));
    }
  } else if (p.experts <= kQuadSpan) {
    const int bytes = p.experts * p.experts * int(sizeof(float));
    const char* table = reinterpret_cast<const char*>(p.similarity);
    for (int at = thread_index() * kLine; at < bytes; at += num_threads() * kLine) {
      prefetch(table + at);
    }
  }
}

// Elements beyond the row's end are zero.
template <typename T>
SERE_DEVICE Quad<T> load_four(const T* row, int at, int end, bool aligned) {
  Quad<T> quad{};
  if (aligned) {
    if (at < end) quad = load_quad(row + at);
    return quad;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at + i < end) quad.at[i] = row[at + i];
  }
  return quad;
}

SERE_DEVICE void scan_quad(const Shared& s, const Quad<float>& quad, int at, Match& best) {
  const uint32_t members = s.primary[(at & (kMaxExperts - 1)) >> 5] >> (at & 31);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t key = ordered_key(quad.at[i]);
    if ((members >> i & 1) && key > best.key) best = {key, at + i};
  }
}

// Highest similarity within P, and the lowest id that has it: in every lane.
SERE_DEVICE Match search_row(const Shared& s, const Params& p, int expert, Quad<float> quad) {
  const float* row = p.similarity + int64_t(expert) * p.experts;
  Match best = {0, kMaxExperts};
  scan_quad(s, quad, lane_index() * 4, best);
#pragma unroll 1
  for (int from = kQuadSpan; from < p.experts; from += kQuadSpan) {
    const int at = from + lane_index() * 4;
    quad = load_four(row, at, p.experts, p.quads);
    if (at < p.experts) scan_quad(s, quad, at, best);
  }
  const uint32_t key = warp_max(best.key);
  return {key, int(warp_min(best.key == key ? uint32_t(best.id) : uint32_t(kMaxExperts)))};
}

// The first of the neighbours that is in P; they are sorted by similarity, ties by id.
SERE_DEVICE int search_list(const Shared& s, const Params& p, int expert, Quad<int16_t> quad) {
  const int16_t* row = p.neighbors + int64_t(expert) * p.experts;
  for (int from = 0;; from += kQuadSpan) {
    const int at = from + lane_index() * 4;
    if (from > 0) quad = load_four(row, at, p.experts, p.quads);
    int found = -1;
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      if (at + i < p.experts && has(s.primary, quad.at[i])) found = quad.at[i];
    }
    const uint32_t lanes = ballot(found >= 0);
    if (lanes != 0) return shuffle(found, lowest_bit(lanes));
    if (from + kQuadSpan >= p.experts) return 0;  // P is not empty, so a whole row has a member
  }
}

// Whether an expert outside P stays active: to rows of one class it may be critical, and move in
// those of another.
SERE_DEVICE bool is_kept(const Shared& s, int expert, float similarity) {
  bool kept = false;
  for (int c = 0; c < num_classes(s.control); ++c) {
    kept |= s.seen[expert][c] != 0 && is_critical(similarity, s.control.threshold[c]);
  }
  return kept;
}

template <bool kLists>
SERE_DEVICE void match_listed(Shared& s, const Params& p) {
  const int warps = num_warps();
  const bool needs_similarity = has_threshold(s.control);
  for (int first = warp_index(); first < s.listed; first += warps * kMatchBatch) {
    Quad<float> row[kMatchBatch];
    Quad<int16_t> list[kMatchBatch];
#pragma unroll
    for (int b = 0; b < kMatchBatch; ++b) {
      const int at = first + b * warps;
      if (at >= s.listed) continue;
      const int64_t begin = int64_t(s.list[at]) * p.experts;
      if constexpr (kLists) {
        list[b] = load_four(p.neighbors + begin, lane_index() * 4, p.experts, p.quads);
      } else {
        row[b] = load_four(p.similarity + begin, lane_index() * 4, p.experts, p.quads);
      }
    }
    int expert = -1;
    Match mine = {0, 0};  // lane b keeps the result of expert b, so that all finish together
#pragma unroll
    for (int b = 0; b < kMatchBatch; ++b) {
      const int at = first + b * warps;
      if (at >= s.listed) continue;
      const int listed = s.list[at];
      Match match;
      if constexpr (kLists) {
        match = {0, search_list(s, p, listed, list[b])};
      } else {
        match = search_row(s, p, listed, row[b]);
      }
      if (lane_index() == b) {
        mine = match;
        expert = listed;
      }
    }
    if (expert < 0) continue;
    s.best[expert] = int16_t(mine.id);
    if (!needs_similarity) continue;
    float similarity = from_key(mine.key);
    if constexpr (kLists) similarity = p.similarity[int64_t(expert) * p.experts + mine.id];
    s.best_similarity[expert] = similarity;
    if (is_kept(s, expert, similarity)) {
      atomic_or(&s.mine_kept[expert >> 5], 1u << (expert & 31));
      atomic_or(&s.active[expert >> 5], 1u << (expert & 31));
    }
  }
}

// Ends with a barrier.
SERE_DEVICE void match(Shared& s, const Params& p) {
  if (s.primaries > 0) {
    if (uses_lists(p)) {
      match_listed<true>(s, p);
    } else {
      match_listed<false>(s, p);
    }
  }
  sync_block();
}

}  // namespace sere
