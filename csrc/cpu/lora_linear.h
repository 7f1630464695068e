// The skinny products of LoRA (fastpeft/ops/products.py has the formulas). Work is cut into fixed pieces, and partial
// sums over rows are added in a fixed order: the bits do not depend on the number of threads.
#pragma once

#include "tile.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

// s = scale * (mask * x) a^T. A task is a block of rows; x passes through L1 by panels. Right before a block of x is
// read `make(row, rows, next_rows, column, columns)` is called: it may write that block, and ask for what it will need
// for the `next_rows` rows after it.
template <typename Make>
static void shrink_of(
    const Matrix& x, const Matrix& a, const Group& group, const Matrix& s, ParallelFor run, const Make& make
) {
  constexpr int64_t ROWS = 24, LONG_PIECE = 512;
  const int64_t k = x.columns, r = group.rank;
  const bool masked = group.mask.on;
  // Members that share x unmasked are one wide member.
  const int64_t members = masked ? group.members : 1, each = masked ? r : r * group.members, wide = round_up(each, W);
  Buffer packed(members * k * wide);  // a^T, each member's rank padded to whole vectors
  parallel(run, members * k, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t g = i / k, column = i % k, columns = smaller(end - i, k - column);
      float* to = packed.data + i * wide;
      if (wide > each) memset(to, 0, columns * wide * sizeof(float));
      transpose(a, g * each, each, column, columns, to, wide);
      i += columns;
    }
  });
  parallel(run, (x.rows + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
    Buffer scratch(ROWS * (PANEL + members * wide));
    float* sums = scratch.data + ROWS * PANEL;
    uint8_t bits[ROWS * PANEL_BLOCKS];
    MaskPanel panel;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * ROWS, rows = smaller(ROWS, x.rows - row);
      if (k == 0) memset(sums, 0, rows * members * wide * sizeof(float));
      if (!masked && x.dtype == DType::f32) {
        for (int64_t column = 0; column < k; column += LONG_PIECE) {
          const int64_t columns = smaller(LONG_PIECE, k - column);
          make(row, rows, 0, column, columns);  // the processor prefetches long pieces itself
          const View v = stage(x, row, rows, column, columns, nullptr, true, nullptr, 0);
          product(
              rows, wide, columns, v.data, v.stride, 1, packed.data + column * wide, wide, sums, wide, column > 0
          );
        }
      } else {
        const int64_t next_rows = smaller(ROWS, x.rows - row - rows);
        for (int64_t column = 0; column < k; column += PANEL) {
          const int64_t columns = smaller(PANEL, k - column);
          make(row, rows, next_rows, column, columns);
          for (int64_t g = 0; g < members; ++g) {
            if (masked) {
              mask_panel(&panel, group.mask, uint32_t(g), column);
              mask_rows(panel, row, rows, bits);
            }
            stage(x, row, rows, column, columns, masked ? bits : nullptr, false, scratch.data, PANEL);
            const float* b = packed.data + (g * k + column) * wide;
            product(rows, wide, columns, scratch.data, PANEL, 1, b, wide, sums + g * wide, members * wide, column > 0);
          }
        }
      }
      for (int64_t g = 0; g < group.members; ++g) {
        const float* from = sums + (masked ? g * wide : g * r);
        unstage<false>(s, row, rows, g * r, r, from, members * wide, group.scale[g]);
      }
    }
  });
}

static void shrink(const Matrix& x, const Matrix& a, const Group& group, const Matrix& s, ParallelFor run) {
  shrink_of(x, a, group, s, run, [&](int64_t row, int64_t rows, int64_t next_rows, int64_t column, int64_t columns) {
    prefetch(x, row + rows, next_rows, column, columns);
  });
}

