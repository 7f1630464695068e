// Y = or += A diag(gain) B in fp32, for matrices too large for registers (fastpeft/ops/gemm.py says when it is used).
//
// The loops are those of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008) with the
// operands' parts exchanged: a panel of B, DEEP x NR, stays in the first cache while strips of A, packed for a block of
// rows, pass by it from the second. Sums are runs of at most DEEP terms, added up in Y: their error against float64 is
// below that of PyTorch's product.
#pragma once

#include "tile.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace gemm {

// The accumulators, MR * NV registers, leave room for a row of the panel and one element of A.
#if defined(FASTPEFT_AVX512)
constexpr int MR = 12, NV = 2;
#elif defined(FASTPEFT_AVX2)
constexpr int MR = 6, NV = 2;
#else
constexpr int MR = 4, NV = 1;
#endif
constexpr int NR = NV * W;
constexpr int64_t DEEP = 320, ROWS = 64 * MR;

// The next panel is asked for while this many strips are multiplied, the last ones: what is asked for earlier has left
// the cache again when it is packed.
constexpr int64_t ASKING = 8;

// to[j * to_stride + i] = from[i * stride + j] for `rows` rows, at most W, and `columns` columns.
#if defined(FASTPEFT_AVX512)
static void turn(const float* from, int64_t stride, int rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t j = 0; j < columns; j += 16) {
    const int n = int(smaller(16, columns - j));
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = i < rows ? load_some(from + i * stride + j, n) : zero();
    // Four by four within the 128-bit parts, then the parts among each other.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      const __m512d low0 = _mm512_castps_pd(_mm512_unpacklo_ps(a[i], a[i + 1]));
      const __m512d high0 = _mm512_castps_pd(_mm512_unpackhi_ps(a[i], a[i + 1]));
      const __m512d low1 = _mm512_castps_pd(_mm512_unpacklo_ps(a[i + 2], a[i + 3]));
      const __m512d high1 = _mm512_castps_pd(_mm512_unpackhi_ps(a[i + 2], a[i + 3]));
      b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1));
      b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1));
      b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1));
      b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 even0 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), odd0 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
      const __m512 even1 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
      const __m512 odd1 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
      a[i] = _mm512_shuffle_f32x4(even0, even1, 0x88);
      a[8 + i] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
      a[4 + i] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
      a[12 + i] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i < n) store_some(to + (j + i) * to_stride, a[i], rows);
    }
  }
}
#else
static void turn(const float* from, int64_t stride, int rows, int64_t columns, float* to, int64_t to_stride) {
  transpose(from, stride, rows, columns, to, to_stride);
}
#endif

// An operand as it lies in memory: element (i, j) at i * stride + j or, turned, at j * stride + i.
struct Operand {
  const float* data;
  int64_t stride;
  bool turned;
};

// Rows row … row + rows (at most MR) and columns column … column + deep as [deep][MR], what is missing being zero.
static void pack_strip(const Operand& a, int64_t row, int64_t rows, int64_t column, int64_t deep, float* to) {
  if (rows < MR) memset(to, 0, deep * MR * sizeof(float));
  if (a.turned) {
    for (int64_t j = 0; j < deep; ++j) {
      const float* from = a.data + (column + j) * a.stride + row;
      for (int64_t i = 0; i < rows; ++i) to[j * MR + i] = from[i];
    }
  } else {
    turn(a.data + row * a.stride + column, a.stride, int(rows), deep, to, MR);
  }
}

// Rows row … row + deep and columns column … column + columns (at most NR) as [deep][NR], what is missing being zero,
// each row times its gain.
static void pack_panel(
    const Operand& b, const float* gain, int64_t row, int64_t deep, int64_t column, int64_t columns, float* to
) {
  if (columns < NR) memset(to, 0, deep * NR * sizeof(float));
  if (b.turned) {
    for (int64_t j = 0; j < columns; j += W) {
      turn(b.data + (column + j) * b.stride + row, b.stride, int(smaller(W, columns - j)), deep, to + j, NR);
    }
  } else {
    for (int64_t i = 0; i < deep; ++i) {
      const float* from = b.data + (row + i) * b.stride + column;
      for (int64_t j = 0; j < columns; j += W) {
        const int n = int(smaller(W, columns - j));
        store_some(to + i * NR + j, load_some(from + j, n), n);
      }
    }
  }
  for (int64_t i = 0; gain != nullptr && i < deep; ++i) {
    const Vec g = set(gain[row + i]);
    for (int64_t j = 0; j < NR; j += W) store(to + i * NR + j, mul(g, load(to + i * NR + j)));
  }
}

// Asks for the part-th of `parts` parts of what pack_panel will read: short rows, far from each other. Inlined by force:
// a function that does nothing but ask has no effect in GCC's eyes, and its calls are left out.
FASTPEFT_INLINE void ask_for_panel(
    const Operand& b, int64_t row, int64_t deep, int64_t column, int64_t columns, int64_t part, int64_t parts
) {
  const int64_t rows = b.turned ? columns : deep, width = b.turned ? deep : columns;
  const float* from = b.turned ? b.data + column * b.stride + row : b.data + row * b.stride + column;
  for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
    for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(from + i * b.stride + j, 0, 2);
  }
}

