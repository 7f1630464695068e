// What DoRA does beside a base product (fastpeft/ops/dora_products.py has the formulas). Work is cut into fixed pieces,
// and sums over rows are added in a fixed order: the bits do not depend on the number of threads.
#pragma once

#include "lora_linear.h"
#include "weight_norm.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

// b^T by panels of 64 columns: (panels, r, PANEL), zero beyond the last column.
static void pack_panels(const Matrix& b, float* to, ParallelFor run) {
  const int64_t n = b.rows, r = b.columns;
  parallel(run, (n + PANEL - 1) / PANEL, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t columns = smaller(PANEL, n - i * PANEL);
      float* panel = to + i * r * PANEL;
      if (columns < PANEL) memset(panel, 0, r * PANEL * sizeof(float));
      transpose(b, i * PANEL, columns, 0, r, panel, PANEL);
    }
  });
}

// A vector (1, n) in fp32, zero up to whole panels; all zero where there is none.
static void spread(const Matrix& m, int64_t n, float* to) {
  memset(to, 0, round_up(n, PANEL) * sizeof(float));
  if (m.data != nullptr) stage(m, 0, 1, 0, n, nullptr, false, to, round_up(n, PANEL));
}

static void spread(const float* from, int64_t n, float* to) {
  memset(to, 0, round_up(n, PANEL) * sizeof(float));
  if (from != nullptr) memcpy(to, from, n * sizeof(float));
}

// The rows of a panel: v = y + rim and y = v + gain (v - bias), or, where there is u: t = u + rim, which replaces u,
// and y = y + bias + rim + gain t.
template <typename T>
static void finish(
    T* y,
    int64_t y_row,
    T* u,
    int64_t u_row,
    int64_t rows,
    int64_t columns,
    const float* rim,
    const float* gain,
    const float* bias
) {
  for (int64_t i = 0; i < rows; ++i, y += y_row, rim += PANEL) {
    for (int64_t j = 0; j < columns; j += W) {
      const int n = int(smaller(W, columns - j));
      const bool whole = n == W;
      const Vec g = load(gain + j), b = load(bias + j), r = load(rim + j);
      const Vec base = whole ? load(y + j) : load(y + j, n);
      Vec out;
      if (u == nullptr) {
        const Vec v = add(base, r);
        out = fma(g, fma(b, set(-1.0f), v), v);
      } else {
        T* at = u + i * u_row + j;
        const Vec t = add(whole ? load(at) : load(at, n), r);
        out = fma(g, t, add(add(base, b), r));
        if (whole) {
          store(at, t);
        } else {
          store(at, t, n);
        }
      }
      if (whole) {
        store(y + j, out);
      } else {
        store(y + j, out, n);
      }
    }
  }
}

static void finish(
    const Matrix& y,
    const Matrix& u,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns,
    const float* rim,
    const float* gain,
    const float* bias
) {
  const int64_t at = row * y.stride + column, u_at = row * u.stride + column;
  const bool has_u = u.data != nullptr;
  switch (y.dtype) {
    case DType::f32: {
      float* p = has_u ? static_cast<float*>(u.data) + u_at : nullptr;
      return finish(static_cast<float*>(y.data) + at, y.stride, p, u.stride, rows, columns, rim, gain, bias);
    }
    case DType::bf16: {
      bf16* p = has_u ? static_cast<bf16*>(u.data) + u_at : nullptr;
      return finish(static_cast<bf16*>(y.data) + at, y.stride, p, u.stride, rows, columns, rim, gain, bias);
    }
    case DType::f16: {
      f16* p = has_u ? static_cast<f16*>(u.data) + u_at : nullptr;
      return finish(static_cast<f16*>(y.data) + at, y.stride, p, u.stride, rows, columns, rim, gain, bias);
    }
  }
}

