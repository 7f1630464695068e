// Weights of 4 bits in bitsandbytes' storage (fastpeft/ops/nf4.py has the formulas).
//
// A product with few rows is bound by decoding, so W is never stored: 8 W elements are read as W words of 32 bits, and
// the nibble s of each word is one table look-up of W elements that lie 8 apart. x is laid out to match, once a call. A
// block's scale is applied to the sum of such words, not to each element: 3 instructions for W elements on AVX-512.
#pragma once

#include "tile.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

// The 16 values of a code times a scale, and the look-up: of W elements in W / 2 bytes, and of nibble s of W words.
#if defined(FASTPEFT_AVX512)

using Words = __m512i;
struct Table {
  __m512 values;
};

FASTPEFT_INLINE Table table(const float* code, float scale) { return {_mm512_mul_ps(_mm512_loadu_ps(code), set(scale))}; }

FASTPEFT_INLINE Vec lookup(const Table& t, Words index) { return _mm512_permutexvar_ps(index, t.values); }

FASTPEFT_INLINE Vec lookup(const Table& t, const uint8_t* bytes) {
  const __m512i all = _mm512_broadcast_i32x4(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  const __m512i pick = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);  // its upper bytes: byte 0
  const __m512i shift = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
  return lookup(t, _mm512_srlv_epi32(_mm512_shuffle_epi8(all, pick), shift));  // bits above the fourth do not count
}

FASTPEFT_INLINE Words words(const uint8_t* p) { return _mm512_loadu_si512(p); }
FASTPEFT_INLINE Words words(const uint8_t* p, int n) { return _mm512_maskz_loadu_epi32(first(n), p); }
template <int S>
FASTPEFT_INLINE Words nibble(Words v) {
  return _mm512_srli_epi32(v, 4 * S);
}

// Lane i: from[(skip + i) >> shift], where that is below W.
FASTPEFT_INLINE Vec spread(const float* from, int skip, int shift) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i index = _mm512_srl_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(skip)), _mm_cvtsi32_si128(shift));
  return _mm512_permutexvar_ps(index, load(from));
}

// The first n lanes; zero behind them.
FASTPEFT_INLINE Vec lanes(Vec v, int n) { return _mm512_maskz_mov_ps(first(n), v); }

// The sums of four vectors' lanes.
FASTPEFT_INLINE void four_totals(const Vec* v, float* to) {
  const Vec ab = add(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const Vec cd = add(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const Vec all = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// The compiler must not make one fused operation of what this is a step of.
FASTPEFT_INLINE Vec rounded(Vec v) {
  asm("" : "+v"(v));
  return v;
}

#elif defined(FASTPEFT_AVX2)

using Words = __m256i;
struct Table {
  __m256 low, high;
};

FASTPEFT_INLINE Table table(const float* code, float scale) {
  return {_mm256_mul_ps(_mm256_loadu_ps(code), set(scale)), _mm256_mul_ps(_mm256_loadu_ps(code + 8), set(scale))};
}

FASTPEFT_INLINE Vec lookup(const Table& t, Words index) {  // the permutation reads three bits, the blend the fourth
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), upper);
}

FASTPEFT_INLINE Vec lookup(const Table& t, const uint8_t* bytes) {
  int32_t word;
  memcpy(&word, bytes, 4);
  return lookup(t, _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24)));
}

FASTPEFT_INLINE Words words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FASTPEFT_INLINE Words words(const uint8_t* p, int n) {
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), first(n));
}
template <int S>
FASTPEFT_INLINE Words nibble(Words v) {
  return _mm256_srli_epi32(v, 4 * S);
}

FASTPEFT_INLINE Vec spread(const float* from, int skip, int shift) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i index = _mm256_srl_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(skip)), _mm_cvtsi32_si128(shift));
  return _mm256_permutevar8x32_ps(load(from), index);
}

FASTPEFT_INLINE Vec lanes(Vec v, int n) { return _mm256_and_ps(v, _mm256_castsi256_ps(first(n))); }

