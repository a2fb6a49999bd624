// The algorithm: gate and up projections of every active expert, their activation, then the down
// projections, whose weighted sums are the output, with what surrogates make of experts that were not
// loaded. Weights are read from memory once.
//
// A unit of work is some weight rows of one expert, small enough to stay in a core's second-level
// cache. The expert's panels of token rows pass over a strip of it after the other, and request the
// weights that come next. Threads take the next unit as they are done.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu_moe_activation.h"
#include "cpu_moe_ahead.h"
#include "cpu_moe_blocks.h"
#include "cpu_moe_routing.h"
#include "cpu_moe_surrogates.h"

namespace sere::moe {

// Bytes of one matrix in a unit: gate and up rows and those of the unit that comes next must fit into
// the second-level cache beside each other.
inline int64_t unit_bytes(int64_t most) {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 512 << 10);
#else
  constexpr int64_t cache = 512 << 10;
#endif
  return std::min(most, cache / 8);
}

// Weight rows of a unit: as many as are `bytes`, fewer where threads would go without.
inline int64_t rows_per_unit(int64_t size, int64_t bytes, int64_t row_bytes, int64_t unit,
                             int64_t groups) {
  const int64_t wanted = 8 * int64_t{omp_get_max_threads()};
  int64_t rows = std::max(unit, std::min(bytes / row_bytes, size) / unit * unit);
  while (rows > unit && groups * ((size + rows - 1) / rows) < wanted) {
    rows = (rows / 2 + unit - 1) / unit * unit;
  }
  return rows;
}

// Weight rows that panels pass over together: gate and up rows, or two halves of some down rows.
template <typename T>
struct Strip {
  const T* first;
  const T* second;  // or null
  int64_t rows;     // of each
};

template <typename Engine>
struct Workspace {
  Routing routing;
  Losses losses;
  typename Engine::Memory memory;
};

template <typename Engine>
class Run {
 public:
  using T = typename Engine::Weight;

  Run(const Problem<T>& p, int64_t first_token, int64_t num_tokens, const Routing& routing,
      Losses& losses, Engine& engine)
      : p_(p),
        first_token_(first_token),
        num_tokens_(num_tokens),
        routing_(routing),
        losses_(losses),
        engine_(engine),
        num_active_(routing.active.size()),
        hidden_depth_(whole_blocks(p.hidden_size)),
        inter_depth_(whole_blocks(p.inter_size)) {
    const int64_t element = sizeof(T);
    const int64_t bytes = unit_bytes(Engine::kMostUnitBytes);
    up_rows_ = rows_per_unit(p.inter_size, bytes, hidden_depth_ * element, kUnitRows,
                             std::max<int64_t>(num_active_, 1));
    up_units_ = (p.inter_size + up_rows_ - 1) / up_rows_;
    down_rows_ = rows_per_unit(p.hidden_size, bytes, inter_depth_ * element, kUnitRows, 1);
    down_units_ = (p.hidden_size + down_rows_ - 1) / down_rows_;
    stride_ = std::max(up_rows_, down_rows_);
  }

