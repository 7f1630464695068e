#include "select.h"

#include <atomic>
#include <cstring>

namespace fastpeft {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the registers.
const Candidate candidates[] = {
    {&kernels_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
    {&kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
    {&kernels_scalar, true},
};
#else
const Candidate candidates[] = {{&kernels_scalar, true}};
#endif

const Kernels* best() {
  for (const Candidate& c : candidates) {
    if (c.supported) return c.kernels;
  }
  return &kernels_scalar;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = current.load(std::memory_order_acquire);
  if (k == nullptr) {
    k = best();
    current.store(k, std::memory_order_release);
  }
  return *k;
}

bool select_isa(const char* name, const char** reason) {
  if (std::strcmp(name, "auto") == 0) {
    current.store(best(), std::memory_order_release);
    return true;
  }
  for (const Candidate& c : candidates) {
    if (std::strcmp(name, c.kernels->name) != 0) continue;
    if (!c.supported) {
      *reason = "this processor does not have it";
      return false;
    }
    current.store(c.kernels, std::memory_order_release);
    return true;
  }
  *reason = "it is not one of the built instruction sets";
  return false;
}

}  // namespace fastpeft
