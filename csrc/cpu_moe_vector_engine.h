// The engine of vector instructions: any sizes, bfloat16 or float32.
//
// An engine knows how token rows are laid out for its multiplications, and multiplies a panel of
// them with consecutive weight rows. cpu_moe_run.h has the algorithm around it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu_moe_routing.h"
#include "cpu_moe_tile.h"

namespace sere::moe {

template <typename Math>
class VectorEngine {
 public:
  using Weight = typename Math::Weight;
  using Row = typename Math::Row;
  static constexpr int kPanelRows = kTileRows;
  static constexpr int kPanelUnit = 1;
  static constexpr int kWeightUnit = 24;  // weight rows at a time: a multiple of every tile's
  static constexpr int64_t kMostUnitBytes = 128 << 10;

  struct Memory {
    Scratch hidden, inter;
  };

  VectorEngine(const Problem<Weight>& p, const Routing& routing, int64_t first_token,
               int64_t num_tokens, Memory& memory)
      : p_(p), routing_(routing), first_token_(first_token), num_tokens_(num_tokens) {
    hidden_stride_ = stride_of(p.hidden_size);
    inter_stride_ = stride_of(p.inter_size);
    hidden_ = memory.hidden.template get<Row>(num_tokens * hidden_stride_);
    inter_ = memory.inter.template get<Row>(routing.token.size() * inter_stride_);
  }

  // Rows of a panel at most: their columns at hand should leave the first-level cache room for the
  // weights that pass.
  static int panel_rows(const Problem<Weight>& p) {
    const int64_t columns =
        std::max(depth_block<Math>(p.hidden_size), depth_block<Math>(p.inter_size));
    const int64_t rows = Math::kPanelBytes / (columns * int64_t{sizeof(Row)});
    return int(std::min<int64_t>(rows, kPanelRows));
  }

  // What a thread needs, between multiplications and during a call.
  struct Thread {};
  struct Session {};

  // Work items that must be done, by any threads, before the first multiplication.
  int64_t num_prepared() const { return num_tokens_; }
  void prepare(int64_t token) {
    Row* to = hidden_ + token * hidden_stride_;
    Math::pack(p_.hidden + (first_token_ + token) * p_.hidden_size, p_.hidden_size, to);
    clear_padding(to, p_.hidden_size);
  }

  // out[r * stride + w] = weight row w times the panel's row r, over the hidden size.
  void multiply_hidden(const Weight* weights, int64_t num_weights, int64_t index,
                       const Ahead& ahead, Thread&, float* out, int64_t stride) const {
    const Panel& panel = routing_.panels[index];
    const Row* rows[kPanelRows];
    for (int r = 0; r < panel.count; ++r) {
      rows[r] = hidden_ + (routing_.token[panel.first + r] - first_token_) * hidden_stride_;
    }
    multiply(weights, num_weights, p_.hidden_size, rows, panel.count, ahead, out, stride);
  }

  void multiply_inter(const Weight* weights, int64_t num_weights, int64_t index, const Ahead& ahead,
                      Thread&, float* out, int64_t stride) const {
    const Panel& panel = routing_.panels[index];
    const Row* rows[kPanelRows];
    for (int r = 0; r < panel.count; ++r) rows[r] = inter_ + (panel.first + r) * inter_stride_;
    multiply(weights, num_weights, p_.inter_size, rows, panel.count, ahead, out, stride);
  }

  // Takes columns [begin, begin + count) of the intermediate rows of a panel.
  void store_inter(int64_t index, int64_t begin, int64_t count, const float* values,
                   int64_t stride) {
    const Panel& panel = routing_.panels[index];
    for (int r = 0; r < panel.count; ++r) {
      Row* to = inter_ + (panel.first + r) * inter_stride_;
      Math::pack(values + r * stride, begin, count, to);
      if (begin == 0) clear_padding(to, p_.inter_size);
    }
  }

 private:
  static constexpr int64_t kFirstLevel = 24 << 10;  // bytes that stay in it

  static int64_t whole_steps(int64_t depth) {
    return (depth + Math::kStep - 1) / Math::kStep * Math::kStep;
  }
  // Rows a power of two apart would share the same few places of a cache.
  static int64_t stride_of(int64_t depth) {
    constexpr int64_t kLine = 64 / sizeof(Row), kPage = 4096 / sizeof(Row);
    const int64_t steps = whole_steps(depth);
    const int64_t lines = (steps + kLine - 1) / kLine * kLine;
    return lines % (kPage / 4) == 0 ? lines + kLine : lines;
  }

  // Padding holds no column, so this may come before or after the columns.
  static void clear_padding(Row* row, int64_t depth) {
    for (int64_t k = depth; k < whole_steps(depth); ++k) row[Math::position(k)] = Row{};
  }

  // Weight rows from their begin to their end where the panel's rows stay in the first-level cache,
  // else a block of columns of all of them, then the next.
  void multiply(const Weight* weights, int64_t num_weights, int64_t depth, const Row* const* rows,
                int count, const Ahead& ahead, float* out, int64_t stride) const {
    const int64_t block = depth_block<Math>(depth);
    const int64_t at_once = count * depth * int64_t{sizeof(Row)} <= kFirstLevel ? depth : block;
    for (int64_t k = 0; k < depth; k += at_once) {
      const int64_t columns = std::min(at_once, depth - k);
      const Row* rows_here[kPanelRows];
      for (int r = 0; r < count; ++r) rows_here[r] = rows[r] + k;
      Operands<Math> o{weights + k, num_weights, depth, columns, block,
                       rows_here,   k == 0,      out,   stride};
      multiply_panel<Math>(o, count, ahead.from(k * sizeof(Weight)));
    }
  }

  const Problem<Weight>& p_;
  const Routing& routing_;
  const int64_t first_token_, num_tokens_;
  int64_t hidden_stride_, inter_stride_;
  Row* hidden_;
  Row* inter_;
};

}  // namespace sere::moe
