// fastpeft/ops/gemm.py on the CPU.
#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::Matrix;

const Tensor* given(const std::optional<Tensor>& t) { return t.has_value() ? &*t : nullptr; }

// A matrix, or the transpose of one, as it lies.
struct Operand {
  explicit Operand(const Tensor& t, const char* name)
      : turned(t.dim() == 2 && t.stride(0) == 1 && t.stride(1) != 1),
        tensor(turned ? torch::stable::transpose(t, 0, 1) : readable(t)),
        m(matrix(tensor, name)) {}
  int64_t rows() const { return turned ? m.columns : m.rows; }
  int64_t columns() const { return turned ? m.rows : m.columns; }
  bool turned;
  Tensor tensor;
  Matrix m;
};

void compute(const Tensor& y, const Operand& a, const Operand& b, const std::optional<Tensor>& gain, bool add) {
  const Matrix ym = matrix(y, "y");
  STD_TORCH_CHECK(
      a.columns() == b.rows() && ym.rows == a.rows() && ym.columns == b.columns(), "y (", ym.rows, ", ", ym.columns,
      ") cannot be a (", a.rows(), ", ", a.columns(), ") times b (", b.rows(), ", ", b.columns(), ")"
  );
  STD_TORCH_CHECK(
      !gain.has_value() ||
          (gain->is_cpu() && gain->dim() == 1 && gain->size(0) == b.rows() && (gain->stride(0) == 1 || b.rows() <= 1)),
      "gain must be ", b.rows(), " contiguous floats"
  );
  const float* gains = gain.has_value() ? static_cast<const float*>(gain->data_ptr()) : nullptr;
  const int64_t threads = torch::stable::get_num_threads();
  fastpeft::kernels().gemm.product(a.m, a.turned, b.m, b.turned, gains, ym, add, threads, run_parallel);
}

Tensor gemm(const Tensor& a_in, const Tensor& b_in, const std::optional<Tensor>& gain) {
  if (!all_fp32({&a_in, &b_in, given(gain)})) {
    auto stack = boxed(a_in, b_in, gain);
    call_reference("fastpeft_reference::gemm", stack);
    return taken(stack[0]);
  }
  const Operand a(a_in, "a"), b(b_in, "b");
  const Tensor y = like(a_in, a.rows(), b.columns());
  compute(y, a, b, gain, false);
  return y;
}

void gemm_(const Tensor& y, const Tensor& a_in, const Tensor& b_in, bool add, const std::optional<Tensor>& gain) {
  if (!all_fp32({&y, &a_in, &b_in, given(gain)})) {
    auto stack = boxed(y, a_in, b_in, add, gain);
    call_reference("fastpeft_reference::gemm_", stack);
    return;
  }
  compute(y, Operand(a_in, "a"), Operand(b_in, "b"), gain, add);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("gemm_", TORCH_BOX(&gemm_));
}
