// The norms of the rows of W + c B A in one pass over W (fastpeft/ops/weight_norm.py has the formula).
#pragma once

#include <float.h>
#include <math.h>

#include "tile.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

// Below this part of its terms a sum counts as cancelled: two of fp32's 24 bits.
constexpr double LEFT_OF_TERMS = 0.25;

// The sum of a vector's lanes.
FASTPEFT_INLINE float sum_of(Vec v) {
#if defined(FASTPEFT_AVX512)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[W];
  store(lanes, v);
  for (int n = W / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
#endif
}

static float sum_of_squares(const float* p, int64_t n) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    for (int v = 0; v < 4; ++v) {
      const Vec x = load(p + j + v * W);
      sums[v] = fma(x, x, sums[v]);
    }
  }
  float total = sum_of(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; j < n; ++j) total += p[j] * p[j];
  return total;
}

// |W_n + c (B A)_n| by the definition, in double precision. w_at: the element (n, column) of W.
template <typename At>
static double norm_by_definition(
    const At& w_at, const float* b, const float* a, int64_t a_row, int64_t r, int64_t k, double scaling
) {
  constexpr int64_t PART = 256;
  double part[PART], total = 0;
  for (int64_t column = 0; column < k; column += PART) {
    const int64_t columns = smaller(PART, k - column);
    for (int64_t j = 0; j < columns; ++j) part[j] = 0;
    for (int64_t i = 0; i < r; ++i) {
      const double factor = double(b[i]) * scaling;
      const float* row = a + i * a_row + column;
      for (int64_t j = 0; j < columns; ++j) part[j] += factor * row[j];
    }
    for (int64_t j = 0; j < columns; ++j) {
      const double x = part[j] + w_at(column + j);
      total += x * x;
    }
  }
  return sqrt(total);
}

// out[n] for rows of W that lie in rows of w or, transposed, in its columns. A task is a block of them.
static void weight_norm(
    const Matrix& w, bool transposed, const Matrix& a, const Matrix& b, double scaling, float* out, ParallelFor run
) {
  constexpr int64_t ROWS = 48, PIECE = 4 * PANEL;
  const int64_t n = b.rows, k = a.columns, r = a.rows, wide = round_up(r, W);
  const int64_t ROW_BLOCK = transposed ? PANEL : ROWS;
  const int64_t a_row = round_up(k, W);
  Buffer a_space(r * a_row), packed(k * wide), gram(r * wide);
  const View a_rows = stage(a, 0, r, 0, k, nullptr, true, a_space.data, a_row);
  memset(packed.data, 0, k * wide * sizeof(float));
  parallel(run, k, 512, [&](int64_t begin, int64_t end) {
    transpose(a, 0, r, begin, end - begin, packed.data + begin * wide, wide);
  });
  if (k == 0) memset(gram.data, 0, r * wide * sizeof(float));
  parallel(run, r, 4, [&](int64_t begin, int64_t end) {
    const float* from = a_rows.data + begin * a_rows.stride;
    product(end - begin, wide, k, from, a_rows.stride, 1, packed.data, wide, gram.data + begin * wide, wide, false);
  });
  parallel(run, (n + ROW_BLOCK - 1) / ROW_BLOCK, 1, [&](int64_t begin, int64_t end) {
    Buffer scratch(PANEL * (PIECE + 3 * wide) + (r + 1) * PANEL);
    float *crossed = scratch.data + PANEL * PIECE, *b_part = crossed + PANEL * wide, *with_gram = b_part + PANEL * wide;
    float *columns_of = with_gram + PANEL * wide, *squares = columns_of + r * PANEL;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * ROW_BLOCK, rows = smaller(ROW_BLOCK, n - row);
      memset(squares, 0, PANEL * sizeof(float));
      if (k == 0) memset(crossed, 0, rows * wide * sizeof(float));
      if (transposed) {  // A W', whose columns are the rows of W: (r, rows)
        for (int64_t at = 0; at < k; at += PANEL) {
          const int64_t deep = smaller(PANEL, k - at);
          const View v = stage(w, at, deep, row, rows, nullptr, rows % W == 0, scratch.data, PANEL);
          const float* from = a_rows.data + at;
          product(
              r, round_up(rows, W), deep, from, a_rows.stride, 1, v.data, v.stride, columns_of, PANEL, at > 0
          );
          for (int64_t j = 0; j < rows; j += W) {
            Vec sum = zero();
            for (int64_t i = 0; i < deep; ++i) {
              const Vec x = load(v.data + i * v.stride + j);
              sum = fma(x, x, sum);
            }
            store(squares + j, add(load(squares + j), sum));
          }
        }
        for (int64_t i = 0; i < rows && k > 0; ++i) {
          for (int64_t j = 0; j < r; ++j) crossed[i * wide + j] = columns_of[j * PANEL + i];
        }
      } else {
        for (int64_t column = 0; column < k; column += PIECE) {
          const int64_t columns = smaller(PIECE, k - column);
          const View v = stage(w, row, rows, column, columns, nullptr, true, scratch.data, PIECE);
          const float* at = packed.data + column * wide;
          product(rows, wide, columns, v.data, v.stride, 1, at, wide, crossed, wide, column > 0);
          for (int64_t i = 0; i < rows; ++i) squares[i] += sum_of_squares(v.data + i * v.stride, columns);
        }
      }
      const View b_rows = stage(b, row, rows, 0, r, nullptr, false, b_part, wide);
      product(rows, wide, r, b_rows.data, b_rows.stride, 1, gram.data, wide, with_gram, wide, false);
      for (int64_t i = 0; i < rows; ++i) {
        const float *b_row = b_rows.data + i * b_rows.stride, *x = crossed + i * wide, *g = with_gram + i * wide;
        double cross = 0, added = 0, sizes = 0;
        for (int64_t j = 0; j < r; ++j) {
          cross += double(b_row[j]) * x[j];
          added += double(b_row[j]) * g[j];
          sizes += double(b_row[j]) * b_row[j] * gram.data[j * wide + j];
        }
        const double c = scaling, total = squares[i] + 2 * c * cross + c * c * added;
        const double terms = squares[i] + c * c * (fabs(added) + sizes);
        if (total < LEFT_OF_TERMS * terms) {
          const auto w_at = [&](int64_t column) {
            return double(transposed ? element(w, column, row + i) : element(w, row + i, column));
          };
          out[row + i] = float(norm_by_definition(w_at, b_row, a_rows.data, a_rows.stride, r, k, c));
        } else {
          out[row + i] = float(sqrt(total));
        }
      }
    }
  });
}

template <typename T>
static void gains(const float* norm, const T* magnitude, int64_t n, float* gain_out, float* norm_out) {
  for (int64_t i = 0; i < n; ++i) {
    T rounded;
    from_float(norm[i], &rounded);
    const float seen = to_float(rounded), length = seen < FLT_MIN ? FLT_MIN : seen;  // NaN stays
    const float more = (to_float(magnitude[i]) - length) / length;
    norm_out[i] = length;
    gain_out[i] = more < -1.0f ? -1.0f : more;
  }
}

static void gain(const float* norm, const Matrix& m, float* gain_out, float* norm_out) {
  switch (m.dtype) {
    case DType::f32:
      return gains(norm, static_cast<const float*>(m.data), m.columns, gain_out, norm_out);
    case DType::bf16:
      return gains(norm, static_cast<const bf16*>(m.data), m.columns, gain_out, norm_out);
    case DType::f16:
      return gains(norm, static_cast<const f16*>(m.data), m.columns, gain_out, norm_out);
  }
}

constexpr WeightNormKernels weight_norm_kernels = {weight_norm, gain};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
