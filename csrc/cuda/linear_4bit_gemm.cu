// y = x W^T and dx = dy W for some dozens of rows of x, on tensor cores.
//
// The weight is the matrix instruction's left operand, so that its 16 rows are full however few rows x has. A lane reads
// the words of W it needs itself and decodes them into the instruction's registers: W goes through no shared memory.
// Which k, or which row of the result, a register stands for is chosen so that these words are whole: see `mma`.
// x (or dy) comes through shared memory, three stages, in 16-byte units placed so that no read meets a bank conflict.
// Blocks that share columns of the result split what is summed over; their parts are added by a second kernel, in order:
// the same bits every time.
#include "mma.cuh"
#include "sum_parts.cuh"

namespace fastpeft {
namespace cuda {
namespace {

constexpr int kThreads = 128, kStages = 3;
constexpr int kTiles = 8;          // tiles of what is summed over for which the scales are loaded at once
constexpr int kColumns = 128;      // columns of the result that are written at a time

// Forward: 128 rows of W by 128 columns a tile. Backward: 64 rows by 256 columns.
constexpr int kForwardRows = 128, kForwardDepth = 128, kBackwardColumns = 256, kBackwardDepth = 64;
constexpr int kForwardScales = kTiles * kForwardDepth / 32;     // of a row, at most: blocks of 32
constexpr int kBackwardScales = kBackwardColumns / 32;
constexpr int kForwardScalePitch = kForwardScales + 1, kBackwardScalePitch = kBackwardScales + 1;

constexpr size_t most(size_t a, size_t b) { return a > b ? a : b; }

// The stages of x and the scales; then, when all is summed, the result on its way out.
template <int BM, bool Backward>
struct Shared {
  static constexpr int depth = Backward ? kBackwardDepth : kForwardDepth;
  static constexpr int units = depth / 8;  // 16 bytes each, in a row of a tile
  static constexpr size_t stage = size_t(BM) * units * 16;
  static constexpr size_t scales =
      sizeof(float) * (Backward ? kTiles * kBackwardDepth * kBackwardScalePitch : kForwardRows * kForwardScalePitch);
  // Of the result's rows. A warp writes rows 2t, columns g in the forward, 8g in the backward: to banks of their own with
  // these pitches, in the backward with a gap after 32 columns.
  static constexpr int pitch = Backward ? 145 : 132;
  static __device__ int place(int column) { return Backward ? column + column / 32 : column; }
  static constexpr size_t rim = sizeof(float) * 17 * (kColumns + BM);
  static constexpr size_t bytes = most(kStages * stage + scales, sizeof(float) * BM * pitch + rim);
};

struct Out {
  const void *left, *right;
  int left_dtype, right_dtype;
  int64_t left_stride, column_stride, rank_stride;
  int r;
};

// `BM` rows of x from column `k0` on, `depth` of them, into a stage. Unit u of row m lies at (m, (u % 4) * 4 + u / 4) in
// the forward, where a lane reads four neighbours, and at (m, u) in the backward; both turned by half for odd m.
template <typename T, int BM, bool Backward>
__device__ inline void load_x(uint4* stage, const T* x, int64_t stride, int m0, int m_rows, int k0, int k_end) {
  constexpr int units = Shared<BM, Backward>::units;
#pragma unroll
  for (int i = 0; i < (BM * units + kThreads - 1) / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x;
    if (BM * units % kThreads != 0 && at >= BM * units) break;
    const int m = at / units, place = at % units ^ (m & 1) * 4;
    const int unit = Backward ? place : place % 4 * 4 + place / 4;
    const int k = k0 + unit * 8;
    const bool there = m0 + m < m_rows && k < k_end;
    copy16(stage + at, there ? x + (m0 + m) * stride + k : x, there);
  }
}

// Writes a BM x 128 part of the result, which lies in `tile`, and adds rim and bias. The warps' stores are whole sectors.
template <typename T, int BM, bool Backward>
__device__ inline void store(
    float* tile,
    T* out,
    int64_t stride,
    float* work,
    int m0,
    int m_rows,
    int column,
    int columns,
    const T* bias,
    const Out& rim
) {
  using S = Shared<BM, Backward>;
  float* b_right = tile + BM * S::pitch;
  float* b_left = b_right + 17 * kColumns;
  const int c = threadIdx.x;
  float v[BM];
#pragma unroll
  for (int m = 0; m < BM; ++m) v[m] = tile[m * S::pitch + S::place(c)];
  for (int i0 = 0; i0 < rim.r; i0 += 16) {
    __syncthreads();
    for (int at = c; at < 16 * kColumns; at += kThreads) {
      // Neighbours in memory to neighbouring lanes, whichever way the adapter lies.
      const int i = rim.rank_stride == 1 ? at % 16 : at / kColumns, j = rim.rank_stride == 1 ? at / 16 : at % kColumns;
      const bool there = i0 + i < rim.r && column + j < columns;
      b_right[j * 17 + i] =
          there ? element(rim.right, (column + j) * rim.column_stride + (i0 + i) * rim.rank_stride, rim.right_dtype) : 0.f;
    }
    for (int at = c; at < 16 * BM; at += kThreads) {
      const int i = at % 16, m = at / 16;
      const bool there = i0 + i < rim.r && m0 + m < m_rows;
      b_left[m * 17 + i] = there ? element(rim.left, (m0 + m) * rim.left_stride + i0 + i, rim.left_dtype) : 0.f;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      const float b = b_right[c * 17 + i];
#pragma unroll
      for (int m = 0; m < BM; ++m) v[m] = fmaf(b, b_left[m * 17 + i], v[m]);
    }
  }
  if (column + c >= columns) return;
  const float b = bias != nullptr ? to_float(bias[column + c]) : 0.f;
#pragma unroll
  for (int m = 0; m < BM; ++m) {
    if (m0 + m >= m_rows) break;
    if (work != nullptr) {
      work[static_cast<int64_t>(m0 + m) * columns + column + c] = v[m] + b;
    } else {
      out[(m0 + m) * stride + column + c] = from_float<T>(v[m] + b);
    }
  }
}

#define FASTPEFT_GEMM_PARAMETERS(T)                                                                                  \
  FASTPEFT_WEIGHT_PARAMETERS, const T *__restrict__ x, int64_t stride_x, T *__restrict__ out, int64_t stride_out,     \
      float *__restrict__ work, int m_rows, int n_rows, int columns, int per_part, const T *__restrict__ bias,        \
      const void *__restrict__ left, const void *__restrict__ right, int left_dtype, int right_dtype,                 \
      int64_t left_stride, int64_t column_stride, int64_t rank_stride, int r

// y: a block has 128 of its columns, a warp 32: two tiles of 16 rows of W. In a tile of k a lane reads 32 codes of each of
// its four rows, 16 bytes of one quantised block, and takes four of them for each of eight instructions.
template <typename T, int BM>
__global__ void __launch_bounds__(kThreads, 2) linear_4bit_gemm_kernel(FASTPEFT_GEMM_PARAMETERS(T)) {
  using S = Shared<BM, false>;
  __shared__ __align__(16) unsigned char memory[S::bytes];
  __shared__ float table[16], nested_table[256];
  uint4* stages = reinterpret_cast<uint4*>(memory);
  float* scales = reinterpret_cast<float*>(memory + kStages * S::stage);
  load_tables(table, nested_table, code, nested_code, small != nullptr);
  const float o = small != nullptr ? *offset : 0.f;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int n0 = blockIdx.x * kForwardRows, m0 = blockIdx.y * BM;
  const int k_first = blockIdx.z * per_part, k_end = min(columns, k_first + per_part);
  const int steps = (k_end - k_first + kForwardDepth - 1) / kForwardDepth;

  int64_t start[4];  // of the lane's rows; those beyond the last read the last again
#pragma unroll
  for (int i = 0; i < 4; ++i) start[i] = static_cast<int64_t>(min(n0 + warp * 32 + i * 8 + g, n_rows - 1)) * columns;

  auto load_w = [&](int step, uint4 (&words)[4]) {
    const int k = k_first + step * kForwardDepth + t * 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = step < steps && k < k_end ? load_packed(reinterpret_cast<const uint4*>(packed + (start[i] + k) / 2))
                                           : make_uint4(0, 0, 0, 0);
    }
  };
  auto load_stage = [&](int step) {
    if (step < steps) {
      const int k0 = k_first + step * kForwardDepth;
      load_x<T, BM, false>(stages + step % kStages * (S::stage / 16), x, stride_x, m0, m_rows, k0, k_end);
    }
    end_copies();
  };

