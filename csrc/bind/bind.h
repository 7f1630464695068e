// What the operators of torch.ops.fastpeft.* for CPU tensors share, on LibTorch's stable ABI. The schemas are defined in
// Python (fastpeft/ops); one file below this folder binds the kernels of one.
//
// The kernels take fp32, bf16 and fp16; anything else (float64 in gradcheck) goes to the reference implementation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/select.h"

#if defined(__ELF__)
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();
#endif

namespace fastpeft {
namespace bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool has_kernel(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline bool have_kernels(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (!has_kernel(*t)) return false;
  }
  return true;
}

// Null: an operand that was not given.
inline bool all_fp32(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (t != nullptr && t->scalar_type() != ScalarType::Float) return false;
  }
  return true;
}

// Of a tensor that has_kernel.
inline DType dtype_of(ScalarType type) {
  return type == ScalarType::Float ? DType::f32 : type == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
}
inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

inline Matrix matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must be a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU, as the other operands are");
  STD_TORCH_CHECK(t.stride(1) == 1 || t.size(1) <= 1, name, " must have contiguous rows");
  return {t.data_ptr(), t.size(0), t.size(1), t.stride(0), dtype_of(t)};
}

// An operand that is only read may have any strides.
inline Tensor readable(const Tensor& t) {
  return t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1) ? t : torch::stable::contiguous(t);
}

inline Tensor readable_heads(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 ? t : torch::stable::contiguous(t);
}

// q, k or v (B, H, T, D), or a table (B or 1, T, R) as a single head.
inline Heads heads(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU, as the other operands are");
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.stride(last) == 1 || t.size(last) <= 1, name, " must have contiguous rows");
  if (last == 3) {
    return {t.data_ptr(), t.size(0), t.size(1), t.size(2), t.size(3), {t.stride(0), t.stride(1), t.stride(2)},
            dtype_of(t)};
  }
  return {t.data_ptr(), t.size(0), 1, t.size(1), t.size(2), {t.stride(0), 0, t.stride(1)}, dtype_of(t)};
}

// A bias of n elements as a matrix of one row, which lives as long as this; data is null without one or for no outputs.
struct __attribute__((visibility("hidden"))) BiasRow {
  BiasRow(const std::optional<Tensor>& t, int64_t n) {
    if (!t.has_value() || n == 0) return;
    kept = torch::stable::contiguous(*t);
    STD_TORCH_CHECK(kept->is_cpu() && kept->dim() == 1 && kept->size(0) == n, "bias must be (", n, ") on the CPU");
    m = {kept->data_ptr(), 1, n, n, dtype_of(*kept)};
  }
  std::optional<Tensor> kept;
  Matrix m = {nullptr, 0, 0, 0, DType::f32};
};

// An empty CPU tensor of t's dtype. Not by way of the dispatcher, as new_empty: that takes a microsecond more.
inline Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, const Tensor& t) {
  int32_t dtype;
  AtenTensorHandle handle;
  STD_TORCH_CHECK(
      aoti_torch_get_dtype(t.get(), &dtype) == AOTI_TORCH_SUCCESS &&
          aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle) ==
              AOTI_TORCH_SUCCESS,
      "no memory for a result"
  );
  return Tensor(handle);
}

inline Tensor like(const Tensor& t, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns > 0 ? columns : 1, 1};
  return empty(2, sizes, strides, t);
}

// (..., columns) as a matrix; the tensor is contiguous.
inline Matrix flat(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() > 0 && t.is_cpu(), name, " must be on the CPU and have a dimension");
  const int64_t columns = t.size(t.dim() - 1);
  Matrix m = {t.data_ptr(), columns > 0 ? t.numel() / columns : 0, columns, columns, DType::f32};
  const ScalarType type = t.scalar_type();
  if (type != ScalarType::Float) m.dtype = type == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
  return m;
}

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// An empty tensor of t's leading dimensions and `columns`.
inline Tensor with_columns(const Tensor& t, int64_t columns) {
  int64_t sizes[64], strides[64], stride = 1;
  const int64_t dim = t.dim();
  for (int64_t i = dim - 1; i >= 0; --i) {
    sizes[i] = i == dim - 1 ? columns : t.size(i);
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty(dim, sizes, strides, t);
}

inline void run_parallel(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n > 0) {
    torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
  }
}

template <typename... Args>
std::array<StableIValue, sizeof...(Args)> boxed(const Args&... args) {
  return {torch::stable::detail::from(args)...};
}

// What was raised by the last call that failed. torch says so from 2.13 on; the weak reference is null in older ones.
inline const char* last_error() {
#if defined(__ELF__)
  return torch_exception_get_what_without_backtrace == nullptr ? "" : torch_exception_get_what_without_backtrace();
#else
  return "";
#endif
}

// Runs the operator of the same name in Python's reference implementation. (STABLE_TORCH_ERROR_CODE_CHECK would need
// torch 2.13.)
template <size_t N>
void call_reference(const char* name, std::array<StableIValue, N>& stack) {
  STD_TORCH_CHECK(
      torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS, name,
      " failed on these operands: ", last_error()
  );
}

inline Tensor taken(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

struct OwnedGroup {
  std::vector<float> scale;
  fastpeft::Group group;
};

// threshold and scale as philox.py has them.
inline void fill(
    OwnedGroup* out, int64_t rank_rows, const std::vector<double>& scaling, double p, const std::optional<Tensor>& seed
) {
  const int64_t members = static_cast<int64_t>(scaling.size());
  STD_TORCH_CHECK(
      members > 0 && rank_rows % members == 0, "A has ", rank_rows, " rows, not a multiple of ", members, " members"
  );
  STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout probability must be between 0 and 1, got ", p);
  const double threshold = std::nearbyint(p * 65536);
  const bool masked = seed.has_value();
  const double kept = !masked ? 1 : threshold < 65536 ? 65536 / (65536 - threshold) : 0;
  for (const double c : scaling) out->scale.push_back(static_cast<float>(c * kept));
  uint64_t value = 0;
  if (masked) {
    STD_TORCH_CHECK(
        seed->numel() == 1 && seed->scalar_type() == ScalarType::Long && seed->is_cpu(),
        "seed must be one int64 on the CPU"
    );
    value = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  }
  out->group = {members, rank_rows / members, out->scale.data(), {masked, value, static_cast<uint32_t>(threshold)}};
}

}  // namespace bind
}  // namespace fastpeft
