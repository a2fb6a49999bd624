// The engine of vector instructions: weights in blocks (cpu_moe_blocks.h), bfloat16 or float32.
//
// An engine knows how token rows are laid out for its multiplications, and multiplies a panel of
// them with a strip of weight rows. cpu_moe_run.h has the algorithm around it.
#pragma once

#include <algorithm>
#include <cstdint>

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
  static constexpr int64_t kStripRows = kBlockRows;
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

  // What a thread needs, between multiplications and during a call.
  struct Thread {};
  struct Session {};

  // Work items that must be done, by any threads, before the first multiplication.
  int64_t num_prepared() const { return num_tokens_; }
  void prepare(int64_t token) {
    const Weight* from = p_.hidden + (first_token_ + token) * p_.hidden_size;
    Row* to = hidden_ + token * hidden_stride_;
    std::transform(from, from + p_.hidden_size, to, [](Weight value) {
      if constexpr (std::is_same_v<Row, Weight>) {
        return value;
      } else {
        return to_float(value);
      }
    });
    clear_padding(to, p_.hidden_size);
  }

  // out[s][r * stride + i] = row i of block s of the strip times the panel's row r, over the hidden
  // size. Blocks are whole, also where the strip has fewer rows.
  void multiply_hidden(const Strip<Weight>& strip, int64_t index, const Ahead& ahead, Thread&,
                       float* const out[2], int64_t stride) const {
    const Panel& panel = routing_.panels[index];
    const Row* rows[kPanelRows];
    for (int r = 0; r < panel.count; ++r) {
      rows[r] = hidden_ + (routing_.token[panel.first + r] - first_token_) * hidden_stride_;
    }
    multiply(strip, p_.hidden_size, rows, panel.count, ahead, out, stride);
  }

  void multiply_inter(const Strip<Weight>& strip, int64_t index, const Ahead& ahead, Thread&,
                      float* const out[2], int64_t stride) const {
    const Panel& panel = routing_.panels[index];
    const Row* rows[kPanelRows];
    for (int r = 0; r < panel.count; ++r) rows[r] = inter_ + (panel.first + r) * inter_stride_;
    multiply(strip, p_.inter_size, rows, panel.count, ahead, out, stride);
  }

  // Takes columns [begin, begin + count) of the intermediate rows of a panel.
  void store_inter(int64_t index, int64_t begin, int64_t count, const float* values,
                   int64_t stride) {
    const Panel& panel = routing_.panels[index];
    for (int r = 0; r < panel.count; ++r) {
      Row* to = inter_ + (panel.first + r) * inter_stride_;
      Math::store_row(values + r * stride, count, to + begin);
      if (begin == 0) clear_padding(to, p_.inter_size);
    }
  }

 private:
  // Rows a power of two apart would share the same few places of a cache.
  static int64_t stride_of(int64_t depth) {
    constexpr int64_t kLine = 64 / sizeof(Row), kPage = 4096 / sizeof(Row);
    const int64_t columns = whole_blocks(depth);
    const int64_t lines = (columns + kLine - 1) / kLine * kLine;
    return lines % (kPage / 4) == 0 ? lines + kLine : lines;
  }

  // Padding holds no column, so this may come before or after the columns.
  static void clear_padding(Row* row, int64_t depth) {
    std::fill(row + depth, row + whole_blocks(depth), Row{});
  }

  static void multiply(const Strip<Weight>& strip, int64_t depth, const Row* const* rows, int count,
                       const Ahead& ahead, float* const out[2], int64_t stride) {
    const Operands<Math> o{{strip.first, strip.second},
                           whole_blocks(depth) / kLineColumns<Weight>,
                           rows,
                           {out[0], out[1]},
                           stride};
    multiply_panel<Math>(o, count, ahead);
  }

  const Problem<Weight>& p_;
  const Routing& routing_;
  const int64_t first_token_, num_tokens_;
  int64_t hidden_stride_, inter_stride_;
  Row* hidden_;
  Row* inter_;
};

}  // namespace sere::moe
