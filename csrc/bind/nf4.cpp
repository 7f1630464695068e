// fastpeft/ops/nf4.py on the CPU.
#include "storage_4bit.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::DType;
using fastpeft::Matrix;
using fastpeft::Packed;

const Matrix nothing = {nullptr, 0, 0, 0, DType::f32};

Matrix matrix_or_nothing(const std::optional<Tensor>& t, const char* name) {
  return t.has_value() && t->numel() > 0 ? matrix(*t, name) : nothing;
}

bool have_kernels_if_given(std::initializer_list<const std::optional<Tensor>*> tensors) {
  for (const std::optional<Tensor>* t : tensors) {
    if (t->has_value() && !has_kernel(**t)) return false;
  }
  return true;
}

std::optional<Tensor> readable_if_given(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(readable(*t)) : t;
}

// Contiguous absmax in fp32, or in uint8 where scales are nested.
Tensor scales_of(const Tensor& absmax, bool nested) {
  if (nested || absmax.scalar_type() == ScalarType::Float) return torch::stable::contiguous(absmax);
  return torch::stable::contiguous(torch::stable::to(absmax, ScalarType::Float));
}

Packed weight(const Storage4bit& s, int64_t rows, int64_t columns) {
  check_storage(s, rows, columns, {});
  Packed w = {
      static_cast<const uint8_t*>(s.packed.data_ptr()), s.absmax.data_ptr(), static_cast<const float*>(s.code.data_ptr()),
      nullptr, nullptr, 0, s.nested_blocksize, log2_of(s.blocksize), rows, columns
  };
  if (s.nested()) {
    w.nested_code = static_cast<const float*>(s.nested_code->data_ptr());
    w.nested_absmax = static_cast<const float*>(s.nested_absmax->data_ptr());
    w.offset = *static_cast<const float*>(s.offset->data_ptr());
  }
  return w;
}

void dequantize_4bit_(
    const Tensor& out,
    const Tensor& packed,
    const Tensor& absmax_in,
    const Tensor& code,
    const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& offset,
    int64_t blocksize,
    int64_t nested_blocksize,
    int64_t columns,
    int64_t row,
    int64_t column
) {
  if (!has_kernel(out)) {
    auto stack = boxed(
        out, packed, absmax_in, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize, columns, row,
        column
    );
    call_reference("fastpeft_reference::dequantize_4bit_", stack);
    return;
  }
  const Matrix om = matrix(out, "out");
  check_panel(row, column, om.columns, columns);
  const Tensor absmax = scales_of(absmax_in, nested_code.has_value());
  const Storage4bit s = {packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize};
  const Packed w = weight(s, row + om.rows, columns);
  fastpeft::kernels().nf4.dequantize(w, row, column, om, run_parallel);
}

Tensor linear_4bit(
    const Tensor& x_in,
    const Tensor& packed,
    const Tensor& absmax_in,
    const Tensor& code,
    const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& offset,
    int64_t blocksize,
    int64_t nested_blocksize,
    int64_t rows,
    const std::optional<Tensor>& bias_in,
    const std::optional<Tensor>& s_in,
    const std::optional<Tensor>& b_in
) {
  if (!has_kernel(x_in) || !have_kernels_if_given({&bias_in, &s_in, &b_in})) {
    auto stack = boxed(
        x_in, packed, absmax_in, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize, rows, bias_in,
        s_in, b_in
    );
    call_reference("fastpeft_reference::linear_4bit", stack);
    return taken(stack[0]);
  }
  const Tensor x = readable(x_in), absmax = scales_of(absmax_in, nested_code.has_value());
  const std::optional<Tensor> s = readable_if_given(s_in), b = readable_if_given(b_in);
  const Matrix xm = matrix(x, "x"), sm = matrix_or_nothing(s, "s"), bm = matrix_or_nothing(b, "B");
  const Packed w =
      weight({packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize}, rows, xm.columns);
  check_rim(s, b, false, xm.rows, rows, "s and B");
  const BiasRow bias(bias_in, rows);
  const Tensor y = like(x, xm.rows, rows);
  fastpeft::kernels().nf4.forward(xm, w, bias.m, sm, bm, matrix(y, "y"), run_parallel);
  return y;
}

// Without threads: what is given to it takes a microsecond.
void run_here(int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n > 0) body(0, n, context);
}