FASTPEFT_INLINE void four_totals(const Vec* v, float* to) {
  const Vec all = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

FASTPEFT_INLINE Vec rounded(Vec v) {
  asm("" : "+x"(v));
  return v;
}

#else

struct Words {
  uint32_t at[W];
};
struct Table {
  float values[16];
};

FASTPEFT_INLINE Table table(const float* code, float scale) {
  Table t;
  for (int i = 0; i < 16; ++i) t.values[i] = code[i] * scale;
  return t;
}

FASTPEFT_INLINE Vec lookup(const Table& t, const Words& index) {
  Vec v;
  for (int i = 0; i < W; ++i) v[i] = t.values[index.at[i] & 15];
  return v;
}

FASTPEFT_INLINE Vec lookup(const Table& t, const uint8_t* bytes) {
  Vec v;
  for (int i = 0; i < W; ++i) v[i] = t.values[bytes[i / 2] >> (i % 2 ? 0 : 4) & 15];
  return v;
}

FASTPEFT_INLINE Words words(const uint8_t* p, int n) {  // a word's first byte is its lowest, whatever the machine
  Words v = {};
  for (int i = 0; i < n; ++i, p += 4) {
    v.at[i] = uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
  }
  return v;
}
FASTPEFT_INLINE Words words(const uint8_t* p) { return words(p, W); }
template <int S>
FASTPEFT_INLINE Words nibble(Words v) {
  for (int i = 0; i < W; ++i) v.at[i] >>= 4 * S;
  return v;
}

FASTPEFT_INLINE Vec spread(const float* from, int skip, int shift) {
  Vec v;
  for (int i = 0; i < W; ++i) v[i] = from[(skip + i) >> shift];
  return v;
}

FASTPEFT_INLINE Vec lanes(Vec v, int n) {
  for (int i = n; i < W; ++i) v[i] = 0;
  return v;
}

FASTPEFT_INLINE void four_totals(const Vec* v, float* to) {
  for (int i = 0; i < 4; ++i) to[i] = total(v[i]);
}

FASTPEFT_INLINE Vec rounded(Vec v) {
  float part[W];
  memcpy(part, &v, sizeof(part));
  asm volatile("" : : "r"(part) : "memory");
  memcpy(&v, part, sizeof(part));
  return v;
}

#endif

// to[i] = from[q[i]]. Not gathered: sixteen at once take a Zen 4 longer than one by one.
__attribute__((optimize("no-tree-vectorize"))) static void look_up(const float* from, const uint8_t* q, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[q[i]];
}

// The scales of blocks begin … end; `to` is written by whole vectors.
static void decode_scales(const Packed& w, int64_t begin, int64_t end, float* to) {
  if (w.nested_code == nullptr) {
    memcpy(to, static_cast<const float*>(w.absmax) + begin, size_t(end - begin) * sizeof(float));
    return;
  }
  const uint8_t* q = static_cast<const uint8_t*>(w.absmax) + begin;
  look_up(w.nested_code, q, end - begin, to);
  const Vec offset = set(w.offset);
  for (int64_t b = begin; b < end;) {
    const int64_t outer = b / w.nested_blocksize, last = smaller((outer + 1) * w.nested_blocksize, end);
    const Vec scale = set(w.nested_absmax[outer]);
    for (; b + W <= last; b += W, to += W) store(to, add(rounded(mul(load(to), scale)), offset));
    if (b < last) {
      const int n = int(last - b);
      store(to, add(rounded(mul(load(to, n), scale)), offset), n);
      to += n;
    }
    b = last;
  }
}

FASTPEFT_INLINE float element(const Packed& w, int64_t at, float scale) {
  const uint8_t byte = w.data[at >> 1];
  return w.code[at & 1 ? byte & 15 : byte >> 4] * scale;
}

// Room for the scales of `columns` elements in a row, written and read by whole vectors.
FASTPEFT_INLINE int64_t blocks_across(const Packed& w, int64_t columns) { return round_up((columns >> w.shift) + 2, W) + W; }

// Elements first … first + count, each rounded once. `scales` has room for blocks_across(count).
template <typename T>
static void decode_span(const Packed& w, int64_t first, int64_t count, float* scales, T* to) {
  const int64_t last = first + count;
  decode_scales(w, first >> w.shift, ((last - 1) >> w.shift) + 1, scales);
  for (int64_t at = first; at < last; ++scales) {
    const int64_t end = smaller(((at >> w.shift) + 1) << w.shift, last);
    if (at & 1) from_float(element(w, at++, *scales), to++);
    const Table t = table(w.code, *scales);
    for (; at + W <= end; at += W, to += W) store(to, lookup(t, w.data + (at >> 1)));
    for (; at < end; ++at) from_float(element(w, at, *scales), to++);
  }
}

static void dequantize(const Packed& w, int64_t row, int64_t column, const Matrix& out, ParallelFor run) {
  if (out.columns == 0) return;
  parallel(run, out.rows, 1 + 16384 / out.columns, [&](int64_t begin, int64_t end) {
    Buffer scales(blocks_across(w, out.columns));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = (row + i) * w.columns + column, at = i * out.stride;
      switch (out.dtype) {
        case DType::f32:
          decode_span(w, first, out.columns, scales.data, static_cast<float*>(out.data) + at);
          break;
        case DType::bf16:
          decode_span(w, first, out.columns, scales.data, static_cast<bf16*>(out.data) + at);
          break;
        case DType::f16:
          decode_span(w, first, out.columns, scales.data, static_cast<f16*>(out.data) + at);
          break;
      }
    }
  });
}

