// W of 4 bits written out in fp32, bf16 or fp16: bitsandbytes' bits.
#include "decode.cuh"

namespace fastpeft {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSegment = 1024;  // elements of a row that a warp writes: up to 32 blocks, whose scales its lanes hold

// 16 bytes, in one instruction: left to itself the compiler may take a float4 apart.
__device__ inline void store16(void* p, const uint32_t (&v)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

template <typename T>
__device__ inline void store(T* p, const float (&v)[8]) {
  store16(p, {pair<T>(v[0], v[1]), pair<T>(v[2], v[3]), pair<T>(v[4], v[5]), pair<T>(v[6], v[7])});
}
__device__ inline void store(float* p, const float (&v)[4]) {
  store16(p, {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])});
}

// The codes of 8 elements, or of 4 in the low half.
template <int N>
__device__ inline uint32_t load_codes(const uint8_t* p) {
  return N == 8 ? load_packed(reinterpret_cast<const uint32_t*>(p)) : *reinterpret_cast<const uint16_t*>(p);
}

// A warp a segment of a row of `out`. Rows, and the first column, begin at multiples of 32 elements of W.
template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_4bit_kernel(
    FASTPEFT_WEIGHT_PARAMETERS,
    T* __restrict__ out,
    int64_t stride,
    int rows,
    int columns,
    int64_t w_columns,
    int64_t row,
    int64_t column
) {
  __shared__ float table[16], nested_table[256];
  load_tables(table, nested_table, code, nested_code, small != nullptr);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int segments = (columns + kSegment - 1) / kSegment;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t i_row = warp / segments;
  const int i_column = static_cast<int>(warp % segments) * kSegment;
  if (i_row >= rows) return;
  const int size = min(kSegment, columns - i_column);
  const int64_t first = (row + i_row) * w_columns + column + i_column;  // of W's elements
  const int64_t block = (first >> block_shift) + lane;
  float scale = 0;
  if (block << block_shift < first + size) {
    const float o = small != nullptr ? *offset : 0.f;
    scale = scale_of(block, small, absmax, nested_table, nested_absmax, o, nested_shift);
  }
  constexpr int each = 16 / sizeof(T);  // elements of a lane at a time: its store of 16 bytes
#pragma unroll
  for (int j = 0; j < kSegment / (32 * each); ++j) {
    const int k = (j * 32 + lane) * each;
    const float s = __shfl_sync(~0u, scale, static_cast<int>(((first + k) >> block_shift) - (first >> block_shift)) & 31);
    if (k < size) {
      const uint32_t word = load_codes<each>(packed + (first + k) / 2);
      float v[each];
#pragma unroll
      for (int i = 0; i < each; ++i) v[i] = __fmul_rn(value(table, word, i), s);
      store(out + i_row * stride + i_column + k, v);
    }
  }
}

// Any shape and any place: a thread an element.
template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_4bit_any_kernel(
    FASTPEFT_WEIGHT_PARAMETERS,
    T* __restrict__ out,
    int64_t stride,
    int rows,
    int columns,
    int64_t w_columns,
    int64_t row,
    int64_t column
) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t i_row = i / columns, i_column = i % columns;
  if (i_row >= rows) return;
  const int64_t e = (row + i_row) * w_columns + column + i_column;
  const int q = packed[e / 2] >> (e % 2 ? 0 : 4) & 15;
  const float o = small != nullptr ? *offset : 0.f;
  const float scale = scale_of(e >> block_shift, small, absmax, nested_code, nested_absmax, o, nested_shift);
  out[i_row * stride + i_column] = from_float<T>(__fmul_rn(code[q], scale));
}

template <typename T>
cudaError_t launch(const Weight4bit& w, const Matrix& out, int64_t row, int64_t column, cudaStream_t stream) {
  T* data = static_cast<T*>(out.data);
  const bool aligned = fused(w) && column % 32 == 0 && out.columns % 8 == 0 && out.stride % 8 == 0 &&
                       reinterpret_cast<uintptr_t>(data) % 16 == 0 && reinterpret_cast<uintptr_t>(w.packed) % 4 == 0;
  const int rows = static_cast<int>(out.rows), columns = static_cast<int>(out.columns);
  if (aligned) {
    const int64_t warps = out.rows * ((out.columns + kSegment - 1) / kSegment);
    const int64_t grid = (warps + kThreads / 32 - 1) / (kThreads / 32);
    dequantize_4bit_kernel<T><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(
        FASTPEFT_WEIGHT_ARGUMENTS(w), data, out.stride, rows, columns, w.columns, row, column
    );
  } else {
    const int64_t grid = (out.rows * out.columns + kThreads - 1) / kThreads;
    dequantize_4bit_any_kernel<T><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(
        FASTPEFT_WEIGHT_ARGUMENTS(w), data, out.stride, rows, columns, w.columns, row, column
    );
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t dequantize_4bit(const Weight4bit& w, const Matrix& out, int64_t row, int64_t column, cudaStream_t stream) {
  if (out.rows == 0 || out.columns == 0) return cudaSuccess;
  return with_dtype(out.dtype, [&](auto of) {
    return launch<typename decltype(of)::type>(w, out, row, column, stream);
  });
}

cudaError_t probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, dequantize_4bit_kernel<__half>);
}

}  // namespace cuda
}  // namespace fastpeft