// `finish` with rim = s b^T. A task is a block of rows.
static void mix(
    const Matrix& y,
    const Matrix& u,
    const Matrix& s,
    const Matrix& b,
    const float* gain,
    const Matrix& bias,
    ParallelFor run
) {
  constexpr int64_t ROWS = 48;
  const int64_t r = b.columns, n = b.rows, panels = (n + PANEL - 1) / PANEL, s_row = round_up(r, W);
  Buffer packed(panels * r * PANEL), vectors(2 * panels * PANEL);
  float *gains = vectors.data, *biases = gains + panels * PANEL;
  spread(gain, n, gains);
  spread(bias, n, biases);
  pack_panels(b, packed.data, run);
  parallel(run, (y.rows + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
    Buffer scratch(ROWS * (s_row + PANEL));
    float* rim = scratch.data + ROWS * s_row;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * ROWS, rows = smaller(ROWS, y.rows - row);
      const View v = stage(s, row, rows, 0, r, nullptr, true, scratch.data, s_row);
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t column = i * PANEL, columns = smaller(PANEL, n - column);
        const bool last = i + 1 == panels;
        const int64_t next = last ? 0 : column + PANEL, next_row = last ? row + rows : row;
        const int64_t next_rows = last ? smaller(ROWS, y.rows - next_row) : rows;
        prefetch(y, next_row, next_rows, next, smaller(PANEL, n - next));
        if (u.data != nullptr) prefetch(u, next_row, next_rows, next, smaller(PANEL, n - next));
        const float* bt = packed.data + i * r * PANEL;
        product(rows, round_up(columns, W), r, v.data, v.stride, 1, bt, PANEL, rim, PANEL, false);
        finish(y, u, row, rows, column, columns, rim, gains + column, biases + column);
      }
    }
  });
}

static void dora_expand(
    const Matrix& y, const Matrix& s, const Matrix& b, const float* gain, const Matrix& bias, ParallelFor run
) {
  mix(y, {nullptr, 0, 0, 0, y.dtype}, s, b, gain, bias, run);
}

// dt = factor dy and sums += the sum over the rows of dy (y - bias), for a panel of columns. y and dt may be null.
template <typename T>
static void weigh(
    const T* dy,
    int64_t dy_row,
    const T* y,
    int64_t y_row,
    T* dt,
    int64_t dt_row,
    int64_t rows,
    int64_t columns,
    const float* bias,
    const float* factor,
    float* sums
) {
  constexpr int NV = PANEL / W;
  Vec sum[NV];
  for (int v = 0; v < NV; ++v) sum[v] = zero();
  if (columns == PANEL) {
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const Vec d = load(dy + i * dy_row + v * W);
        if (y != nullptr) {
          sum[v] = fma(d, fma(load(bias + v * W), set(-1.0f), load(y + i * y_row + v * W)), sum[v]);
        }
        if (dt != nullptr) store(dt + i * dt_row + v * W, mul(d, load(factor + v * W)));
      }
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int v = 0; v * W < columns; ++v) {
        const int n = int(smaller(W, columns - v * W));
        const Vec d = load(dy + i * dy_row + v * W, n);
        if (y != nullptr) {
          sum[v] = fma(d, fma(load(bias + v * W), set(-1.0f), load(y + i * y_row + v * W, n)), sum[v]);
        }
        if (dt != nullptr) store(dt + i * dt_row + v * W, mul(d, load(factor + v * W)), n);
      }
    }
  }
  for (int v = 0; v < NV; ++v) store(sums + v * W, add(load(sums + v * W), sum[v]));
}

template <typename T>
static void weigh(
    const Matrix& dy,
    const Matrix& y,
    const Matrix& dt,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns,
    const float* bias,
    const float* factor,
    float* sums
) {
  const auto at = [&](const Matrix& m) {
    return m.data == nullptr ? nullptr : static_cast<T*>(m.data) + row * m.stride + column;
  };
  weigh<T>(at(dy), dy.stride, at(y), y.stride, at(dt), dt.stride, rows, columns, bias, factor, sums);
}

static void weigh(
    const Matrix& dy,
    const Matrix& y,
    const Matrix& dt,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns,
    const float* bias,
    const float* factor,
    float* sums
) {
  switch (dy.dtype) {
    case DType::f32:
      return weigh<float>(dy, y, dt, row, rows, column, columns, bias, factor, sums);
    case DType::bf16:
      return weigh<bf16>(dy, y, dt, row, rows, column, columns, bias, factor, sums);
    case DType::f16:
      return weigh<f16>(dy, y, dt, row, rows, column, columns, bias, factor, sums);
  }
}

