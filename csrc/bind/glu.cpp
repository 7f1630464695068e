// fastpeft/ops/glu.py on the CPU.
#include <string>

#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::Activation;
using fastpeft::DType;
using fastpeft::Matrix;
using Maybe = std::optional<Tensor>;

const char* const ACTIVATIONS[] = {"silu",  "gelu",  "gelu_tanh", "quick_gelu", "relu",
                                   "relu2", "relu6", "hardswish", "tanh",       "sigmoid"};

// The activation's name as the dispatcher hands it over, freed with this object: torch 2.13's own conversion to
// std::string leaks one string a call.
struct Name {
  explicit Name(StringHandle handle) : handle(handle) {}
  ~Name() { torch_delete_string(handle); }
  Name(const Name&) = delete;
  Name& operator=(const Name&) = delete;
  std::string text() const {
    size_t length;
    const char* data;
    STD_TORCH_CHECK(
        torch_string_length(handle, &length) == AOTI_TORCH_SUCCESS &&
            torch_string_c_str(handle, &data) == AOTI_TORCH_SUCCESS,
        "the activation's name cannot be read"
    );
    return std::string(data, length);
  }
  StringHandle handle;
};

Activation activation(const std::string& name) {
  for (int32_t i = 0; i < int32_t(sizeof(ACTIVATIONS) / sizeof(ACTIVATIONS[0])); ++i) {
    if (name == ACTIVATIONS[i]) return Activation(i);
  }
  STD_TORCH_CHECK(false, "unknown activation '", name, "'");
}

bool have_kernel(const Maybe& t) { return !t.has_value() || has_kernel(*t); }

Maybe readable(const Maybe& t) {
  return t.has_value() ? Maybe(fastpeft::bind::readable(*t)) : std::nullopt;
}
using fastpeft::bind::readable;

Maybe maybe(StableIValue value) { return torch::stable::detail::to<Maybe>(value); }

const Matrix NONE = {nullptr, 0, 0, 0, DType::f32};

// `t` beside gate: of its shape and dtype; none for none.
Matrix beside(const Maybe& t, const Matrix& gate, const char* name) {
  if (!t.has_value()) return NONE;
  const Matrix m = matrix(*t, name);
  STD_TORCH_CHECK(
      m.rows == gate.rows && m.columns == gate.columns && m.dtype == gate.dtype, name, " is (", m.rows, ", ", m.columns,
      "), gate (", gate.rows, ", ", gate.columns, "); they must have one shape and one dtype"
  );
  return m;
}

Maybe like_given(const Maybe& t, const Matrix& gate) {
  return t.has_value() ? Maybe(like(*t, gate.rows, gate.columns)) : std::nullopt;
}

Tensor glu(const Tensor& gate_in, const Maybe& up_in, StringHandle act_in) {
  const std::string act = Name(act_in).text();
  if (!has_kernel(gate_in) || !have_kernel(up_in)) {
    auto stack = boxed(gate_in, up_in, act);
    call_reference("fastpeft_reference::glu", stack);
    return taken(stack[0]);
  }
  const Tensor gate = readable(gate_in);
  const Maybe up = readable(up_in);
  const Matrix gm = matrix(gate, "gate"), um = beside(up, gm, "up");
  const Tensor h = like(gate, gm.rows, gm.columns);
  fastpeft::kernels().glu.forward(gm, um, activation(act), matrix(h, "h"), run_parallel);
  return h;
}

std::tuple<Maybe, Maybe> glu_backward(
    const Tensor& dh_in, const Tensor& gate_in, const Maybe& up_in, StringHandle act_in
) {
  const std::string act = Name(act_in).text();
  if (!have_kernels({&dh_in, &gate_in}) || !have_kernel(up_in)) {
    auto stack = boxed(dh_in, gate_in, up_in, act);
    call_reference("fastpeft_reference::glu_backward", stack);
    return {maybe(stack[0]), maybe(stack[1])};
  }
  const Tensor gate = readable(gate_in);
  const Maybe up = readable(up_in), dh = readable(Maybe(dh_in));
  const Matrix gm = matrix(gate, "gate"), um = beside(up, gm, "up"), dhm = beside(dh, gm, "dh");
  const Tensor dgate = like(gate, gm.rows, gm.columns);
  const Maybe dup = like_given(up, gm);
  fastpeft::kernels().glu.backward(
      dhm, gm, um, activation(act), matrix(dgate, "dgate"), beside(dup, gm, "dup"), run_parallel
  );
  return {dgate, dup};
}

