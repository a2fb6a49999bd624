// Rows stay distinct: what becomes of slots that met on one expert. One row at a time; shared by
// both CPU implementations and by the CUDA kernels. Semantics: docs/semantics.md.
#pragma once

#include "reroute_core.h"

namespace sere {

// A set of experts; bits beyond the last expert are 0.
struct ExpertBits {
  const uint32_t* words;
  int count;  // of words
};

// Rounded once: never the second half of a fused multiply-add, which the reference is not either.
SERE_HD float add_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;  // compiled without contraction
#endif
}

SERE_HD float multiply_rounded(float a, float b) {  // nor the first half
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SERE_HD int first_bit(uint32_t bits) {  // not 0
#ifdef __CUDA_ARCH__
  return __ffs(bits) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// Slots that hold an expert: bit k for slot k.
SERE_HD uint32_t live_slots(const int32_t* ids, int top_k, int experts) {
  uint32_t live = 0;
  for (int k = 0; k < top_k; ++k) live |= uint32_t(is_expert(ids[k], experts)) << k;
  return live;
}

// Of the live slots that hold one expert the lowest gets the weight of all, added in slot order.
// Returns those lowest slots; the other live ones are free.
SERE_HD uint32_t merge_slots(int top_k, uint32_t live, const int32_t* ids, float* weights) {
  uint32_t taken = 0;
  for (int k = 0; k < top_k; ++k) {
    if (!(live >> k & 1)) continue;
    int first = 0;
    while (first < k && !(taken >> first & 1 && ids[first] == ids[k])) ++first;
    if (first == k) {
      taken |= 1u << k;
    } else if (weights != nullptr) {
      weights[first] = add_rounded(weights[first], weights[k]);
    }
  }
  return taken;
}

// Live slots that are not taken get, in slot order and at weight 0, the lowest members of A that no
// taken slot holds. Where there are none left, a slot keeps its own expert; if that is in A, and so
// in the row, it takes the next of the row's own experts that a taken slot gave up.
// Distinct if `own` is.
SERE_HD void fill_free_slots(const ExpertBits& a, int top_k, uint32_t live, uint32_t taken,
                             const int32_t* own, int32_t* ids, float* weights) {
  uint32_t left = live & ~taken;
  for (int word = 0; word < a.count && left != 0; ++word) {
    uint32_t unused = a.words[word];
    if (unused == 0) continue;
    for (int k = 0; k < top_k; ++k) {
      if (taken >> k & 1 && ids[k] >> 5 == word) unused &= ~(1u << (ids[k] & 31));
    }
    for (; unused != 0 && left != 0; unused &= unused - 1, left &= left - 1) {
      const int slot = first_bit(left);
      ids[slot] = word * 32 + first_bit(unused);
      if (weights != nullptr) weights[slot] = 0.0f;
    }
  }
  int donor = 0;
  for (uint32_t surplus = left; left != 0; left &= left - 1) {
    const int slot = first_bit(left);
    if (weights != nullptr) weights[slot] = 0.0f;
    ids[slot] = own[slot];
    if (!has(a.words, own[slot])) continue;
    const auto gave_up = [&](int k) { return (live & ~surplus) >> k & 1 && !has(a.words, own[k]); };
    while (donor < top_k && !gave_up(donor)) ++donor;
    if (donor < top_k) ids[slot] = own[donor++];
  }
}

// What a padding row holds where no valid row can be copied: the lowest members of A, in every slot
// one of its own if A is large enough. A is not empty.
SERE_HD void fill_padding_slots(const ExpertBits& a, int top_k, int32_t* ids) {
  int word = 0;
  while (a.words[word] == 0) ++word;
  for (int k = 0; k < top_k; ++k) ids[k] = word * 32 + first_bit(a.words[word]);
  const uint32_t every = top_k >= 32 ? 0xffffffffu : (1u << top_k) - 1;
  fill_free_slots(a, top_k, every, 0, ids, ids, nullptr);
}

}  // namespace sere