static int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The largest part when n is cut into the fewest equal parts of at most `most`, a multiple of `unit`.
static int64_t even_part(int64_t n, int64_t most, int64_t unit) {
  return n <= most ? n : smaller(most, round_up(divided(n, divided(n, most)), unit));
}

// A worker has some of the strips and some of the panels, and packs them for itself: nobody waits for anybody.
struct Grid {
  int64_t down, across;
};

static Grid grid(int64_t strips, int64_t panels, int64_t threads) {
  Grid best{1, 1};
  double least = 0;
  for (int64_t down = 1; down <= threads; ++down) {
    const int64_t across = threads / down, s = divided(strips, down), p = divided(panels, across);
    // Multiplications, and packing at 0.3 cycles an element, in cycles of one term.
    const double cost = double(s) * p * MR * NV + 0.3 * (s * MR + p * NR * divided(s * MR, ROWS));
    if (down == 1 || cost < least) {
      least = cost;
      best = {down, across};
    }
  }
  return best;
}

struct Target {
  float* data;
  int64_t stride;
  bool add;
};

// A tile of y with fewer columns than a panel.
static void edge(int64_t rows, int64_t columns, int64_t deep, const float* packed, const float* panel, const Target& y) {
  float part[MR * NR];
  strip<MR, NV>(rows, deep, packed, 1, MR, panel, NR, part, NR, false);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += W) {
      const int lanes = int(smaller(W, columns - j));
      const Vec v = load(part + i * NR + j);
      float* to = y.data + i * y.stride + j;
      store_some(to, y.add ? add(load_some(to, lanes), v) : v, lanes);
    }
  }
}

// y (m x n) = or += a (m x k) diag(gain) b (k x n). Without a gain: null.
static void run(
    const Operand& a, int64_t m, int64_t n, int64_t k, const Operand& b, const float* gain, const Target& y,
    int64_t threads, ParallelFor run_parallel
) {
  if (k == 0) {
    for (int64_t i = 0; i < m && !y.add; ++i) memset(y.data + i * y.stride, 0, n * sizeof(float));
    return;
  }
  const int64_t all_strips = divided(m, MR), all_panels = divided(n, NR), depth = even_part(k, DEEP, W);
  const Grid workers = grid(all_strips, all_panels, threads);
  parallel(run_parallel, workers.down * workers.across, 1, [&](int64_t begin, int64_t end) {
    Buffer panel(depth * NR), strips(smaller(ROWS, all_strips * MR) * depth);
    for (int64_t worker = begin; worker < end; ++worker) {
      const int64_t down = worker / workers.across, across = worker % workers.across;
      const int64_t first = all_panels * across / workers.across, last = all_panels * (across + 1) / workers.across;
      const int64_t top = all_strips * down / workers.down * MR;
      const int64_t bottom = smaller(m, all_strips * (down + 1) / workers.down * MR);
      const int64_t block = even_part(bottom - top, ROWS, MR);
      for (int64_t row = top; row < bottom && first < last; row += block) {
        const int64_t rows = smaller(block, bottom - row), count = divided(rows, MR), asking = smaller(ASKING, count);
        for (int64_t at = 0; at < k; at += depth) {
          const int64_t deep = smaller(depth, k - at);
          for (int64_t i = 0; i < rows; i += MR) {
            pack_strip(a, row + i, smaller(MR, rows - i), at, deep, strips.data + i * deep);
          }
          for (int64_t p = first; p < last; ++p) {
            const int64_t column = p * NR, columns = smaller(NR, n - column);
            pack_panel(b, gain, at, deep, column, columns, panel.data);
            // The panel after this one, which may be the first of the next terms.
            const int64_t next = p + 1 < last ? p + 1 : first, next_at = p + 1 < last ? at : at + depth;
            for (int64_t i = 0; i < count; ++i) {
              const Target to{y.data + (row + i * MR) * y.stride + column, y.stride, y.add || at > 0};
              const int64_t here = smaller(MR, rows - i * MR), part = i - (count - asking);
              const float* packed = strips.data + i * MR * deep;
              if (part >= 0 && next_at < k) {
                ask_for_panel(
                    b, next_at, smaller(depth, k - next_at), next * NR, smaller(NR, n - next * NR), part, asking
                );
              }
              if (columns == NR) {
                for (int64_t q = 0; to.add && q < here; ++q) {
                  for (int64_t j = 0; j < NR; j += 16) __builtin_prefetch(to.data + q * to.stride + j, 1, 3);
                }
                strip<MR, NV>(here, deep, packed, 1, MR, panel.data, NR, to.data, to.stride, to.add);
              } else {
                edge(here, columns, deep, packed, panel.data, to);
              }
            }
          }
        }
      }
    }
  });
}

static void product(
    const Matrix& a,
    bool a_turned,
    const Matrix& b,
    bool b_turned,
    const float* gain,
    const Matrix& y,
    bool add_to,
    int64_t threads,
    ParallelFor parallel
) {
  const Operand left{static_cast<const float*>(a.data), a.stride, a_turned};
  const Operand right{static_cast<const float*>(b.data), b.stride, b_turned};
  const Target target{static_cast<float*>(y.data), y.stride, add_to};
  run(left, y.rows, y.columns, a_turned ? a.rows : a.columns, right, gain, target, threads, parallel);
}

}  // namespace gemm

constexpr GemmKernels gemm_kernels = {gemm::product};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
