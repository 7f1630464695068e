// The parts of a product that was split along what is summed over, added in order: the same bits every time.
#pragma once

#include "decode.cuh"

namespace fastpeft {
namespace cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(256) sum_parts_kernel(
    const float* __restrict__ work, int parts, T* __restrict__ out, int64_t stride, int rows, int columns
) {
  const int64_t size = static_cast<int64_t>(rows) * columns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float v = 0;
  for (int p = 0; p < parts; ++p) v += work[p * size + i];
  out[i / columns * stride + i % columns] = from_float<T>(v);
}

// out = the sum of `parts` results that lie in `work`.
template <typename T>
cudaError_t sum_parts(const float* work, int parts, const Matrix& out, cudaStream_t stream) {
  const int64_t size = out.rows * out.columns;
  sum_parts_kernel<T><<<static_cast<unsigned>((size + 255) / 256), 256, 0, stream>>>(
      work, parts, static_cast<T*>(out.data), out.stride, static_cast<int>(out.rows), static_cast<int>(out.columns)
  );
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda
}  // namespace fastpeft
