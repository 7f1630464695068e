// One LoRA layer on a few rows in one call (fastpeft/ops/lora_linear_small.py has the formulas): nothing is packed, and
// nothing runs in parallel, since the whole of it takes about a microsecond.
#pragma once

#include "lora_linear.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

// out[i] = x . w_i + s . b_i for NR rows of w (k long; null: none) and of b (r long). s is fp32, padded with zeros.
template <int NR, typename T>
FASTPEFT_INLINE void dots(
    const T* x, const T* w, int64_t w_row, int64_t k, const float* s, const T* b, int64_t b_row, int64_t r, float* out
) {
  Vec sum[NR];
#pragma GCC unroll 4
  for (int i = 0; i < NR; ++i) sum[i] = zero();
  int64_t j = 0;
  for (; j + W <= k; j += W) {
    const Vec v = load(x + j);
#pragma GCC unroll 4
    for (int i = 0; i < NR; ++i) sum[i] = fma(v, load(w + i * w_row + j), sum[i]);
  }
  if (j < k) {
    const Vec v = load(x + j, int(k - j));
#pragma GCC unroll 4
    for (int i = 0; i < NR; ++i) sum[i] = fma(v, load(w + i * w_row + j, int(k - j)), sum[i]);
  }
  for (j = 0; j + W <= r; j += W) {
    const Vec v = load(s + j);
#pragma GCC unroll 4
    for (int i = 0; i < NR; ++i) sum[i] = fma(v, load(b + i * b_row + j), sum[i]);
  }
  if (j < r) {
    const Vec v = load(s + j);
#pragma GCC unroll 4
    for (int i = 0; i < NR; ++i) sum[i] = fma(v, load(b + i * b_row + j, int(r - j)), sum[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < NR; ++i) out[i] = total(sum[i]);
}

template <typename T>
static void small_shrink(const Matrix& x, const Matrix& a, float scaling, float* s, int64_t s_row) {
  const int64_t k = x.columns, r = a.rows;
  memset(s, 0, x.rows * s_row * sizeof(float));
  for (int64_t j = 0; j < r; j += 4) {
    const T* row = static_cast<const T*>(a.data) + j * a.stride;
    for (int64_t i = 0; i < x.rows; ++i) {
      const T* p = static_cast<const T*>(x.data) + i * x.stride;
      float out[4];
      const int n = int(smaller(4, r - j));
      if (n == 4) {
        dots<4, T>(p, row, a.stride, k, nullptr, nullptr, 0, 0, out);
      } else {
        for (int c = 0; c < n; ++c) dots<1, T>(p, row + c * a.stride, 0, k, nullptr, nullptr, 0, 0, out + c);
      }
      for (int c = 0; c < n; ++c) s[i * s_row + j + c] = scaling * out[c];
    }
  }
}

template <typename T>
static void small_forward(
    const Matrix& x, const Matrix& w, const Matrix& bias, const float* s, int64_t s_row, const Matrix& b, const Matrix& y
) {
  const int64_t k = w.data == nullptr ? 0 : x.columns, r = b.columns;
  for (int64_t j = 0; j < y.columns; j += 4) {
    const int n = int(smaller(4, y.columns - j));
    const T *w_rows = static_cast<const T*>(w.data), *b_rows = static_cast<const T*>(b.data) + j * b.stride;
    if (k > 0) w_rows += j * w.stride;
    for (int64_t i = 0; i < x.rows; ++i) {
      const T* p = static_cast<const T*>(x.data) + i * x.stride;
      T* to = static_cast<T*>(y.data) + i * y.stride + j;
      float out[4];
      if (n == 4) {
        dots<4, T>(p, w_rows, w.stride, k, s + i * s_row, b_rows, b.stride, r, out);
      } else {
        for (int c = 0; c < n; ++c) {
          dots<1, T>(p, w_rows + c * w.stride, 0, k, s + i * s_row, b_rows + c * b.stride, 0, r, out + c);
        }
      }
      for (int c = 0; c < n; ++c) {
        if (k == 0) out[c] += to_float(to[c]);
        if (bias.data != nullptr) out[c] += to_float(static_cast<const T*>(bias.data)[j + c]);
        from_float(out[c], to + c);
      }
    }
  }
}

// y = x w^T + bias + scaling * x a^T b^T, or y += the adapter's part where w.data is null. One dtype for all.
static void linear_small(
    const Matrix& x,
    const Matrix& w,
    const Matrix& bias,
    const Matrix& a,
    const Matrix& b,
    float scaling,
    const Matrix& y
) {
  const int64_t s_row = round_up(a.rows, W);
  Buffer s(x.rows * s_row);
  switch (x.dtype) {
    case DType::f32:
      small_shrink<float>(x, a, scaling, s.data, s_row);
      return small_forward<float>(x, w, bias, s.data, s_row, b, y);
    case DType::bf16:
      small_shrink<bf16>(x, a, scaling, s.data, s_row);
      return small_forward<bf16>(x, w, bias, s.data, s_row, b, y);
    case DType::f16:
      small_shrink<f16>(x, a, scaling, s.data, s_row);
      return small_forward<f16>(x, w, bias, s.data, s_row, b, y);
  }
}

template <typename T>
static void small_base_backward(const Matrix& dy, const Matrix& w, const Matrix& dx) {
  for (int64_t i = 0; i < dy.rows; ++i) {
    const T* g = static_cast<const T*>(dy.data) + i * dy.stride;
    T* to = static_cast<T*>(dx.data) + i * dx.stride;
    for (int64_t j = 0; j < dx.columns; j += W) {
      const int n = int(smaller(W, dx.columns - j));
      const T* p = static_cast<const T*>(w.data) + j;
      Vec even = zero(), odd = zero();
      int64_t c = 0;
      if (n == W) {
        for (; c + 2 <= dy.columns; c += 2, p += 2 * w.stride) {
          even = fma(set(to_float(g[c])), load(p), even);
          odd = fma(set(to_float(g[c + 1])), load(p + w.stride), odd);
        }
      }
      for (; c < dy.columns; ++c, p += w.stride) even = fma(set(to_float(g[c])), load(p, n), even);
      store(to + j, add(even, odd), n);
    }
  }
}

// The backward: dx = dy w where w.data is given (else dx holds it already), da, db, and dx += the adapter's part.
static void linear_small_backward(
    const Matrix& dy,
    const Matrix& x,
    const Matrix& w,
    const Matrix& a,
    const Matrix& b,
    float scaling,
    const Matrix& dx,
    const Matrix& da,
    const Matrix& db,
    ParallelFor run
) {
  const int64_t r = a.rows, s_row = round_up(r, W);
  Buffer space(2 * x.rows * s_row);
  const Matrix s = {space.data, x.rows, r, s_row, DType::f32};
  const Matrix ds = {space.data + x.rows * s_row, x.rows, r, s_row, DType::f32};
  const float one = 1.0f;
  const Group group = {1, r, &one, {false, 0, 0}};
  switch (x.dtype) {
    case DType::f32:
      small_shrink<float>(x, a, scaling, space.data, s_row);
      if (w.data != nullptr) small_base_backward<float>(dy, w, dx);
      break;
    case DType::bf16:
      small_shrink<bf16>(x, a, scaling, space.data, s_row);
      if (w.data != nullptr) small_base_backward<bf16>(dy, w, dx);
      break;
    case DType::f16:
      small_shrink<f16>(x, a, scaling, space.data, s_row);
      if (w.data != nullptr) small_base_backward<f16>(dy, w, dx);
      break;
  }
  expand_backward_scaled(dy, s, b, ds, scaling, db, 1.0f, run);
  shrink_backward(ds, x, a, group, dx, da, run);
}

constexpr LoraLinearSmallKernels lora_linear_small_kernels = {linear_small, linear_small_backward};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
