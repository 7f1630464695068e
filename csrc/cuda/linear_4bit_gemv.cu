// y = x W^T for up to four rows of x at a time: what decoding a token takes. Bound by reading W, so a warp owns whole
// rows of W, reads them once, in order, and multiplies the table's values before the scale: one more product a lane and
// word instead of eight.
#include <type_traits>

#include "decode.cuh"

namespace fastpeft {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kStep = 1024;           // columns a step: up to 32 blocks, whose scales a warp's lanes hold
constexpr int kWords = kStep / 256;   // words of 8 codes that a lane reads of a row in a step

// How often a lane reads 16 bytes of x for a word, and so in how many pieces it reads the word: lanes are neighbours in
// each, in fp32 128 columns apart. (Eight fp32 of a lane in a row would be two loads with half of each sector.)
template <typename T>
constexpr int kPieces = sizeof(T) / 2;

// The words and the scale that a lane holds of row `n` from column `k0` on.
template <int R>
struct Step {
  uint32_t words[R][kWords];
  float scale[R];
};

template <typename T, int M, int R>
__global__ void __launch_bounds__(32 * kWarps) linear_4bit_gemv_kernel(
    FASTPEFT_WEIGHT_PARAMETERS,
    const T* __restrict__ x,
    int64_t stride_x,
    T* __restrict__ y,
    int64_t stride_y,
    int m_rows,
    int n_rows,
    int columns,
    const T* __restrict__ bias,
    const void* __restrict__ left,
    const void* __restrict__ right,
    int left_dtype,
    int right_dtype,
    int64_t left_stride,
    int64_t column_stride,
    int64_t rank_stride,
    int r
) {
  __shared__ float table[16], nested_table[256], sums[M][kWarps * R];
  load_tables(table, nested_table, code, nested_code, small != nullptr);
  const float o = small != nullptr ? *offset : 0.f;
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int n0 = (blockIdx.x * kWarps + warp) * R;
  const int m0 = blockIdx.y * M;

  int64_t start[R];  // the row's first element in W; rows beyond the last read the last again
#pragma unroll
  for (int i = 0; i < R; ++i) start[i] = static_cast<int64_t>(min(n0 + i, n_rows - 1)) * columns;
  const T* rows[M];
#pragma unroll
  for (int m = 0; m < M; ++m) rows[m] = x + min(m0 + m, m_rows - 1) * stride_x;

  constexpr int P = kPieces<T>, E = 8 / P;
  using Piece = std::conditional_t<P == 1, uint32_t, uint16_t>;
  auto column = [&](int k0, int j, int h) { return k0 + j * 256 + h * 128 + lane * E; };
  auto load = [&](int k0, Step<R>& step) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int64_t first = start[i] + k0;
      const int64_t block = (first >> block_shift) + lane;
      step.scale[i] = 0;
      if (k0 < columns && block << block_shift < first + min(kStep, columns - k0)) {
        step.scale[i] = scale_of(block, small, absmax, nested_table, nested_absmax, o, nested_shift);
      }
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        step.words[i][j] = 0;
#pragma unroll
        for (int h = 0; h < P; ++h) {
          const int k = column(k0, j, h);
          if (k < columns) {
            const Piece* piece = reinterpret_cast<const Piece*>(packed + (start[i] + k) / 2);
            step.words[i][j] |= load_packed(piece) << (h * 16);
          }
        }
      }
    }
  };

  float acc[R][M] = {};
  Step<R> now, next;
  load(0, now);
  for (int k0 = 0; k0 < columns; k0 += kStep) {
    load(k0 + kStep, next);
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
#pragma unroll
      for (int h = 0; h < P; ++h) {
        const int k = column(k0, j, h);
        float v[M][E] = {};
        if (k < columns) {
#pragma unroll
          for (int m = 0; m < M; ++m) load16(rows[m] + k, v[m]);
        }
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const int64_t first = start[i] + k0;
          const int holder = static_cast<int>(((start[i] + k) >> block_shift) - (first >> block_shift)) & 31;
          const float scale = __shfl_sync(~0u, now.scale[i], holder);
          float part[M] = {};
#pragma unroll
          for (int e = 0; e < E; ++e) {
            const float c = value(table, now.words[i][j], h * E + e);
#pragma unroll
            for (int m = 0; m < M; ++m) part[m] = fmaf(c, v[m][e], part[m]);
          }
#pragma unroll
          for (int m = 0; m < M; ++m) acc[i][m] = fmaf(scale, part[m], acc[i][m]);
        }
      }
    }
    now = next;
  }

  for (int j = lane; j < r; j += 32) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const float b = element(right, min(n0 + i, n_rows - 1) * column_stride + j * rank_stride, right_dtype);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        acc[i][m] = fmaf(b, element(left, min(m0 + m, m_rows - 1) * left_stride + j, left_dtype), acc[i][m]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int d = 16; d > 0; d /= 2) acc[i][m] += __shfl_xor_sync(~0u, acc[i][m], d);
      if (lane == 0) sums[m][warp * R + i] = acc[i][m];
    }
  }
  __syncthreads();
  // The block's columns of y together: 16 of them in bf16 are a sector.
  if (threadIdx.x < M * kWarps * R) {
    const int m = m0 + threadIdx.x / (kWarps * R), i = threadIdx.x % (kWarps * R);
    const int n = blockIdx.x * kWarps * R + i;
    if (m < m_rows && n < n_rows) {
      const float b = bias != nullptr ? to_float(bias[n]) : 0.f;
      y[m * stride_y + n] = from_float<T>(sums[m - m0][i] + b);
    }
  }
}