// y += s b^T by members. A task is a block of rows.
static void expand(
    const Matrix& y, const Matrix& s, const Matrix& b, const int64_t* splits, int64_t members, ParallelFor run
) {
  constexpr int64_t ROWS = 48;
  const int64_t r = b.columns, s_row = round_up(members * r, W);
  int64_t panels = 0;
  for (int64_t g = 0; g < members; ++g) panels += (splits[g] + PANEL - 1) / PANEL;
  struct Panel {
    int64_t member, column, columns;
  };
  Buffer table(panels * int64_t(sizeof(Panel) / sizeof(float)));
  Panel* list = reinterpret_cast<Panel*>(table.data);
  for (int64_t g = 0, i = 0, start = 0; g < members; start += splits[g++]) {
    for (int64_t c = 0; c < splits[g]; c += PANEL) list[i++] = {g, start + c, smaller(PANEL, splits[g] - c)};
  }
  Buffer packed(panels * r * PANEL);  // b^T by panels
  parallel(run, panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = packed.data + i * r * PANEL;
      if (list[i].columns < PANEL) memset(to, 0, r * PANEL * sizeof(float));
      transpose(b, list[i].column, list[i].columns, 0, r, to, PANEL);
    }
  });
  parallel(run, (y.rows + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
    Buffer scratch(ROWS * (s_row + PANEL));
    float* sums = scratch.data + ROWS * s_row;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * ROWS, rows = smaller(ROWS, y.rows - row);
      const View v = stage(s, row, rows, 0, members * r, nullptr, true, scratch.data, s_row);
      for (int64_t i = 0; i < panels; ++i) {
        const Panel& p = list[i];
        const float *from = v.data + p.member * r, *bt = packed.data + i * r * PANEL;
        if (i + 1 < panels) {
          prefetch(y, row, rows, list[i + 1].column, list[i + 1].columns);
        } else {
          prefetch(y, row + rows, smaller(ROWS, y.rows - row - rows), list[0].column, list[0].columns);
        }
        if (y.dtype == DType::f32 && p.columns % W == 0) {
          float* to = static_cast<float*>(y.data) + row * y.stride + p.column;
          product(rows, p.columns, r, from, v.stride, 1, bt, PANEL, to, y.stride, true);
        } else {
          product(rows, round_up(p.columns, W), r, from, v.stride, 1, bt, PANEL, sums, PANEL, false);
          unstage<true>(y, row, rows, p.column, p.columns, sums, PANEL, 1.0f);
        }
      }
    }
  });
}

// Rows of a matrix in fp32, padded with zeros to whole vectors: itself where it is that already.
static View padded_rows(const Matrix& m, float* scratch, int64_t wide, ParallelFor run) {
  if (m.dtype == DType::f32 && m.columns == wide) return {static_cast<const float*>(m.data), m.stride};
  parallel(run, m.rows, 512, [&](int64_t begin, int64_t end) {
    stage(m, begin, end - begin, 0, m.columns, nullptr, false, scratch + begin * wide, wide);
  });
  return {scratch, wide};
}

