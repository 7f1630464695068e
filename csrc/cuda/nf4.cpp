// fastpeft/ops/nf4.py on NVIDIA GPUs. What the kernels do not take goes to the operator that Python names (`fallback`):
// Triton's where there is one for the GPU, else the reference.
#include "bind/storage_4bit.h"
#include "kernels.h"
#include "runtime.h"

namespace fastpeft {
namespace cuda {
namespace {

using namespace fastpeft::bind;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kGemvRows = 4;  // up to so many rows of x, reading W takes longer than multiplying

// Whether the kernels read such a storage at all.
bool readable_storage(const Storage4bit& s) {
  const auto plain = [](const Tensor& t, ScalarType type) { return t.scalar_type() == type && t.is_contiguous(); };
  if (!plain(s.packed, ScalarType::Byte) || !plain(s.code, ScalarType::Float) || s.code.numel() != 16) return false;
  if (s.blocksize < 32 || s.blocksize > 4096 || !is_power_of_two(s.blocksize)) return false;
  if (!s.nested()) return plain(s.absmax, ScalarType::Float);
  return plain(s.absmax, ScalarType::Byte) && plain(*s.nested_code, ScalarType::Float) &&
         s.nested_code->numel() == 256 && s.nested_absmax.has_value() && plain(*s.nested_absmax, ScalarType::Float) &&
         s.offset.has_value() && plain(*s.offset, ScalarType::Float) && is_power_of_two(s.nested_blocksize);
}

Weight4bit weight(const Storage4bit& s, int64_t rows, int64_t columns, int device) {
  check_storage(s, rows, columns, {device});
  const auto data = [](const std::optional<Tensor>& t) {
    return t.has_value() ? static_cast<const float*>(t->data_ptr()) : nullptr;
  };
  return {
      static_cast<const uint8_t*>(s.packed.data_ptr()),
      s.nested() ? static_cast<const uint8_t*>(s.absmax.data_ptr()) : nullptr,
      s.nested() ? nullptr : static_cast<const float*>(s.absmax.data_ptr()),
      static_cast<const float*>(s.code.data_ptr()),
      data(s.nested_code),
      data(s.nested_absmax),
      data(s.offset),
      log2_of(s.blocksize),
      s.nested() ? log2_of(s.nested_blocksize) : 0,
      rows,
      columns,
  };
}

Matrix device_matrix(const Tensor& t, const char* name, int device) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must be a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, name, " must be on GPU ", device, ", as the input is");
  STD_TORCH_CHECK(t.size(0) < INT32_MAX && t.size(1) < INT32_MAX, name, " is too large");
  return {t.data_ptr(), t.size(0), t.size(1), t.stride(0), dtype_of(t)};
}

// x with rows that begin on 16 bytes: itself, or a copy.
Tensor aligned(const Tensor& x) {
  const int64_t each = x.scalar_type() == ScalarType::Float ? 4 : 8;
  const bool good = x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1) && x.stride(0) % each == 0 &&
                    reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  return good ? x : torch::stable::clone(torch::stable::contiguous(x));
}

Rim rim_of(const std::optional<Tensor>& left, const std::optional<Tensor>& right, bool transposed, int device) {
  if (!left.has_value()) return {nullptr, nullptr, DType::f32, DType::f32, 0, 0, 0, 0};
  const Matrix l = device_matrix(*left, "s", device), r = device_matrix(*right, "the adapter", device);
  STD_TORCH_CHECK(left->stride(1) == 1 || l.columns <= 1, "s must have contiguous rows");
  const int64_t inner = right->stride(1);
  return {
      l.data, r.data, l.dtype, r.dtype, l.stride, transposed ? inner : r.stride, transposed ? r.stride : inner,
      static_cast<int>(l.columns),
  };
}

bool rim_has_kernel(const std::optional<Tensor>& left, const std::optional<Tensor>& right) {
  return (!left.has_value() || has_kernel(*left)) && (!right.has_value() || has_kernel(*right));
}

std::string fallback_name(int device, const char* op) { return fallback(device) + "::" + op; }

void dequantize_4bit_(
    const Tensor& out,
    const Tensor& packed,
    const Tensor& absmax,
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
  const int device = out.get_device_index();
  const Storage4bit storage = {packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize};
  if (!has_kernel(out) || !readable_storage(storage) || out.dim() != 2 ||
      (out.stride(1) != 1 && out.size(1) > 1) || !runs(device)) {
    auto stack = boxed(
        out, packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize, columns, row, column
    );
    call_reference(fallback_name(device, "dequantize_4bit_").c_str(), stack);
    return;
  }
  const Matrix m = device_matrix(out, "out", device);
  check_panel(row, column, m.columns, columns);
  const Weight4bit w = weight(storage, row + m.rows, columns, device);
  const DeviceGuard guard(device);
  check(dequantize_4bit(w, m, row, column, current_stream(device)), "dequantize_4bit");
}