  float acc[2][BM / 8][4] = {};
  uint4 words[4], next[4];
  load_w(0, words);
  for (int step = 0; step < kStages - 1; ++step) load_stage(step);
  for (int step = 0; step < steps; ++step) {
    const int k_scales = k_first + step / kTiles * kTiles * kForwardDepth;
    if (step % kTiles == 0) {
      __syncthreads();
      const int width = min(kTiles * kForwardDepth, k_end - k_scales);
      const int most_blocks = min(kForwardScales, blocks_of(width, columns, block_shift));
      for (int at = threadIdx.x; at < kForwardRows * most_blocks; at += kThreads) {
        const int n = at / most_blocks, i = at % most_blocks;
        const int64_t first = static_cast<int64_t>(min(n0 + n, n_rows - 1)) * columns + k_scales;
        const int64_t block = (first >> block_shift) + i;
        scales[n * kForwardScalePitch + i] =
            block << block_shift < first + width
                ? scale_of(block, small, absmax, nested_table, nested_absmax, o, nested_shift)
                : 0.f;
      }
    }
    wait_copies<kStages - 2>();
    __syncthreads();
    load_stage(step + kStages - 1);
    load_w(step + 1, next);
    const int k = k_first + step * kForwardDepth + t * 32;
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t block = ((start[i] + k) >> block_shift) - ((start[i] + k_scales) >> block_shift);
      scale[i] = k < k_end ? scales[(warp * 32 + i * 8 + g) * kForwardScalePitch + static_cast<int>(block)] : 0.f;
    }
    const uint4* stage = stages + step % kStages * (S::stage / 16);
#pragma unroll
    for (int q = 0; q < 4; ++q) {  // a word, eight codes of each row: two instructions
      uint4 b[BM / 8];
#pragma unroll
      for (int j = 0; j < BM / 8; ++j) b[j] = stage[(j * 8 + g) * S::units + ((q * 4 + t) ^ (g & 1) * 4)];
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        const uint32_t w0 = (&words[2 * a].x)[q], w1 = (&words[2 * a + 1].x)[q];
        const float s0 = scale[2 * a], s1 = scale[2 * a + 1];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int e = 4 * h;
          auto two = [&](uint32_t w, float s, int i) {
            return pair<T>(__fmul_rn(value(table, w, i), s), __fmul_rn(value(table, w, i + 1), s));
          };
          const uint32_t left_operand[4] = {two(w0, s0, e), two(w1, s1, e), two(w0, s0, e + 2), two(w1, s1, e + 2)};
#pragma unroll
          for (int j = 0; j < BM / 8; ++j) {
            mma<T>(acc[a][j], left_operand, h == 0 ? b[j].x : b[j].z, h == 0 ? b[j].y : b[j].w);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = next[i];
  }
  wait_copies<0>();
  __syncthreads();
  float* tile = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int a = 0; a < 2; ++a) {
#pragma unroll
    for (int j = 0; j < BM / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        tile[(j * 8 + 2 * t + i % 2) * S::pitch + warp * 32 + a * 16 + i / 2 * 8 + g] = acc[a][j][i];
      }
    }
  }
  __syncthreads();
  const Out rim = {left, right, left_dtype, right_dtype, left_stride, column_stride, rank_stride, blockIdx.z == 0 ? r : 0};
  float* part = work != nullptr ? work + static_cast<int64_t>(blockIdx.z) * m_rows * n_rows : nullptr;
  store<T, BM, false>(tile, out, stride_out, part, m0, m_rows, n0, n_rows, blockIdx.z == 0 ? bias : nullptr, rim);
}

// dx: a block has 256 of its columns, a warp 64: four tiles of 16 columns of W. Of every row of W a lane reads a word, the
// codes of eight neighbouring columns; two of these are "rows" g and g + 8 of a tile. Its eight rows among 32 are
// neighbours, four for each of two instructions.
template <typename T, int BM>
__global__ void __launch_bounds__(kThreads, 2) linear_4bit_backward_gemm_kernel(FASTPEFT_GEMM_PARAMETERS(T)) {
  using S = Shared<BM, true>;
  __shared__ __align__(16) unsigned char memory[S::bytes];
  __shared__ float table[16], nested_table[256];
  uint4* stages = reinterpret_cast<uint4*>(memory);
  float* scales = reinterpret_cast<float*>(memory + kStages * S::stage);
  load_tables(table, nested_table, code, nested_code, small != nullptr);
  const float o = small != nullptr ? *offset : 0.f;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int k0 = blockIdx.x * kBackwardColumns, m0 = blockIdx.y * BM;
  const int k = k0 + warp * 64 + g * 8;
  const int width = min(kBackwardColumns, columns - k0);
  const int n_first = blockIdx.z * per_part, n_end = min(n_rows, n_first + per_part);
  const int steps = (n_end - n_first + kBackwardDepth - 1) / kBackwardDepth;

  auto load_w = [&](int step, uint32_t (&words)[2][8]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int n = n_first + step * kBackwardDepth + i * 32 + t * 8 + e;
        words[i][e] = n < n_end && k < columns
                          ? load_packed(reinterpret_cast<const uint32_t*>(
                                packed + (static_cast<int64_t>(n) * columns + k) / 2
                            ))
                          : 0;
      }
    }
  };
  auto load_stage = [&](int step) {
    if (step < steps) {
      const int n = n_first + step * kBackwardDepth;
      load_x<T, BM, true>(stages + step % kStages * (S::stage / 16), x, stride_x, m0, m_rows, n, n_end);
    }
    end_copies();
  };

  float acc[4][BM / 8][4] = {};
  uint32_t words[2][8], next[2][8];
  load_w(0, words);
  for (int step = 0; step < kStages - 1; ++step) load_stage(step);
  for (int step = 0; step < steps; ++step) {
    const int n_scales = n_first + step / kTiles * kTiles * kBackwardDepth;
    if (step % kTiles == 0) {
      __syncthreads();
      const int most_blocks = min(kBackwardScales, blocks_of(width, columns, block_shift));
      for (int at = threadIdx.x; at < kTiles * kBackwardDepth * most_blocks; at += kThreads) {
        const int n = at / most_blocks, i = at % most_blocks;
        const int64_t first = static_cast<int64_t>(n_scales + n) * columns + k0;
        const int64_t block = (first >> block_shift) + i;
        scales[n * kBackwardScalePitch + i] =
            n_scales + n < n_end && block << block_shift < first + width
                ? scale_of(block, small, absmax, nested_table, nested_absmax, o, nested_shift)
                : 0.f;
      }
    }
    wait_copies<kStages - 2>();
    __syncthreads();
    load_stage(step + kStages - 1);
    load_w(step + 1, next);
    const uint4* stage = stages + step % kStages * (S::stage / 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint4 b[BM / 8];
#pragma unroll
      for (int j = 0; j < BM / 8; ++j) b[j] = stage[(j * 8 + g) * S::units + ((i * 4 + t) ^ (g & 1) * 4)];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float scale[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = n_first + step * kBackwardDepth + i * 32 + t * 8 + h * 4 + e;
          const int64_t first = static_cast<int64_t>(n) * columns;
          const int64_t block = ((first + k) >> block_shift) - ((first + k0) >> block_shift);
          scale[e] = k < columns ? scales[(n - n_scales) * kBackwardScalePitch + static_cast<int>(block)] : 0.f;
        }
#pragma unroll
        for (int a = 0; a < 4; ++a) {
          auto two = [&](int e, int c) {
            return pair<T>(
                __fmul_rn(value(table, words[i][h * 4 + e], c), scale[e]),
                __fmul_rn(value(table, words[i][h * 4 + e + 1], c), scale[e + 1])
            );
          };
          const uint32_t left_operand[4] = {two(0, 2 * a), two(0, 2 * a + 1), two(2, 2 * a), two(2, 2 * a + 1)};
#pragma unroll
          for (int j = 0; j < BM / 8; ++j) {
            mma<T>(acc[a][j], left_operand, h == 0 ? b[j].x : b[j].z, h == 0 ? b[j].y : b[j].w);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) words[i / 8][i % 8] = next[i / 8][i % 8];
  }
  wait_copies<0>();
  float* tile = reinterpret_cast<float*>(memory);
  const Out rim = {left, right, left_dtype, right_dtype, left_stride, column_stride, rank_stride, blockIdx.z == 0 ? r : 0};
  float* part = work != nullptr ? work + static_cast<int64_t>(blockIdx.z) * m_rows * columns : nullptr;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    __syncthreads();
    if (warp / 2 == half) {
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int j = 0; j < BM / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            tile[(j * 8 + 2 * t + i % 2) * S::pitch + S::place(warp % 2 * 64 + g * 8 + 2 * a + i / 2)] = acc[a][j][i];
          }
        }
      }
    }
    __syncthreads();
    store<T, BM, true>(
        tile, out, stride_out, part, m0, m_rows, k0 + half * kColumns, columns, static_cast<const T*>(nullptr), rim
    );
  }
}

