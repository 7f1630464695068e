// fastpeft/ops/dora_products.py on the CPU.
#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::DType;
using fastpeft::Matrix;

constexpr Matrix NOTHING = {nullptr, 0, 0, 0, DType::f32};

bool have(const std::optional<Tensor>& t) { return !t.has_value() || has_kernel(*t); }

// A vector of n floats, one an output.
const float* floats(const Tensor& t, int64_t n, const char* name) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == n && (t.stride(0) == 1 || n <= 1),
      name, " must be ", n, " contiguous floats"
  );
  return static_cast<const float*>(t.data_ptr());
}

Matrix row(const std::optional<Tensor>& t, int64_t n, const char* name) {
  if (!t.has_value()) return NOTHING;
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == n && (t->stride(0) == 1 || n <= 1), name, " must be (", n, ")");
  return {t->data_ptr(), 1, n, n, dtype_of(*t)};
}

Matrix optional(const std::optional<Tensor>& t, int64_t rows, int64_t columns, const char* name) {
  if (!t.has_value()) return NOTHING;
  Matrix m = matrix(*t, name);
  STD_TORCH_CHECK(m.rows == rows && m.columns == columns, name, " must be (", rows, ", ", columns, ")");
  if (rows * columns == 0) m.data = nullptr;
  return m;
}

void check_rim(const Matrix& y, const Matrix& s, const Matrix& b) {
  STD_TORCH_CHECK(
      b.rows == y.columns && s.rows == y.rows && s.columns == b.columns, "for y (", y.rows, ", ", y.columns,
      ") s must be (", y.rows, ", r) and B (", y.columns, ", r)"
  );
}

Tensor dora_gain(const Tensor& norm, const Tensor& magnitude) {
  if (norm.scalar_type() != ScalarType::Float || !has_kernel(magnitude)) {
    auto stack = boxed(norm, magnitude);
    call_reference("fastpeft_reference::dora_gain", stack);
    return taken(stack[0]);
  }
  const int64_t n = magnitude.numel();
  const float* lengths = floats(norm, n, "norm");
  STD_TORCH_CHECK(magnitude.is_cpu(), "magnitude must be on the CPU, as the norms are");
  const Tensor whole = torch::stable::contiguous(magnitude), out = torch::stable::new_empty(norm, {2, n});
  float* to = static_cast<float*>(out.data_ptr());
  fastpeft::kernels().weight_norm.gain(lengths, {whole.data_ptr(), 1, n, n, dtype_of(whole)}, to, to + n);
  return out;
}

void dora_expand_(
    const Tensor& y, const Tensor& s_in, const Tensor& b_in, const Tensor& gain, const std::optional<Tensor>& bias
) {
  if (!have_kernels({&y, &s_in, &b_in, &gain}) || !have(bias)) {
    auto stack = boxed(y, s_in, b_in, gain, bias);
    call_reference("fastpeft_reference::dora_expand_", stack);
    return;
  }
  const Tensor s = readable(s_in), b = readable(b_in);
  const Matrix ym = matrix(y, "y"), sm = matrix(s, "s"), bm = matrix(b, "B");
  check_rim(ym, sm, bm);
  const float* g = floats(gain, ym.columns, "gain");
  fastpeft::kernels().dora_linear.expand(ym, sm, bm, g, row(bias, ym.columns, "bias"), run_parallel);
}

std::tuple<Tensor, Tensor, Tensor> dora_expand_backward(
    const Tensor& dy_in,
    const std::optional<Tensor>& y_in,
    const std::optional<Tensor>& bias,
    const Tensor& s_in,
    const Tensor& b_in,
    const Tensor& gain,
    const std::optional<Tensor>& out_gain,
    const std::optional<Tensor>& dt
) {
  const auto alike = [&](const std::optional<Tensor>& t) {
    return !t.has_value() || t->scalar_type() == dy_in.scalar_type();
  };
  if (!have_kernels({&dy_in, &s_in, &b_in, &gain}) || !alike(y_in) || !alike(dt) || !have(bias)) {
    auto stack = boxed(dy_in, y_in, bias, s_in, b_in, gain, out_gain, dt);
    call_reference("fastpeft_reference::dora_expand_backward", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2])};
  }
  const Tensor dy = readable(dy_in), s = readable(s_in), b = readable(b_in);
  std::optional<Tensor> y;
  if (y_in.has_value()) y = readable(*y_in);
  const Matrix dym = matrix(dy, "dy"), sm = matrix(s, "s"), bm = matrix(b, "B");
  check_rim(dym, sm, bm);
  const int64_t m = dym.rows, n = dym.columns;
  const Tensor ds = like(s, m, sm.columns), db = like(b, n, bm.columns);
  const Tensor sums = torch::stable::new_empty(gain, {n});
  const float* g = floats(gain, n, "gain");
  const float* out = out_gain.has_value() ? floats(*out_gain, n, "out_gain") : nullptr;
  STD_TORCH_CHECK(out_gain.has_value() == dt.has_value(), "dt and out_gain are both given or neither");
  fastpeft::kernels().dora_linear.expand_backward(
      dym, optional(y, m, n, "y"), row(bias, n, "bias"), sm, bm, g, out, optional(dt, m, n, "dt"), matrix(ds, "ds"),
      matrix(db, "dB"), static_cast<float*>(sums.data_ptr()), run_parallel
  );
  return {ds, db, sums};
}

