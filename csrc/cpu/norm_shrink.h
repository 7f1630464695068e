// A norm together with the narrow products of what it feeds: s in the forward; in the backward the rim's part of dy, and
// dA of an output that is made again.
#pragma once

#include "lora_linear.h"
#include "norm.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

template <bool CENTRED>
static void norm_shrink(
    const Norm& norm,
    const Matrix& x,
    const Matrix& a,
    const Group& group,
    const Matrix& y,
    const Matrix& s,
    ParallelFor run
) {
  const Affine affine(norm, x.columns);
  const Matrix none = {nullptr, 0, 0, 0, x.dtype};
  const Forward f = {norm, affine, x, none, none, y};
  const ForwardRows rows_of_y = forward_rows_of<CENTRED>(x.dtype, y.dtype);
  // A row's sums need the whole row, so all of it is made when its first columns are asked for.
  shrink_of(y, a, group, s, run, [&](int64_t row, int64_t rows, int64_t, int64_t column, int64_t) {
    if (column == 0) rows_of_y(f, row, row + rows);
  });
}

// A block of y, made again as forward_rows made it, from (0, 0) of `y` on.
using RemakeBlock = void (*)(
    const Norm& norm,
    const Affine& affine,
    const Matrix& x,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns,
    void* y,
    int64_t stride
);

template <bool CENTRED, typename X, typename Y>
static void remake_block(
    const Norm& norm,
    const Affine& affine,
    const Matrix& x,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns,
    void* y,
    int64_t stride
) {
  for (int64_t i = 0; i < rows; ++i) {
    normalise<CENTRED>(
        row_of<const X>(x, row + i) + column, CENTRED ? norm.mean[row + i] : 0.0f, norm.rstd[row + i],
        affine.factor + column, affine.shift + column, columns, static_cast<Y*>(y) + i * stride
    );
  }
}

template <bool CENTRED>
static RemakeBlock remake_block_of(DType x, DType y) {
  RemakeBlock found = nullptr;
  with_type(x, [&](auto a) {
    with_type(y, [&](auto b) { found = remake_block<CENTRED, decltype(a), decltype(b)>; });
  });
  return found;
}

