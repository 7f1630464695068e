// dx = dy W without tensor cores: fp32, bf16 before sm_80, and shapes that the tensor cores' kernel does not take.
//
// A block has 256 columns of dx, one word of eight codes of each row of W a lane; its warps share the rows of W among
// them and add up in shared memory. Bound by reading W where dy has few rows; eight rows of dy cost 64 products a word,
// as many as decoding it takes. The scale multiplies dy, not the eight values.
#include "sum_parts.cuh"

namespace fastpeft {
namespace cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kColumns = 256;      // a block's, 8 a lane
constexpr int kAhead = 4;          // rows of W that a lane reads at once
constexpr int kChunk = 256;        // rows of W for which dy and the scales lie in shared memory
constexpr int kScales = kColumns / 32 + 2, kScalePitch = kScales + 1;  // of a row, at most: blocks of 32
constexpr int kPitch = 36;         // a lane's eight sums lie this far apart: no two of the block meet in a bank
constexpr int kRows = 8;           // rows of dy at a time, at most
constexpr int kShortestPart = 256; // rows of W in a part, at least

template <typename T, int M>
__global__ void __launch_bounds__(kThreads, 2) linear_4bit_backward_kernel(
    FASTPEFT_WEIGHT_PARAMETERS,
    const T* __restrict__ dy,
    int64_t stride_dy,
    T* __restrict__ dx,
    int64_t stride_dx,
    float* __restrict__ work,
    int m_rows,
    int n_rows,
    int columns,
    int per_part,
    const void* __restrict__ left,
    const void* __restrict__ right,
    int left_dtype,
    int right_dtype,
    int64_t left_stride,
    int64_t column_stride,
    int64_t rank_stride,
    int r
) {
  __shared__ float table[16], nested_table[256], shared_dy[M][kChunk], sums[kWarps][8 * kPitch];
  __shared__ float scales[kChunk * kScalePitch];
  load_tables(table, nested_table, code, nested_code, small != nullptr);
  const float o = small != nullptr ? *offset : 0.f;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int k0 = blockIdx.x * kColumns, k = k0 + lane * 8, m0 = blockIdx.y * M;
  const int n_first = blockIdx.z * per_part, n_end = min(n_rows, n_first + per_part);
  const int width = min(kColumns, columns - k0), blocks = min(kScales, blocks_of(width, columns, block_shift));

  float acc[M][8] = {};
  for (int n0 = n_first; n0 < n_end; n0 += kChunk) {
    __syncthreads();
    for (int at = threadIdx.x; at < M * kChunk; at += kThreads) {
      const int m = at / kChunk, n = at % kChunk;
      const bool there = m0 + m < m_rows && n0 + n < n_end;
      shared_dy[m][n] = there ? to_float(dy[(m0 + m) * stride_dy + n0 + n]) : 0.f;
    }
    for (int at = threadIdx.x; at < kChunk * blocks; at += kThreads) {
      const int n = at / blocks, i = at % blocks;
      const int64_t first = static_cast<int64_t>(n0 + n) * columns + k0, block = (first >> block_shift) + i;
      scales[n * kScalePitch + i] = n0 + n < n_end && block << block_shift < first + width
                                        ? scale_of(block, small, absmax, nested_table, nested_absmax, o, nested_shift)
                                        : 0.f;
    }
    __syncthreads();
    const int end = min(kChunk, n_end - n0);
    for (int n = warp; n < end; n += kWarps * kAhead) {
      uint32_t words[kAhead];
      float scale[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        words[i] = 0, scale[i] = 0;
        if (n + i * kWarps < end && k < columns) {
          const int64_t first = static_cast<int64_t>(n0 + n + i * kWarps) * columns + k;
          words[i] = load_packed(reinterpret_cast<const uint32_t*>(packed + first / 2));
          const int64_t block = (first >> block_shift) - ((first - lane * 8) >> block_shift);
          scale[i] = scales[(n + i * kWarps) * kScalePitch + static_cast<int>(block)];
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        float scaled[M];
#pragma unroll
        for (int m = 0; m < M; ++m) scaled[m] = scale[i] * shared_dy[m][min(n + i * kWarps, kChunk - 1)];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float c = value(table, words[i], e);
#pragma unroll
          for (int m = 0; m < M; ++m) acc[m][e] = fmaf(c, scaled[m], acc[m][e]);
        }
      }
    }
  }

  // A thread a column from here on.
  const int c = threadIdx.x;
  float total[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; ++e) sums[warp][e * kPitch + lane] = acc[m][e];
    __syncthreads();
    total[m] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total[m] += sums[w][c % 8 * kPitch + c / 8];
  }
  for (int i0 = 0; blockIdx.z == 0 && i0 < r; i0 += kChunk) {  // the adapter's left factor where dy was
    const int end = min(kChunk, r - i0);
    __syncthreads();
    for (int at = threadIdx.x; at < M * kChunk; at += kThreads) {
      const int m = at / kChunk, i = at % kChunk;
      if (i < end) shared_dy[m][i] = element(left, min(m0 + m, m_rows - 1) * left_stride + i0 + i, left_dtype);
    }
    __syncthreads();
    for (int i = 0; i < end && k0 + c < columns; ++i) {
      const float a = element(right, (k0 + c) * column_stride + (i0 + i) * rank_stride, right_dtype);
#pragma unroll
      for (int m = 0; m < M; ++m) total[m] = fmaf(a, shared_dy[m][i], total[m]);
    }
  }
  if (k0 + c >= columns) return;
  float* part = work != nullptr ? work + static_cast<int64_t>(blockIdx.z) * m_rows * columns : nullptr;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if (m0 + m >= m_rows) break;
    if (part != nullptr) {
      part[static_cast<int64_t>(m0 + m) * columns + k0 + c] = total[m];
    } else {
      dx[(m0 + m) * stride_dx + k0 + c] = from_float<T>(total[m]);
    }
  }
}

