// The pieces every kernel is built from: staging a tile into fp32, and one small matrix product.
#pragma once

#include <stdlib.h>

#include "kernels.h"
#include "philox.h"
#include "vec.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

FASTPEFT_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
FASTPEFT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Floats from malloc, aligned to a cache line.
struct Buffer {
  explicit Buffer(int64_t n) : data(static_cast<float*>(aligned_alloc(64, size_t(round_up(n > 0 ? n : 1, 16)) * 4))) {
    if (data == nullptr) abort();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data;
};

template <typename F>
static void parallel(ParallelFor run, int64_t n, int64_t grain, const F& body) {
  run(
      n, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body))
  );
}

// A read-only fp32 matrix.
struct View {
  const float* data;
  int64_t stride;
};

template <typename T>
static void decode(
    const T* from, int64_t stride, int64_t rows, int64_t columns, const uint8_t* bits, float* to, int64_t to_stride
) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* p = from + i * stride;
    float* q = to + i * to_stride;
    const uint8_t* b = bits == nullptr ? nullptr : bits + i * PANEL_BLOCKS;
    int64_t j = 0;
    for (; j + W <= columns; j += W) {
      const Vec v = load(p + j);
      store(q + j, bits != nullptr ? keep(v, b + j / 8) : v);
    }
    if (j < columns) {
      const Vec v = load(p + j, int(columns - j));
      store(q + j, bits != nullptr ? keep(v, b + j / 8) : v);  // the rest of the vector is zero
    }
  }
}

// Rows row … row + rows and columns column … column + columns of m, in fp32, masked where bits are given (eight bytes a
// row), zero up to a multiple of W. Without need (`in_place` and nothing to convert, mask or pad) it is m itself.
static View stage(
    const Matrix& m,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns,
    const uint8_t* bits,
    bool in_place,
    float* scratch,
    int64_t scratch_stride
) {
  const int64_t at = row * m.stride + column;
  switch (m.dtype) {
    case DType::f32: {
      const float* p = static_cast<const float*>(m.data) + at;
      if (in_place && bits == nullptr) return {p, m.stride};
      decode(p, m.stride, rows, columns, bits, scratch, scratch_stride);
      break;
    }
    case DType::bf16:
      decode(static_cast<const bf16*>(m.data) + at, m.stride, rows, columns, bits, scratch, scratch_stride);
      break;
    case DType::f16:
      decode(static_cast<const f16*>(m.data) + at, m.stride, rows, columns, bits, scratch, scratch_stride);
      break;
  }
  return {scratch, scratch_stride};
}

template <typename T, bool ADD>
static void encode(
    T* to, int64_t stride, int64_t rows, int64_t columns, const float* from, int64_t from_stride, float scale
) {
  const Vec c = set(scale);
  for (int64_t i = 0; i < rows; ++i) {
    T* p = to + i * stride;
    const float* q = from + i * from_stride;
    int64_t j = 0;
    for (; j + W <= columns; j += W) store(p + j, ADD ? fma(c, load(q + j), load(p + j)) : mul(c, load(q + j)));
    if (j < columns) {
      const int n = int(columns - j);
      const Vec v = load(q + j, n);
      store(p + j, ADD ? fma(c, v, load(p + j, n)) : mul(c, v), n);
    }
  }
}

// m[…] = scale * from (ADD: += ), rounded once.
template <bool ADD>
static void unstage(
    const Matrix& m,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns,
    const float* from,
    int64_t from_stride,
    float scale
) {
  const int64_t at = row * m.stride + column;
  switch (m.dtype) {
    case DType::f32:
      return encode<float, ADD>(static_cast<float*>(m.data) + at, m.stride, rows, columns, from, from_stride, scale);
    case DType::bf16:
      return encode<bf16, ADD>(static_cast<bf16*>(m.data) + at, m.stride, rows, columns, from, from_stride, scale);
    case DType::f16:
      return encode<f16, ADD>(static_cast<f16*>(m.data) + at, m.stride, rows, columns, from, from_stride, scale);
  }
}

static float element(const Matrix& m, int64_t row, int64_t column) {
  const int64_t at = row * m.stride + column;
  switch (m.dtype) {
    case DType::f32:
      return static_cast<const float*>(m.data)[at];
    case DType::bf16:
      return to_float(static_cast<const bf16*>(m.data)[at]);
    default:
      return to_float(static_cast<const f16*>(m.data)[at]);
  }
}

FASTPEFT_INLINE int64_t element_size(const Matrix& m) { return m.dtype == DType::f32 ? 4 : 2; }

// Asks for a tile that will be needed next: its rows are far apart, which the processor's own prefetcher does not
// guess. From memory shrink takes 0.65 to 0.75 of the time with it and expand 0.55 to 0.65, from the cache 1.00 to 1.05
// (512 rows of 576 and 1536, fp32 and bf16, Zen 4). The backward passes lose by it for dy (bf16 up to 1.2) and do
// without; for y, which DoRA's reads beside dy, it is 0.87 to 0.95 in fp32 and 1.00 in bf16.
static void prefetch(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const int64_t size = element_size(m), bytes = columns * size;
  const char* p = static_cast<const char*>(m.data) + (row * m.stride + column) * size;
  for (int64_t i = 0; i < rows; ++i, p += m.stride * size) {
    for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(p + j, 0, 2);
  }
}

