// fastpeft/ops/rms_norm.py on the CPU.
#include "norm.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::DType;
using fastpeft::Matrix;
using fastpeft::Norm;

const Matrix NONE = {nullptr, 0, 0, 0, DType::f32};

Norm norm_of(const Parameter& weight, double eps, double offset, float* rstd) {
  return {weight.m, NONE, static_cast<float>(eps), static_cast<float>(offset), nullptr, rstd};
}

std::tuple<Tensor, Tensor> rms_norm(
    const Tensor& x_in, const std::optional<Tensor>& weight_in, double eps, double offset, ScalarType out_dtype
) {
  if (!has_kernel(x_in) || !has_kernel(weight_in) || !has_kernel(out_dtype)) {
    auto stack = boxed(x_in, weight_in, eps, offset, out_dtype);
    call_reference("fastpeft_reference::rms_norm", stack);
    return {taken(stack[0]), taken(stack[1])};
  }
  const Tensor x = readable(x_in);
  const Matrix xm = matrix(x, "x");
  const Parameter weight(weight_in, xm.columns, "weight");
  const Tensor y = output_like(x, out_dtype), rstd = vector_like(x);
  const Norm norm = norm_of(weight, eps, offset, statistic(rstd, xm.rows, "rstd"));
  fastpeft::kernels().rms_norm.forward(norm, xm, NONE, NONE, matrix(y, "y"), run_parallel);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_add(
    const Tensor& x_in,
    const Tensor& residual_in,
    const std::optional<Tensor>& weight_in,
    double eps,
    double offset,
    ScalarType out_dtype
) {
  if (!have_kernels({&x_in, &residual_in}) || !has_kernel(weight_in) || !has_kernel(out_dtype)) {
    auto stack = boxed(x_in, residual_in, weight_in, eps, offset, out_dtype);
    call_reference("fastpeft_reference::rms_norm_add", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2])};
  }
  const Tensor x = readable(x_in), residual = readable(residual_in);
  const Matrix xm = matrix(x, "x"), rm = beside_x(residual, xm, "residual");
  const Parameter weight(weight_in, xm.columns, "weight");
  const Tensor y = output_like(x, out_dtype), h = like(x, xm.rows, xm.columns), rstd = vector_like(x);
  const Norm norm = norm_of(weight, eps, offset, statistic(rstd, xm.rows, "rstd"));
  fastpeft::kernels().rms_norm.forward(norm, xm, rm, matrix(h, "h"), matrix(y, "y"), run_parallel);
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy_in,
    const Tensor& x_in,
    const Tensor& rstd,
    const std::optional<Tensor>& weight_in,
    double offset,
    const std::optional<Tensor>& d_h_in,
    bool need_weight
) {
  if (!have_kernels({&dy_in, &x_in}) || !has_kernel(weight_in) || !has_kernel(d_h_in)) {
    auto stack = boxed(dy_in, x_in, rstd, weight_in, offset, d_h_in, need_weight);
    call_reference("fastpeft_reference::rms_norm_backward", stack);
    return {taken(stack[0]), taken(stack[1])};
  }
  const Tensor dy = readable(dy_in), x = readable(x_in);
  const std::optional<Tensor> d_h = readable(d_h_in);
  const Matrix xm = matrix(x, "x"), dym = like_x(dy, xm, "dy"), d_hm = beside_x(d_h, xm, "d_h");
  const Parameter weight(weight_in, xm.columns, "weight");
  const Tensor dx = like(x, xm.rows, xm.columns), dweight = weight.gradient(x, need_weight);
  const Norm norm = norm_of(weight, 0, offset, statistic(rstd, xm.rows, "rstd"));
  fastpeft::kernels().rms_norm.backward(
      norm, dym, xm, d_hm, matrix(dx, "dx"), row(dweight, weight.m), NONE, run_parallel
  );
  return {dx, dweight};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_shrink(
    const Tensor& x_in,
    const std::optional<Tensor>& weight_in,
    double eps,
    double offset,
    const Tensor& a_in,
    const std::vector<double>& scaling,
    double p,
    const std::optional<Tensor>& seed,
    ScalarType out_dtype
) {
  if (!have_kernels({&x_in, &a_in}) || !has_kernel(weight_in) || !has_kernel(out_dtype)) {
    auto stack = boxed(x_in, weight_in, eps, offset, a_in, scaling, p, seed, out_dtype);
    call_reference("fastpeft_reference::rms_norm_shrink", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2])};
  }
  const Tensor x = readable(x_in), a = readable(a_in);
  const Matrix xm = matrix(x, "x"), am = adapter(a, xm);
  const Parameter weight(weight_in, xm.columns, "weight");
  OwnedGroup owned;
  fill(&owned, am.rows, scaling, p, seed);
  const Tensor y = output_like(x, out_dtype), rstd = vector_like(x), s = like(a, xm.rows, am.rows);
  const Norm norm = norm_of(weight, eps, offset, statistic(rstd, xm.rows, "rstd"));
  fastpeft::kernels().rms_norm.shrink(norm, xm, am, owned.group, matrix(y, "y"), matrix(s, "s"), run_parallel);
  return {y, rstd, s};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_shrink_backward(
    const Tensor& dy_in,
    const Tensor& ds_in,
    const Tensor& x_in,
    const Tensor& rstd,
    const std::optional<Tensor>& weight_in,
    double offset,
    const Tensor& a_in,
    const std::vector<double>& scaling,
    double p,
    const std::optional<Tensor>& seed,
    ScalarType out_dtype,
    bool need_dx,
    bool need_weight
) {
  if (!have_kernels({&dy_in, &ds_in, &x_in, &a_in}) || !has_kernel(weight_in) || !has_kernel(out_dtype)) {
    auto stack = boxed(
        dy_in, ds_in, x_in, rstd, weight_in, offset, a_in, scaling, p, seed, out_dtype, need_dx, need_weight
    );
    call_reference("fastpeft_reference::rms_norm_shrink_backward", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2])};
  }
  const Tensor dy = readable(dy_in), ds = readable(ds_in), x = readable(x_in), a = readable(a_in);
  const Matrix xm = matrix(x, "x"), dym = like_x(dy, xm, "dy"), am = adapter(a, xm), dsm = matrix(ds, "ds");
  STD_TORCH_CHECK(dsm.rows == xm.rows && dsm.columns == am.rows, "ds must be (", xm.rows, ", ", am.rows, ")");
  const Parameter weight(weight_in, xm.columns, "weight");
  OwnedGroup owned;
  fill(&owned, am.rows, scaling, p, seed);
  const Tensor dx = need_dx ? like(x, xm.rows, xm.columns) : torch::stable::new_empty(x, {0});
  const Tensor da = like(a, am.rows, am.columns), dweight = weight.gradient(x, need_weight);
  const Norm norm = norm_of(weight, 0, offset, statistic(rstd, xm.rows, "rstd"));
  fastpeft::kernels().rms_norm.shrink_backward(
      norm, dym, dsm, xm, dtype_of(out_dtype), am, owned.group, need_dx ? matrix(dx, "dx") : NONE, matrix(da, "dA"),
      row(dweight, weight.m), NONE, run_parallel
  );
  return {dx, da, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_add", TORCH_BOX(&rms_norm_add));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("rms_norm_shrink", TORCH_BOX(&rms_norm_shrink));
  m.impl("rms_norm_shrink_backward", TORCH_BOX(&rms_norm_shrink_backward));
}
