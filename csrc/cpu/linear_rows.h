// y = x w^T + bias for few rows of x and a large w (fastpeft/ops/linear_rows.py says when it is used): w, which comes from
// memory, is read once, and nothing is packed.
//
// A tile is R rows of w by MR rows of x, a vector of partial sums for each pair. What the next tile needs is asked for
// while one is multiplied: its rows lie where the processor's own prefetcher, which stops at the end of a page, starts anew.
#pragma once

#include "tile.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace linear_rows {

#if defined(FASTPEFT_AVX512)
constexpr int MR = 4;
#else
constexpr int MR = 2;
#endif
constexpr int R = 4;
// Vectors that one partial sum adds up, a longer one being a sum of such runs: the error against float64 stays below
// that of PyTorch's product at any K.
constexpr int64_t RUN = 64;

// sum[r][m] += x_m . w_r, n of the lanes; ASK: for what lies `ahead` too.
template <int NR, int NM, bool ASK, typename T>
FASTPEFT_INLINE void step(
    const T* w, int64_t w_row, const float* x, int64_t x_row, int n, int64_t ahead, Vec (*sum)[NM]
) {
  Vec row[NR];
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r) {
    row[r] = load_some(w + r * w_row, n);
    if (ASK) __builtin_prefetch(w + r * w_row + ahead, 0, 2);
  }
#pragma GCC unroll 4
  for (int m = 0; m < NM; ++m) {
    const Vec v = load(x + m * x_row);
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) sum[r][m] = fma(row[r], v, sum[r][m]);
  }
}

// out[m * out_row + r] = x_m . w_r for NR rows of w and NM of x; x is fp32, zero up to a multiple of W.
template <int NR, int NM, bool ASK, typename T>
FASTPEFT_INLINE void tile(
    const T* w, int64_t w_row, int64_t k, const float* x, int64_t x_row, int64_t ahead, float* out, int64_t out_row
) {
  Vec whole[NR][NM];
  for (int64_t j = 0; j < k || j == 0;) {
    Vec sum[NR][NM];
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
      for (int m = 0; m < NM; ++m) sum[r][m] = zero();
    }
    const bool begin = j == 0;
    const int64_t end = smaller(k, j + RUN * W);
    for (; j + W <= end; j += W) step<NR, NM, ASK, T>(w + j, w_row, x + j, x_row, W, ahead, sum);
    if (j < end) {
      step<NR, NM, false, T>(w + j, w_row, x + j, x_row, int(end - j), 0, sum);
      j = end;
    }
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
      for (int m = 0; m < NM; ++m) whole[r][m] = begin ? sum[r][m] : add(whole[r][m], sum[r][m]);
    }
    if (k == 0) break;
  }
#pragma GCC unroll 4
  for (int m = 0; m < NM; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) out[m * out_row + r] = total(whole[r][m]);
  }
}

template <int NR, typename T>
static void rows_of(
    const T* w, int64_t w_row, int64_t k, const float* x, int64_t x_row, int64_t m, int64_t ahead, float* out,
    int64_t out_row
) {
  int64_t i = 0;
  if (m >= MR) {
    tile<NR, MR, true, T>(w, w_row, k, x, x_row, ahead, out, out_row);
    i = MR;
  } else {
    tile<NR, 1, true, T>(w, w_row, k, x, x_row, ahead, out, out_row);
    i = 1;
  }
  for (; i + MR <= m; i += MR) {
    tile<NR, MR, false, T>(w, w_row, k, x + i * x_row, x_row, 0, out + i * out_row, out_row);
  }
  for (; i < m; ++i) tile<NR, 1, false, T>(w, w_row, k, x + i * x_row, x_row, 0, out + i * out_row, out_row);
}

// Bytes from which a weight is no cache's: it is read past them, so that what they hold, the other weights and the
// program, stays there. A decoded token's head takes 2.0 ms so and 2.5 as a tile (113 MB, two threads of a Zen 4).
constexpr int64_t PAST_CACHES = 16 << 20;

