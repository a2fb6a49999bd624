// Activations, a register at a time.
#pragma once

#include "cpu_moe_vector.h"

namespace sere::moe {

// exp with a relative error near 1e-7; beyond -87 and 88 as at those. NaN counts as 88.
inline Floats exp(Floats x) {
  x = x < 88.0f ? x : broadcast(88.0f);
  x = x > -87.0f ? x : broadcast(-87.0f);
  const Floats rounding = broadcast(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded
  const Floats shifted = x * 1.44269504088896341f + rounding;
  const Floats n = shifted - rounding;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats y = broadcast(1.0f / 720);
  for (const float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    y = y * r + coefficient;
  }
  return (Floats)((Ints)y + ((Ints)shifted << 23));  // times 2^n
}

// Both are x * sigmoid(y(x)).
inline Floats activate(Activation activation, Floats x) {
  Floats y = x;
  if (activation == Activation::kGeluTanh) {
    y = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // 2 * sqrt(2 / pi)
  }
  return x / (1.0f + exp(-y));
}

}  // namespace sere::moe
