// What the CUDA kernels need of the machine: whether they can run on a device and why not, and PyTorch's stream there.
// The CUDA runtime is linked statically and its driver is looked for only when asked, so that the extension loads on a
// machine without one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "cpu/kernels.h"

namespace fastpeft {
namespace cuda {

// Empty if kernels of this build run on GPU `device`, else a sentence that says why not. Asked once a device.
const std::string& why_not(int device);

bool runs(int device);

// 80 for compute capability 8.0; 0 where no driver tells.
int capability(int device);

int multiprocessors(int device);

// Whether tensor cores multiply `dtype` there without rounding it: fp16 from compute capability 7.5 on, bf16 from 8.0 on,
// fp32 never.
bool tensor_cores(int device, DType dtype);

// The namespace of the operators that take what the kernels do not, as Python has set it: Triton's from compute
// capability 8.0 on, else the reference.
std::string fallback(int device);
void fall_back_to(const std::string& name_space);

// Empty if there is a driver and a GPU, else why not.
std::string why_no_driver();

// PyTorch's current stream on `device`, the one every launch goes to.
cudaStream_t current_stream(int device);

// Throws with what failed, if it did.
void check(cudaError_t error, const char* what);

}  // namespace cuda
}  // namespace fastpeft
