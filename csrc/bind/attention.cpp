// fastpeft/ops/attention.py on the CPU.
#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::AttentionCall;
using fastpeft::Heads;

// (B, H, T, D) that lies as (B, T, H, D): what a projection of all heads reads and writes.
Tensor by_tokens(const Tensor& like) {
  const int64_t b = like.size(0), h = like.size(1), t = like.size(2), d = like.size(3);
  const int64_t sizes[] = {b, h, t, d}, strides[] = {t * h * d, d, h * d, 1};
  return empty(4, sizes, strides, like);
}

void check_heads(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) STD_TORCH_CHECK(t->dim() == 4, "q, k, v, out and dout must be (B, H, T, D)");
}

AttentionCall call_of(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale) {
  AttentionCall call = {};
  call.q = heads(q, "q");
  call.k = heads(k, "k");
  call.v = heads(v, "v");
  call.causal = causal;
  call.scale = float(scale);
  const Heads *first = &call.k, *second = &call.v;
  STD_TORCH_CHECK(
      first->batch == second->batch && first->heads == second->heads && first->tokens == second->tokens &&
          first->width == second->width && first->batch == call.q.batch && first->width == call.q.width,
      "k and v must be alike, and q's in batch and width"
  );
  STD_TORCH_CHECK(
      call.q.heads > 0 && call.k.heads > 0 && call.q.heads % call.k.heads == 0 && call.k.tokens > 0, "q's ",
      call.q.heads, " heads must be a multiple of k's, ", call.k.heads, ", and k must have tokens"
  );
  STD_TORCH_CHECK(call.q.width % 16 == 0 && scale > 0, "heads must be a multiple of 16 wide, and scale positive");
  return call;
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, bool causal, double scale
) {
  if (!all_fp32({&q_in, &k_in, &v_in})) {
    auto stack = boxed(q_in, k_in, v_in, causal, scale);
    call_reference("fastpeft_reference::attention", stack);
    return {taken(stack[0]), taken(stack[1])};
  }
  check_heads({&q_in, &k_in, &v_in});
  const Tensor q = readable_heads(q_in), k = readable_heads(k_in), v = readable_heads(v_in);
  AttentionCall call = call_of(q, k, v, causal, scale);
  const Tensor out = by_tokens(q);
  const int64_t sizes[] = {q.size(0), q.size(1), q.size(2)}, strides[] = {q.size(1) * q.size(2), q.size(2), 1};
  const Tensor log_sum = empty(3, sizes, strides, q);
  call.out = heads(out, "out");
  call.log_sum = static_cast<float*>(log_sum.data_ptr());
  fastpeft::kernels().attention.forward(call, torch::stable::get_num_threads(), run_parallel);
  return {out, log_sum};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& out_in,
    const Tensor& log_sum_in, bool causal, double scale
) {
  if (!all_fp32({&dout_in, &q_in, &k_in, &v_in, &out_in, &log_sum_in})) {
    auto stack = boxed(dout_in, q_in, k_in, v_in, out_in, log_sum_in, causal, scale);
    call_reference("fastpeft_reference::attention_backward", stack);
    return {taken(stack[0]), taken(stack[1]), taken(stack[2])};
  }
  check_heads({&dout_in, &q_in, &k_in, &v_in, &out_in});
  const Tensor q = readable_heads(q_in), k = readable_heads(k_in), v = readable_heads(v_in);
  const Tensor dout = readable_heads(dout_in), out = readable_heads(out_in), log_sum = packed(log_sum_in);
  AttentionCall call = call_of(q, k, v, causal, scale);
  const Tensor dq = by_tokens(q), dk = by_tokens(k), dv = by_tokens(v);
  call.out = heads(out, "out");
  call.dout = heads(dout, "dout");
  for (const Heads* x : {&call.out, &call.dout}) {
    STD_TORCH_CHECK(
        x->batch == call.q.batch && x->heads == call.q.heads && x->tokens == call.q.tokens && x->width == call.q.width,
        "out and dout must have q's shape"
    );
  }
  STD_TORCH_CHECK(
      log_sum.numel() == call.q.batch * call.q.heads * call.q.tokens && log_sum.is_cpu(), "log_sum must be (B, H, T)"
  );
  call.log_sum = static_cast<float*>(log_sum.data_ptr());
  call.dq = heads(dq, "dq");
  call.dk = heads(dk, "dk");
  call.dv = heads(dv, "dv");
  fastpeft::kernels().attention.backward(call, torch::stable::get_num_threads(), run_parallel);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