void dora_mix_(
    const Tensor& y,
    const Tensor& u,
    const Tensor& s_in,
    const Tensor& b_in,
    const Tensor& gain,
    const std::optional<Tensor>& bias
) {
  if (!have_kernels({&y, &u, &s_in, &b_in, &gain}) || !have(bias) || u.scalar_type() != y.scalar_type()) {
    auto stack = boxed(y, u, s_in, b_in, gain, bias);
    call_reference("fastpeft_reference::dora_mix_", stack);
    return;
  }
  const Tensor s = readable(s_in), b = readable(b_in);
  const Matrix ym = matrix(y, "y"), um = matrix(u, "u"), sm = matrix(s, "s"), bm = matrix(b, "B");
  check_rim(ym, sm, bm);
  STD_TORCH_CHECK(um.rows == ym.rows && um.columns == ym.columns, "u must have the shape of y");
  if (ym.rows * ym.columns == 0) return;
  const float* g = floats(gain, ym.columns, "gain");
  fastpeft::kernels().dora_linear.mix(ym, um, sm, bm, g, row(bias, ym.columns, "bias"), run_parallel);
}

Tensor dora_drop_(
    const Tensor& y,
    const Tensor& x_in,
    const Tensor& weight_in,
    const Tensor& s_in,
    const Tensor& b_in,
    const Tensor& gain,
    const std::optional<Tensor>& bias,
    double p,
    const Tensor& seed,
    int64_t member
) {
  if (!have_kernels({&y, &x_in, &weight_in, &s_in, &b_in, &gain}) || !have(bias)) {
    auto stack = boxed(y, x_in, weight_in, s_in, b_in, gain, bias, p, seed, member);
    call_reference("fastpeft_reference::dora_drop_", stack);
    return taken(stack[0]);
  }
  const Tensor x = readable(x_in), weight = readable(weight_in), s = readable(s_in), b = readable(b_in);
  const Matrix ym = matrix(y, "y"), xm = matrix(x, "x"), wm = matrix(weight, "weight"), sm = matrix(s, "s"),
               bm = matrix(b, "B");
  check_rim(ym, sm, bm);
  STD_TORCH_CHECK(
      xm.rows == ym.rows && wm.rows == ym.columns && wm.columns == xm.columns, "x must be (", ym.rows,
      ", K) and weight (", ym.columns, ", K)"
  );
  const Tensor t = like(y, ym.rows, ym.columns);
  if (ym.rows * ym.columns == 0) return t;
  OwnedGroup owned;
  fill(&owned, bm.columns, {1.0}, p, seed);
  fastpeft::kernels().dora_linear.drop(
      ym, xm, wm, sm, bm, floats(gain, ym.columns, "gain"), row(bias, ym.columns, "bias"), owned.group.mask, member,
      owned.scale[0], matrix(t, "t"), run_parallel
  );
  return t;
}

void dora_drop_backward_(
    const Tensor& dx,
    const Tensor& dy_in,
    const Tensor& weight_in,
    const Tensor& gain,
    double p,
    const Tensor& seed,
    int64_t member
) {
  if (!have_kernels({&dx, &dy_in, &weight_in, &gain})) {
    auto stack = boxed(dx, dy_in, weight_in, gain, p, seed, member);
    call_reference("fastpeft_reference::dora_drop_backward_", stack);
    return;
  }
  const Tensor dy = readable(dy_in), weight = readable(weight_in);
  const Matrix dxm = matrix(dx, "dx"), dym = matrix(dy, "dy"), wm = matrix(weight, "weight");
  STD_TORCH_CHECK(
      dxm.rows == dym.rows && wm.rows == dym.columns && wm.columns == dxm.columns, "weight must be (", dym.columns,
      ", ", dxm.columns, ")"
  );
  if (dxm.rows * dxm.columns == 0) return;
  OwnedGroup owned;
  fill(&owned, 1, {1.0}, p, seed);
  fastpeft::kernels().dora_linear.drop_backward(
      dxm, dym, wm, floats(gain, dym.columns, "gain"), owned.group.mask, member, run_parallel
  );
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("dora_gain", TORCH_BOX(&dora_gain));
  m.impl("dora_expand_", TORCH_BOX(&dora_expand_));
  m.impl("dora_expand_backward", TORCH_BOX(&dora_expand_backward));
  m.impl("dora_mix_", TORCH_BOX(&dora_mix_));
  m.impl("dora_drop_", TORCH_BOX(&dora_drop_));
  m.impl("dora_drop_backward_", TORCH_BOX(&dora_drop_backward_));
}