int tile_rows(int64_t m) { return m <= 8 ? 8 : m <= 16 ? 16 : 32; }

int64_t per_part(int64_t length, int depth, int parts) {
  const int64_t run = int64_t(kTiles) * depth;  // a part ends where scales are loaded anew
  const int64_t runs = (length + run - 1) / run;
  return (runs + parts - 1) / parts * run;
}

template <typename T, int BM, bool Backward>
cudaError_t start(
    const Matrix& x,
    const Weight4bit& w,
    const void* bias,
    const Rim& rim,
    const Matrix& out,
    float* work,
    int parts,
    cudaStream_t stream
) {
  const int64_t across = Backward ? w.columns : w.rows, along = Backward ? w.rows : w.columns;
  const int tile = Backward ? kBackwardColumns : kForwardRows;
  const int64_t each = per_part(along, Backward ? kBackwardDepth : kForwardDepth, parts);
  const dim3 grid(
      static_cast<unsigned>((across + tile - 1) / tile), static_cast<unsigned>((x.rows + BM - 1) / BM),
      static_cast<unsigned>(parts)
  );
  const auto kernel = Backward ? linear_4bit_backward_gemm_kernel<T, BM> : linear_4bit_gemm_kernel<T, BM>;
  kernel<<<grid, kThreads, 0, stream>>>(
      FASTPEFT_WEIGHT_ARGUMENTS(w), static_cast<const T*>(x.data), x.stride, static_cast<T*>(out.data), out.stride,
      parts > 1 ? work : nullptr, static_cast<int>(x.rows), static_cast<int>(w.rows), static_cast<int>(w.columns),
      static_cast<int>(each), static_cast<const T*>(bias), rim.left, rim.right, static_cast<int>(rim.left_dtype),
      static_cast<int>(rim.right_dtype), rim.left_stride, rim.column_stride, rim.rank_stride, rim.r
  );
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess || parts == 1 ? error : sum_parts<T>(work, parts, out, stream);
}