// part[r, m] = or += nibble S of the words v[r] times x_m. One nibble of all rows after the other: what lies side by side
// does not wait for each other, which a processor's scheduler, about two rows long, would not find by itself.
template <int S, int R, int MR>
FASTPEFT_INLINE void step(const Table& t, const Words* v, const float* x, int64_t x_row, Vec* part) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const Vec c = lookup(t, nibble<S>(v[r]));
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const Vec at = load(x + m * x_row + S * W);
      part[r * MR + m] = S == 0 ? mul(c, at) : fma(c, at, part[r * MR + m]);
    }
  }
}

// sums[r, m] += x_m . row r of W, lane by lane, for R rows that begin `skip` eights of elements after the block that
// they begin in does. x: for each chunk of 8 W elements and each row of it, 8 vectors, one a nibble. scales: of the
// first row; the next row's are `blocks` further.
template <int R, int MR>
FASTPEFT_INLINE void dot(
    const Packed& w,
    const uint8_t* bytes,
    const float* x,
    int64_t x_row,
    const float* scales,
    int64_t blocks,
    int64_t skip,
    Vec* sums
) {
  const Table t = table(w.code, 1.0f);
  const int eights = int(w.shift) - 3;  // log2 of a block's
  const int64_t row = w.columns / 2;
  // The same place some rows on, 4 KiB or more: 128 MiB that are not in the cache take 0.57 of the time with it.
  const int64_t ahead = R * row * (1 + 4096 / (R * row + 1));
  for (int64_t left = w.columns / 8; left > 0; left -= W, bytes += 4 * W, x += 8 * W, skip += W) {
    const bool whole = left >= W;
    Words v[R];
    Vec part[R * MR];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* p = bytes + r * row;
      v[r] = whole ? words(p) : words(p, int(left));
      __builtin_prefetch(p + ahead, 0, 2);
    }
    step<0, R, MR>(t, v, x, x_row, part), step<1, R, MR>(t, v, x, x_row, part), step<2, R, MR>(t, v, x, x_row, part);
    step<3, R, MR>(t, v, x, x_row, part), step<4, R, MR>(t, v, x, x_row, part), step<5, R, MR>(t, v, x, x_row, part);
    step<6, R, MR>(t, v, x, x_row, part), step<7, R, MR>(t, v, x, x_row, part);
    const int64_t block = skip >> eights;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec scale = spread(scales + r * blocks + block, int(skip - (block << eights)), eights);
      // Behind the row's end x is zero, and what lies there of the scales may not be a number.
      if (!whole) scale = lanes(scale, int(left));
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) sums[r * MR + m] = fma(part[r * MR + m], scale, sums[r * MR + m]);
    }
  }
}