template <typename T, int M, int R>
cudaError_t launch(
    const Matrix& x, const Weight4bit& w, const void* bias, const Rim& rim, const Matrix& y, cudaStream_t stream
) {
  const dim3 grid(
      static_cast<unsigned>((w.rows + kWarps * R - 1) / (kWarps * R)), static_cast<unsigned>((x.rows + M - 1) / M)
  );
  linear_4bit_gemv_kernel<T, M, R><<<grid, 32 * kWarps, 0, stream>>>(
      FASTPEFT_WEIGHT_ARGUMENTS(w), static_cast<const T*>(x.data), x.stride, static_cast<T*>(y.data), y.stride,
      static_cast<int>(x.rows), static_cast<int>(w.rows), static_cast<int>(w.columns), static_cast<const T*>(bias),
      rim.left, rim.right, static_cast<int>(rim.left_dtype), static_cast<int>(rim.right_dtype), rim.left_stride,
      rim.column_stride, rim.rank_stride, rim.r
  );
  return cudaGetLastError();
}

template <typename T>
cudaError_t choose(
    const Matrix& x,
    const Weight4bit& w,
    const void* bias,
    const Rim& rim,
    const Matrix& y,
    int multiprocessors,
    cudaStream_t stream
) {
  // Two rows a warp halve what is read of x, unless that leaves multiprocessors idle (grouped keys and values).
  if (x.rows == 1 && w.rows < 16 * multiprocessors) return launch<T, 1, 1>(x, w, bias, rim, y, stream);
  if (x.rows == 1) return launch<T, 1, 2>(x, w, bias, rim, y, stream);
  if (x.rows == 2) return launch<T, 2, 2>(x, w, bias, rim, y, stream);
  return launch<T, 4, 2>(x, w, bias, rim, y, stream);
}

}  // namespace

cudaError_t linear_4bit_gemv(
    const Matrix& x,
    const Weight4bit& w,
    const void* bias,
    const Rim& rim,
    const Matrix& y,
    int multiprocessors,
    cudaStream_t stream
) {
  if (y.rows == 0 || y.columns == 0) return cudaSuccess;
  return with_dtype(x.dtype, [&](auto of) {
    return choose<typename decltype(of)::type>(x, w, bias, rim, y, multiprocessors, stream);
  });
}

}  // namespace cuda
}  // namespace fastpeft
