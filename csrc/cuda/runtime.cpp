#include "runtime.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <mutex>

#include "kernels.h"

namespace fastpeft {
namespace cuda {
namespace {

constexpr int kDevices = 64;

struct Answer {
  std::once_flag once;
  std::string reason;
  int capability = 0;
  int multiprocessors = 0;
};

std::array<Answer, kDevices> answers;
std::string fallback_namespace = "fastpeft_reference";

std::string text(cudaError_t error) {
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

void ask(int device, Answer* answer) {
  answer->reason = why_no_driver();
  if (!answer->reason.empty()) return;
  int before = 0, major = 0, minor = 0;
  cudaGetDevice(&before);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&answer->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) {
    answer->reason = "GPU " + std::to_string(device) + " does not answer: " + text(error);
    cudaGetLastError();  // what was asked here is no error of the next launch
    return;
  }
  answer->capability = 10 * major + minor;
  if ((error = probe()) != cudaSuccess) {
    answer->reason = "GPU " + std::to_string(device) + " has compute capability " + std::to_string(major) + "." +
                     std::to_string(minor) + ", and this build holds code for " FASTPEFT_CUDA_ARCHS " only (" +
                     cudaGetErrorName(error) + ")";
  }
  cudaGetLastError();
  cudaSetDevice(before);
}

const Answer& answer(int device) {
  STD_TORCH_CHECK(device >= 0 && device < kDevices, "GPU ", device, ": the CUDA kernels know of ", kDevices);
  Answer& a = answers[device];
  std::call_once(a.once, ask, device, &a);
  return a;
}

using GetStream = AOTITorchError (*)(int32_t, void**);

// The function lies in libtorch_cuda, which a CPU build of PyTorch lacks and which is therefore not linked.
GetStream find_get_stream() {
  const char* name = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, name);
  if (found == nullptr) {
    if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, name);
  }
  return reinterpret_cast<GetStream>(found);
}

}  // namespace

std::string why_no_driver() {
  int driver = 0, count = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver == 0) return "this machine has no NVIDIA driver";
  if (error == cudaSuccess) error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (error == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver is one for CUDA " + version(driver) + ", too old for this build's CUDA " +
           version(CUDART_VERSION) + "; update the driver or install a wheel for CUDA " + version(driver);
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    return "no NVIDIA GPU is visible (CUDA_VISIBLE_DEVICES may hide it)";
  }
  return error == cudaSuccess ? "" : "the NVIDIA driver does not answer: " + text(error);
}

const std::string& why_not(int device) { return answer(device).reason; }

bool runs(int device) { return answer(device).reason.empty(); }

int capability(int device) { return answer(device).capability; }

int multiprocessors(int device) { return answer(device).multiprocessors; }

bool tensor_cores(int device, DType dtype) {
  return capability(device) >= (dtype == DType::f16 ? 75 : 80) && dtype != DType::f32;
}

std::string fallback(int device) {
  const int known = capability(device);
  return known != 0 && known < 80 ? "fastpeft_reference" : fallback_namespace;
}

void fall_back_to(const std::string& name_space) { fallback_namespace = name_space; }

cudaStream_t current_stream(int device) {
  static const GetStream get_stream = find_get_stream();
  STD_TORCH_CHECK(get_stream != nullptr, "this PyTorch has no CUDA part, and so no CUDA stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == AOTI_TORCH_SUCCESS, "PyTorch gives no stream for GPU ", device);
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed: ", text(error));
}

}  // namespace cuda
}  // namespace fastpeft