  void operator()() {
#pragma omp parallel
    {
      thread_local typename Engine::Thread thread;
      [[maybe_unused]] const typename Engine::Session session;
      thread_local Scratch values_scratch, sums_scratch;
      float* values = values_scratch.get<float>(2 * Engine::kPanelRows * stride_);
      float* sums = sums_scratch.get<float>(num_tokens_ * down_rows_);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < engine_.num_prepared(); ++i) engine_.prepare(i);

      const int64_t first_down = next_down_++;
      int64_t unit = next_up_++;
      while (unit < num_active_ * up_units_) {
        const int64_t following = next_up_++;
        run_up(unit, following, first_down, thread, values);
        unit = following;
      }
      for (; unit < num_active_ * up_units_ + losses_.num_experts(); unit = next_up_++) {
        losses_.project(unit - num_active_ * up_units_, p_.hidden);
      }
#pragma omp barrier
      unit = first_down;
      while (unit < down_units_) {
        const int64_t following = next_down_++;
        run_down(unit, following, thread, values, sums);
        unit = following;
      }
    }
  }

 private:
  static constexpr int64_t kUnitRows = 32;  // a multiple of what engines multiply at a time

  const T* gate_of(int64_t unit) const {
    return p_.w13 +
           (2 * expert_of(unit).id * inter_depth_ + unit % up_units_ * up_rows_) * hidden_depth_;
  }
  const T* down_of(int64_t unit, int64_t active) const {
    return p_.w2 + (routing_.active[active].id * hidden_depth_ + unit * down_rows_) * inter_depth_;
  }
  const Routing::Expert& expert_of(int64_t up_unit) const {
    return routing_.active[up_unit / up_units_];
  }
  static Rows bytes_of(const T* rows, int64_t count, int64_t depth) {
    return {(const char*)rows, count * depth * int64_t{sizeof(T)}};
  }

  // Rows of a strip, and how far its second half is from the first.
  int64_t strip_rows(int64_t unit_rows) const {
    return Engine::kStripRows ? Engine::kStripRows : unit_rows;
  }
  int64_t down_strip_rows() const {
    return Engine::kStripRows ? 2 * Engine::kStripRows : down_rows_;
  }

  // What a down unit begins with.
  void begin_down(int64_t unit, int64_t active, Ahead& ahead) const {
    if (unit >= down_units_) return;
    const int64_t rows = std::min(down_rows_, p_.hidden_size - unit * down_rows_);
    next_down(down_of(unit, active), rows, ahead);
  }
  void next_down(const T* from, int64_t rows, Ahead& ahead) const {
    const int64_t first = std::min(strip_rows(down_rows_), rows);
    ahead.next[0] = bytes_of(from, first, inter_depth_);
    if (first < rows) ahead.next[1] = bytes_of(from + first * inter_depth_, first, inter_depth_);
  }

  // Gate and up rows of one expert for all of its tokens.
  void run_up(int64_t unit, int64_t following, int64_t first_down, typename Engine::Thread& thread,
              float* values) {
    const auto& expert = expert_of(unit);
    const int64_t unit_begin = unit % up_units_ * up_rows_;
    const int64_t end = std::min(unit_begin + up_rows_, p_.inter_size);
    const int64_t up_offset = inter_depth_ * hidden_depth_, step = strip_rows(up_rows_);
    float* const out[2] = {values, values + Engine::kPanelRows * stride_};
    for (int64_t begin = unit_begin; begin < end; begin += step) {
      const int64_t rows = std::min(step, end - begin);
      const T* gate = gate_of(unit) + (begin - unit_begin) * hidden_depth_;
      Ahead ahead{{}, 0, expert.num_panels};
      const T* next = begin + step < end                    ? gate + step * hidden_depth_
                      : following < num_active_ * up_units_ ? gate_of(following)
                                                            : nullptr;
      if (next) {
        ahead.next[0] = bytes_of(next, step, hidden_depth_);
        ahead.next[1] = bytes_of(next + up_offset, step, hidden_depth_);
      } else {
        begin_down(first_down, 0, ahead);
      }
      const int64_t bias_at = 2 * expert.id * p_.inter_size + begin;
      const float* bias = p_.w13_bias ? p_.w13_bias + bias_at : nullptr;
      for (; ahead.panel < expert.num_panels; ++ahead.panel) {
        const int64_t panel = expert.first_panel + ahead.panel;
        engine_.multiply_hidden({gate, gate + up_offset, rows}, panel, ahead, thread, out, stride_);
        for (int r = 0; r < routing_.panels[panel].count; ++r) {
          apply_activation(out[0] + r * stride_, out[1] + r * stride_, bias, rows);
        }
        engine_.store_inter(panel, begin, rows, values, stride_);
      }
    }
  }

  // gate = act(gate + bias) * (up + bias), whole registers: both buffers reach beyond `count`.
  void apply_activation(float* gate, const float* up, const float* bias, int64_t count) const {
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats g{}, u{};
      const int64_t lanes = std::min<int64_t>(kLanes, count - i);
      if (lanes == kLanes) {
        g = load(gate + i), u = load(up + i);
        if (bias) g += load(bias + i), u += load(bias + p_.inter_size + i);
        store(gate + i, activate(p_.activation, g) * u);
        continue;
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        g[lane] = gate[i + lane] + (bias ? bias[i + lane] : 0.0f);
        u[lane] = up[i + lane] + (bias ? bias[p_.inter_size + i + lane] : 0.0f);
      }
      g = activate(p_.activation, g) * u;
      for (int64_t lane = 0; lane < lanes; ++lane) gate[i + lane] = g[lane];
    }
  }

  // Some columns of the output, over all experts, so that they add up without locks.
  void run_down(int64_t unit, int64_t following, typename Engine::Thread& thread, float* values,
                float* sums) {
    const int64_t unit_begin = unit * down_rows_;
    const int64_t count = std::min(down_rows_, p_.hidden_size - unit_begin);
    const int64_t half = strip_rows(down_rows_), step = down_strip_rows();
    float* const out[2] = {values, values + half};
    std::fill_n(sums, num_tokens_ * down_rows_, 0.0f);
    for (int64_t e = 0; e < num_active_; ++e) {
      const auto& expert = routing_.active[e];
      for (int64_t begin = 0; begin < count; begin += step) {
        const int64_t rows = std::min(step, count - begin);
        const T* first = down_of(unit, e) + begin * inter_depth_;
        const T* second = half < rows ? first + half * inter_depth_ : nullptr;
        Ahead ahead{{}, 0, expert.num_panels};
        if (begin + step < count) {
          next_down(first + step * inter_depth_, count - begin - step, ahead);
        } else if (e + 1 < num_active_) {
          begin_down(unit, e + 1, ahead);
        } else {
          begin_down(following, 0, ahead);
        }
        const int64_t bias_at = expert.id * p_.hidden_size + unit_begin + begin;
        const float* bias = p_.w2_bias ? p_.w2_bias + bias_at : nullptr;
        for (; ahead.panel < expert.num_panels; ++ahead.panel) {
          const int64_t panel = expert.first_panel + ahead.panel;
          engine_.multiply_inter({first, second, std::min(half, rows)}, panel, ahead, thread, out,
                                 stride_);
          for (int r = 0; r < routing_.panels[panel].count; ++r) {
            const int64_t position = routing_.panels[panel].first + r;
            float* sum = sums + (routing_.token[position] - first_token_) * down_rows_ + begin;
            const float* of_row = values + r * stride_;
            const float weight = routing_.weight[position];
            for (int64_t i = 0; i < rows; ++i) {
              sum[i] += weight * (of_row[i] + (bias ? bias[i] : 0.0f));
            }
          }
        }
      }
    }
    losses_.add(unit_begin, count, down_rows_, sums);
    for (int64_t t = 0; t < num_tokens_; ++t) {
      T* out = p_.out + (first_token_ + t) * p_.hidden_size + unit_begin;
      for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(sums[t * down_rows_ + i]);
    }
  }

  const Problem<T>& p_;
  const int64_t first_token_, num_tokens_;
  const Routing& routing_;
  Losses& losses_;
  Engine& engine_;
  const int64_t num_active_;
  const int64_t hidden_depth_, inter_depth_;  // of weight rows
  int64_t up_rows_, up_units_;      // of an expert's intermediate columns
  int64_t down_rows_, down_units_;  // of the hidden size
  int64_t stride_;                  // of products
  std::atomic<int64_t> next_up_{0}, next_down_{0};
};

template <typename Engine>
void run(const Problem<typename Engine::Weight>& p, int64_t first_token, int64_t num_tokens,
         Workspace<Engine>& workspace) {
  workspace.routing.build(p, first_token, num_tokens, Engine::kPanelRows, Engine::kPanelUnit);
  workspace.losses.build(p.surrogates, first_token, num_tokens);
  Engine engine(p, workspace.routing, first_token, num_tokens, workspace.memory);
  Run<Engine>(p, first_token, num_tokens, workspace.routing, workspace.losses, engine)();
}

}  // namespace sere::moe
