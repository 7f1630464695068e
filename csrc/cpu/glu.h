// Activations, gated or not, alone and with the narrow product of the result (fastpeft/ops/glu.py has the formulas).
#pragma once

#include "activation.h"
#include "lora_linear.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

template <typename T>
FASTPEFT_INLINE T* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<T*>(m.data) + row * m.stride + column;
}

// A block of gate and up: where it lies, and h for it, from (0, 0) of `h` on.
using ForwardBlock = void (*)(
    const Matrix& gate,
    const Matrix& up,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns,
    void* h,
    int64_t h_stride
);

template <typename F, typename T, bool GATED>
static void forward_block(
    const Matrix& gate,
    const Matrix& up,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns,
    void* h,
    int64_t h_stride
) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* g = at<T>(gate, row + i, column);
    const T* u = GATED ? at<T>(up, row + i, column) : nullptr;
    T* to = static_cast<T*>(h) + i * h_stride;
    const auto step = [&](int64_t j, int n) __attribute__((always_inline)) {
      Vec f = F::value(load_some(g + j, n));
      if (GATED) f = mul(f, load_some(u + j, n));
      store_some(to + j, f, n);
    };
    int64_t j = 0;
    for (; j + W <= columns; j += W) step(j, W);
    if (j < columns) step(j, int(columns - j));
  }
}

// dgate and dup of dh + rim (rows PANEL apart; may be null) for a block.
using BackwardBlock = void (*)(
    const Matrix& dh,
    const float* rim,
    const Matrix& gate,
    const Matrix& up,
    const Matrix& dgate,
    const Matrix& dup,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns
);

template <typename F, typename T, bool GATED>
static void backward_block(
    const Matrix& dh,
    const float* rim,
    const Matrix& gate,
    const Matrix& up,
    const Matrix& dgate,
    const Matrix& dup,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns
) {
  for (int64_t i = 0; i < rows; ++i) {
    const T *d = at<T>(dh, row + i, column), *g = at<T>(gate, row + i, column);
    const T* u = GATED ? at<T>(up, row + i, column) : nullptr;
    T *dg = at<T>(dgate, row + i, column), *du = GATED ? at<T>(dup, row + i, column) : nullptr;
    const float* r = rim == nullptr ? nullptr : rim + i * PANEL;
    const auto step = [&](int64_t j, int n) __attribute__((always_inline)) {
      Vec f, slope, total = load_some(d + j, n);
      if (r != nullptr) total = add(total, load(r + j));
      F::both(load_some(g + j, n), &f, &slope);
      store_some(dg + j, mul(GATED ? mul(total, load_some(u + j, n)) : total, slope), n);
      if (GATED) store_some(du + j, mul(total, f), n);
    };
    int64_t j = 0;
    for (; j + W <= columns; j += W) step(j, W);
    if (j < columns) step(j, int(columns - j));
  }
}

struct GluBlocks {
  ForwardBlock forward;
  BackwardBlock backward;
};

template <typename F, typename T>
static GluBlocks blocks_for(bool gated) {
  if (gated) return {forward_block<F, T, true>, backward_block<F, T, true>};
  return {forward_block<F, T, false>, backward_block<F, T, false>};
}

static GluBlocks blocks_for(Activation act, DType dtype, bool gated) {
  GluBlocks found = {};
  with_activation(act, [&](auto f) {
    using F = decltype(f);
    switch (dtype) {
      case DType::f32:
        found = blocks_for<F, float>(gated);
        break;
      case DType::bf16:
        found = blocks_for<F, bf16>(gated);
        break;
      case DType::f16:
        found = blocks_for<F, f16>(gated);
        break;
    }
  });
  return found;
}

FASTPEFT_INLINE char* address(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<char*>(m.data) + (row * m.stride + column) * element_size(m);
}

// Rows a thread takes at least: 2^15 elements are about ten microseconds.
FASTPEFT_INLINE int64_t rows_at_least(int64_t columns) { return 1 + (int64_t(1) << 15) / (columns > 0 ? columns : 1); }

