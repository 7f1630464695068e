// fastpeft/ops/lora_embedding.py on the CPU.
#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::Matrix;

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
  fastpeft::kernels().lora_embedding.forward(
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
  fastpeft::kernels().lora_embedding.backward(
      dym, static_cast<const int64_t*>(indices.data_ptr()), am, bm, static_cast<float>(scaling), padding_idx,
      matrix(da, "dA"), matrix(db, "dB"), run_parallel
  );
  return {da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("lora_embedding", TORCH_BOX(&lora_embedding));
  m.impl("lora_embedding_backward", TORCH_BOX(&lora_embedding_backward));
}
