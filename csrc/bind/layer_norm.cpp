// fastpeft/ops/layer_norm.py on the CPU.
#include "norm.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::DType;
using fastpeft::Matrix;
using fastpeft::Norm;

const Matrix NONE = {nullptr, 0, 0, 0, DType::f32};

Norm norm_of(
    const Parameter& weight,
    const Parameter& bias,
    double eps,
    double offset,
    const Matrix& x,
    const Tensor& mean,
    const Tensor& rstd
) {
  return {
      weight.m, bias.m, static_cast<float>(eps), static_cast<float>(offset), statistic(mean, x.rows, "mean"),
      statistic(rstd, x.rows, "rstd")
  };
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(
    const Tensor& x_in,
    const std::optional<Tensor>& weight_in,
    const std::optional<Tensor>& bias_in,
    double eps,
    double offset,
    ScalarType out_dtype
) {
  if (!has_kernel(x_in) || !has_kernel(weight_in) || !has_kernel(bias_in) || !has_kernel(out_dtype)) {
    auto stack = boxed(x_in, weight_in, bias_in, eps, offset, out_dtype);
    call_reference("fastpeft_reference::layer_norm", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2])};
  }
  const Tensor x = readable(x_in);
  const Matrix xm = matrix(x, "x");
  const Parameter weight(weight_in, xm.columns, "weight"), bias(bias_in, xm.columns, "bias");
  const Tensor y = output_like(x, out_dtype), mean = vector_like(x), rstd = vector_like(x);
  const Norm norm = norm_of(weight, bias, eps, offset, xm, mean, rstd);
  fastpeft::kernels().layer_norm.forward(norm, xm, NONE, NONE, matrix(y, "y"), run_parallel);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_add(
    const Tensor& x_in,
    const Tensor& residual_in,
    const std::optional<Tensor>& weight_in,
    const std::optional<Tensor>& bias_in,
    double eps,
    double offset,
    ScalarType out_dtype
) {
  if (!have_kernels({&x_in, &residual_in}) || !has_kernel(weight_in) || !has_kernel(bias_in) || !has_kernel(out_dtype)) {
    auto stack = boxed(x_in, residual_in, weight_in, bias_in, eps, offset, out_dtype);
    call_reference("fastpeft_reference::layer_norm_add", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2]), taken(stack[3])};
  }
  const Tensor x = readable(x_in), residual = readable(residual_in);
  const Matrix xm = matrix(x, "x"), rm = beside_x(residual, xm, "residual");
  const Parameter weight(weight_in, xm.columns, "weight"), bias(bias_in, xm.columns, "bias");
  const Tensor y = output_like(x, out_dtype), h = like(x, xm.rows, xm.columns);
  const Tensor mean = vector_like(x), rstd = vector_like(x);
  const Norm norm = norm_of(weight, bias, eps, offset, xm, mean, rstd);
  fastpeft::kernels().layer_norm.forward(norm, xm, rm, matrix(h, "h"), matrix(y, "y"), run_parallel);
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy_in,
    const Tensor& x_in,
    const Tensor& mean,
    const Tensor& rstd,
    const std::optional<Tensor>& weight_in,
    const std::optional<Tensor>& bias_in,
    double offset,
    const std::optional<Tensor>& d_h_in,
    bool need_weight,
    bool need_bias
) {
  if (!have_kernels({&dy_in, &x_in}) || !has_kernel(weight_in) || !has_kernel(bias_in) || !has_kernel(d_h_in)) {
    auto stack = boxed(dy_in, x_in, mean, rstd, weight_in, bias_in, offset, d_h_in, need_weight, need_bias);
    call_reference("fastpeft_reference::layer_norm_backward", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2])};
  }
  const Tensor dy = readable(dy_in), x = readable(x_in);
  const std::optional<Tensor> d_h = readable(d_h_in);
  const Matrix xm = matrix(x, "x"), dym = like_x(dy, xm, "dy"), d_hm = beside_x(d_h, xm, "d_h");
  const Parameter weight(weight_in, xm.columns, "weight"), bias(bias_in, xm.columns, "bias");
  const Tensor dx = like(x, xm.rows, xm.columns);
  const Tensor dweight = weight.gradient(x, need_weight), dbias = bias.gradient(x, need_bias);
  const Norm norm = norm_of(weight, bias, 0, offset, xm, mean, rstd);
  fastpeft::kernels().layer_norm.backward(
      norm, dym, xm, d_hm, matrix(dx, "dx"), row(dweight, weight.m), row(dbias, bias.m), run_parallel
  );
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_shrink(
    const Tensor& x_in,
    const std::optional<Tensor>& weight_in,
    const std::optional<Tensor>& bias_in,
    double eps,
    double offset,
    const Tensor& a_in,
    const std::vector<double>& scaling,
    double p,
    const std::optional<Tensor>& seed,
    ScalarType out_dtype
) {
  if (!have_kernels({&x_in, &a_in}) || !has_kernel(weight_in) || !has_kernel(bias_in) || !has_kernel(out_dtype)) {
    auto stack = boxed(x_in, weight_in, bias_in, eps, offset, a_in, scaling, p, seed, out_dtype);
    call_reference("fastpeft_reference::layer_norm_shrink", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2]), taken(stack[3])};
  }
  const Tensor x = readable(x_in), a = readable(a_in);
  const Matrix xm = matrix(x, "x"), am = adapter(a, xm);
  const Parameter weight(weight_in, xm.columns, "weight"), bias(bias_in, xm.columns, "bias");
  OwnedGroup owned;
  fill(&owned, am.rows, scaling, p, seed);
  const Tensor y = output_like(x, out_dtype), s = like(a, xm.rows, am.rows);
  const Tensor mean = vector_like(x), rstd = vector_like(x);
  const Norm norm = norm_of(weight, bias, eps, offset, xm, mean, rstd);
  fastpeft::kernels().layer_norm.shrink(norm, xm, am, owned.group, matrix(y, "y"), matrix(s, "s"), run_parallel);
  return {y, mean, rstd, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_shrink_backward(
    const Tensor& dy_in,
    const Tensor& ds_in,
    const Tensor& x_in,
    const Tensor& mean,
    const Tensor& rstd,
    const std::optional<Tensor>& weight_in,
    const std::optional<Tensor>& bias_in,
    double offset,
    const Tensor& a_in,
    const std::vector<double>& scaling,
    double p,
    const std::optional<Tensor>& seed,
    ScalarType out_dtype,
    bool need_dx,
    bool need_weight,
    bool need_bias
) {
  if (!have_kernels({&dy_in, &ds_in, &x_in, &a_in}) || !has_kernel(weight_in) || !has_kernel(bias_in) ||
      !has_kernel(out_dtype)) {
    auto stack = boxed(
        dy_in, ds_in, x_in, mean, rstd, weight_in, bias_in, offset, a_in, scaling, p, seed, out_dtype, need_dx,
        need_weight, need_bias
    );
    call_reference("fastpeft_reference::layer_norm_shrink_backward", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2]), taken(stack[3])};
  }
  const Tensor dy = readable(dy_in), ds = readable(ds_in), x = readable(x_in), a = readable(a_in);
  const Matrix xm = matrix(x, "x"), dym = like_x(dy, xm, "dy"), am = adapter(a, xm), dsm = matrix(ds, "ds");
  STD_TORCH_CHECK(dsm.rows == xm.rows && dsm.columns == am.rows, "ds must be (", xm.rows, ", ", am.rows, ")");
  const Parameter weight(weight_in, xm.columns, "weight"), bias(bias_in, xm.columns, "bias");
  OwnedGroup owned;
  fill(&owned, am.rows, scaling, p, seed);
  const Tensor dx = need_dx ? like(x, xm.rows, xm.columns) : torch::stable::new_empty(x, {0});
  const Tensor da = like(a, am.rows, am.columns);
  const Tensor dweight = weight.gradient(x, need_weight), dbias = bias.gradient(x, need_bias);
  const Norm norm = norm_of(weight, bias, 0, offset, xm, mean, rstd);
  fastpeft::kernels().layer_norm.shrink_backward(
      norm, dym, dsm, xm, dtype_of(out_dtype), am, owned.group, need_dx ? matrix(dx, "dx") : NONE, matrix(da, "dA"),
      row(dweight, weight.m), row(dbias, bias.m), run_parallel
  );
  return {dx, da, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_add", TORCH_BOX(&layer_norm_add));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("layer_norm_shrink", TORCH_BOX(&layer_norm_shrink));
  m.impl("layer_norm_shrink_backward", TORCH_BOX(&layer_norm_shrink_backward));
}
