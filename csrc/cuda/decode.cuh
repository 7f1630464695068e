// How a weight of 4 bits is read (ops/nf4.py has the formula), and numbers of the dtypes.
//
// The table of 16 values lies in shared memory: 16 words in 16 banks, so that 32 lanes read any of them without a
// conflict. Its values are fp32, as the weight's bits depend on an fp32 product; a table in byte permutations would take
// four planes of three permutations and two more for each value.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace fastpeft {
namespace cuda {

// A kernel's arguments for the weight: plain ones, so that an emulator or a profiler shows them.
#define FASTPEFT_WEIGHT_PARAMETERS                                                                               \
  const uint8_t *__restrict__ packed, const uint8_t *__restrict__ small, const float *__restrict__ absmax,       \
      const float *__restrict__ code, const float *__restrict__ nested_code,                                     \
      const float *__restrict__ nested_absmax, const float *__restrict__ offset, int block_shift, int nested_shift

#define FASTPEFT_WEIGHT_ARGUMENTS(w) \
  w.packed, w.small, w.absmax, w.code, w.nested_code, w.nested_absmax, w.offset, w.block_shift, w.nested_shift

// body(Type<T>()) with the type of a dtype's elements.
template <typename T>
struct Type {
  using type = T;
};
template <typename Body>
cudaError_t with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bf16:
      return body(Type<__nv_bfloat16>());
    case DType::f16:
      return body(Type<__half>());
    default:
      return body(Type<float>());
  }
}

template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

// Two values rounded to T, the first in the low half.
template <typename T>
__device__ inline uint32_t pair(float first, float second);
template <>
__device__ inline uint32_t pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ inline uint32_t pair<__half>(float first, float second) {
  const __half2 v = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Element i of a matrix whose dtype is known at run time only: an adapter's.
__device__ inline float element(const void* data, int64_t i, int dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::bf16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::f16:
      return to_float(static_cast<const __half*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

// A lane's share of consecutive values of x as fp32: four of fp32, eight of 16 bits, 16 bytes either way.
__device__ inline void load16(const float* p, float (&v)[4]) {
  const float4 a = *reinterpret_cast<const float4*>(p);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
}
template <typename T>
__device__ inline void load16(const T* p, float (&v)[8]) {
  const uint4 a = *reinterpret_cast<const uint4*>(p);
  const T* each = reinterpret_cast<const T*>(&a);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = to_float(each[i]);
}

// A word of the packed weight, which is read once: not kept in L1.
__device__ inline uint32_t load_packed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ inline uint32_t load_packed(const uint16_t* p) {
  uint16_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
__device__ inline uint4 load_packed(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Code i (0 … 7) of a word: byte i / 2, its high half first.
__device__ inline float value(const float* table, uint32_t word, int i) {
  return table[(word >> (i / 2 * 8 + (i % 2 ? 0 : 4))) & 15];
}

// Both tables in shared memory; the caller synchronises.
__device__ inline void load_tables(
    float (&table)[16], float (&nested_table)[256], const float* code, const float* nested_code, bool nested
) {
  for (int i = threadIdx.x; i < 16; i += blockDim.x) table[i] = code[i];
  if (nested) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) nested_table[i] = nested_code[i];
  }
}

// The scale of a block: a product, then a sum, each rounded, as bitsandbytes makes it.
__device__ inline float scale_of(
    int64_t block,
    const uint8_t* small,
    const float* absmax,
    const float* nested_table,
    const float* nested_absmax,
    float offset,
    int nested_shift
) {
  if (small == nullptr) return absmax[block];
  return __fadd_rn(__fmul_rn(nested_table[small[block]], nested_absmax[block >> nested_shift]), offset);
}

// How many blocks `width` columns of a row may touch. Tiles begin at multiples of their width, a power of two: where rows
// are whole blocks, so do they, and lanes that share the blocks of some rows among them have whole rows.
__device__ inline int blocks_of(int width, int columns, int block_shift) {
  const bool whole = (columns & ((1 << block_shift) - 1)) == 0;
  return whole ? max(width >> block_shift, 1) : (width >> block_shift) + 2;
}

}  // namespace cuda
}  // namespace fastpeft
