// LoRA on an embedding (fastpeft/ops/lora_embedding.py has the formulas). Same bits for any number of threads.
#pragma once

#include "lora_linear.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

// to[i, j] = scaling * a[j, indices[i]]
static void gather_columns(
    const Matrix& a, const int64_t* indices, int64_t rows, float scaling, float* to, int64_t to_stride
) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < a.rows; ++j) to[i * to_stride + j] = scaling * element(a, j, indices[i]);
  }
}

static void embedding(
    const int64_t* indices,
    const Matrix& weight,
    const Matrix& a,
    const Matrix& b,
    float scaling,
    const Matrix& y,
    ParallelFor run
) {
  constexpr int64_t ROWS = 48;
  const int64_t r = a.rows, n = y.columns, wide = round_up(n, W);
  Buffer packed(r * wide);  // b^T
  parallel(run, r, 4, [&](int64_t begin, int64_t end) {
    memset(packed.data + begin * wide, 0, (end - begin) * wide * sizeof(float));
    transpose(b, 0, n, begin, end - begin, packed.data + begin * wide, wide);
  });
  parallel(run, (y.rows + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
    Buffer scratch(ROWS * (r + PANEL) + PANEL);
    float *sums = scratch.data, *base = sums + ROWS * PANEL, *s = base + PANEL;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * ROWS, rows = smaller(ROWS, y.rows - row);
      gather_columns(a, indices + row, rows, scaling, s, r);
      for (int64_t column = 0; column < n; column += PANEL) {
        const int64_t columns = smaller(PANEL, n - column);
        product(rows, round_up(columns, W), r, s, r, 1, packed.data + column, wide, sums, PANEL, false);
        for (int64_t i = 0; i < rows; ++i) {
          float* sum = sums + i * PANEL;
          const View w = stage(weight, indices[row + i], 1, column, columns, nullptr, false, base, PANEL);
          for (int64_t j = 0; j < columns; j += W) store(sum + j, add(load(sum + j), load(w.data + j)));
        }
        unstage<false>(y, row, rows, column, columns, sums, PANEL, 1.0f);
      }
    }
  });
}

static void embedding_backward(
    const Matrix& dy,
    const int64_t* indices,
    const Matrix& a,
    const Matrix& b,
    float scaling,
    int64_t padding_idx,
    const Matrix& da,
    const Matrix& db,
    ParallelFor run
) {
  const int64_t m = dy.rows, r = a.rows, vocabulary = a.columns;
  Buffer s(m * r), ds(m * r);
  parallel(run, m, 256, [&](int64_t begin, int64_t end) {
    gather_columns(a, indices + begin, end - begin, scaling, s.data + begin * r, r);
  });
  const Matrix s_rows = {s.data, m, r, r, DType::f32}, ds_rows = {ds.data, m, r, r, DType::f32};
  expand_backward_scaled(dy, s_rows, b, ds_rows, scaling, db, 1.0f, run);
  // One row of da at a time, tokens in their order: no two threads add to one element.
  parallel(run, r, 1, [&](int64_t begin, int64_t end) {
    Buffer sum(round_up(vocabulary, W));
    for (int64_t j = begin; j < end; ++j) {
      memset(sum.data, 0, vocabulary * sizeof(float));
      for (int64_t i = 0; i < m; ++i) sum.data[indices[i]] += ds.data[i * r + j];
      if (padding_idx >= 0) sum.data[padding_idx] = 0.0f;
      unstage<false>(da, j, 1, 0, vocabulary, sum.data, 0, 1.0f);
    }
  });
}

constexpr LoraEmbeddingKernels lora_embedding_kernels = {embedding, embedding_backward};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