// ds = ds_scale * dy b and db = db_scale * dy^T s in one pass over dy. A task is a block of rows: its ds is done, its
// part of db goes to a workspace whose parts are added in their order afterwards.
static void expand_backward_scaled(
    const Matrix& dy,
    const Matrix& s,
    const Matrix& b,
    const Matrix& ds,
    float ds_scale,
    const Matrix& db,
    float db_scale,
    ParallelFor run
) {
  // At most 64 parts, so that the workspace stays small beside dy.
  const int64_t ROWS = dy.rows <= 64 * 128 ? 128 : round_up((dy.rows + 63) / 64, 16);
  const int64_t m = dy.rows, n = dy.columns, r = b.columns, wide = round_up(r, W), blocks = (m + ROWS - 1) / ROWS;
  Buffer space(n * wide), parts((blocks > 0 ? blocks : 1) * n * wide);
  const View b_rows = padded_rows(b, space.data, wide, run);
  parallel(run, blocks, 1, [&](int64_t begin, int64_t end) {
    Buffer scratch(ROWS * (PANEL + 2 * wide));
    float *sums = scratch.data + ROWS * PANEL, *s_part = sums + ROWS * wide;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * ROWS, rows = smaller(ROWS, m - row);
      const View s_rows = stage(s, row, rows, 0, r, nullptr, r == wide, s_part, wide);
      float* part = parts.data + task * n * wide;
      if (n == 0) memset(sums, 0, rows * wide * sizeof(float));
      for (int64_t column = 0; column < n; column += PANEL) {
        const int64_t columns = smaller(PANEL, n - column);
        const View v = stage(dy, row, rows, column, columns, nullptr, true, scratch.data, PANEL);
        product(
            rows, wide, columns, v.data, v.stride, 1, b_rows.data + column * b_rows.stride, b_rows.stride, sums, wide,
            column > 0
        );
        product(
            columns, wide, rows, v.data, 1, v.stride, s_rows.data, s_rows.stride, part + column * wide, wide, false
        );
      }
      unstage<false>(ds, row, rows, 0, r, sums, wide, ds_scale);
    }
  });
  parallel(run, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* total = parts.data + i * wide;
      if (blocks == 0) memset(total, 0, wide * sizeof(float));
      for (int64_t task = 1; task < blocks; ++task) {
        const float* part = parts.data + (task * n + i) * wide;
        for (int64_t j = 0; j < wide; j += W) store(total + j, add(load(total + j), load(part + j)));
      }
      unstage<false>(db, i, 1, 0, r, total, wide, db_scale);
    }
  });
}

static void expand_backward(
    const Matrix& dy, const Matrix& s, const Matrix& b, const Matrix& ds, const Matrix& db, ParallelFor run
) {
  expand_backward_scaled(dy, s, b, ds, 1.0f, db, 1.0f, run);
}

// A panel of rows: to = or += from where the bit is set.
static void add_kept(float* to, const float* from, int64_t rows, const uint8_t* bits, bool first) {
  for (int64_t i = 0; i < rows; ++i, to += PANEL, from += PANEL, bits += PANEL_BLOCKS) {
    for (int64_t j = 0; j < PANEL; j += W) {
      const Vec v = keep(load(from + j), bits + j / 8);
      store(to + j, first ? v : add(load(to + j), v));
    }
  }
}

// x in memory, and the dx (its data may be null) that the rim is added to: what shrink_backward_of reads and adds to.
struct Given {
  Matrix x, dx;

  bool adds() const { return dx.data != nullptr; }
  void begin(int64_t, int64_t, int64_t, int64_t) {}  // a block that is read and added to next
  View read(int64_t row, int64_t rows, int64_t column, int64_t columns, const uint8_t* bits, float* scratch) {
    return stage(x, row, rows, column, columns, bits, columns == PANEL, scratch, PANEL);
  }
  // Where an unmasked product may be added to, rows `stride` apart; null if it must go through `add`.
  float* direct(int64_t row, int64_t column, int64_t columns, int64_t* stride) {
    if (dx.dtype != DType::f32 || columns < PANEL) return nullptr;
    *stride = dx.stride;
    return static_cast<float*>(dx.data) + row * dx.stride + column;
  }
  void add(int64_t row, int64_t rows, int64_t column, int64_t columns, const float* rim) {
    unstage<true>(dx, row, rows, column, columns, rim, PANEL, 1.0f);
  }
};