// ds = (gain dy) b, db = gain (dy^T s), sums = the sums over rows of dy (y - bias) and dt = out_gain dy, in one pass
// over dy and y. A task is a block of rows; the parts of db and of the sums are added in their order afterwards.
static void dora_expand_backward(
    const Matrix& dy,
    const Matrix& y,
    const Matrix& bias,
    const Matrix& s,
    const Matrix& b,
    const float* gain,
    const float* out_gain,
    const Matrix& dt,
    const Matrix& ds,
    const Matrix& db,
    float* sums,
    ParallelFor run
) {
  const int64_t ROWS = dy.rows <= 64 * 128 ? 128 : round_up((dy.rows + 63) / 64, 16);
  const int64_t m = dy.rows, n = dy.columns, r = b.columns, wide = round_up(r, W), blocks = (m + ROWS - 1) / ROWS;
  const int64_t whole = round_up(n, PANEL), part_size = n * wide + whole;
  Buffer b_scaled(n * wide), vectors(3 * whole), parts((blocks > 0 ? blocks : 1) * part_size);
  float *gains = vectors.data, *out_gains = gains + whole, *biases = out_gains + whole;
  spread(gain, n, gains);
  spread(out_gain, n, out_gains);
  spread(bias, n, biases);
  parallel(run, n, 512, [&](int64_t begin, int64_t end) {
    stage(b, begin, end - begin, 0, r, nullptr, false, b_scaled.data + begin * wide, wide);
    for (int64_t i = begin; i < end; ++i) {
      const Vec g = set(gain[i]);
      for (int64_t j = 0; j < wide; j += W) {
        float* p = b_scaled.data + i * wide + j;
        store(p, mul(g, load(p)));
      }
    }
  });
  parallel(run, blocks, 1, [&](int64_t begin, int64_t end) {
    Buffer scratch(ROWS * (PANEL + 2 * wide));
    float *dy_part = scratch.data, *ds_part = dy_part + ROWS * PANEL, *s_part = ds_part + ROWS * wide;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * ROWS, rows = smaller(ROWS, m - row);
      const View s_rows = stage(s, row, rows, 0, r, nullptr, r == wide, s_part, wide);
      float *part = parts.data + task * part_size, *part_sums = part + n * wide;
      memset(part_sums, 0, whole * sizeof(float));
      if (n == 0) memset(ds_part, 0, rows * wide * sizeof(float));
      for (int64_t column = 0; column < n; column += PANEL) {
        const int64_t columns = smaller(PANEL, n - column);
        if (y.data != nullptr) prefetch(y, row, rows, column, columns);
        const View v = stage(dy, row, rows, column, columns, nullptr, true, dy_part, PANEL);
        const float* b_at = b_scaled.data + column * wide;
        product(rows, wide, columns, v.data, v.stride, 1, b_at, wide, ds_part, wide, column > 0);
        product(
            columns, wide, rows, v.data, 1, v.stride, s_rows.data, s_rows.stride, part + column * wide, wide, false
        );
        weigh(dy, y, dt, row, rows, column, columns, biases + column, out_gains + column, part_sums + column);
      }
      unstage<false>(ds, row, rows, 0, r, ds_part, wide, 1.0f);
    }
  });
  parallel(run, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float *total = parts.data + i * wide, *sum = parts.data + n * wide + i;
      if (blocks == 0) {
        memset(total, 0, wide * sizeof(float));
        *sum = 0.0f;
      }
      for (int64_t task = 1; task < blocks; ++task) {
        const float* part = parts.data + task * part_size;
        for (int64_t j = 0; j < wide; j += W) store(total + j, add(load(total + j), load(part + i * wide + j)));
        *sum += part[n * wide + i];
      }
      unstage<false>(db, i, 1, 0, r, total, wide, gain[i]);
      sums[i] = *sum;
    }
  });
}