// c (MR x NV*W) = or += a (MR x k) b (k x NV*W), everything fp32. a[i, j] is at i*a_row + j*a_column.
template <int MR, int NV>
static void micro(
    int64_t k,
    const float* a,
    int64_t a_row,
    int64_t a_column,
    const float* b,
    int64_t b_row,
    float* c,
    int64_t c_row,
    bool add_to
) {
  Vec sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[i][v] = zero();
  }
  for (int64_t j = 0; j < k; ++j, a += a_column, b += b_row) {
    Vec row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec x = set(a[i * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[i][v] = fma(x, row[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* to = c + i * c_row + v * W;
      store(to, add_to ? add(load(to), sum[i][v]) : sum[i][v]);
    }
  }
}

template <int MR, int NV>
FASTPEFT_INLINE void strip(
    int64_t m,
    int64_t k,
    const float* a,
    int64_t a_row,
    int64_t a_column,
    const float* b,
    int64_t b_row,
    float* c,
    int64_t c_row,
    bool add_to
) {
  int64_t i = 0;
  for (; i + MR <= m; i += MR) micro<MR, NV>(k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add_to);
  if (MR > 4) {
    for (; i + 4 <= m; i += 4) micro<4, NV>(k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add_to);
  }
  for (; i < m; ++i) micro<1, NV>(k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add_to);
}

// c (m x n) = or += a (m x k) b (k x n) for n a multiple of W. The accumulators fill the registers: 32 of AVX-512, 16
// of the others, less those for a row of b.
static void product(
    int64_t m,
    int64_t n,
    int64_t k,
    const float* a,
    int64_t a_row,
    int64_t a_column,
    const float* b,
    int64_t b_row,
    float* c,
    int64_t c_row,
    bool add_to
) {
  // Terms that one accumulator sums up. A longer sum is a sum of such runs: in one run over K = 1,792 the error against
  // float64 was three times that of PyTorch's product, in runs of 256 it is below it.
  constexpr int64_t RUN = 256;
  if (k > RUN) {
    for (int64_t j = 0; j < k; j += RUN) {
      const float* panel = b + j * b_row;
      product(m, n, smaller(RUN, k - j), a + j * a_column, a_row, a_column, panel, b_row, c, c_row, add_to || j > 0);
    }
    return;
  }
  while (n > 0) {
    int64_t done;
#if defined(FASTPEFT_AVX512)
    if (n >= 4 * W) {
      strip<6, 4>(m, k, a, a_row, a_column, b, b_row, c, c_row, add_to);
      done = 4 * W;
    } else if (n >= 2 * W) {
      strip<12, 2>(m, k, a, a_row, a_column, b, b_row, c, c_row, add_to);
      done = 2 * W;
    } else {
      strip<12, 1>(m, k, a, a_row, a_column, b, b_row, c, c_row, add_to);
      done = W;
    }
#elif !defined(FASTPEFT_AVX2)
    strip<4, 1>(m, k, a, a_row, a_column, b, b_row, c, c_row, add_to);
    done = W;
#else
    if (n >= 2 * W) {
      strip<6, 2>(m, k, a, a_row, a_column, b, b_row, c, c_row, add_to);
      done = 2 * W;
    } else {
      strip<8, 1>(m, k, a, a_row, a_column, b, b_row, c, c_row, add_to);
      done = W;
    }
#endif
    n -= done;
    b += done;
    c += done;
  }
}

template <typename T>
static void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  constexpr int64_t BLOCK = 16;  // 16 rows of 16 columns are read from 16 cache lines
  for (int64_t j0 = 0; j0 < columns; j0 += BLOCK) {
    const int64_t j1 = smaller(j0 + BLOCK, columns);
    for (int64_t i0 = 0; i0 < rows; i0 += BLOCK) {
      const int64_t i1 = smaller(i0 + BLOCK, rows);
      for (int64_t j = j0; j < j1; ++j) {
        for (int64_t i = i0; i < i1; ++i) to[j * to_stride + i] = to_float(from[i * stride + j]);
      }
    }
  }
}

// to[j, i] = m[row + i, column + j] in fp32.
static void transpose(
    const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns, float* to, int64_t to_stride
) {
  const int64_t at = row * m.stride + column;
  switch (m.dtype) {
    case DType::f32:
      return transpose(static_cast<const float*>(m.data) + at, m.stride, rows, columns, to, to_stride);
    case DType::bf16:
      return transpose(static_cast<const bf16*>(m.data) + at, m.stride, rows, columns, to, to_stride);
    case DType::f16:
      return transpose(static_cast<const f16*>(m.data) + at, m.stride, rows, columns, to, to_stride);
  }
}

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
