// What the kernels of one instruction set offer, as plain data: every translation unit below csrc/cpu is compiled for
// its own instruction set, so nothing here may be an inline function that a linker could share between them.
#pragma once

#include <cstdint>

namespace fastpeft {

enum class DType : int32_t { f32, bf16, f16 };

// A matrix with contiguous rows.
struct Matrix {
  void* data;
  int64_t rows, columns, stride;  // stride: elements from one row to the next
  DType dtype;
};

// The dropout masks of a group: philox.py says which element is kept.
struct Mask {
  bool on;
  uint64_t seed;
  uint32_t threshold;  // 0 … 65536
};

// A group of G members of rank r; scale[g] holds the member's scaling times 1/(1 - p).
struct Group {
  int64_t members, rank;
  const float* scale;
  Mask mask;
};

// Calls body(begin, end, context) for ranges that together are [0, n), in parallel.
using ParallelFor = void (*)(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// One struct an operator, filled at the end of the header that has its kernels.
struct GemmKernels {
  // y = or += a diag(gain) b, all fp32; gain null: of ones. turned: the rows of the operand are the columns of the
  // matrix.
  void (*product)(
      const Matrix& a,
      bool a_turned,
      const Matrix& b,
      bool b_turned,
      const float* gain,
      const Matrix& y,
      bool add_to,
      int64_t threads,
      ParallelFor parallel
  );
};

struct LinearRowsKernels {
  // y = x w^T + bias. bias (one row) may be without data.
  void (*forward)(const Matrix& x, const Matrix& w, const Matrix& bias, const Matrix& y, ParallelFor parallel);
};

struct LoraLinearKernels {
  void (*shrink)(const Matrix& x, const Matrix& a, const Group& group, const Matrix& s, ParallelFor parallel);
  void (*expand)(
      const Matrix& y, const Matrix& s, const Matrix& b, const int64_t* splits, int64_t members, ParallelFor parallel
  );
  void (*expand_backward)(
      const Matrix& dy, const Matrix& s, const Matrix& b, const Matrix& ds, const Matrix& db, ParallelFor parallel
  );
  // dx.data may be null.
  void (*shrink_backward)(
      const Matrix& ds,
      const Matrix& x,
      const Matrix& a,
      const Group& group,
      const Matrix& dx,
      const Matrix& da,
      ParallelFor parallel
  );
};

// w.data and dx.data may be null: see lora_linear_small.h.
struct LoraLinearSmallKernels {
  void (*forward)(
      const Matrix& x,
      const Matrix& w,
      const Matrix& bias,
      const Matrix& a,
      const Matrix& b,
      float scaling,
      const Matrix& y
  );
  void (*backward)(
      const Matrix& dy,
      const Matrix& x,
      const Matrix& w,
      const Matrix& a,
      const Matrix& b,
      float scaling,
      const Matrix& dx,
      const Matrix& da,
      const Matrix& db,
      ParallelFor parallel
  );
};

struct LoraEmbeddingKernels {
  void (*forward)(
      const int64_t* indices,
      const Matrix& weight,
      const Matrix& a,
      const Matrix& b,
      float scaling,
      const Matrix& y,
      ParallelFor parallel
  );
  void (*backward)(
      const Matrix& dy,
      const int64_t* indices,
      const Matrix& a,
      const Matrix& b,
      float scaling,
      int64_t padding_idx,
      const Matrix& da,
      const Matrix& db,
      ParallelFor parallel
  );
};

struct WeightNormKernels {
  // transposed: the rows of W are the columns of w.
  void (*norm)(
      const Matrix& w, bool transposed, const Matrix& a, const Matrix& b, double scaling, float* out, ParallelFor parallel
  );
  // See dora_gain in fastpeft/ops/dora_products.py; magnitude is (1, N).
  void (*gain)(const float* norm, const Matrix& magnitude, float* gain_out, float* norm_out);
};

// bias.data may be null. gain holds N floats.
struct DoraLinearKernels {
  void (*expand)(
      const Matrix& y, const Matrix& s, const Matrix& b, const float* gain, const Matrix& bias, ParallelFor parallel
  );
  // y.data may be null (then `sums` is not written), and dt.data.
  void (*expand_backward)(
      const Matrix& dy,
      const Matrix& y,
      const Matrix& bias,
      const Matrix& s,
      const Matrix& b,
      const float* gain,
      const float* out_gain,
      const Matrix& dt,
      const Matrix& ds,
      const Matrix& db,
      float* sums,
      ParallelFor parallel
  );
  void (*mix)(
      const Matrix& y,
      const Matrix& u,
      const Matrix& s,
      const Matrix& b,
      const float* gain,
      const Matrix& bias,
      ParallelFor parallel
  );
  void (*drop)(
      const Matrix& y,
      const Matrix& x,
      const Matrix& w,
      const Matrix& s,
      const Matrix& b,
      const float* gain,
      const Matrix& bias,
      const Mask& mask,
      int64_t member,
      float kept,
      const Matrix& t,
      ParallelFor parallel
  );
  void (*drop_backward)(
      const Matrix& dx,
      const Matrix& dy,
      const Matrix& w,
      const float* gain,
      const Mask& mask,
      int64_t member,
      ParallelFor parallel
  );
};

// The parameters of a norm, rows of one (data null: none), and its statistics, one a row; RMSNorm has no bias, no mean.
struct Norm {
  Matrix weight, bias;
  float eps, offset;
  float *mean, *rstd;
};

// RMSNorm's or LayerNorm's. The data of what is optional is null: residual and h, d_h, dx, dweight, dbias.
struct NormKernels {
  void (*forward)(
      const Norm& norm, const Matrix& x, const Matrix& residual, const Matrix& h, const Matrix& y, ParallelFor parallel
  );
  void (*backward)(
      const Norm& norm,
      const Matrix& dy,
      const Matrix& x,
      const Matrix& d_h,
      const Matrix& dx,
      const Matrix& dweight,
      const Matrix& dbias,
      ParallelFor parallel
  );
  void (*shrink)(
      const Norm& norm,
      const Matrix& x,
      const Matrix& a,
      const Group& group,
      const Matrix& y,
      const Matrix& s,
      ParallelFor parallel
  );
  void (*shrink_backward)(
      const Norm& norm,
      const Matrix& dy,
      const Matrix& ds,
      const Matrix& x,
      DType y,
      const Matrix& a,
      const Group& group,
      const Matrix& dx,
      const Matrix& da,
      const Matrix& dweight,
      const Matrix& dbias,
      ParallelFor parallel
  );
};

enum class Activation : int32_t {
  silu,
  gelu,
  gelu_tanh,
  quick_gelu,
  relu,
  relu2,
  relu6,
  hardswish,
  tanh,
  sigmoid,
};

// up.data and dup.data are null where there is no up; dh and dgate are where no gradient of the input is wanted.
struct GluKernels {
  void (*forward)(const Matrix& gate, const Matrix& up, Activation act, const Matrix& h, ParallelFor parallel);
  void (*backward)(
      const Matrix& dh,
      const Matrix& gate,
      const Matrix& up,
      Activation act,
      const Matrix& dgate,
      const Matrix& dup,
      ParallelFor parallel
  );
  void (*shrink)(
      const Matrix& gate,
      const Matrix& up,
      Activation act,
      const Matrix& a,
      const Group& group,
      const Matrix& h,
      const Matrix& s,
      ParallelFor parallel
  );
  void (*shrink_backward)(
      const Matrix& dh,
      const Matrix& ds,
      const Matrix& gate,
      const Matrix& up,
      Activation act,
      const Matrix& a,
      const Group& group,
      const Matrix& dgate,
      const Matrix& dup,
      const Matrix& da,
      ParallelFor parallel
  );
};

// Heads of queries or keys, or (one head, the same for all sequences if batch is 1) a table: rows of `width` contiguous
// elements, strides of sequence, head and token.
struct Heads {
  void* data;
  int64_t batch, heads, tokens, width;
  int64_t strides[3];
  DType dtype;
};

struct RopeCall {
  Heads q, k, q_out, k_out;  // k.data is null where there is no k
  Heads cos, sin;
  bool interleaved, pairs, inverse;
};

struct RopeKernels {
  void (*rotate)(const RopeCall& call, ParallelFor parallel);
};

// q, out, dout, dq: H heads of T tokens; k, v, dk, dv: G heads of S tokens, G a divisor of H. All fp32 and of one width, a
// multiple of 16. log_sum: B x H x T. The backward's: dout and what it makes, dq, dk and dv.
struct AttentionCall {
  Heads q, k, v, out;
  float* log_sum;
  bool causal;  // query i sees the keys 0 … i
  float scale;
  Heads dout, dq, dk, dv;
};

struct AttentionKernels {
  void (*forward)(const AttentionCall& call, int64_t threads, ParallelFor parallel);
  void (*backward)(const AttentionCall& call, int64_t threads, ParallelFor parallel);
};

// A tile of logits, the columns first … of `rows` rows. state: four vectors of that length, cross_entropy.py's `state` or
// `rows`. acc.data may be null.
struct CrossEntropyTile {
  Matrix z;
  int64_t rows;
  const int64_t* labels;
  int64_t first;
  float scale, cap, slack;
  float* state;
  Matrix acc;
};

struct CrossEntropyKernels {
  void (*accumulate)(const CrossEntropyTile& tile, ParallelFor parallel);
  void (*gradient)(const CrossEntropyTile& tile, ParallelFor parallel);
};

// A weight of 4 bits, rows * columns elements in blocks of 2^shift.
struct Packed {
  const uint8_t* data;
  const void* absmax;        // fp32, or uint8 where nested_code is given
  const float* code;         // 16
  const float* nested_code;  // 256, or null
  const float* nested_absmax;
  float offset;
  int64_t nested_blocksize, shift, rows, columns;
};

struct Nf4Kernels {
  // out = the weight from (row, column) on, as far as out reaches.
  void (*dequantize)(const Packed& weight, int64_t row, int64_t column, const Matrix& out, ParallelFor parallel);
  // bias (one row) and s may be without data.
  void (*forward)(
      const Matrix& x,
      const Packed& weight,
      const Matrix& bias,
      const Matrix& s,
      const Matrix& b,
      const Matrix& y,
      ParallelFor parallel
  );
  // ds may be without data.
  void (*backward)(
      const Matrix& dy, const Packed& weight, const Matrix& ds, const Matrix& a, const Matrix& dx, ParallelFor parallel
  );
  // weight: contiguous.
  void (*quantize)(
      const Matrix& weight, const float* code, int64_t blocksize, uint8_t* packed, float* absmax, ParallelFor parallel
  );
};

struct Kernels {
  const char* name;
  GemmKernels gemm;
  LinearRowsKernels linear_rows;
  LoraLinearKernels lora_linear;
  LoraLinearSmallKernels lora_linear_small;
  LoraEmbeddingKernels lora_embedding;
  WeightNormKernels weight_norm;
  DoraLinearKernels dora_linear;
  NormKernels rms_norm;
  NormKernels layer_norm;
  GluKernels glu;
  RopeKernels rope;
  AttentionKernels attention;
  CrossEntropyKernels cross_entropy;
  Nf4Kernels nf4;
};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace fastpeft
