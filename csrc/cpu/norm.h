// RMSNorm and, CENTRED, LayerNorm (fastpeft/ops/rms_norm.py and layer_norm.py have the formulas). A row is read from
// memory once and from the cache as often as its sums need. Sums over rows, for the parameters, are of fixed blocks and
// added in their order: the bits do not depend on the number of threads.
#pragma once

#include "tile.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

template <typename T>
FASTPEFT_INLINE T* row_of(const Matrix& m, int64_t row) {
  return static_cast<T*>(m.data) + row * m.stride;
}

// Calls f with an object of the element type.
template <typename F>
static void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

// step(column, lanes, i) for all vectors of a row; i, from 0 to 3, says which of four sums to use.
template <typename Step>
FASTPEFT_INLINE void each_vector(int64_t k, const Step& step) {
  int64_t j = 0;
  for (; j + 4 * W <= k; j += 4 * W) {
    step(j, W, 0);
    step(j + W, W, 1);
    step(j + 2 * W, W, 2);
    step(j + 3 * W, W, 3);
  }
  for (; j + W <= k; j += W) step(j, W, 0);
  if (j < k) step(j, int(k - j), 0);
}

#define FASTPEFT_STEP [&](int64_t j, int n, int i) __attribute__((always_inline))

FASTPEFT_INLINE float total(const Vec* sums) {
  float lanes[W];
  store(lanes, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Zero from lane n on.
FASTPEFT_INLINE Vec head(Vec v, int n) {
  if (n == W) return v;
  float lanes[W];
  store(lanes, v);
  return load(lanes, n);
}

// offset + weight and bias in fp32: ones and zeros where there is none, the parameter itself where it is that already.
struct Affine {
  Affine(const Norm& norm, int64_t k) : space(2 * k) {
    factor = prepared(norm.weight, norm.offset, 1.0f, k, space.data);
    shift = prepared(norm.bias, 0.0f, 0.0f, k, space.data + k);
  }
  static const float* prepared(const Matrix& m, float offset, float none, int64_t k, float* to) {
    if (m.data == nullptr) {
      for (int64_t j = 0; j < k; ++j) to[j] = none;
      return to;
    }
    if (m.dtype == DType::f32 && offset == 0.0f) return static_cast<const float*>(m.data);
    for (int64_t j = 0; j < k; ++j) to[j] = element(m, 0, j) + offset;
    return to;
  }
  Buffer space;
  const float *factor, *shift;
};

// Mean and 1/sqrt(variance + eps) of a row; not centred, 1/sqrt(mean square + eps).
template <bool CENTRED, typename X>
static void statistics(const X* x, int64_t k, float eps, float* mean, float* rstd) {
  float m = 0;
  if (CENTRED) {
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    each_vector(k, FASTPEFT_STEP { sums[i] = add(sums[i], load_some(x + j, n)); });
    m = total(sums) / float(k);
    *mean = m;
  }
  const Vec minus = set(-m);
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  each_vector(k, FASTPEFT_STEP {
    const Vec v = load_some(x + j, n), c = CENTRED ? head(add(v, minus), n) : v;
    sums[i] = fma(c, c, sums[i]);
  });
  *rstd = 1.0f / __builtin_sqrtf(total(sums) / float(k) + eps);
}

// y = (x - mean) * rstd * factor + shift; not centred, x * rstd * factor.
template <bool CENTRED, typename X, typename Y>
static void normalise(
    const X* x, float mean, float rstd, const float* factor, const float* shift, int64_t k, Y* y
) {
  const Vec minus = set(-mean), r = set(rstd);
  each_vector(k, FASTPEFT_STEP {
    const Vec v = load_some(x + j, n), f = load_some(factor + j, n);
    const Vec out = CENTRED ? fma(mul(add(v, minus), r), f, load_some(shift + j, n)) : mul(mul(v, r), f);
    store_some(y + j, out, n);
  });
}

template <typename X>
static void add_row(const X* x, const X* residual, int64_t k, X* h) {
  each_vector(k, FASTPEFT_STEP { store_some(h + j, add(load_some(x + j, n), load_some(residual + j, n)), n); });
}

// What the forward's functions read and write. residual.data and h.data may be null.
struct Forward {
  const Norm& norm;
  const Affine& affine;
  const Matrix &x, &residual, &h, &y;
};

template <bool CENTRED, typename X, typename Y>
static void forward_rows(const Forward& f, int64_t first, int64_t last) {
  const int64_t k = f.x.columns;
  for (int64_t i = first; i < last; ++i) {
    const X* x = row_of<const X>(f.x, i);
    if (f.residual.data != nullptr) {
      X* h = row_of<X>(f.h, i);
      add_row(x, row_of<const X>(f.residual, i), k, h);
      x = h;
    }
    float mean = 0, rstd;
    statistics<CENTRED>(x, k, f.norm.eps, &mean, &rstd);
    f.norm.rstd[i] = rstd;
    if (CENTRED) f.norm.mean[i] = mean;
    normalise<CENTRED>(x, mean, rstd, f.affine.factor, f.affine.shift, k, row_of<Y>(f.y, i));
  }
}

using ForwardRows = void (*)(const Forward& f, int64_t first, int64_t last);

template <bool CENTRED>
static ForwardRows forward_rows_of(DType x, DType y) {
  ForwardRows found = nullptr;
  with_type(x, [&](auto a) {
    with_type(y, [&](auto b) { found = forward_rows<CENTRED, decltype(a), decltype(b)>; });
  });
  return found;
}

// Rows a thread takes at least: 2^15 elements are a few microseconds.
FASTPEFT_INLINE int64_t rows_for_a_thread(int64_t columns) {
  return 1 + (int64_t(1) << 15) / (columns > 0 ? columns : 1);
}

template <bool CENTRED>
static void norm_forward(
    const Norm& norm, const Matrix& x, const Matrix& residual, const Matrix& h, const Matrix& y, ParallelFor run
) {
  const Affine affine(norm, x.columns);
  const Forward f = {norm, affine, x, residual, h, y};
  const ForwardRows rows = forward_rows_of<CENTRED>(x.dtype, y.dtype);
  parallel(run, x.rows, rows_for_a_thread(x.columns), [&](int64_t begin, int64_t end) { rows(f, begin, end); });
}

// The sums over columns that a row's gradient needs: of g = dy * factor, and of g * (x - mean) * rstd.
struct RowSums {
  float g, gx;
};

template <bool CENTRED, typename D, typename X>
static RowSums row_sums(const D* dy, const X* x, float mean, float rstd, const float* factor, int64_t k) {
  const Vec minus = set(-mean);
  Vec sums[4] = {zero(), zero(), zero(), zero()}, sums_x[4] = {zero(), zero(), zero(), zero()};
  each_vector(k, FASTPEFT_STEP {
    const Vec g = mul(load_some(dy + j, n), load_some(factor + j, n)), v = load_some(x + j, n);
    if (CENTRED) sums[i] = add(sums[i], g);
    sums_x[i] = fma(g, CENTRED ? add(v, minus) : v, sums_x[i]);
  });
  return {CENTRED ? total(sums) : 0.0f, total(sums_x) * rstd};
}

// dx = rstd * (g - mean(g) - h' * mean(g * h')) + d_h for h' = (x - mean) * rstd. d_h may be null; dx may be dy.
template <bool CENTRED, typename D, typename X>
static void row_gradient(
    const D* dy, const X* x, float mean, float rstd, const float* factor, RowSums sums, const X* d_h, int64_t k, X* dx
) {
  const Vec minus = set(-mean), r = set(rstd), each = set(-rstd * sums.g / float(k));
  const Vec along = set(-rstd * rstd * sums.gx / float(k));
  each_vector(k, FASTPEFT_STEP {
    const Vec g = mul(load_some(dy + j, n), load_some(factor + j, n)), v = load_some(x + j, n);
    Vec out = fma(g, r, CENTRED ? fma(add(v, minus), along, each) : mul(v, along));
    if (d_h != nullptr) out = add(out, load_some(d_h + j, n));
    store_some(dx + j, out, n);
  });
}

// dweight += dy * h' and dbias += dy, for those that are not null; they have room for whole vectors.
template <bool CENTRED, typename D, typename X>
static void row_parameters(const D* dy, const X* x, float mean, float rstd, int64_t k, float* dweight, float* dbias) {
  const Vec minus = set(-mean), r = set(rstd);
  each_vector(k, FASTPEFT_STEP {
    const Vec d = load_some(dy + j, n), v = load_some(x + j, n);
    if (dweight != nullptr) store(dweight + j, fma(d, mul(CENTRED ? add(v, minus) : v, r), load(dweight + j)));
    if (dbias != nullptr) store(dbias + j, add(d, load(dbias + j)));
  });
}

// What the backward's functions read and write. d_h.data and dx.data may be null.
struct Backward {
  const Norm& norm;
  const Affine& affine;
  const Matrix &dy, &x, &d_h, &dx;
};

// Rows first … last, of which dy holds the first as its row `dy_first`. dweight and dbias are added to; they may be null.
template <bool CENTRED, typename D, typename X>
static void backward_rows(
    const Backward& b, int64_t first, int64_t last, int64_t dy_first, float* dweight, float* dbias
) {
  const int64_t k = b.x.columns;
  for (int64_t i = first; i < last; ++i) {
    const D* dy = row_of<const D>(b.dy, i - first + dy_first);
    const X* x = row_of<const X>(b.x, i);
    const float mean = CENTRED ? b.norm.mean[i] : 0.0f, rstd = b.norm.rstd[i];
    // Before dx, which may lie where dy does.
    if (dweight != nullptr || dbias != nullptr) row_parameters<CENTRED>(dy, x, mean, rstd, k, dweight, dbias);
    if (b.dx.data == nullptr) continue;
    const RowSums sums = row_sums<CENTRED>(dy, x, mean, rstd, b.affine.factor, k);
    const X* d_h = b.d_h.data == nullptr ? nullptr : row_of<const X>(b.d_h, i);
    row_gradient<CENTRED>(dy, x, mean, rstd, b.affine.factor, sums, d_h, k, row_of<X>(b.dx, i));
  }
}

using BackwardRows = void (*)(
    const Backward& b, int64_t first, int64_t last, int64_t dy_first, float* dweight, float* dbias
);

template <bool CENTRED>
static BackwardRows backward_rows_of(DType dy, DType x) {
  BackwardRows found = nullptr;
  with_type(dy, [&](auto d) {
    with_type(x, [&](auto a) { found = backward_rows<CENTRED, decltype(d), decltype(a)>; });
  });
  return found;
}

// The sums of a block for dweight and dbias, gathered run by run.
struct ParameterSums {
  float* block;
  int64_t wide;
  bool weight, bias;
  float* run;

  void begin(bool first, float* space) {
    run = first ? block : space;
    memset(run, 0, 2 * wide * sizeof(float));
  }
  float* dweight() const { return weight ? run : nullptr; }
  float* dbias() const { return bias ? run + wide : nullptr; }
  void end() const {
    if (run == block) return;
    for (int64_t j = 0; j < 2 * wide; j += W) store(block + j, add(load(block + j), load(run + j)));
  }
};

// m = the sum of the first rows of `count` workspaces of `size` floats each, in their order.
static void sum_parts(const float* parts, int64_t count, int64_t size, const Matrix& m, ParallelFor run) {
  if (m.data == nullptr) return;
  parallel(run, m.columns, 4096, [&](int64_t begin, int64_t end) {
    Buffer sum(end - begin);
    memset(sum.data, 0, (end - begin) * sizeof(float));
    for (int64_t part = 0; part < count; ++part) {
      const float* from = parts + part * size;
      for (int64_t j = begin; j < end; ++j) sum.data[j - begin] += from[j];
    }
    unstage<false>(m, 0, 1, begin, end - begin, sum.data, 0, 1.0f);
  });
}

// dweight.data and dbias.data may be null, dx.data too.
template <bool CENTRED>
static void norm_backward(
    const Norm& norm,
    const Matrix& dy,
    const Matrix& x,
    const Matrix& d_h,
    const Matrix& dx,
    const Matrix& dweight,
    const Matrix& dbias,
    ParallelFor run
) {
  const int64_t m = x.rows, k = x.columns, wide = round_up(k, W);
  const Affine affine(norm, k);
  const Backward b = {norm, affine, dy, x, d_h, dx};
  const BackwardRows rows = backward_rows_of<CENTRED>(dy.dtype, x.dtype);
  if (dweight.data == nullptr && dbias.data == nullptr) {
    parallel(run, m, rows_for_a_thread(k), [&](int64_t begin, int64_t end) { rows(b, begin, end, begin, nullptr, nullptr); });
    return;
  }
  // At most 64 blocks, each the sum of runs of 64 rows: one run over thousands of rows would lose digits.
  constexpr int64_t RUN = 64;
  const int64_t ROWS = m <= 64 * RUN ? RUN : round_up((m + 63) / 64, RUN);
  const int64_t blocks = (m + ROWS - 1) / ROWS, size = 2 * wide;
  Buffer parts(blocks * size);
  parallel(run, blocks, 1, [&](int64_t begin, int64_t end) {
    Buffer sums(size);
    for (int64_t block = begin; block < end; ++block) {
      ParameterSums part = {parts.data + block * size, wide, dweight.data != nullptr, dbias.data != nullptr};
      const int64_t last = smaller(block * ROWS + ROWS, m);
      for (int64_t first = block * ROWS; first < last; first += RUN) {
        part.begin(first == block * ROWS, sums.data);
        rows(b, first, smaller(first + RUN, last), first, part.dweight(), part.dbias());
        part.end();
      }
    }
  });
  sum_parts(parts.data, blocks, size, dweight, run);
  sum_parts(parts.data + wide, blocks, size, dbias, run);
}

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
