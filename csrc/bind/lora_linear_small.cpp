// fastpeft/ops/lora_linear_small.py on the CPU.
#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::DType;
using fastpeft::Matrix;

constexpr Matrix none = {nullptr, 0, 0, 0, DType::f32};

// Multiplications up to which the base product is done here. Up to there a call of the vendor's costs more.
constexpr int64_t OWN = 1 << 17;

bool same_kernel_dtype(std::initializer_list<const Tensor*> tensors) {
  const ScalarType first = (*tensors.begin())->scalar_type();
  for (const Tensor* t : tensors) {
    if (t->scalar_type() != first || !has_kernel(*t)) return false;
  }
  return true;
}

bool rows_contiguous(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1; }

Tensor lora_linear_small(
    const Tensor& x_in,
    const Tensor& weight,
    const std::optional<Tensor>& bias_in,
    const Tensor& a_in,
    const Tensor& b_in,
    double scaling,
    int64_t few
) {
  if (!same_kernel_dtype({&x_in, &weight, &a_in, &b_in}) ||
      (bias_in.has_value() && bias_in->scalar_type() != x_in.scalar_type())) {
    auto stack = boxed(x_in, weight, bias_in, a_in, b_in, scaling, few);
    call_reference("fastpeft_reference::lora_linear_small", stack);
    return taken(stack[0]);
  }
  const Tensor x = packed(x_in), a = readable(a_in), b = readable(b_in);
  const Matrix xm = flat(x, "x"), am = matrix(a, "A"), bm = matrix(b, "B");
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(1) == xm.columns && am.columns == xm.columns && bm.rows == weight.size(0) &&
          bm.columns == am.rows,
      "A must be (r, K) and B (N, r) for a weight (N, K) and an input (..., K)"
  );
  const int64_t n = bm.rows;
  Matrix bias_matrix = none;
  Tensor bias;
  if (bias_in.has_value()) {
    bias = packed(*bias_in);
    STD_TORCH_CHECK(bias.numel() == n, "bias has ", bias.numel(), " elements, expected ", n);
    bias_matrix = flat(bias, "bias");
  }
  const bool small = xm.rows * n * xm.columns <= OWN && xm.columns > 0;
  if (!small && xm.rows <= few && xm.columns > 0 && rows_contiguous(weight)) {
    const Tensor y = with_columns(x, n);
    const Matrix ym = flat(y, "y");
    fastpeft::kernels().linear_rows.forward(xm, matrix(weight, "weight"), bias_matrix, ym, run_parallel);
    fastpeft::kernels().lora_linear_small.forward(xm, none, none, am, bm, float(scaling), ym);
    return y;
  }
  if (!small || !rows_contiguous(weight)) {
    auto stack = boxed(x, weight, bias_in);
    STD_TORCH_CHECK(
        torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
        "the base product failed"
    );
    const Tensor y = packed(taken(stack[0]));
    fastpeft::kernels().lora_linear_small.forward(xm, none, none, am, bm, float(scaling), flat(y, "y"));
    return y;
  }
  const Tensor y = with_columns(x, n);
  fastpeft::kernels().lora_linear_small.forward(
      xm, matrix(weight, "weight"), bias_matrix, am, bm, float(scaling), flat(y, "y")
  );
  return y;
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_small_backward(
    const Tensor& dy_in,
    const Tensor& x_in,
    const Tensor& weight,
    const Tensor& a_in,
    const Tensor& b_in,
    double scaling,
    bool need_dx
) {
  if (!same_kernel_dtype({&dy_in, &x_in, &weight, &a_in, &b_in})) {
    auto stack = boxed(dy_in, x_in, weight, a_in, b_in, scaling, need_dx);
    call_reference("fastpeft_reference::lora_linear_small_backward", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2])};
  }
  const Tensor dy = packed(dy_in), x = packed(x_in), a = readable(a_in), b = readable(b_in);
  const Matrix dym = flat(dy, "dy"), xm = flat(x, "x"), am = matrix(a, "A"), bm = matrix(b, "B");
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(1) == xm.columns && am.columns == xm.columns && bm.rows == weight.size(0) &&
          bm.columns == am.rows && dym.columns == bm.rows && dym.rows == xm.rows,
      "A must be (r, K), B (N, r) and dy (..., N) for a weight (N, K) and an input (..., K)"
  );
  const Tensor da = like(a, am.rows, am.columns), db = like(b, bm.rows, bm.columns);
  const bool own = dym.rows * dym.columns * xm.columns <= OWN && rows_contiguous(weight);
  Tensor dx;
  if (!need_dx) {
    dx = like(x, 0, 0);
  } else if (own) {
    dx = with_columns(x, xm.columns);
  } else {
    auto stack = boxed(dy, weight);
    STD_TORCH_CHECK(
        torch_call_dispatcher("aten::matmul", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
        "the base product failed"
    );
    dx = packed(taken(stack[0]));
  }
  Matrix dxm = need_dx ? flat(dx, "dx") : none;
  if (dxm.rows * dxm.columns == 0) dxm.data = nullptr;
  fastpeft::kernels().lora_linear_small.backward(
      dym, xm, need_dx && own ? matrix(weight, "weight") : none, am, bm, float(scaling), dxm, matrix(da, "dA"),
      matrix(db, "dB"), run_parallel
  );
  return {dx, da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("lora_linear_small", TORCH_BOX(&lora_linear_small));
  m.impl("lora_linear_small_backward", TORCH_BOX(&lora_linear_small_backward));
}