Tensor lora_linear_4bit(
    const Tensor& x_in,
    const Tensor& packed_weight,
    const Tensor& absmax_in,
    const Tensor& code,
    const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& offset,
    int64_t blocksize,
    int64_t nested_blocksize,
    int64_t rows,
    const std::optional<Tensor>& bias_in,
    const Tensor& a_in,
    const Tensor& b_in,
    double scaling
) {
  if (!have_kernels({&x_in, &a_in, &b_in}) || !have_kernels_if_given({&bias_in})) {
    auto stack = boxed(
        x_in, packed_weight, absmax_in, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize, rows,
        bias_in, a_in, b_in, scaling
    );
    call_reference("fastpeft_reference::lora_linear_4bit", stack);
    return taken(stack[0]);
  }
  const Tensor x = packed(x_in), a = readable(a_in), b = readable(b_in);
  const Tensor absmax = scales_of(absmax_in, nested_code.has_value());
  const Matrix xm = flat(x, "x"), am = matrix(a, "A"), bm = matrix(b, "B");
  const Packed w = weight(
      {packed_weight, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize}, rows, xm.columns
  );
  STD_TORCH_CHECK(
      am.columns == xm.columns && bm.rows == rows && bm.columns == am.rows, "A must be (r, ", xm.columns, ") and B (",
      rows, ", r)"
  );
  const BiasRow bias(bias_in, rows);
  std::vector<float> s(static_cast<size_t>(xm.rows * am.rows));
  const Matrix sm = {s.empty() ? nullptr : s.data(), xm.rows, am.rows, am.rows, DType::f32};
  fastpeft::kernels().linear_rows.forward(xm, am, nothing, sm, run_here);
  for (float& each : s) each *= static_cast<float>(scaling);
  const Tensor y = with_columns(x, rows);
  fastpeft::kernels().nf4.forward(xm, w, bias.m, sm, bm, flat(y, "y"), run_parallel);
  return y;
}

Tensor linear_4bit_backward(
    const Tensor& dy_in,
    const Tensor& packed,
    const Tensor& absmax_in,
    const Tensor& code,
    const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& offset,
    int64_t blocksize,
    int64_t nested_blocksize,
    int64_t columns,
    const std::optional<Tensor>& ds_in,
    const std::optional<Tensor>& a_in
) {
  if (!has_kernel(dy_in) || !have_kernels_if_given({&ds_in, &a_in})) {
    auto stack = boxed(
        dy_in, packed, absmax_in, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize, columns, ds_in,
        a_in
    );
    call_reference("fastpeft_reference::linear_4bit_backward", stack);
    return taken(stack[0]);
  }
  const Tensor dy = readable(dy_in), absmax = scales_of(absmax_in, nested_code.has_value());
  const std::optional<Tensor> ds = readable_if_given(ds_in), a = readable_if_given(a_in);
  const Matrix dym = matrix(dy, "dy"), dsm = matrix_or_nothing(ds, "ds"), am = matrix_or_nothing(a, "A");
  const Packed w = weight(
      {packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize}, dym.columns, columns
  );
  check_rim(ds, a, true, dym.rows, columns, "ds and A");
  const Tensor dx = like(dy, dym.rows, columns);
  fastpeft::kernels().nf4.backward(dym, w, dsm, am, matrix(dx, "dx"), run_parallel);
  return dx;
}

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& weight_in, const Tensor& code_in, int64_t blocksize) {
  if (!has_kernel(weight_in)) {
    auto stack = boxed(weight_in, code_in, blocksize);
    call_reference("fastpeft_reference::quantize_4bit", stack);
    return {taken(stack[0]), taken(stack[1])};
  }
  STD_TORCH_CHECK(blocksize > 0 && blocksize % 2 == 0, "blocksize must be even and positive, got ", blocksize);
  const Tensor w = torch::stable::contiguous(weight_in);
  const Matrix wm = matrix(w, "weight");
  const int64_t n = wm.rows * wm.columns;
  const Tensor packed = torch::stable::new_empty(w, {(n + 1) / 2}, ScalarType::Byte);
  const Tensor absmax = torch::stable::new_empty(w, {(n + blocksize - 1) / blocksize}, ScalarType::Float);
  fastpeft::kernels().nf4.quantize(
      wm, floats(code_in, 16, "code", {}), blocksize, static_cast<uint8_t*>(packed.data_ptr()),
      static_cast<float*>(absmax.data_ptr()), run_parallel
  );
  return {packed, absmax};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("dequantize_4bit_", TORCH_BOX(&dequantize_4bit_));
  m.impl("linear_4bit", TORCH_BOX(&linear_4bit));
  m.impl("lora_linear_4bit", TORCH_BOX(&lora_linear_4bit));
  m.impl("linear_4bit_backward", TORCH_BOX(&linear_4bit_backward));
  m.impl("quantize_4bit", TORCH_BOX(&quantize_4bit));
}
