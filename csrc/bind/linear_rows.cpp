// fastpeft/ops/linear_rows.py on the CPU.
#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::Matrix;

Tensor linear_rows(const Tensor& x_in, const Tensor& w_in, const std::optional<Tensor>& bias_in) {
  if (!have_kernels({&x_in, &w_in}) || (bias_in.has_value() && !has_kernel(*bias_in))) {
    auto stack = boxed(x_in, w_in, bias_in);
    call_reference("fastpeft_reference::linear_rows", stack);
    return taken(stack[0]);
  }
  const Tensor x = readable(x_in), w = readable(w_in);
  const Matrix xm = matrix(x, "x"), wm = matrix(w, "weight");
  STD_TORCH_CHECK(xm.columns == wm.columns, "x has ", xm.columns, " columns and the weight ", wm.columns);
  const BiasRow bias(bias_in, wm.rows);
  const Tensor y = like(x, xm.rows, wm.rows);
  fastpeft::kernels().linear_rows.forward(xm, wm, bias.m, matrix(y, "y"), run_parallel);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("linear_rows", TORCH_BOX(&linear_rows)); }
