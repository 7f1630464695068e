// torch.ops.fastpeft.* for CPU tensors, on LibTorch's stable ABI. The schemas are defined in Python (fastpeft/ops).
//
// The kernels take fp32, bf16 and fp16; anything else (float64 in gradcheck) goes to the reference implementation.
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

namespace {

using fastpeft::DType;
using fastpeft::Matrix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool has_kernel(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

bool have_kernels(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (!has_kernel(*t)) return false;
  }
  return true;
}

Matrix matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must be a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU, as the other operands are");
  STD_TORCH_CHECK(t.stride(1) == 1 || t.size(1) <= 1, name, " must have contiguous rows");
  const ScalarType type = t.scalar_type();
  const DType dtype = type == ScalarType::Float ? DType::f32 : type == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
  return {t.data_ptr(), t.size(0), t.size(1), t.stride(0), dtype};
}

// An operand that is only read may have any strides.
Tensor readable(const Tensor& t) {
  return t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1) ? t : torch::stable::contiguous(t);
}

Tensor like(const Tensor& t, int64_t rows, int64_t columns) { return torch::stable::new_empty(t, {rows, columns}); }

void run_parallel(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n > 0) {
    torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
  }
}

struct OwnedGroup {
  std::vector<float> scale;
  fastpeft::Group group;
};

// threshold and scale as philox.py has them.
void fill(
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

template <typename... Args>
std::array<StableIValue, sizeof...(Args)> boxed(const Args&... args) {
  return {torch::stable::detail::from(args)...};
}

// Runs the operator of the same name in Python's reference implementation.
template <size_t N>
void call_reference(const char* name, std::array<StableIValue, N>& stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
}

Tensor taken(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

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
  fastpeft::kernels().shrink(xm, am, owned.group, matrix(s, "s"), run_parallel);
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
  fastpeft::kernels().expand(ym, sm, bm, splits.data(), members, run_parallel);
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
  fastpeft::kernels().expand_backward(dym, sm, bm, matrix(ds, "ds"), matrix(db, "dB"), run_parallel);
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
  fastpeft::kernels().shrink_backward(dsm, xm, am, owned.group, dxm, matrix(da, "dA"), run_parallel);
  return da;
}

// Contiguous int64 indices, each checked.
Tensor checked_indices(const Tensor& indices, int64_t vocabulary) {
  STD_TORCH_CHECK(indices.dim() == 1, "indices must be one-dimensional");
  const Tensor t = torch::stable::contiguous(
      indices.scalar_type() == ScalarType::Long ? indices : torch::stable::to(indices, ScalarType::Long)
  );
  const int64_t* p = static_cast<const int64_t*>(t.data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i) {
    STD_TORCH_CHECK(
        p[i] >= 0 && p[i] < vocabulary, "index ", p[i], " is out of range for an embedding of ", vocabulary, " rows"
    );
  }
  return t;
}

Tensor lora_embedding(
    const Tensor& indices_in,
    const Tensor& weight_in,
    const Tensor& a_in,
    const Tensor& b_in,
    double scaling,
    int64_t padding_idx
) {
  if (!have_kernels({&weight_in, &a_in, &b_in})) {
    auto stack = boxed(indices_in, weight_in, a_in, b_in, scaling, padding_idx);
    call_reference("fastpeft_reference::lora_embedding", stack);
    return taken(stack[0]);
  }
  const Tensor weight = readable(weight_in), a = readable(a_in), b = readable(b_in);
  const Matrix wm = matrix(weight, "weight"), am = matrix(a, "A"), bm = matrix(b, "B");
  STD_TORCH_CHECK(
      am.columns == wm.rows && bm.rows == wm.columns && am.rows == bm.columns,
      "A must be (r, V) and B (D, r) for a weight (V, D)"
  );
  const Tensor indices = checked_indices(indices_in, wm.rows);
  const Tensor y = like(weight, indices.numel(), wm.columns);
  fastpeft::kernels().embedding(
      static_cast<const int64_t*>(indices.data_ptr()), wm, am, bm, static_cast<float>(scaling), matrix(y, "y"),
      run_parallel
  );
  return y;
}

std::tuple<Tensor, Tensor> lora_embedding_backward(
    const Tensor& dy_in,
    const Tensor& indices_in,
    const Tensor& a_in,
    const Tensor& b_in,
    double scaling,
    int64_t padding_idx
) {
  if (!have_kernels({&dy_in, &a_in, &b_in})) {
    auto stack = boxed(dy_in, indices_in, a_in, b_in, scaling, padding_idx);
    call_reference("fastpeft_reference::lora_embedding_backward", stack);
    return {taken(stack[0]), taken(stack[1])};
  }
  const Tensor dy = readable(dy_in), a = readable(a_in), b = readable(b_in);
  const Matrix dym = matrix(dy, "dy"), am = matrix(a, "A"), bm = matrix(b, "B");
  const Tensor indices = checked_indices(indices_in, am.columns);
  STD_TORCH_CHECK(
      dym.columns == bm.rows && am.rows == bm.columns && indices.numel() == dym.rows,
      "dy must be (M, D), A (r, V) and B (D, r) for M indices"
  );
  const Tensor da = like(a, am.rows, am.columns), db = like(b, bm.rows, bm.columns);
  fastpeft::kernels().embedding_backward(
      dym, static_cast<const int64_t*>(indices.data_ptr()), am, bm, static_cast<float>(scaling), padding_idx,
      matrix(da, "dA"), matrix(db, "dB"), run_parallel
  );
  return {da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_expand_));
  m.impl("lora_expand_backward", TORCH_BOX(&lora_expand_backward));
  m.impl("lora_shrink_backward", TORCH_BOX(&lora_shrink_backward));
  m.impl("lora_embedding", TORCH_BOX(&lora_embedding));
  m.impl("lora_embedding_backward", TORCH_BOX(&lora_embedding_backward));
}