// da = scale * ds^T (mask * x) and dx += scale * mask * (ds a), one pass over x and dx, each mask formed once. A task
// is a panel of columns and a block of rows; with several blocks their parts of da are added in their order afterwards.
// x is (m, k); each thread has a copy of `blocks_of`, which is like Given.
template <typename Blocks>
static void shrink_backward_of(
    const Matrix& ds,
    int64_t m,
    int64_t k,
    const Blocks& blocks_of,
    const Matrix& a,
    const Group& group,
    const Matrix& da,
    ParallelFor run
) {
  constexpr int64_t PART = 36;
  const int64_t ROWS = m <= 64 * 288 ? 288 : round_up((m + 63) / 64, PART);
  const int64_t r = group.rank, total_rank = r * group.members;
  const bool masked = group.mask.on, adds = blocks_of.adds();
  const int64_t members = masked ? group.members : 1, each = masked ? r : total_rank, ds_row = round_up(total_rank, W);
  const int64_t panels = (k + PANEL - 1) / PANEL, blocks = (m + ROWS - 1) / ROWS;
  Buffer scaled(m * ds_row), parts((blocks > 0 ? blocks : 1) * total_rank * panels * PANEL);
  parallel(run, m, 256, [&](int64_t begin, int64_t end) {  // the scale goes into ds, so into both products
    stage(ds, begin, end - begin, 0, total_rank, nullptr, false, scaled.data + begin * ds_row, ds_row);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t g = 0; g < group.members; ++g) {
        float* d = scaled.data + i * ds_row + g * r;
        for (int64_t j = 0; j < r; ++j) d[j] *= group.scale[g];
      }
    }
  });
  parallel(run, blocks * panels, 1, [&](int64_t begin, int64_t end) {
    Buffer scratch(total_rank * PANEL + 3 * PART * PANEL);
    float *a_panel = scratch.data, *x_part = a_panel + total_rank * PANEL;
    float *rim = x_part + PART * PANEL, *rim_sum = rim + PART * PANEL;
    uint8_t bits[PART * PANEL_BLOCKS];
    MaskPanel mask;
    Blocks source(blocks_of);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task % panels, block = task / panels, column = panel * PANEL,
                    columns = smaller(PANEL, k - column);
      const int64_t first = block * ROWS, last = smaller(first + ROWS, m), wide = round_up(columns, W);
      float* sums = parts.data + task * total_rank * PANEL;
      const View a_rows = stage(a, 0, total_rank, column, columns, nullptr, columns == PANEL, a_panel, PANEL);
      for (int64_t row = first; row < last; row += PART) {
        const int64_t rows = smaller(PART, last - row);
        const float* d = scaled.data + row * ds_row;
        source.begin(row, rows, column, columns);
        int64_t stride = PANEL;
        float* direct = adds && !masked ? source.direct(row, column, columns, &stride) : nullptr;
        for (int64_t g = 0; g < members; ++g) {
          if (masked) {
            mask_panel(&mask, group.mask, uint32_t(g), column);
            mask_rows(mask, row, rows, bits);
          }
          const View v = source.read(row, rows, column, columns, masked ? bits : nullptr, x_part);
          product(each, wide, rows, d + g * r, 1, ds_row, v.data, v.stride, sums + g * r * PANEL, PANEL, row > first);
          if (!adds) continue;
          product(
              rows, wide, each, d + g * r, ds_row, 1, a_rows.data + g * r * a_rows.stride, a_rows.stride,
              direct != nullptr ? direct : rim, stride, direct != nullptr
          );
          if (masked) add_kept(rim_sum, rim, rows, bits, g == 0);
        }
        if (adds && direct == nullptr) source.add(row, rows, column, columns, masked ? rim_sum : rim);
      }
    }
  });
  parallel(run, total_rank * panels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i % panels, j = i / panels;
      float* total = parts.data + (panel * total_rank + j) * PANEL;
      if (blocks == 0) memset(total, 0, PANEL * sizeof(float));
      for (int64_t block = 1; block < blocks; ++block) {
        const float* part = parts.data + ((block * panels + panel) * total_rank + j) * PANEL;
        for (int64_t c = 0; c < PANEL; c += W) store(total + c, add(load(total + c), load(part + c)));
      }
      unstage<false>(da, j, 1, panel * PANEL, smaller(PANEL, k - panel * PANEL), total, PANEL, 1.0f);
    }
  });
}

static void shrink_backward(
    const Matrix& ds,
    const Matrix& x,
    const Matrix& a,
    const Group& group,
    const Matrix& dx,
    const Matrix& da,
    ParallelFor run
) {
  shrink_backward_of(ds, x.rows, x.columns, Given{x, dx}, a, group, da, run);
}

constexpr LoraLinearKernels lora_linear_kernels = {shrink, expand, expand_backward, shrink_backward};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