int rows_at_once(int64_t m) { return m <= 1 ? 1 : m <= 2 ? 2 : m <= 4 ? 4 : kRows; }

// A multiple of kChunk, so that a part's chunks are whole.
int64_t per_part(int64_t rows, int parts) {
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  return (chunks + parts - 1) / parts * kChunk;
}

template <typename T, int M>
cudaError_t launch(
    const Matrix& dy, const Weight4bit& w, const Rim& rim, const Matrix& dx, float* work, int parts, cudaStream_t stream
) {
  const dim3 grid(
      static_cast<unsigned>((w.columns + kColumns - 1) / kColumns), static_cast<unsigned>((dy.rows + M - 1) / M),
      static_cast<unsigned>(parts)
  );
  linear_4bit_backward_kernel<T, M><<<grid, kThreads, 0, stream>>>(
      FASTPEFT_WEIGHT_ARGUMENTS(w), static_cast<const T*>(dy.data), dy.stride, static_cast<T*>(dx.data), dx.stride,
      parts > 1 ? work : nullptr, static_cast<int>(dy.rows), static_cast<int>(w.rows), static_cast<int>(w.columns),
      static_cast<int>(per_part(w.rows, parts)), rim.left, rim.right, static_cast<int>(rim.left_dtype),
      static_cast<int>(rim.right_dtype), rim.left_stride, rim.column_stride, rim.rank_stride, rim.r
  );
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess || parts == 1 ? error : sum_parts<T>(work, parts, dx, stream);
}

template <typename T>
cudaError_t choose(
    const Matrix& dy, const Weight4bit& w, const Rim& rim, const Matrix& dx, float* work, int parts, cudaStream_t stream
) {
  switch (rows_at_once(dy.rows)) {
    case 1:
      return launch<T, 1>(dy, w, rim, dx, work, parts, stream);
    case 2:
      return launch<T, 2>(dy, w, rim, dx, work, parts, stream);
    case 4:
      return launch<T, 4>(dy, w, rim, dx, work, parts, stream);
    default:
      return launch<T, kRows>(dy, w, rim, dx, work, parts, stream);
  }
}

}  // namespace

int linear_4bit_backward_parts(const Weight4bit& w, int64_t m, int multiprocessors) {
  const int64_t each = rows_at_once(m);
  const int64_t blocks = (w.columns + kColumns - 1) / kColumns * ((m + each - 1) / each);
  const int64_t most = (w.rows + kShortestPart - 1) / kShortestPart;
  int64_t parts = blocks > 0 ? 2 * int64_t(multiprocessors) / blocks : 1;  // two blocks a multiprocessor
  parts = parts < 1 ? 1 : parts > most ? most : parts;
  if (parts <= 1) return 1;
  const int64_t rows = per_part(w.rows, static_cast<int>(parts));
  return static_cast<int>((w.rows + rows - 1) / rows);
}

cudaError_t linear_4bit_backward_plain(
    const Matrix& dy, const Weight4bit& w, const Rim& rim, const Matrix& dx, float* work, int parts, cudaStream_t stream
) {
  if (dx.rows == 0 || dx.columns == 0) return cudaSuccess;
  return with_dtype(dy.dtype, [&](auto of) {
    return choose<typename decltype(of)::type>(dy, w, rim, dx, work, parts, stream);
  });
}

}  // namespace cuda
}  // namespace fastpeft
