// What the bindings of the two norms share.
#pragma once

#include "bind.h"

namespace fastpeft {
namespace bind {

inline bool has_kernel(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline bool has_kernel(const std::optional<Tensor>& t) { return !t.has_value() || has_kernel(*t); }

inline std::optional<Tensor> readable(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(readable(*t)) : std::nullopt;
}

// A parameter of k elements as one row; it owns the contiguous copy where one was needed.
struct __attribute__((visibility("hidden"))) Parameter {
  Parameter(const std::optional<Tensor>& t, int64_t k, const char* name) : m{nullptr, 0, 0, 0, DType::f32} {
    if (!t.has_value()) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == k, name, " must be a vector of ", k, " elements");
    STD_TORCH_CHECK(t->is_cpu(), name, " must be on the CPU, as the other operands are");
    owner = t->stride(0) == 1 ? *t : torch::stable::contiguous(*t);
    m = {owner->data_ptr(), 1, k, k, dtype_of(*t)};
  }
  // Of the same length and dtype, if it is wanted; else empty.
  Tensor gradient(const Tensor& like, bool wanted) const {
    if (!wanted || m.data == nullptr) return torch::stable::new_empty(like, {0}, ScalarType::Float);
    return torch::stable::new_empty(*owner, {m.columns});
  }
  std::optional<Tensor> owner;
  Matrix m;
};

// A gradient as one row; data null where it is empty, and where there is nothing to write to.
inline Matrix row(const Tensor& t, const Matrix& parameter) {
  Matrix m = parameter;
  m.data = t.numel() > 0 && parameter.data != nullptr ? t.data_ptr() : nullptr;
  return m;
}

// mean or rstd of `rows` rows.
inline float* statistic(const Tensor& t, int64_t rows, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 1 && t.size(0) == rows && t.is_cpu() && t.scalar_type() == ScalarType::Float, name,
      " must be fp32, of ", rows, " elements"
  );
  return static_cast<float*>(t.data_ptr());
}

inline Matrix like_x(const Tensor& t, const Matrix& x, const char* name) {
  const Matrix m = matrix(t, name);
  STD_TORCH_CHECK(
      m.rows == x.rows && m.columns == x.columns, name, " must be (", x.rows, ", ", x.columns, "), as x is, got (",
      m.rows, ", ", m.columns, ")"
  );
  return m;
}

// residual or d_h: of x's shape and dtype.
inline Matrix beside_x(const std::optional<Tensor>& t, const Matrix& x, const char* name) {
  if (!t.has_value()) return {nullptr, 0, 0, 0, x.dtype};
  const Matrix m = like_x(*t, x, name);
  STD_TORCH_CHECK(m.dtype == x.dtype, name, " must have the dtype of x");
  return m;
}

inline Matrix adapter(const Tensor& a, const Matrix& x) {
  const Matrix m = matrix(a, "A");
  STD_TORCH_CHECK(m.columns == x.columns, "x has ", x.columns, " columns and A ", m.columns);
  return m;
}

inline Tensor vector_like(const Tensor& x) { return torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float); }

inline Tensor output_like(const Tensor& x, ScalarType type) {
  return torch::stable::new_empty(x, {x.size(0), x.size(1)}, type);
}

}  // namespace bind
}  // namespace fastpeft
