// Rotary position embeddings (fastpeft/ops/rope.py has the formula).
#pragma once

#include "tile.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

#if defined(FASTPEFT_AVX512)
FASTPEFT_INLINE Vec neighbours(Vec x) { return _mm512_permute_ps(x, 0xB1); }
#elif defined(FASTPEFT_AVX2)
FASTPEFT_INLINE Vec neighbours(Vec x) { return _mm256_permute_ps(x, 0xB1); }
#else
FASTPEFT_INLINE Vec neighbours(Vec x) { return Vec{x[1], x[0], x[3], x[2], x[5], x[4], x[7], x[6]}; }
#endif

// For one position: to[j] = cos[j] and turn[j] such that y[j] = x[j] to[j] + x[partner of j] turn[j], in fp32, for any
// of the forms.
static void fill_tables(
    const float* cos, const float* sin, int64_t columns, bool interleaved, bool pairs, bool inverse, float* to, float* turn
) {
  const int64_t half = columns / 2;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t low = interleaved ? 2 * i : i, high = interleaved ? 2 * i + 1 : i + half;
    const int64_t at_low = pairs ? i : low, at_high = pairs ? i : high;
    to[low] = cos[at_low];
    to[high] = cos[at_high];
    turn[low] = inverse ? sin[at_high] : -sin[at_low];
    turn[high] = inverse ? -sin[at_low] : sin[at_high];
  }
}

template <typename T>
static void rotate_head(const T* x, T* y, int64_t columns, int64_t width, bool interleaved, const float* to, const float* turn) {
  if (interleaved) {
    const auto step = [&](int64_t j, int n) __attribute__((always_inline)) {
      const Vec v = n == W ? load(x + j) : load(x + j, n);
      const Vec r = fma(v, load(to + j), mul(neighbours(v), load(turn + j)));
      n == W ? store(y + j, r) : store(y + j, r, n);
    };
    int64_t j = 0;
    for (; j + W <= columns; j += W) step(j, W);
    if (j < columns) step(j, int(columns - j));
  } else {
    const int64_t half = columns / 2;
    const auto step = [&](int64_t j, int n) __attribute__((always_inline)) {
      const Vec a = n == W ? load(x + j) : load(x + j, n), b = n == W ? load(x + half + j) : load(x + half + j, n);
      const Vec low = fma(a, load(to + j), mul(b, load(turn + j)));
      const Vec high = fma(b, load(to + half + j), mul(a, load(turn + half + j)));
      n == W ? store(y + j, low) : store(y + j, low, n);
      n == W ? store(y + half + j, high) : store(y + half + j, high, n);
    };
    int64_t j = 0;
    for (; j + W <= half; j += W) step(j, W);
    if (j < half) step(j, int(half - j));
  }
  if (columns < width) memcpy(y + columns, x + columns, (width - columns) * sizeof(T));
}

template <typename T>
static void rotate_heads(
    const Heads& x, const Heads& y, int64_t batch, int64_t token, int64_t columns, bool interleaved, const float* to,
    const float* turn
) {
  const T* from = static_cast<const T*>(x.data) + batch * x.strides[0] + token * x.strides[2];
  T* into = static_cast<T*>(y.data) + batch * y.strides[0] + token * y.strides[2];
  for (int64_t h = 0; h < x.heads; ++h) {
    rotate_head(from + h * x.strides[1], into + h * y.strides[1], columns, x.width, interleaved, to, turn);
  }
}

// A task is some positions of a sequence, with all heads of q and k: a position's tables are made once.
static void rope_rotate(const RopeCall& call, ParallelFor run) {
  const Heads& q = call.q;
  const int64_t positions = q.batch * q.tokens, given = call.cos.width, columns = given * (call.pairs ? 2 : 1);
  const int64_t each = (q.heads + call.k.heads) * q.width;
  parallel(run, positions, 1 + (int64_t(1) << 15) / (each > 0 ? each : 1), [&](int64_t begin, int64_t end) {
    const int64_t room = round_up(columns, 16) + 16;  // whole vectors are read from any column on
    Buffer space(2 * room + 2 * round_up(given, 16));
    float *to = space.data, *turn = to + room, *cos = turn + room, *sin = cos + round_up(given, 16);
    memset(to, 0, 2 * room * sizeof(float));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / q.tokens, token = i % q.tokens;
      const Heads* tables[] = {&call.cos, &call.sin};
      float* staged[] = {cos, sin};
      for (int t = 0; t < 2; ++t) {
        const Heads& table = *tables[t];
        const int64_t row = (table.batch > 1 ? batch * table.strides[0] : 0) + token * table.strides[2];
        char* data = static_cast<char*>(table.data) + row * (table.dtype == DType::f32 ? 4 : 2);
        stage({data, 1, given, given, table.dtype}, 0, 1, 0, given, nullptr, false, staged[t], given);
      }
      fill_tables(cos, sin, columns, call.interleaved, call.pairs, call.inverse, to, turn);
      for (int t = 0; t < (call.k.data == nullptr ? 1 : 2); ++t) {
        const Heads &x = t == 0 ? call.q : call.k, &y = t == 0 ? call.q_out : call.k_out;
        switch (x.dtype) {
          case DType::f32:
            rotate_heads<float>(x, y, batch, token, columns, call.interleaved, to, turn);
            break;
          case DType::bf16:
            rotate_heads<bf16>(x, y, batch, token, columns, call.interleaved, to, turn);
            break;
          case DType::f16:
            rotate_heads<f16>(x, y, batch, token, columns, call.interleaved, to, turn);
            break;
        }
      }
    }
  });
}

constexpr RopeKernels rope_kernels = {rope_rotate};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