// x laid out for `dot`, in fp32, zero behind its end; row m at m * x_row, chunks of 8 W elements in their order.
static void lay_out(const Matrix& x, int64_t x_row, float* to, float* scratch) {
  for (int64_t m = 0; m < x.rows; ++m, to += x_row) {
    const View v = stage(x, m, 1, 0, x.columns, nullptr, true, scratch, x.columns);
    memset(to, 0, size_t(x_row) * sizeof(float));
    for (int64_t k = 0; k < x.columns; k += 8) {
      float* p = to + k / (8 * W) * 8 * W + k / 8 % W;
      for (int s = 0; s < 8; ++s) p[s * W] = v.data[k + (s ^ 1)];  // the low nibble is the second of its two
    }
  }
}

// out[m, r] = x_m . W[n + r] + s_m . b[r]; R is 1, 2 or 4. scales: from the block on that row n begins in.
template <int R, int MR>
static void forward_rows(
    const Packed& w, int64_t n, const float* x, int64_t x_row, const float* scales, const View& s, const float* b,
    int64_t wide, float* out, int64_t out_row
) {
  const int64_t skip = (n * w.columns & ((int64_t(1) << w.shift) - 1)) / 8;
  Vec sums[R * MR];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      Vec sum = zero();
      for (int64_t j = 0; j < wide; j += W) sum = fma(load(s.data + m * s.stride + j), load(b + r * wide + j), sum);
      sums[r * MR + m] = sum;
    }
  }
  dot<R, MR>(w, w.data + n * w.columns / 2, x, x_row, scales, w.columns >> w.shift, skip, sums);
  if constexpr (R * MR % 4 == 0) {
    float each[R * MR];
#pragma GCC unroll 4
    for (int i = 0; i < R * MR; i += 4) four_totals(sums + i, each + i);
#pragma GCC unroll 8
    for (int i = 0; i < R * MR; ++i) out[i % MR * out_row + i / MR] = each[i];
  } else {
    static_assert(R == 1 && MR == 1);
    out[0] = total(sums[0]);
  }
}

// The same where rows do not begin on a multiple of eight elements: a row is decoded, then multiplied.
static void forward_any(
    const Packed& w, int64_t m, const float* x, int64_t x_row, const float* row, const View& s, const float* b,
    int64_t wide, float* out, int64_t out_row
) {
  for (int64_t i = 0; i < m; ++i) {
    Vec sum = zero();
    for (int64_t j = 0; j < wide; j += W) sum = fma(load(s.data + i * s.stride + j), load(b + j), sum);
    for (int64_t k = 0; k < x_row; k += W) sum = fma(load(x + i * x_row + k), load(row + k), sum);
    out[i * out_row] = total(sum);
  }
}