// dx, da, dweight and dbias of dy + rim, rim = scale * mask * (ds a). A task is a block of rows. Of a few rows at a time,
// panel by panel, y is made again for da and the rim is added to dy in an fp32 tile, from which the rows' gradients are
// then made as by norm_backward. Every mask is formed once.
template <bool CENTRED>
static void norm_shrink_backward(
    const Norm& norm,
    const Matrix& dy,
    const Matrix& ds,
    const Matrix& x,
    DType y,
    const Matrix& a,
    const Group& group,
    const Matrix& dx,
    const Matrix& da,
    const Matrix& dweight,
    const Matrix& dbias,
    ParallelFor run
) {
  const int64_t m = x.rows, k = x.columns, r = group.rank, total_rank = r * group.members, k_row = round_up(k, W);
  // The tile stays in L2: 36 rows of 2,048 columns are 288 KiB.
  const int64_t PART = k <= 2048 ? 36 : k <= 4096 ? 24 : 12;
  const int64_t ROWS = m <= 64 * 144 ? 144 : round_up((m + 63) / 64, 72), blocks = (m + ROWS - 1) / ROWS;
  const bool masked = group.mask.on, adds = dx.data != nullptr || dweight.data != nullptr || dbias.data != nullptr;
  const int64_t members = masked ? group.members : 1, each = masked ? r : total_rank, ds_row = round_up(total_rank, W);
  const int64_t size = (total_rank + 2) * k_row;  // of a block's sums: da, dweight, dbias
  const Affine affine(norm, k);
  const RemakeBlock remake = remake_block_of<CENTRED>(x.dtype, y);
  const BackwardRows rows_of_dx = backward_rows_of<CENTRED>(DType::f32, x.dtype);
  const Matrix none = {nullptr, 0, 0, 0, x.dtype};
  // dx may be the tile itself: a row's gradient is written after its sums are known, element by element.
  const bool in_place = dx.data != nullptr && dx.dtype == DType::f32 && k == k_row;

  Buffer scaled(m * ds_row), space(total_rank * k_row), parts(blocks * size);
  parallel(run, m, 256, [&](int64_t begin, int64_t end) {  // the scale goes into ds, so into both products
    stage(ds, begin, end - begin, 0, total_rank, nullptr, false, scaled.data + begin * ds_row, ds_row);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t g = 0; g < group.members; ++g) {
        float* d = scaled.data + i * ds_row + g * r;
        for (int64_t j = 0; j < r; ++j) d[j] *= group.scale[g];
      }
    }
  });
  const View a_rows = padded_rows(a, space.data, k_row, run);

  parallel(run, blocks, 1, [&](int64_t begin, int64_t end) {
    Buffer scratch((adds && !in_place ? PART * k_row : 0) + 4 * PART * PANEL + 2 * k_row);
    float *y_part = scratch.data, *y_kept = y_part + PART * PANEL, *rim = y_kept + PART * PANEL;
    float *rim_sum = rim + PART * PANEL, *run_sums = rim_sum + PART * PANEL, *tile_space = run_sums + 2 * k_row;
    uint8_t bits[36 * PANEL_BLOCKS];
    MaskPanel mask;
    for (int64_t task = begin; task < end; ++task) {
      float* sums = parts.data + task * size;
      ParameterSums parameters = {sums + total_rank * k_row, k_row, dweight.data != nullptr, dbias.data != nullptr};
      const int64_t first = task * ROWS, last = smaller(first + ROWS, m);
      for (int64_t row = first; row < last; row += PART) {
        const int64_t rows = smaller(PART, last - row);
        const float* d = scaled.data + row * ds_row;
        float* place = in_place ? row_of<float>(dx, row) : tile_space;
        const Matrix tile = {place, rows, k, in_place ? dx.stride : k_row, DType::f32};
        for (int64_t column = 0; column < k; column += PANEL) {
          const int64_t columns = smaller(PANEL, k - column), wide = round_up(columns, W);
          // Rows of a panel lie far apart, which the processor's prefetcher does not guess.
          const int64_t ahead = column + PANEL < k ? column + PANEL : 0, ahead_row = ahead > 0 ? row : row + PART;
          if (ahead_row < last) {
            const int64_t ahead_rows = smaller(PART, last - ahead_row), ahead_columns = smaller(PANEL, k - ahead);
            prefetch(x, ahead_row, ahead_rows, ahead, ahead_columns);
            if (adds) prefetch(dy, ahead_row, ahead_rows, ahead, ahead_columns);
          }
          remake(norm, affine, x, row, rows, column, columns, y_part, PANEL);
          if (adds) stage(dy, row, rows, column, columns, nullptr, false, place + column, tile.stride);
          for (int64_t g = 0; g < members; ++g) {
            if (masked) {
              mask_panel(&mask, group.mask, uint32_t(g), column);
              mask_rows(mask, row, rows, bits);
            }
            const View v = stage(
                {y_part, rows, columns, PANEL, y}, 0, rows, 0, columns, masked ? bits : nullptr, columns == wide,
                y_kept, PANEL
            );
            product(
                each, wide, rows, d + g * r, 1, ds_row, v.data, v.stride, sums + g * r * k_row + column, k_row,
                row > first
            );
            if (!adds) continue;
            const float* a_part = a_rows.data + g * r * a_rows.stride + column;
            float* to = masked ? rim : place + column;
            product(rows, wide, each, d + g * r, ds_row, 1, a_part, a_rows.stride, to, masked ? PANEL : tile.stride, !masked);
            if (masked) add_kept(rim_sum, rim, rows, bits, g == 0);
          }
          if (adds && masked) unstage<true>(tile, 0, rows, column, columns, rim_sum, PANEL, 1.0f);
        }
        if (!adds) continue;
        parameters.begin(row == first, run_sums);
        rows_of_dx({norm, affine, tile, x, none, dx}, row, row + rows, 0, parameters.dweight(), parameters.dbias());
        parameters.end();
      }
    }
  });

  if (blocks == 0) memset(space.data, 0, total_rank * k_row * sizeof(float));
  parallel(run, total_rank, 1 + 4096 / (blocks * k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* sum = (blocks == 0 ? space.data : parts.data) + i * k_row;
      for (int64_t block = 1; block < blocks; ++block) {
        const float* part = parts.data + block * size + i * k_row;
        for (int64_t j = 0; j < k_row; j += W) store(sum + j, add(load(sum + j), load(part + j)));
      }
      unstage<false>(da, i, 1, 0, k, sum, 0, 1.0f);
    }
  });
  const float* after = parts.data + total_rank * k_row;
  sum_parts(after, blocks, size, dweight, run);
  sum_parts(after + k_row, blocks, size, dbias, run);
}

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
