// fastpeft/ops/weight_norm.py on the CPU.
#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::Matrix;

Tensor weight_norm(const Tensor& weight_in, const Tensor& a_in, const Tensor& b_in, double scaling) {
  if (!have_kernels({&weight_in, &a_in, &b_in})) {
    auto stack = boxed(weight_in, a_in, b_in, scaling);
    call_reference("fastpeft_reference::weight_norm", stack);
    return taken(stack[0]);
  }
  // A weight stored as (in, out), an embedding: read as it lies.
  const bool transposed = weight_in.dim() == 2 && weight_in.stride(0) == 1 && weight_in.stride(1) != 1;
  const Tensor weight = transposed ? torch::stable::transpose(weight_in, 0, 1) : readable(weight_in);
  const Tensor a = readable(a_in), b = readable(b_in);
  const Matrix wm = matrix(weight, "weight"), am = matrix(a, "A"), bm = matrix(b, "B");
  const int64_t n = transposed ? wm.columns : wm.rows, k = transposed ? wm.rows : wm.columns;
  STD_TORCH_CHECK(
      am.columns == k && bm.rows == n && bm.columns == am.rows, "A must be (r, ", k, ") and B (", n, ", r)"
  );
  const Tensor norms = torch::stable::new_empty(b, {n}, ScalarType::Float);
  fastpeft::kernels().weight_norm.norm(
      wm, transposed, am, bm, scaling, static_cast<float*>(norms.data_ptr()), run_parallel
  );
  return norms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("weight_norm", TORCH_BOX(&weight_norm)); }
