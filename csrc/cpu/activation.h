// The activations of fastpeft/ops/activation.py on Vec: `value` is the function, `both` the function and its derivative.
#pragma once

#include "kernels.h"
#include "math.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

// x σ(u), which silu and both approximations of gelu are: the derivative is σ + x σ (1 - σ) u'.
FASTPEFT_INLINE void swish(Vec x, Vec u, Vec slope, Vec* f, Vec* d) {
  Vec rest;
  const Vec s = sigmoid(u, &rest);
  *f = mul(x, s);
  *d = fma(mul(*f, rest), slope, s);
}

struct Silu {
  FASTPEFT_INLINE Vec value(Vec x) { return mul(x, sigmoid(x)); }
  FASTPEFT_INLINE void both(Vec x, Vec* f, Vec* d) { swish(x, x, set(1.0f), f, d); }
};

struct QuickGelu {
  FASTPEFT_INLINE Vec value(Vec x) { return mul(x, sigmoid(mul(x, set(1.702f)))); }
  FASTPEFT_INLINE void both(Vec x, Vec* f, Vec* d) { swish(x, mul(x, set(1.702f)), set(1.702f), f, d); }
};

struct GeluTanh {  // (1 + tanh u)/2 = σ(2u)
  FASTPEFT_INLINE Vec value(Vec x) { return mul(x, sigmoid(argument(x))); }
  FASTPEFT_INLINE void both(Vec x, Vec* f, Vec* d) {
    const Vec slope = fma(mul(x, x), set(3 * TWICE * CUBIC), set(TWICE));
    swish(x, argument(x), slope, f, d);
  }
  FASTPEFT_INLINE Vec argument(Vec x) { return mul(x, fma(mul(x, x), set(TWICE * CUBIC), set(TWICE))); }
  static constexpr float TWICE = 1.5957691216f, CUBIC = 0.044715f;  // 2 √(2/π)
};

struct Gelu {
  FASTPEFT_INLINE Vec value(Vec x) {
    Vec distribution, density;
    normal(x, &distribution, &density);
    return mul(x, distribution);
  }
  FASTPEFT_INLINE void both(Vec x, Vec* f, Vec* d) {
    Vec distribution, density;
    normal(x, &distribution, &density);
    *f = mul(x, distribution);
    *d = fma(x, density, distribution);
  }
};

// greatest and least return their second operand where one is NaN.
struct Relu {
  FASTPEFT_INLINE Vec value(Vec x) { return greatest(zero(), x); }
  FASTPEFT_INLINE void both(Vec x, Vec* f, Vec* d) {
    *f = value(x);
    *d = below(zero(), x, set(1.0f), zero());
  }
};

struct Relu2 {
  FASTPEFT_INLINE Vec value(Vec x) {
    const Vec r = greatest(zero(), x);
    return mul(r, r);
  }
  FASTPEFT_INLINE void both(Vec x, Vec* f, Vec* d) {
    const Vec r = greatest(zero(), x);
    *f = mul(r, r);
    *d = add(r, r);
  }
};

struct Relu6 {
  FASTPEFT_INLINE Vec value(Vec x) { return least(set(6.0f), greatest(zero(), x)); }
  FASTPEFT_INLINE void both(Vec x, Vec* f, Vec* d) {
    *f = value(x);
    *d = below(zero(), x, below(x, set(6.0f), set(1.0f), zero()), zero());
  }
};

struct Hardswish {
  FASTPEFT_INLINE Vec value(Vec x) {
    const Vec inner = least(set(6.0f), greatest(zero(), add(x, set(3.0f))));
    return mul(x, div(inner, set(6.0f)));
  }
  FASTPEFT_INLINE void both(Vec x, Vec* f, Vec* d) {
    *f = value(x);
    const Vec between = fma(x, set(1.0f / 3), set(0.5f));
    *d = below(set(-3.0f), x, below(x, set(3.0f), between, set(1.0f)), zero());
  }
};

struct Tanh {
  FASTPEFT_INLINE Vec value(Vec x) { return tanh(x); }
  FASTPEFT_INLINE void both(Vec x, Vec* f, Vec* d) {
    *f = tanh(x);
    *d = sub(set(1.0f), mul(*f, *f));
  }
};

struct Sigmoid {
  FASTPEFT_INLINE Vec value(Vec x) { return sigmoid(x); }
  FASTPEFT_INLINE void both(Vec x, Vec* f, Vec* d) {
    Vec rest;
    *f = sigmoid(x, &rest);
    *d = mul(*f, rest);
  }
};

// Calls f with an object of the activation's type.
template <typename F>
static void with_activation(Activation act, const F& f) {
  switch (act) {
    case Activation::silu:
      return f(Silu{});
    case Activation::gelu:
      return f(Gelu{});
    case Activation::gelu_tanh:
      return f(GeluTanh{});
    case Activation::quick_gelu:
      return f(QuickGelu{});
    case Activation::relu:
      return f(Relu{});
    case Activation::relu2:
      return f(Relu2{});
    case Activation::relu6:
      return f(Relu6{});
    case Activation::hardswish:
      return f(Hardswish{});
    case Activation::tanh:
      return f(Tanh{});
    case Activation::sigmoid:
      return f(Sigmoid{});
  }
}

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
