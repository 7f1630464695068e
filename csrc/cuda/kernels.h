// The launchers of the CUDA kernels, as plain data and without PyTorch's headers: the sources that nvcc compiles include
// nothing else. Each starts its kernels on `stream` and returns the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpu/kernels.h"

namespace fastpeft {
namespace cuda {

// A weight (rows, columns) in bitsandbytes' storage; ops/nf4.py has the formula.
struct Weight4bit {
  const uint8_t* packed;
  const uint8_t* small;        // one scale a block in 8 bits where scales are nested, else null
  const float* absmax;         // one scale a block where they are not, else null
  const float* code;           // 16
  const float* nested_code;    // 256
  const float* nested_absmax;  // one for 2^nested_shift blocks
  const float* offset;
  int block_shift, nested_shift;  // log2 of the block sizes
  int64_t rows, columns;
};

// The adapter's part of a product, added to it: left (M, r) times right (columns, r), element [c, i] of which lies at
// c * column_stride + i * rank_stride. r = 0: none.
struct Rim {
  const void* left;
  const void* right;
  DType left_dtype, right_dtype;
  int64_t left_stride, column_stride, rank_stride;
  int r;
};

// Whether the fused kernels read such a weight: whole 16 bytes of it lie in one row and one block.
inline bool fused(const Weight4bit& w) { return w.columns % 32 == 0 && w.block_shift >= 5; }

// out = W[row : row + out.rows, column : column + out.columns]
cudaError_t dequantize_4bit(const Weight4bit& w, const Matrix& out, int64_t row, int64_t column, cudaStream_t stream);

// y = x W^T + bias + rim, for rows of x by fours: fp32 sums and products, W not rounded. bias has x's dtype, or is null.
cudaError_t linear_4bit_gemv(
    const Matrix& x,
    const Weight4bit& w,
    const void* bias,
    const Rim& rim,
    const Matrix& y,
    int multiprocessors,
    cudaStream_t stream
);

// The parts that a product of M rows is split in along what is summed over. More than one: `work` holds that many
// results in fp32.
int linear_4bit_parts(const Weight4bit& w, int64_t m, bool backward, int multiprocessors);

// y = x W^T + bias + rim, and dx = dy W + rim, on tensor cores, bf16 (from sm_80 on) or fp16. W is rounded to x's dtype.
cudaError_t linear_4bit_gemm(
    const Matrix& x,
    const Weight4bit& w,
    const void* bias,
    const Rim& rim,
    const Matrix& y,
    float* work,
    int parts,
    cudaStream_t stream
);
cudaError_t linear_4bit_backward_gemm(
    const Matrix& dy,
    const Weight4bit& w,
    const Rim& rim,
    const Matrix& dx,
    float* work,
    int parts,
    cudaStream_t stream
);

// dx = dy W + rim in fp32 sums and products, W not rounded, for any dtype and any number of rows of W; columns must be a
// multiple of 8. As above: the parts it is split in, and the work that these take.
int linear_4bit_backward_parts(const Weight4bit& w, int64_t m, int multiprocessors);
cudaError_t linear_4bit_backward_plain(
    const Matrix& dy, const Weight4bit& w, const Rim& rim, const Matrix& dx, float* work, int parts, cudaStream_t stream
);

// cudaSuccess if the current device has code of this build.
cudaError_t probe();

}  // namespace cuda
}  // namespace fastpeft