// y = x W^T + bias + s b^T. bias.data and s.data may be null. A task is a block of rows of W.
static void forward(
    const Matrix& x, const Packed& w, const Matrix& bias, const Matrix& s, const Matrix& b, const Matrix& y,
    ParallelFor run
) {
  constexpr int64_t ROWS = 32;
  const int64_t m = x.rows, k = w.columns, wide = s.data == nullptr ? 0 : round_up(s.columns, W);
  const bool octets = k % 8 == 0;
  const int64_t x_row = round_up(k, octets ? 8 * W : W);
  if (m == 0 || w.rows == 0) return;
  Buffer laid_out(m * x_row + k + W), s_wide(m * wide);
  if (octets) {
    lay_out(x, x_row, laid_out.data, laid_out.data + m * x_row);
  } else {
    memset(laid_out.data, 0, size_t(m * x_row) * sizeof(float));
    stage(x, 0, m, 0, k, nullptr, false, laid_out.data, x_row);
  }
  if (wide > 0) stage(s, 0, m, 0, s.columns, nullptr, false, s_wide.data, wide);
  const bool aligned = (k & ((int64_t(1) << w.shift) - 1)) == 0;  // every row begins with a block
  const int64_t blocks = blocks_across(w, ROWS * k);
  const int64_t grain = smaller(1 + 65536 / (1 + k * round_up(m, 4)), 8);
  parallel(run, (w.rows + ROWS - 1) / ROWS, grain, [&](int64_t begin, int64_t end) {
    Buffer scratch(blocks + x_row + W + ROWS * (wide + m));
    float *scales = scratch.data, *row = scales + blocks, *b_rows = row + x_row + W;
    float* sums = b_rows + ROWS * wide;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * ROWS, rows = smaller(ROWS, w.rows - first);
      if (wide > 0) stage(b, first, rows, 0, b.columns, nullptr, false, b_rows, wide);
      const int64_t first_block = first * k >> w.shift;
      if (octets && k > 0) decode_scales(w, first_block, (((first + rows) * k - 1) >> w.shift) + 1, scales);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = first + i;
        const float* bn = b_rows + i * wide;
        if (octets && aligned && i + 4 <= rows) {
          const float* own = scales + i * (k >> w.shift);
          int64_t j = 0;
          for (; j + 4 <= m; j += 4) {
            // What is looked up is used four times, what is loaded of x twice, and x may be too long for the first cache:
            // a weight (2048, 4096) takes 0.84 ms so, 1.32 a row of it at a time (one thread of a Zen 4).
            for (int r = 0; r < 4; r += 2) {
              forward_rows<2, 4>(
                  w, n + r, laid_out.data + j * x_row, x_row, own + r * (k >> w.shift), {s_wide.data + j * wide, wide},
                  bn + r * wide, wide, sums + j * ROWS + i + r, ROWS
              );
            }
          }
          for (; j < m; ++j) {
            forward_rows<4, 1>(
                w, n, laid_out.data + j * x_row, x_row, own, {s_wide.data + j * wide, wide}, bn, wide,
                sums + j * ROWS + i, ROWS
            );
          }
          i += 3;
          continue;
        }
        if (!octets) {
          decode_span(w, n * k, k, scales, row);
          for (int64_t j = k; j < x_row; ++j) row[j] = 0;
          forward_any(w, m, laid_out.data, x_row, row, {s_wide.data, wide}, bn, wide, sums + i, ROWS);
          continue;
        }
        const float* own = scales + ((n * k >> w.shift) - first_block);
        int64_t j = 0;
        for (; j + 4 <= m; j += 4) {
          forward_rows<1, 4>(
              w, n, laid_out.data + j * x_row, x_row, own, {s_wide.data + j * wide, wide}, bn, wide, sums + j * ROWS + i,
              ROWS
          );
        }
        for (; j < m; ++j) {
          forward_rows<1, 1>(
              w, n, laid_out.data + j * x_row, x_row, own, {s_wide.data + j * wide, wide}, bn, wide, sums + j * ROWS + i,
              ROWS
          );
        }
      }
      if (bias.data != nullptr) {
        for (int64_t i = 0; i < rows; ++i) {
          const float added = element(bias, 0, first + i);
          for (int64_t j = 0; j < m; ++j) sums[j * ROWS + i] += added;
        }
      }
      unstage<false>(y, 0, m, first, rows, sums, ROWS, 1.0f);
    }
  });
}

