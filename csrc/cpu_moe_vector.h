// A register of float32 lanes on whatever the compiler was told to build for: AVX-512, AVX2, or 16
// bytes, which is NEON on aarch64 and SSE2 on x86.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu_moe_common.h"

namespace sere::moe {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

template <typename Vector, typename T>
inline Vector load_as(const T* from) {
  Vector values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

inline Floats load(const float* from) { return load_as<Floats>(from); }
inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }
inline Floats broadcast(float value) { return Floats{} + value; }

// f(0), f(1), ... f(kCount - 1), where each is a constant: an array that only they index is kept in
// registers from the start, which a compiler that unrolls a loop notices too late to rely on.
template <int kCount, typename Function>
[[gnu::always_inline]] inline void unrolled(const Function& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace sere::moe

#if defined(__AVX512F__)
#include "cpu_moe_avx512.h"
#elif defined(__AVX2__)
#include "cpu_moe_avx2.h"
#else
#include "cpu_moe_portable.h"
#endif