// out[r] = x . w_r for one row of x and rows of w one after the other, as they lie.
template <typename T>
static void stream(const T* w, int64_t w_row, int64_t rows, int64_t k, const float* x, float* out) {
  constexpr int64_t AHEAD = 8192 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r, w += w_row) {
    Vec whole = zero();
    for (int64_t j = 0; j < k;) {
      Vec sum[4] = {zero(), zero(), zero(), zero()};
      const int64_t end = smaller(k, j + 4 * RUN * W);
      for (; j + 4 * W <= end; j += 4 * W) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          sum[v] = fma(load(w + j + v * W), load(x + j + v * W), sum[v]);
          if (v % (64 / (W * int(sizeof(T)))) == 0) __builtin_prefetch(w + j + v * W + AHEAD, 0, 0);
        }
      }
      for (; j < end; j += W) {
        const int n = int(smaller(W, end - j));
        sum[0] = fma(load_some(w + j, n), load(x + j), sum[0]);
      }
      whole = add(whole, add(add(sum[0], sum[1]), add(sum[2], sum[3])));
    }
    out[r] = total(whole);
  }
}

template <typename T>
static void product(
    const View& x, int64_t m, const Matrix& w, const Matrix& bias, const Matrix& y, ParallelFor run
) {
  constexpr int64_t ROWS = 32;  // a task: that many rows of w
  const int64_t k = w.columns, n = w.rows;
  const T* data = static_cast<const T*>(w.data);
  // The same place some tiles on, 4 KiB or more.
  const int64_t tile_size = R * w.stride, ahead = tile_size * (1 + 4096 / (tile_size * int64_t(sizeof(T)) + 1));
  const int64_t grain = 1 + 32768 / (ROWS * k * m + 1);
  parallel(run, (n + ROWS - 1) / ROWS, grain, [&](int64_t begin, int64_t end) {
    Buffer sums(m * ROWS + W);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * ROWS, rows = smaller(ROWS, n - first);
      const T* from = data + first * w.stride;
      int64_t i = 0;
      if (m == 1 && n * w.stride * int64_t(sizeof(T)) > PAST_CACHES) {
        stream<T>(from, w.stride, rows, k, x.data, sums.data);
        i = rows;
      }
      for (; i + R <= rows; i += R) {
        rows_of<R, T>(from + i * w.stride, w.stride, k, x.data, x.stride, m, ahead, sums.data + i, ROWS);
      }
      for (; i < rows; ++i) {
        rows_of<1, T>(from + i * w.stride, w.stride, k, x.data, x.stride, m, ahead, sums.data + i, ROWS);
      }
      if (bias.data != nullptr) {
        for (i = 0; i < rows; ++i) {
          const float added = element(bias, 0, first + i);
          for (int64_t j = 0; j < m; ++j) sums.data[j * ROWS + i] += added;
        }
      }
      unstage<false>(y, 0, m, first, rows, sums.data, ROWS, 1.0f);
    }
  });
}

static void linear(const Matrix& x, const Matrix& w, const Matrix& bias, const Matrix& y, ParallelFor run) {
  const int64_t m = x.rows, x_row = round_up(w.columns, W);
  if (m == 0 || w.rows == 0) return;
  Buffer wide(m * x_row);
  View v = stage(x, 0, m, 0, w.columns, nullptr, w.columns % W == 0, wide.data, x_row);
  switch (w.dtype) {
    case DType::f32:
      return product<float>(v, m, w, bias, y, run);
    case DType::bf16:
      return product<bf16>(v, m, w, bias, y, run);
    case DType::f16:
      return product<f16>(v, m, w, bias, y, run);
  }
}

}  // namespace linear_rows

constexpr LinearRowsKernels linear_rows_kernels = {linear_rows::linear};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