Matrix adapter(const Tensor& a, const Matrix& gate) {
  const Matrix m = matrix(a, "A");
  STD_TORCH_CHECK(m.columns == gate.columns, "gate has ", gate.columns, " columns and A ", m.columns);
  return m;
}

std::tuple<Tensor, Tensor> glu_shrink(
    const Tensor& gate_in,
    const Maybe& up_in,
    StringHandle act_in,
    const Tensor& a_in,
    const std::vector<double>& scaling,
    double p,
    const Maybe& seed
) {
  const std::string act = Name(act_in).text();
  if (!have_kernels({&gate_in, &a_in}) || !have_kernel(up_in)) {
    auto stack = boxed(gate_in, up_in, act, a_in, scaling, p, seed);
    call_reference("fastpeft_reference::glu_shrink", stack);
    return {taken(stack[0]), taken(stack[1])};
  }
  const Tensor gate = readable(gate_in), a = readable(a_in);
  const Maybe up = readable(up_in);
  const Matrix gm = matrix(gate, "gate"), um = beside(up, gm, "up"), am = adapter(a, gm);
  OwnedGroup owned;
  fill(&owned, am.rows, scaling, p, seed);
  const Tensor h = like(gate, gm.rows, gm.columns), s = like(a, gm.rows, am.rows);
  fastpeft::kernels().glu.shrink(
      gm, um, activation(act), am, owned.group, matrix(h, "h"), matrix(s, "s"), run_parallel
  );
  return {h, s};
}

std::tuple<Maybe, Maybe, Maybe> glu_shrink_backward(
    const Maybe& dh_in,
    const Tensor& ds_in,
    const Tensor& gate_in,
    const Maybe& up_in,
    StringHandle act_in,
    const Tensor& a_in,
    const std::vector<double>& scaling,
    double p,
    const Maybe& seed,
    bool need_input
) {
  const std::string act = Name(act_in).text();
  if (!have_kernels({&ds_in, &gate_in, &a_in}) || !have_kernel(up_in) || !have_kernel(dh_in)) {
    auto stack = boxed(dh_in, ds_in, gate_in, up_in, act, a_in, scaling, p, seed, need_input);
    call_reference("fastpeft_reference::glu_shrink_backward", stack);
    return {maybe(stack[0]), maybe(stack[1]), maybe(stack[2])};
  }
  STD_TORCH_CHECK(dh_in.has_value() || !need_input, "dh is needed for the gradient of the input");
  const Tensor gate = readable(gate_in), ds = readable(ds_in), a = readable(a_in);
  const Maybe up = readable(up_in), dh = need_input ? readable(dh_in) : std::nullopt;
  const Matrix gm = matrix(gate, "gate"), um = beside(up, gm, "up"), dhm = beside(dh, gm, "dh");
  const Matrix am = adapter(a, gm), dsm = matrix(ds, "ds");
  STD_TORCH_CHECK(dsm.rows == gm.rows && dsm.columns == am.rows, "ds must be (", gm.rows, ", ", am.rows, ")");
  OwnedGroup owned;
  fill(&owned, am.rows, scaling, p, seed);
  const Tensor da = like(a, am.rows, am.columns);
  Maybe dgate, dup;
  if (need_input) {
    dgate = like(gate, gm.rows, gm.columns);
    dup = like_given(up, gm);
  }
  fastpeft::kernels().glu.shrink_backward(
      dhm, dsm, gm, um, activation(act), am, owned.group, beside(dgate, gm, "dgate"), beside(dup, gm, "dup"),
      matrix(da, "dA"), run_parallel
  );
  return {dgate, dup, da};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("glu", TORCH_BOX(&glu));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
  m.impl("glu_shrink", TORCH_BOX(&glu_shrink));
  m.impl("glu_shrink_backward", TORCH_BOX(&glu_shrink_backward));
}