// The columns that the mask drops in rows first … first + rows, row after row: those of row i are
// columns[start[i]] … columns[start[i + 1]].
struct Dropped {
  Dropped(const Mask& mask, int64_t member, int64_t first, int64_t rows, int64_t k, ParallelFor run) : start(rows + 1) {
    // Bits are made panel by panel for all rows, indices row by row.
    const int64_t panels = (k + PANEL - 1) / PANEL;
    Buffer space(rows * panels * 2);
    uint8_t* bits = reinterpret_cast<uint8_t*>(space.data);
    parallel(run, panels, 4, [&](int64_t begin, int64_t end) {
      MaskPanel panel;
      for (int64_t i = begin; i < end; ++i) {
        mask_panel(&panel, mask, uint32_t(member), i * PANEL);
        mask_rows(panel, first, rows, bits + i * rows * PANEL_BLOCKS);
      }
    });
    const auto gone = [&](int64_t row, int64_t i) {
      uint64_t kept;
      memcpy(&kept, bits + (i * rows + row) * PANEL_BLOCKS, 8);
      const int64_t left = k - i * PANEL;
      return left < 64 ? ~kept & ((uint64_t(1) << left) - 1) : ~kept;
    };
    parallel(run, rows, 128, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        int64_t n = 0;
        for (int64_t i = 0; i < panels; ++i) n += __builtin_popcountll(gone(row, i));
        start.data[row + 1] = int32_t(n);
      }
    });
    start.data[0] = 0;
    for (int64_t row = 0; row < rows; ++row) start.data[row + 1] += start.data[row];
    columns.resize(start.data[rows]);
    parallel(run, rows, 128, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        int32_t* to = columns.data + start.data[row];
        for (int64_t i = 0; i < panels; ++i) {
          for (uint64_t g = gone(row, i); g != 0; g &= g - 1) *to++ = int32_t(i * PANEL + __builtin_ctzll(g));
        }
      }
    });
  }
  int64_t begin(int64_t row) const { return start.data[row]; }
  int64_t end(int64_t row) const { return start.data[row + 1]; }
  const int32_t* list() const { return columns.data; }

 private:
  struct Ints {
    Ints() = default;
    explicit Ints(int64_t n) { resize(n); }
    ~Ints() { free(data); }
    Ints(const Ints&) = delete;
    Ints& operator=(const Ints&) = delete;
    void resize(int64_t n) {
      free(data);
      data = static_cast<int32_t*>(malloc(size_t(n > 0 ? n : 1) * sizeof(int32_t)));
      if (data == nullptr) abort();
    }
    int32_t* data = nullptr;
  };
  Ints start, columns;
};

// y, which is x W^T, becomes the layer's output and t its other part (see `finish`): u = dropout(x) W^T is what kept
// times y leaves without the few columns of x that are dropped. A task is a panel of outputs and a block of rows.
static void drop(
    const Matrix& y,
    const Matrix& x,
    const Matrix& w,
    const Matrix& s,
    const Matrix& b,
    const float* gain,
    const Matrix& bias,
    const Mask& mask,
    int64_t member,
    float kept,
    const Matrix& t,
    ParallelFor run
) {
  constexpr int64_t ROWS = 512, NV = PANEL / W;
  const int64_t m = x.rows, k = x.columns, n = y.columns, r = b.columns, panels = (n + PANEL - 1) / PANEL;
  Buffer packed(panels * r * PANEL), vectors(2 * panels * PANEL);
  float *gains = vectors.data, *biases = gains + panels * PANEL;
  spread(gain, n, gains);
  spread(bias, n, biases);
  pack_panels(b, packed.data, run);
  for (int64_t first = 0; first < m; first += ROWS) {
    const int64_t rows = smaller(ROWS, m - first);
    const Dropped dropped(mask, member, first, rows, k, run);
    Buffer values(dropped.end(rows - 1));
    parallel(run, rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = dropped.begin(i); j < dropped.end(i); ++j) {
          values.data[j] = element(x, first + i, dropped.list()[j]);
        }
      }
    });
    parallel(run, panels, 1, [&](int64_t begin, int64_t end) {
      constexpr int64_t PART = 48;
      const int64_t s_row = round_up(r, W);
      Buffer scratch(k * PANEL + PART * (2 * PANEL + s_row));
      float *rim = scratch.data + k * PANEL, *y_part = rim + PART * PANEL, *s_part = y_part + PART * PANEL;
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * PANEL, columns = smaller(PANEL, n - column), wide = round_up(columns, W);
        if (columns < PANEL) memset(scratch.data, 0, k * PANEL * sizeof(float));
        transpose(w, column, columns, 0, k, scratch.data, PANEL);
        for (int64_t part = 0; part < rows; part += PART) {
          const int64_t part_rows = smaller(PART, rows - part), row = first + part;
          prefetch(y, row + part_rows, smaller(PART, rows - part - part_rows), column, columns);
          prefetch(t, row + part_rows, smaller(PART, rows - part - part_rows), column, columns);
          const View y_rows = stage(y, row, part_rows, column, columns, nullptr, columns == PANEL, y_part, PANEL);
          for (int64_t i = 0; i < part_rows; ++i) {
            Vec sum[NV];
            for (int64_t v = 0; v < NV; ++v) sum[v] = zero();
            for (int64_t j = dropped.begin(part + i); j < dropped.end(part + i); ++j) {
              const Vec value = set(values.data[j]);
              const float* from = scratch.data + int64_t(dropped.list()[j]) * PANEL;
#pragma GCC unroll 8
              for (int64_t v = 0; v < NV; ++v) sum[v] = fma(value, load(from + v * W), sum[v]);
            }
            for (int64_t v = 0; v * W < wide; ++v) {
              const Vec whole = load(y_rows.data + i * y_rows.stride + v * W);
              store(rim + i * PANEL + v * W, mul(set(kept), fma(sum[v], set(-1.0f), whole)));
            }
          }
          unstage<false>(t, row, part_rows, column, columns, rim, PANEL, 1.0f);
          const View v = stage(s, row, part_rows, 0, r, nullptr, true, s_part, s_row);
          const float* bt = packed.data + panel * r * PANEL;
          product(part_rows, wide, r, v.data, v.stride, 1, bt, PANEL, rim, PANEL, false);
          finish(y, t, row, part_rows, column, columns, rim, gains + column, biases + column);
        }
      }
    });
  }
}

