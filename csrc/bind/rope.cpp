// fastpeft/ops/rope.py on the CPU.
#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::RopeCall;
using Maybe = std::optional<Tensor>;

Tensor like_heads(const Tensor& t) { return torch::stable::empty_like(t); }

std::tuple<Maybe, Maybe> rope(
    const Tensor& q_in, const Maybe& k_in, const Tensor& cos_in, const Tensor& sin_in, bool interleaved, bool pairs,
    bool inverse
) {
  if (!have_kernels({&q_in, &cos_in, &sin_in}) || (k_in.has_value() && !has_kernel(*k_in))) {
    auto stack = boxed(q_in, k_in, cos_in, sin_in, interleaved, pairs, inverse);
    call_reference("fastpeft_reference::rope", stack);
    using torch::stable::detail::to;
    return {to<Maybe>(stack[0]), to<Maybe>(stack[1])};
  }
  STD_TORCH_CHECK(q_in.dim() == 4 && (!k_in.has_value() || k_in->dim() == 4), "q and k must be (B, H, T, D)");
  STD_TORCH_CHECK(cos_in.dim() == 3 && sin_in.dim() == 3, "cos and sin must be (B or 1, T, R)");
  const Tensor q = readable_heads(q_in), cos = readable_heads(cos_in), sin = readable_heads(sin_in);
  const Maybe k = k_in.has_value() ? Maybe(readable_heads(*k_in)) : std::nullopt;
  // Laid out as the caller's q and k; where those have no contiguous rows the result cannot be written as it lies.
  const Tensor q_out = like_heads(q_in);
  const Maybe k_out = k_in.has_value() ? Maybe(like_heads(*k_in)) : std::nullopt;
  const Tensor q_to = readable_heads(q_out);
  const Maybe k_to = k_out.has_value() ? Maybe(readable_heads(*k_out)) : std::nullopt;
  RopeCall call = {};
  call.q = heads(q, "q");
  call.q_out = heads(q_to, "q_out");
  call.cos = heads(cos, "cos");
  call.sin = heads(sin, "sin");
  if (k.has_value()) {
    call.k = heads(*k, "k");
    call.k_out = heads(*k_to, "k_out");
    STD_TORCH_CHECK(
        call.k.batch == call.q.batch && call.k.tokens == call.q.tokens && call.k.width == call.q.width &&
            call.k.dtype == call.q.dtype,
        "k must be like q in all but the number of heads"
    );
  }
  call.interleaved = interleaved;
  call.pairs = pairs;
  call.inverse = inverse;
  for (const fastpeft::Heads* table : {&call.cos, &call.sin}) {
    STD_TORCH_CHECK(
        (table->batch == 1 || table->batch == call.q.batch) && table->tokens == call.q.tokens &&
            table->width == call.cos.width,
        "cos and sin must be (1 or ", call.q.batch, ", ", call.q.tokens, ", R)"
    );
  }
  const int64_t columns = call.cos.width * (pairs ? 2 : 1);
  STD_TORCH_CHECK(columns % 2 == 0 && columns <= call.q.width, columns, " columns of ", call.q.width, " to be rotated");
  fastpeft::kernels().rope.rotate(call, run_parallel);
  if (q_to.data_ptr() != q_out.data_ptr()) torch::stable::copy_(const_cast<Tensor&>(q_out), q_to);
  if (k.has_value() && k_to->data_ptr() != k_out->data_ptr()) torch::stable::copy_(const_cast<Tensor&>(*k_out), *k_to);
  return {q_out, k_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("rope", TORCH_BOX(&rope)); }