template <typename T, bool Backward>
cudaError_t choose(
    const Matrix& x,
    const Weight4bit& w,
    const void* bias,
    const Rim& rim,
    const Matrix& out,
    float* work,
    int parts,
    cudaStream_t stream
) {
  if (out.rows == 0 || out.columns == 0) return cudaSuccess;
  switch (tile_rows(x.rows)) {
    case 8:
      return start<T, 8, Backward>(x, w, bias, rim, out, work, parts, stream);
    case 16:
      return start<T, 16, Backward>(x, w, bias, rim, out, work, parts, stream);
    default:
      return start<T, 32, Backward>(x, w, bias, rim, out, work, parts, stream);
  }
}

}  // namespace

int linear_4bit_parts(const Weight4bit& w, int64_t m, bool backward, int multiprocessors) {
  const int64_t across = backward ? w.columns : w.rows, along = backward ? w.rows : w.columns;
  const int64_t tile = backward ? kBackwardColumns : kForwardRows;
  const int64_t run = int64_t(kTiles) * (backward ? kBackwardDepth : kForwardDepth);
  const int64_t blocks = (across + tile - 1) / tile * ((m + tile_rows(m) - 1) / tile_rows(m));
  const int64_t runs = (along + run - 1) / run;
  int64_t parts = blocks > 0 ? multiprocessors / blocks : 1;  // one block a multiprocessor
  parts = parts < 1 ? 1 : parts > runs ? runs : parts;
  if (parts < 1) return 1;
  const int64_t each = (runs + parts - 1) / parts;
  return static_cast<int>((runs + each - 1) / each);
}

cudaError_t linear_4bit_gemm(
    const Matrix& x,
    const Weight4bit& w,
    const void* bias,
    const Rim& rim,
    const Matrix& y,
    float* work,
    int parts,
    cudaStream_t stream
) {
  return x.dtype == DType::bf16 ? choose<__nv_bfloat16, false>(x, w, bias, rim, y, work, parts, stream)
                                : choose<__half, false>(x, w, bias, rim, y, work, parts, stream);
}

cudaError_t linear_4bit_backward_gemm(
    const Matrix& dy,
    const Weight4bit& w,
    const Rim& rim,
    const Matrix& dx,
    float* work,
    int parts,
    cudaStream_t stream
) {
  return dy.dtype == DType::bf16 ? choose<__nv_bfloat16, true>(dy, w, nullptr, rim, dx, work, parts, stream)
                                 : choose<__half, true>(dy, w, nullptr, rim, dx, work, parts, stream);
}

}  // namespace cuda
}  // namespace fastpeft