// dx -= (gain dy) w where the mask drops. A task has some of the panels of outputs and packs their weights for itself:
// two threads that shared the rows, and so read what both had packed, took 1.3 times as long as one.
static void drop_backward(
    const Matrix& dx,
    const Matrix& dy,
    const Matrix& w,
    const float* gain,
    const Mask& mask,
    int64_t member,
    ParallelFor run
) {
  constexpr int64_t ROWS = 512, WIDE = 2 * PANEL, NV = WIDE / W, PARTS = 8;
  const int64_t m = dy.rows, k = dx.columns, n = dy.columns, panels = (n + WIDE - 1) / WIDE;
  const int64_t parts = smaller(panels, PARTS);
  Buffer gains(round_up(n, WIDE));
  memset(gains.data, 0, round_up(n, WIDE) * sizeof(float));
  memcpy(gains.data, gain, n * sizeof(float));
  for (int64_t first = 0; first < m; first += ROWS) {
    const int64_t rows = smaller(ROWS, m - first);
    const Dropped dropped(mask, member, first, rows, k, run);
    const int64_t count = dropped.end(rows - 1);
    Buffer values(parts * count);
    parallel(run, parts, 1, [&](int64_t begin, int64_t end) {
      Buffer packed(k * WIDE), scratch(WIDE);
      for (int64_t part = begin; part < end; ++part) {
        float* sums = values.data + part * count;
        memset(sums, 0, count * sizeof(float));
        for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
          const int64_t column = panel * WIDE, columns = smaller(WIDE, n - column);
          if (columns < WIDE) memset(packed.data, 0, k * WIDE * sizeof(float));
          transpose(w, column, columns, 0, k, packed.data, WIDE);
          for (int64_t i = 0; i < rows; ++i) {
            if (columns < WIDE) memset(scratch.data, 0, WIDE * sizeof(float));
            const View v = stage(dy, first + i, 1, column, columns, nullptr, columns == WIDE, scratch.data, WIDE);
            Vec d[NV];
            for (int64_t v_i = 0; v_i < NV; ++v_i) {
              d[v_i] = mul(load(gains.data + column + v_i * W), load(v.data + v_i * W));
            }
            for (int64_t j = dropped.begin(i); j < dropped.end(i); ++j) {
              const float* from = packed.data + int64_t(dropped.list()[j]) * WIDE;
              Vec sum[2] = {zero(), zero()};
#pragma GCC unroll 16
              for (int64_t v_i = 0; v_i < NV; ++v_i) sum[v_i % 2] = fma(d[v_i], load(from + v_i * W), sum[v_i % 2]);
              sums[j] += sum_of(add(sum[0], sum[1]));
            }
          }
        }
      }
    });
    parallel(run, n > 0 ? rows : 0, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = dropped.begin(i); j < dropped.end(i); ++j) {
          const int64_t at = (first + i) * dx.stride + dropped.list()[j];
          float sum = 0.0f;
          for (int64_t part = 0; part < parts; ++part) sum += values.data[part * count + j];
          const float new_value = element(dx, first + i, dropped.list()[j]) - sum;
          switch (dx.dtype) {
            case DType::f32:
              static_cast<float*>(dx.data)[at] = new_value;
              break;
            case DType::bf16:
              from_float(new_value, static_cast<bf16*>(dx.data) + at);
              break;
            case DType::f16:
              from_float(new_value, static_cast<f16*>(dx.data) + at);
              break;
          }
        }
      }
    });
  }
}

constexpr DoraLinearKernels dora_linear_kernels = {dora_expand, dora_expand_backward, mix, drop, drop_backward};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
