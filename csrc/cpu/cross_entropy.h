// The softmax between the two products of a linear cross-entropy, on one tile of the logits (fastpeft/ops/
// cross_entropy.py has the formulas). A row is one thread's: same bits for any number of threads.
#pragma once

#include "math.h"
#include "norm.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

FASTPEFT_INLINE float lane_0(Vec v) {
  float lanes[W];
  store(lanes, v);
  return lanes[0];
}

FASTPEFT_INLINE float largest(const Vec* v) {
  return greatest_lane(greatest(greatest(v[0], v[1]), greatest(v[2], v[3])));
}

// x of a logit and, with a cap, t = x / cap.
template <bool CAPPED>
FASTPEFT_INLINE Vec squashed(Vec z, Vec scale, Vec scale_over_cap, Vec cap, Vec* t) {
  if (!CAPPED) return mul(z, scale);
  *t = tanh(mul(z, scale_over_cap));
  return mul(cap, *t);
}

template <typename T, bool CAPPED>
static void accumulate_rows(const CrossEntropyTile& tile, int64_t begin, int64_t end) {
  const int64_t n = tile.z.columns, m = tile.rows;
  Buffer x(round_up(n, 4 * W));
  Vec scale = set(tile.scale), cap = set(tile.cap), ratio = set(CAPPED ? tile.scale / tile.cap : 0.0f), t = zero();
  for (int64_t j = n; j < round_up(n, 4 * W); ++j) x.data[j] = MINUS_INFINITY;
  for (int64_t i = begin; i < end; ++i) {
    T* z = row_of<T>(tile.z, i);
    float *reference = tile.state + i, *sum = tile.state + m + i, *of_label = sum + m, *all = of_label + m;
    Vec totals[4] = {zero(), zero(), zero(), zero()};
    int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W) {
      for (int v = 0; v < 4; ++v) {
        const Vec value = squashed<CAPPED>(load(z + j + v * W), scale, ratio, cap, &t);
        totals[v] = add(totals[v], value);
        store(x.data + j + v * W, value);
      }
    }
    for (; j < n; j += W) {
      const int width = int(smaller(W, n - j));
      const Vec value = squashed<CAPPED>(load(z + j, width), scale, ratio, cap, &t);
      totals[0] = add(totals[0], value);  // beyond the row 0
      store(x.data + j, value, width);
    }
    *all += total(totals);
    const int64_t label = tile.labels[i] - tile.first;
    const bool here = tile.labels[i] >= 0 && label >= 0 && label < n;
    if (here) {
      *of_label = x.data[label];
      x.data[label] = MINUS_INFINITY;
    }
    Vec most[4] = {set(MINUS_INFINITY), set(MINUS_INFINITY), set(MINUS_INFINITY), set(MINUS_INFINITY)};
    for (j = 0; j < n; j += 4 * W) {
      for (int v = 0; v < 4; ++v) most[v] = greatest(most[v], load(x.data + j + v * W));
    }
    const float top = largest(most);
    if (top > *reference + tile.slack) {
      const float factor = lane_0(exp(set(*reference - top)));
      *reference = top;
      *sum *= factor;
      float* acc = tile.acc.data == nullptr ? nullptr : row_of<float>(tile.acc, i);
      if (acc != nullptr) {
        for (int64_t k = 0; k < tile.acc.columns; ++k) acc[k] *= factor;
      }
    }
    const bool empty = *reference == MINUS_INFINITY && top == MINUS_INFINITY;  // e^(x - m) is 0, not NaN
    const Vec m_i = set(empty ? 0.0f : *reference), one = set(1.0f), inverse = set(CAPPED ? 1.0f / tile.cap : 0.0f);
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    for (j = 0; j < n; j += 4 * W) {
      for (int v = 0; v < 4; ++v) {
        const int64_t at = j + v * W;
        if (at >= n) break;
        const Vec value = load(x.data + at);
        Vec e = exp(sub(value, m_i));
        sums[v] = add(sums[v], e);
        if (tile.acc.data == nullptr) continue;
        if (CAPPED) {
          t = mul(value, inverse);
          e = mul(e, sub(one, mul(t, t)));
        }
        if (at + W <= n) {
          store(z + at, e);
        } else {
          store(z + at, e, int(n - at));
        }
      }
    }
    if (here && tile.acc.data != nullptr) from_float(0.0f, z + label);
    *sum += total(sums);
  }
}

template <typename T, bool CAPPED>
static void gradient_rows(const CrossEntropyTile& tile, int64_t begin, int64_t end) {
  const int64_t n = tile.z.columns, m = tile.rows;
  const Vec scale = set(tile.scale), cap = set(tile.cap), one = set(1.0f);
  const Vec ratio = set(CAPPED ? tile.scale / tile.cap : 0.0f);
  for (int64_t i = begin; i < end; ++i) {
    T* z = row_of<T>(tile.z, i);
    const float* row = tile.state + i;
    const Vec log_sum = set(row[0]), a = set(row[m]), b = set(row[2 * m]);
    const int64_t label = tile.labels[i] - tile.first;
    const bool here = tile.labels[i] >= 0 && label >= 0 && label < n;
    Vec t = zero();
    float of_label = row[3 * m] * tile.scale;
    if (here && CAPPED) {
      squashed<CAPPED>(set(to_float(z[label])), scale, ratio, cap, &t);
      of_label *= lane_0(sub(one, mul(t, t)));
    }
    for (int64_t j = 0; j < n; j += W) {
      const int width = int(smaller(W, n - j));
      const Vec x = squashed<CAPPED>(width == W ? load(z + j) : load(z + j, width), scale, ratio, cap, &t);
      Vec g = mul(scale, sub(mul(a, exp(sub(x, log_sum))), b));
      if (CAPPED) g = mul(g, sub(one, mul(t, t)));
      if (width == W) {
        store(z + j, g);
      } else {
        store(z + j, g, width);
      }
    }
    if (here) from_float(of_label, z + label);
  }
}

template <typename T>
static void run_rows(const CrossEntropyTile& tile, bool gradient, int64_t begin, int64_t end) {
  if (gradient) {
    tile.cap == 0.0f ? gradient_rows<T, false>(tile, begin, end) : gradient_rows<T, true>(tile, begin, end);
  } else {
    tile.cap == 0.0f ? accumulate_rows<T, false>(tile, begin, end) : accumulate_rows<T, true>(tile, begin, end);
  }
}

template <bool GRADIENT>
static void cross_entropy_tile(const CrossEntropyTile& tile, ParallelFor run) {
  const int64_t grain = 1 + (1 << 14) / (tile.z.columns + 1);  // 16,384 exponentials take about 10 microseconds
  parallel(run, tile.rows, grain, [&](int64_t begin, int64_t end) {
    switch (tile.z.dtype) {
      case DType::f32:
        return run_rows<float>(tile, GRADIENT, begin, end);
      case DType::bf16:
        return run_rows<bf16>(tile, GRADIENT, begin, end);
      case DType::f16:
        return run_rows<f16>(tile, GRADIENT, begin, end);
    }
  });
}

constexpr CrossEntropyKernels cross_entropy_kernels = {cross_entropy_tile<false>, cross_entropy_tile<true>};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
