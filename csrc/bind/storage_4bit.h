// A weight of 4 bits in bitsandbytes' storage, as every operator of fastpeft/ops/nf4.py is given it, and what must hold
// for it and for the operands beside it, on the CPU and on a GPU alike.
#pragma once

#include <string>

#include "bind.h"

namespace fastpeft {
namespace bind {

// Where the operands must lie.
struct Place {
  int gpu = -1;  // -1: the CPU

  bool holds(const Tensor& t) const { return gpu < 0 ? t.is_cpu() : t.is_cuda() && t.get_device_index() == gpu; }
  std::string name() const { return gpu < 0 ? "on the CPU" : "on GPU " + std::to_string(gpu); }
};

struct __attribute__((visibility("hidden"))) Storage4bit {
  const Tensor &packed, &absmax, &code;
  const std::optional<Tensor>&nested_code, &nested_absmax, &offset;
  int64_t blocksize, nested_blocksize;

  bool nested() const { return nested_code.has_value(); }
  int64_t blocks(int64_t rows, int64_t columns) const { return (rows * columns + blocksize - 1) / blocksize; }
};

inline bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

inline int log2_of(int64_t n) {
  int shift = 0;
  while ((int64_t(1) << shift) < n) ++shift;
  return shift;
}

// The memory of a contiguous tensor of a dtype with at least so many elements.
inline const void* plain(
    const Tensor& t, ScalarType type, int64_t least, const char* name, const char* dtype, const Place& place
) {
  STD_TORCH_CHECK(
      t.scalar_type() == type && t.is_contiguous() && t.numel() >= least && place.holds(t), name, " must have ", least,
      " contiguous ", dtype, " values ", place.name()
  );
  return t.data_ptr();
}

inline const float* floats(const Tensor& t, int64_t least, const char* name, const Place& place) {
  return static_cast<const float*>(plain(t, ScalarType::Float, least, name, "fp32", place));
}

// Throws unless the storage holds a weight (rows, columns).
inline void check_storage(const Storage4bit& s, int64_t rows, int64_t columns, const Place& place) {
  STD_TORCH_CHECK(
      s.blocksize >= 32 && s.blocksize <= 4096 && is_power_of_two(s.blocksize),
      "blocksize must be a power of two from 32 to 4096, got ", s.blocksize
  );
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "the weight must not have a negative size");
  const int64_t blocks = s.blocks(rows, columns);
  plain(s.packed, ScalarType::Byte, (rows * columns + 1) / 2, "packed", "uint8", place);
  floats(s.code, 16, "code", place);
  if (!s.nested()) {
    floats(s.absmax, blocks, "absmax", place);
    return;
  }
  STD_TORCH_CHECK(
      s.nested_absmax.has_value() && s.offset.has_value() && s.nested_blocksize > 0,
      "nested scales need nested_code, nested_absmax, offset and nested_blocksize"
  );
  plain(s.absmax, ScalarType::Byte, blocks, "absmax (of nested scales)", "uint8", place);
  floats(*s.nested_code, 256, "nested_code", place);
  const int64_t nested_blocks = (blocks + s.nested_blocksize - 1) / s.nested_blocksize;
  floats(*s.nested_absmax, nested_blocks, "nested_absmax", place);
  floats(*s.offset, 1, "offset", place);
}

// Throws unless a panel of so many columns from `column` on lies in a weight of `all` columns.
inline void check_panel(int64_t row, int64_t column, int64_t columns, int64_t all) {
  STD_TORCH_CHECK(
      row >= 0 && column >= 0 && column + columns <= all, "columns ", column, " to ", column + columns,
      " are not all among the weight's ", all
  );
}

// Throws unless left (rows, r) and right (columns, r), or where `transposed` (r, columns), are both given or both not.
inline void check_rim(
    const std::optional<Tensor>& left, const std::optional<Tensor>& right, bool transposed, int64_t rows,
    int64_t columns, const char* names
) {
  STD_TORCH_CHECK(left.has_value() == right.has_value(), names, " must both be given or both be None");
  if (!left.has_value()) return;
  STD_TORCH_CHECK(left->dim() == 2 && right->dim() == 2, names, " must be matrices");
  const int64_t r = left->size(1);
  const bool fits = left->size(0) == rows && right->size(transposed ? 0 : 1) == r &&
                    right->size(transposed ? 1 : 0) == columns;
  STD_TORCH_CHECK(
      fits, names, " must be (", rows, ", r) and ", transposed ? "(r, " : "(", columns, transposed ? ")" : ", r)"
  );
}

}  // namespace bind
}  // namespace fastpeft