// dx = dy W + ds a. ds.data may be null. A task is a block of columns of W, decoded a few rows at a time.
static void backward(
    const Matrix& dy, const Packed& w, const Matrix& ds, const Matrix& a, const Matrix& dx, ParallelFor run
) {
  constexpr int64_t ROWS = 64, COLUMNS = 2 * PANEL;
  const int64_t m = dy.rows, k = w.columns, n = w.rows;
  if (m == 0) return;
  Buffer dy_rows(m * n + W);  // rows are stored by whole vectors
  const View d = stage(dy, 0, m, 0, n, nullptr, true, dy_rows.data, n);
  parallel(run, (k + COLUMNS - 1) / COLUMNS, 1, [&](int64_t begin, int64_t end) {
    const int64_t r = ds.data == nullptr ? 0 : ds.columns, depth = r > ROWS ? r : ROWS;
    Buffer scratch(depth * COLUMNS + m * COLUMNS + m * r + blocks_across(w, COLUMNS) + W);
    float *panel = scratch.data, *sums = panel + depth * COLUMNS, *d_rim = sums + m * COLUMNS, *scales = d_rim + m * r;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task * COLUMNS, columns = smaller(COLUMNS, k - column), whole = round_up(columns, W);
      memset(sums, 0, size_t(m * COLUMNS) * sizeof(float));
      if (columns < whole) memset(panel, 0, size_t(depth * COLUMNS) * sizeof(float));
      if (r > 0) {
        const View v = stage(ds, 0, m, 0, r, nullptr, true, d_rim, r);
        stage(a, 0, r, column, columns, nullptr, false, panel, COLUMNS);
        product(m, whole, r, v.data, v.stride, 1, panel, COLUMNS, sums, COLUMNS, true);
      }
      for (int64_t row = 0; row < n; row += ROWS) {
        const int64_t rows = smaller(ROWS, n - row);
        for (int64_t i = 0; i < rows; ++i) {
          decode_span(w, (row + i) * k + column, columns, scales, panel + i * COLUMNS);
        }
        product(m, whole, rows, d.data + row, d.stride, 1, panel, COLUMNS, sums, COLUMNS, true);
      }
      unstage<false>(dx, 0, m, column, columns, sums, COLUMNS, 1.0f);
    }
  });
}

// The code nearest to each element over its block's largest; blocks run on from row to row. weight has whole rows.
static void quantize(
    const Matrix& weight, const float* code, int64_t blocksize, uint8_t* packed, float* absmax, ParallelFor run
) {
  int order[16];  // by value; a code that equals another stays behind it
  for (int i = 0; i < 16; ++i) {
    int j = i;
    for (; j > 0 && code[order[j - 1]] > code[i]; --j) order[j] = order[j - 1];
    order[j] = i;
  }
  float middles[15];
  for (int i = 0; i < 15; ++i) middles[i] = (code[order[i]] + code[order[i + 1]]) / 2;
  const int64_t n = weight.rows * weight.columns;
  parallel(run, (n + blocksize - 1) / blocksize, 1 + 16384 / blocksize, [&](int64_t begin, int64_t end) {
    Buffer values(blocksize + W);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * blocksize, count = smaller(blocksize, n - first);
      // The weight is contiguous: as one row.
      const Matrix flat = {weight.data, 1, n, n, weight.dtype};
      stage(flat, 0, 1, first, count, nullptr, false, values.data, blocksize + W);
      float* v = values.data;
      float largest = 0;
      for (int64_t i = 0; i < count; ++i) largest = __builtin_fabsf(v[i]) > largest ? __builtin_fabsf(v[i]) : largest;
      const float least = 1e-38f, divisor = largest > least ? largest : least, inverse = 1.0f / divisor;
      const bool whole = count == blocksize;
      absmax[block] = whole ? largest : divisor;
      for (int64_t i = 0; i < count; ++i) {
        const float scaled = whole ? v[i] * inverse : v[i] / divisor;
        v[i] = scaled < -1 ? -1 : scaled > 1 ? 1 : scaled;
      }
      if (count % 2 != 0) v[count] = 0;
      for (int64_t i = 0; i < count; i += 2) {
        int high = 0, low = 0;
        for (int j = 0; j < 15; ++j) {
          high += v[i] > middles[j];
          low += v[i + 1] > middles[j];
        }
        packed[(first + i) / 2] = uint8_t(order[high] << 4 | order[low]);
      }
    }
  });
}

constexpr Nf4Kernels nf4_kernels = {dequantize, forward, backward, quantize};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
