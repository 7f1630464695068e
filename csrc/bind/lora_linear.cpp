// fastpeft/ops/products.py on the CPU.
#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::DType;
using fastpeft::Matrix;

Tensor lora_shrink(
    const Tensor& x_in,
    const Tensor& a_in,
    const std::vector<double>& scaling,
    double p,
    const std::optional<Tensor>& seed
) {
  if (!have_kernels({&x_in, &a_in})) {
    auto stack = boxed(x_in, a_in, scaling, p, seed);
    call_reference("fastpeft_reference::lora_shrink", stack);
    return taken(stack[0]);
  }
  const Tensor x = readable(x_in), a = readable(a_in);
  const Matrix xm = matrix(x, "x"), am = matrix(a, "A");
  STD_TORCH_CHECK(xm.columns == am.columns, "x has ", xm.columns, " columns and A ", am.columns);
  OwnedGroup owned;
  fill(&owned, am.rows, scaling, p, seed);
  const Tensor s = like(a, xm.rows, am.rows);
  fastpeft::kernels().lora_linear.shrink(xm, am, owned.group, matrix(s, "s"), run_parallel);
  return s;
}

void lora_expand_(const Tensor& y, const Tensor& s_in, const Tensor& b_in, const std::vector<int64_t>& splits) {
  if (!have_kernels({&y, &s_in, &b_in})) {
    auto stack = boxed(y, s_in, b_in, splits);
    call_reference("fastpeft_reference::lora_expand_", stack);
    return;
  }
  const Tensor s = readable(s_in), b = readable(b_in);
  const Matrix ym = matrix(y, "y"), sm = matrix(s, "s"), bm = matrix(b, "B");
  const int64_t members = static_cast<int64_t>(splits.size());
  int64_t total = 0;
  for (const int64_t n : splits) {
    STD_TORCH_CHECK(n >= 0, "splits must not be negative");
    total += n;
  }
  STD_TORCH_CHECK(
      total == bm.rows && total == ym.columns, "splits sum to ", total, ", B has ", bm.rows, " rows and y ", ym.columns,
      " columns"
  );
  STD_TORCH_CHECK(
      sm.columns == members * bm.columns && sm.rows == ym.rows, "s is (", sm.rows, ", ", sm.columns, "), expected (",
      ym.rows, ", ", members * bm.columns, ")"
  );
  fastpeft::kernels().lora_linear.expand(ym, sm, bm, splits.data(), members, run_parallel);
}

std::tuple<Tensor, Tensor> lora_expand_backward(const Tensor& dy_in, const Tensor& s_in, const Tensor& b_in) {
  if (!have_kernels({&dy_in, &s_in, &b_in})) {
    auto stack = boxed(dy_in, s_in, b_in);
    call_reference("fastpeft_reference::lora_expand_backward", stack);
    return {taken(stack[0]), taken(stack[1])};
  }
  const Tensor dy = readable(dy_in), s = readable(s_in), b = readable(b_in);
  const Matrix dym = matrix(dy, "dy"), sm = matrix(s, "s"), bm = matrix(b, "B");
  STD_TORCH_CHECK(dym.columns == bm.rows, "dy has ", dym.columns, " columns and B ", bm.rows, " rows");
  STD_TORCH_CHECK(sm.rows == dym.rows && sm.columns == bm.columns, "s must be (", dym.rows, ", ", bm.columns, ")");
  const Tensor ds = like(s, sm.rows, sm.columns), db = like(b, bm.rows, bm.columns);
  fastpeft::kernels().lora_linear.expand_backward(dym, sm, bm, matrix(ds, "ds"), matrix(db, "dB"), run_parallel);
  return {ds, db};
}

Tensor lora_shrink_backward(
    const Tensor& ds_in,
    const Tensor& x_in,
    const Tensor& a_in,
    const std::vector<double>& scaling,
    double p,
    const std::optional<Tensor>& seed,
    const std::optional<Tensor>& dx
) {
  if (!have_kernels({&ds_in, &x_in, &a_in}) || (dx.has_value() && !has_kernel(*dx))) {
    auto stack = boxed(ds_in, x_in, a_in, scaling, p, seed, dx);
    call_reference("fastpeft_reference::lora_shrink_backward", stack);
    return taken(stack[0]);
  }
  const Tensor ds = readable(ds_in), x = readable(x_in), a = readable(a_in);
  const Matrix dsm = matrix(ds, "ds"), xm = matrix(x, "x"), am = matrix(a, "A");
  STD_TORCH_CHECK(xm.columns == am.columns, "x has ", xm.columns, " columns and A ", am.columns);
  STD_TORCH_CHECK(dsm.rows == xm.rows && dsm.columns == am.rows, "ds must be (", xm.rows, ", ", am.rows, ")");
  Matrix dxm = {nullptr, 0, 0, 0, DType::f32};
  if (dx.has_value()) {
    dxm = matrix(*dx, "dx");
    STD_TORCH_CHECK(dxm.rows == xm.rows && dxm.columns == xm.columns, "dx must have the shape of x");
    if (dxm.rows * dxm.columns == 0) dxm.data = nullptr;
  }
  OwnedGroup owned;
  fill(&owned, am.rows, scaling, p, seed);
  const Tensor da = like(a, am.rows, am.columns);
  fastpeft::kernels().lora_linear.shrink_backward(dsm, xm, am, owned.group, dxm, matrix(da, "dA"), run_parallel);
  return da;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_expand_));
  m.impl("lora_expand_backward", TORCH_BOX(&lora_expand_backward));
  m.impl("lora_shrink_backward", TORCH_BOX(&lora_shrink_backward));
}