static void glu_forward(const Matrix& gate, const Matrix& up, Activation act, const Matrix& h, ParallelFor run) {
  const ForwardBlock block = blocks_for(act, gate.dtype, up.data != nullptr).forward;
  parallel(run, gate.rows, rows_at_least(gate.columns), [&](int64_t begin, int64_t end) {
    block(gate, up, begin, end - begin, 0, gate.columns, address(h, begin, 0), h.stride);
  });
}

static void glu_backward(
    const Matrix& dh,
    const Matrix& gate,
    const Matrix& up,
    Activation act,
    const Matrix& dgate,
    const Matrix& dup,
    ParallelFor run
) {
  const BackwardBlock block = blocks_for(act, gate.dtype, up.data != nullptr).backward;
  parallel(run, gate.rows, rows_at_least(gate.columns), [&](int64_t begin, int64_t end) {
    block(dh, nullptr, gate, up, dgate, dup, begin, end - begin, 0, gate.columns);
  });
}

static void glu_shrink(
    const Matrix& gate,
    const Matrix& up,
    Activation act,
    const Matrix& a,
    const Group& group,
    const Matrix& h,
    const Matrix& s,
    ParallelFor run
) {
  const ForwardBlock block = blocks_for(act, gate.dtype, up.data != nullptr).forward;
  shrink_of(h, a, group, s, run, [&](int64_t row, int64_t rows, int64_t next_rows, int64_t column, int64_t columns) {
    prefetch(gate, row + rows, next_rows, column, columns);
    if (up.data != nullptr) prefetch(up, row + rows, next_rows, column, columns);
    block(gate, up, row, rows, column, columns, address(h, row, column), h.stride);
  });
}

// Blocks of h, made again and rounded as it was, and of dh: what shrink_backward_of reads and adds to.
struct Remade {
  static constexpr int64_t ROWS = 36;  // shrink_backward_of's blocks have no more

  Remade(const Matrix& dh, const Matrix& gate, const Matrix& up, GluBlocks blocks, const Matrix& dgate, const Matrix& dup)
      : dh(dh), gate(gate), up(up), dgate(dgate), dup(dup), blocks(blocks), space(ROWS * PANEL) {}
  Remade(const Remade& other) : Remade(other.dh, other.gate, other.up, other.blocks, other.dgate, other.dup) {}

  bool adds() const { return dgate.data != nullptr; }
  void begin(int64_t row, int64_t rows, int64_t column, int64_t columns) {
    if (adds()) prefetch(dh, row, rows, column, columns);
    const int64_t next_rows = smaller(rows, gate.rows - row - rows);
    prefetch(gate, row + rows, next_rows, column, columns);
    if (up.data != nullptr) prefetch(up, row + rows, next_rows, column, columns);
    blocks.forward(gate, up, row, rows, column, columns, space.data, PANEL);
  }
  View read(int64_t, int64_t rows, int64_t, int64_t columns, const uint8_t* bits, float* scratch) {
    const Matrix h = {space.data, rows, columns, PANEL, gate.dtype};
    return stage(h, 0, rows, 0, columns, bits, columns == PANEL, scratch, PANEL);
  }
  float* direct(int64_t, int64_t, int64_t, int64_t*) { return nullptr; }
  void add(int64_t row, int64_t rows, int64_t column, int64_t columns, const float* rim) {
    blocks.backward(dh, rim, gate, up, dgate, dup, row, rows, column, columns);
  }

  const Matrix &dh, &gate, &up, &dgate, &dup;
  GluBlocks blocks;
  Buffer space;
};

static void glu_shrink_backward(
    const Matrix& dh,
    const Matrix& ds,
    const Matrix& gate,
    const Matrix& up,
    Activation act,
    const Matrix& a,
    const Group& group,
    const Matrix& dgate,
    const Matrix& dup,
    const Matrix& da,
    ParallelFor run
) {
  const Remade remade(dh, gate, up, blocks_for(act, gate.dtype, up.data != nullptr), dgate, dup);
  shrink_backward_of(ds, gate.rows, gate.columns, remade, a, group, da, run);
}

constexpr GluKernels glu_kernels = {glu_forward, glu_backward, glu_shrink, glu_shrink_backward};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
