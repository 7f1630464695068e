// fastpeft/ops/cross_entropy.py on the CPU.
#include "bind.h"

namespace {

using namespace fastpeft::bind;
using fastpeft::CrossEntropyTile;
using fastpeft::DType;
using fastpeft::Matrix;

constexpr float SLACK = 8.0f;  // as in cross_entropy.py

CrossEntropyTile tile_of(const Tensor& z, const Tensor& labels, int64_t first, double scale, double cap, const Tensor& rows) {
  const Matrix zm = matrix(z, "z");
  STD_TORCH_CHECK(
      labels.dim() == 1 && labels.scalar_type() == ScalarType::Long && labels.is_cpu() && labels.numel() == zm.rows &&
          (labels.numel() <= 1 || labels.stride(0) == 1),
      "labels must be one contiguous int64 a row of z"
  );
  STD_TORCH_CHECK(
      rows.dim() == 2 && rows.size(0) == 4 && rows.size(1) == zm.rows && rows.scalar_type() == ScalarType::Float &&
          rows.is_cpu() && rows.is_contiguous(),
      "what is known of the rows must be contiguous fp32 (4, ", zm.rows, ")"
  );
  const Matrix none = {nullptr, 0, 0, 0, DType::f32};
  return {zm,
          zm.rows,
          static_cast<const int64_t*>(labels.data_ptr()),
          first,
          static_cast<float>(scale),
          static_cast<float>(cap),
          SLACK,
          static_cast<float*>(rows.data_ptr()),
          none};
}

void cross_entropy_accumulate_(
    const Tensor& z,
    const Tensor& labels,
    int64_t first,
    double scale,
    double cap,
    const Tensor& state,
    const std::optional<Tensor>& acc
) {
  if (!has_kernel(z)) {
    auto stack = boxed(z, labels, first, scale, cap, state, acc);
    call_reference("fastpeft_reference::cross_entropy_accumulate_", stack);
    return;
  }
  CrossEntropyTile tile = tile_of(z, labels, first, scale, cap, state);
  if (acc.has_value()) {
    tile.acc = matrix(*acc, "acc");
    STD_TORCH_CHECK(tile.acc.rows == tile.rows && tile.acc.dtype == DType::f32, "acc must be fp32 with z's rows");
  }
  if (tile.z.columns > 0) fastpeft::kernels().cross_entropy.accumulate(tile, run_parallel);
}

void cross_entropy_gradient_(
    const Tensor& z, const Tensor& labels, int64_t first, double scale, double cap, const Tensor& rows
) {
  if (!has_kernel(z)) {
    auto stack = boxed(z, labels, first, scale, cap, rows);
    call_reference("fastpeft_reference::cross_entropy_gradient_", stack);
    return;
  }
  const CrossEntropyTile tile = tile_of(z, labels, first, scale, cap, rows);
  if (tile.z.columns > 0) fastpeft::kernels().cross_entropy.gradient(tile, run_parallel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("cross_entropy_accumulate_", TORCH_BOX(&cross_entropy_accumulate_));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
}
