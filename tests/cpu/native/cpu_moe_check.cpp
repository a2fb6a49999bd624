// The CPU MoE's kernels against a float64 loop, as a program of its own: built for any machine's
// instruction set without Python, and run under an emulator where the machine is not at hand.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu_moe_run.h"
#include "cpu_moe_vector_engine.h"

#ifdef SERE_EMULATED_AMX
#include "amx_emulator.h"
#include "cpu_moe_amx_engine.h"
#endif

using namespace sere::moe;

namespace {

struct Sizes {
  int64_t tokens, top_k, experts, hidden, inter;
};

template <typename T>
struct Layer {
  std::vector<T> hidden, w13, w2, out;
  std::vector<T> packed_w13, packed_w2;
  std::vector<float> w13_bias, w2_bias, weights;
  std::vector<int32_t> ids;
  Sizes sizes;

  explicit Layer(const Sizes& s, uint32_t seed) : sizes(s) {
    std::mt19937 random(seed);
    const auto fill = [&](std::vector<T>& to, int64_t count, float scale) {
      for (int64_t i = 0; i < count; ++i) {
        to.push_back(from_float<T>(scale * (int32_t(random() % 2001) - 1000) / 1000.0f));
      }
    };
    fill(hidden, s.tokens * s.hidden, 1.7f);
    fill(w13, s.experts * 2 * s.inter * s.hidden, 1.7f / std::sqrt(float(s.hidden)));
    fill(w2, s.experts * s.hidden * s.inter, 1.7f / std::sqrt(float(s.inter)));
    for (int64_t i = 0; i < s.experts * 2 * s.inter; ++i) w13_bias.push_back(random() % 9 * 0.1f);
    for (int64_t i = 0; i < s.experts * s.hidden; ++i) w2_bias.push_back(random() % 9 * 0.1f);
    for (int64_t i = 0; i < s.tokens * s.top_k; ++i) {
      ids.push_back(int32_t(random() % (s.experts + 1)) - 1);  // -1: an empty slot
      weights.push_back(0.1f + random() % 9 * 0.1f);
    }
    out.resize(s.tokens * s.hidden);
    packed_w13 = packed(w13, 2 * s.experts, s.inter, s.hidden);
    packed_w2 = packed(w2, s.experts, s.hidden, s.inter);
  }

  // [matrices, rows, depth], padded, in blocks.
  static std::vector<T> packed(const std::vector<T>& from, int64_t matrices, int64_t rows,
                               int64_t depth) {
    const int64_t to_rows = whole_blocks(rows), to_depth = whole_blocks(depth);
    std::vector<T> to(matrices * to_rows * to_depth);
    for (int64_t i = 0; i < matrices * rows; ++i) {
      const int64_t row = i / rows * to_rows + i % rows;
      std::copy_n(from.data() + i * depth, depth, to.data() + row * to_depth);
    }
    const std::vector<T> before = to;
    const int64_t words = to_depth * sizeof(T) / sizeof(uint32_t);
    pack_blocks((uint32_t*)to.data(), matrices * to_rows, words, false);
    std::vector<T> back = to;
    pack_blocks((uint32_t*)back.data(), matrices * to_rows, words, true);
    if (std::memcmp(back.data(), before.data(), back.size() * sizeof(T)) != 0) std::abort();
    return to;
  }

  // Tokens [first, first + count), as a call of their own.
  template <typename Engine, bool kInBlocks>
  std::vector<T> run(int64_t first, int64_t count, Activation activation) {
    const Problem<T> p{hidden.data() + first * sizes.hidden,
                       kInBlocks ? packed_w13.data() : w13.data(),
                       kInBlocks ? packed_w2.data() : w2.data(),
                       w13_bias.data(),
                       w2_bias.data(),
                       ids.data() + first * sizes.top_k,
                       weights.data() + first * sizes.top_k,
                       out.data(),
                       count,
                       sizes.top_k,
                       sizes.experts,
                       sizes.hidden,
                       sizes.inter,
                       activation};
    Workspace<Engine> workspace;
    sere::moe::run(p, 0, count, workspace);
    return {out.begin(), out.begin() + count * sizes.hidden};
  }