// The workspace of a product whose sums are split; one element where they are not.
Tensor workspace(const Tensor& x, int parts, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(x, {parts > 1 ? parts * rows * columns : 1}, ScalarType::Float);
}

Tensor linear_4bit(
    const Tensor& x_in,
    const Tensor& packed,
    const Tensor& absmax,
    const Tensor& code,
    const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& offset,
    int64_t blocksize,
    int64_t nested_blocksize,
    int64_t rows,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& s,
    const std::optional<Tensor>& B
) {
  const int device = x_in.get_device_index();
  const Storage4bit storage = {packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize};
  const bool takes = has_kernel(x_in) && x_in.dim() == 2 && readable_storage(storage) && rim_has_kernel(s, B) &&
                     (!bias.has_value() || bias->scalar_type() == x_in.scalar_type()) && runs(device) &&
                     x_in.size(1) % 32 == 0 && blocksize >= 32;
  if (!takes) {
    auto stack = boxed(
        x_in, packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize, rows, bias, s, B
    );
    call_reference(fallback_name(device, "linear_4bit").c_str(), stack);
    return taken(stack[0]);
  }
  const DeviceGuard guard(device);
  const Tensor x = aligned(x_in);
  const Matrix xm = device_matrix(x, "x", device);
  const Weight4bit w = weight(storage, rows, xm.columns, device);
  check_rim(s, B, false, xm.rows, rows, "s and B");
  const Rim rim = rim_of(s, B, false, device);
  STD_TORCH_CHECK(!bias.has_value() || (bias->numel() == rows && bias->is_contiguous()), "bias must be (", rows, ")");
  const void* b = bias.has_value() ? bias->data_ptr() : nullptr;
  const Tensor y = like(x, xm.rows, rows);
  const Matrix ym = device_matrix(y, "y", device);
  const cudaStream_t stream = current_stream(device);
  if (xm.rows <= kGemvRows || !tensor_cores(device, xm.dtype)) {
    check(linear_4bit_gemv(xm, w, b, rim, ym, multiprocessors(device), stream), "linear_4bit");
    return y;
  }
  const int parts = linear_4bit_parts(w, xm.rows, false, multiprocessors(device));
  const Tensor work = workspace(x, parts, xm.rows, rows);
  check(linear_4bit_gemm(xm, w, b, rim, ym, static_cast<float*>(work.data_ptr()), parts, stream), "linear_4bit");
  return y;
}

Tensor linear_4bit_backward(
    const Tensor& dy_in,
    const Tensor& packed,
    const Tensor& absmax,
    const Tensor& code,
    const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& offset,
    int64_t blocksize,
    int64_t nested_blocksize,
    int64_t columns,
    const std::optional<Tensor>& ds,
    const std::optional<Tensor>& A
) {
  const int device = dy_in.get_device_index();
  const Storage4bit storage = {packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize};
  const bool takes = has_kernel(dy_in) && dy_in.dim() == 2 && readable_storage(storage) && rim_has_kernel(ds, A) &&
                     runs(device) && columns % 8 == 0 && blocksize >= 32;
  if (!takes) {
    auto stack = boxed(
        dy_in, packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize, columns, ds, A
    );
    call_reference(fallback_name(device, "linear_4bit_backward").c_str(), stack);
    return taken(stack[0]);
  }
  const DeviceGuard guard(device);
  const Tensor dy = aligned(dy_in);
  const Matrix dym = device_matrix(dy, "dy", device);
  const Weight4bit w = weight(storage, dym.columns, columns, device);
  check_rim(ds, A, true, dym.rows, columns, "ds and A");
  const Rim rim = rim_of(ds, A, true, device);
  const Tensor dx = like(dy, dym.rows, columns);
  const bool cores = tensor_cores(device, dym.dtype) && dym.columns % 8 == 0 && columns % 32 == 0;
  const int sms = multiprocessors(device);
  const int parts = cores ? linear_4bit_parts(w, dym.rows, true, sms) : linear_4bit_backward_parts(w, dym.rows, sms);
  const Tensor work = workspace(dy, parts, dym.rows, columns);
  check(
      (cores ? linear_4bit_backward_gemm : linear_4bit_backward_plain)(
          dym, w, rim, device_matrix(dx, "dx", device), static_cast<float*>(work.data_ptr()), parts,
          current_stream(device)
      ),
      "linear_4bit_backward"
  );
  return dx;
}

}  // namespace
}  // namespace cuda
}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) {
  m.impl("dequantize_4bit_", TORCH_BOX(&fastpeft::cuda::dequantize_4bit_));
  m.impl("linear_4bit", TORCH_BOX(&fastpeft::cuda::linear_4bit));
  m.impl("linear_4bit_backward", TORCH_BOX(&fastpeft::cuda::linear_4bit_backward));
}
