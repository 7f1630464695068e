// Stands in for the CUDA runtime under the launchers of csrc/cuda: a launch is handed to a function of the test's, which
// executes the kernel on an emulator. Compiled into one library with the objects that nvcc made.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

#include "cuda/kernels.h"

namespace {

using Launch = int (*)(const char* name, const unsigned* grid, const unsigned* block, void** arguments, size_t shared);

Launch launch = nullptr;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> m;
  return m;
}
struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

cudaError_t run(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
  const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  return static_cast<cudaError_t>(launch(names()[function].c_str(), g, b, arguments, shared));
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*
) {
  names()[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t
) {
  return run(kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return run(f, grid, block, arguments, shared);
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

using fastpeft::Matrix;
using fastpeft::cuda::Rim;
using fastpeft::cuda::Weight4bit;

void on_launch(Launch function) { launch = function; }
int dequantize_4bit(const Weight4bit* w, const Matrix* out, int64_t row, int64_t column) {
  return fastpeft::cuda::dequantize_4bit(*w, *out, row, column, nullptr);
}
int linear_4bit_gemv(
    const Matrix* x, const Weight4bit* w, const void* bias, const Rim* rim, const Matrix* y, int multiprocessors
) {
  return fastpeft::cuda::linear_4bit_gemv(*x, *w, bias, *rim, *y, multiprocessors, nullptr);
}
int linear_4bit_parts(const Weight4bit* w, int64_t m, int backward, int multiprocessors) {
  return fastpeft::cuda::linear_4bit_parts(*w, m, backward != 0, multiprocessors);
}
int linear_4bit_gemm(
    const Matrix* x, const Weight4bit* w, const void* bias, const Rim* rim, const Matrix* y, float* work, int parts
) {
  return fastpeft::cuda::linear_4bit_gemm(*x, *w, bias, *rim, *y, work, parts, nullptr);
}
int linear_4bit_backward_gemm(
    const Matrix* dy, const Weight4bit* w, const Rim* rim, const Matrix* dx, float* work, int parts
) {
  return fastpeft::cuda::linear_4bit_backward_gemm(*dy, *w, *rim, *dx, work, parts, nullptr);
}
int linear_4bit_backward_parts(const Weight4bit* w, int64_t m, int multiprocessors) {
  return fastpeft::cuda::linear_4bit_backward_parts(*w, m, multiprocessors);
}
int linear_4bit_backward_plain(
    const Matrix* dy, const Weight4bit* w, const Rim* rim, const Matrix* dx, float* work, int parts
) {
  return fastpeft::cuda::linear_4bit_backward_plain(*dy, *w, *rim, *dx, work, parts, nullptr);
}

}  // extern "C"