  std::vector<double> expected(int64_t token, Activation activation) const {
    std::vector<double> sums(sizes.hidden), inter(sizes.inter);
    for (int64_t slot = token * sizes.top_k; slot < (token + 1) * sizes.top_k; ++slot) {
      const int64_t e = ids[slot];
      if (e < 0) continue;
      const auto dot = [](const T* a, const auto* b, int64_t n) {
        double sum = 0;
        for (int64_t k = 0; k < n; ++k) sum += double(to_float(a[k])) * double(b[k]);
        return sum;
      };
      std::vector<double> x(sizes.hidden);
      for (int64_t k = 0; k < sizes.hidden; ++k) x[k] = to_float(hidden[token * sizes.hidden + k]);
      for (int64_t i = 0; i < sizes.inter; ++i) {
        const int64_t gate_row = 2 * e * sizes.inter + i, up_row = gate_row + sizes.inter;
        const double g =
            dot(&w13[gate_row * sizes.hidden], x.data(), sizes.hidden) + w13_bias[gate_row];
        const double u =
            dot(&w13[up_row * sizes.hidden], x.data(), sizes.hidden) + w13_bias[up_row];
        const double tanh_form =
            0.5 * g * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)));
        inter[i] = (activation == Activation::kSilu ? g / (1 + std::exp(-g)) : tanh_form) * u;
      }
      for (int64_t h = 0; h < sizes.hidden; ++h) {
        const int64_t row = e * sizes.hidden + h;
        sums[h] +=
            weights[slot] * (dot(&w2[row * sizes.inter], inter.data(), sizes.inter) + w2_bias[row]);
      }
    }
    return sums;
  }
};

// Relative error of the whole output, and whether rows computed alone are the same, bit for bit.
template <typename Engine, bool kInBlocks>
bool check(const char* name, const Sizes& sizes, Activation activation, double tolerance) {
  using T = typename Engine::Weight;
  Layer<T> layer(sizes, 7);
  const std::vector<T> got = layer.template run<Engine, kInBlocks>(0, sizes.tokens, activation);
  double error = 0, norm = 0;
  bool alone = true;
  for (int64_t t = 0; t < sizes.tokens; ++t) {
    const std::vector<double> want = layer.expected(t, activation);
    const std::vector<T> row = layer.template run<Engine, kInBlocks>(t, 1, activation);
    for (int64_t h = 0; h < sizes.hidden; ++h) {
      const T value = got[t * sizes.hidden + h];
      error += std::pow(to_float(value) - want[h], 2);
      norm += std::pow(want[h], 2);
      alone = alone && to_float(value) == to_float(row[h]);
    }
  }
  const double relative = std::sqrt(error / norm);
  const bool good = relative < tolerance && alone;
  std::printf("%s %s tokens %ld hidden %ld inter %ld: error %.2e, rows alone %s\n",
              good ? "ok" : "FAILED", name, long(sizes.tokens), long(sizes.hidden),
              long(sizes.inter), relative, alone ? "the same" : "differ");
  return good;
}

template <typename Engine, bool kInBlocks>
bool check_all(const char* name, double tolerance, std::initializer_list<Sizes> all_sizes) {
  bool good = true;
  for (const Sizes& sizes : all_sizes) {
    for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
      good = check<Engine, kInBlocks>(name, sizes, activation, tolerance) && good;
    }
  }
  return good;
}

template <typename Math>
bool check_vectors(const char* name, double tolerance) {
  return check_all<VectorEngine<Math>, true>(
      name, tolerance,
      {{1, 2, 4, 64, 32}, {5, 3, 3, 37, 21}, {9, 2, 3, 33, 1}, {40, 3, 4, 96, 160}, {20, 4, 2, 1100, 25}});
}

}  // namespace

int main() {
  bool good = check_vectors<Float32<bf16>>("bfloat16", 1e-2);
  good = check_vectors<Float32<float>>("float32", 2e-6) && good;
#ifdef __AVX512BF16__
  good = check_vectors<NativeBf16>("bfloat16 pairs", 1e-2) && good;
#endif
#ifdef SERE_EMULATED_AMX
  good = check_all<amx::Engine, false>(
             "tiles", 1e-2, {{1, 2, 4, 64, 32}, {40, 3, 4, 96, 160}, {70, 2, 3, 1184, 64}}) &&
         good;
#endif
  return good ? 0 : 1;
}
