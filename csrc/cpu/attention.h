// softmax(scale q k^T) v for the heads of a batch, in fp32, and its gradients (fastpeft/ops/attention.py has the
// formulas). What is as long as the keys is never made: they are taken by blocks, whose softmax is corrected when a
// later one has a larger logit (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135).
#pragma once

#include "math.h"
#include "tile.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace attention {

// A block of logits is 48 KB; its keys and its values are 64 KB each at 64 columns.
constexpr int64_t QUERIES = 48, KEYS = 256;

static float* row(const Heads& x, int64_t batch, int64_t head, int64_t token) {
  return static_cast<float*>(x.data) + batch * x.strides[0] + head * x.strides[1] + token * x.strides[2];
}

// How the work is cut: a task has the queries of one head of k and v, or where those are too few, of a part of them.
struct Tasks {
  int64_t kv_heads, group, parts;  // of a group of q's heads

  Tasks(const AttentionCall& call, int64_t threads)
      : kv_heads(call.k.batch * call.k.heads), group(call.q.heads / call.k.heads), parts(1) {
    if (kv_heads % threads != 0 && kv_heads < 4 * threads) parts = group;
  }
  int64_t count() const { return kv_heads * parts; }
};

// Queries from … to of which some may look at the keys from `key` on, and how many keys those are.
struct Block {
  int64_t query, queries, key, keys;
};

// Calls body(block) for the queries that see some of the keys key … key + keys.
template <typename F>
static void for_queries(const AttentionCall& call, int64_t key, int64_t keys, const F& body) {
  const int64_t tokens = call.q.tokens;
  for (int64_t i = call.causal ? key / QUERIES * QUERIES : 0; i < tokens; i += QUERIES) {
    const int64_t queries = smaller(QUERIES, tokens - i);
    body(Block{i, queries, key, call.causal ? smaller(keys, i + queries - key) : keys});
  }
}

// How many of the block's keys its i-th query sees.
static int64_t seen(const AttentionCall& call, const Block& block, int64_t i) {
  if (!call.causal) return block.keys;
  const int64_t n = block.query + i - block.key + 1;
  return n < 0 ? 0 : smaller(block.keys, n);
}

// x[0 … rows] as [width][KEYS], columns up to a multiple of W being zero.
static void turned(const float* x, int64_t stride, int64_t rows, int64_t width, float* to) {
  const int64_t whole = round_up(rows, W);
  transpose(x, stride, rows, width, to, KEYS);
  for (int64_t j = 0; rows < whole && j < width; ++j) memset(to + j * KEYS + rows, 0, (whole - rows) * sizeof(float));
}

// c (m x n) = a b, b and c with rows of KEYS: the logits, or the products of dout with v. Sums are runs of at most 64
// terms. In one run of 256 the largest error against float64 was up to four times that of PyTorch's attention, in runs
// of 64 it is below twice, at the same time.
static void dots(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, const float* b, float* c) {
  constexpr int64_t RUN = 64;
  for (int64_t j = 0; j < k; j += RUN) {
    product(m, n, smaller(RUN, k - j), a + j, a_row, 1, b + j * KEYS, KEYS, c, KEYS, j > 0);
  }
}

// One row of logits becomes exp(scale s - reference), the rest of the row up to `end` 0. Returns the sum.
static float exponentials(float* s, int64_t n, int64_t end, float scale, float reference) {
  const Vec c = set(scale), m = set(-reference);
  Vec sum = zero();
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const Vec e = exp(fma(load(s + j), c, m));
    sum = add(sum, e);
    store(s + j, e);
  }
  if (j < n) {
    const int lanes = int(n - j);
    store(s + j, exp(fma(load(s + j, lanes), c, m)), lanes);
    for (int64_t q = n; q < j + W; ++q) s[q] = 0.0f;
    sum = add(sum, load(s + j));
    j += W;
  }
  for (; j < end; j += W) store(s + j, zero());
  return total(sum);
}

static float largest(const float* s, int64_t n) {
  Vec most = set(MINUS_INFINITY);
  int64_t j = 0;
  for (; j + W <= n; j += W) most = greatest(most, load(s + j));
  float top = greatest_lane(most);
  for (; j < n; ++j) top = s[j] > top ? s[j] : top;
  return top;
}

static void scale_row(float* x, int64_t n, float factor) {
  const Vec c = set(factor);
  for (int64_t j = 0; j < n; j += W) store(x + j, mul(c, load(x + j)));
}

// Of one head of q, all queries with the keys key … key + keys. reference, sum: a query's largest logit, times scale, and
// its sum of exponentials, so far.
static void forward_head(
    const AttentionCall& call, int64_t batch, int64_t head, const float* keys_turned, int64_t key, int64_t keys,
    float* logits, float* reference, float* sum
) {
  const int64_t width = call.q.width, of_kv = head / (call.q.heads / call.k.heads);
  const float* v = row(call.v, batch, of_kv, key);
  for_queries(call, key, keys, [&](const Block& block) {
    const int64_t columns = round_up(block.keys, W);
    float* out = row(call.out, batch, head, block.query);
    const float* q = row(call.q, batch, head, block.query);
    dots(block.queries, columns, width, q, call.q.strides[2], keys_turned, logits);
    for (int64_t i = 0; i < block.queries; ++i) {
      float *s = logits + i * KEYS, *m = reference + block.query + i, *l = sum + block.query + i;
      const int64_t n = seen(call, block, i);
      const float top = n > 0 ? call.scale * largest(s, n) : *m, before = *m;
      if (block.key == 0 || top > before) {
        *m = top;
        if (block.key > 0) {
          const float factor = __builtin_expf(before - top);
          *l *= factor;
          scale_row(out + i * call.out.strides[2], width, factor);
        }
      }
      *l += exponentials(s, n, columns, call.scale, *m);
    }
    product(
        block.queries, width, block.keys, logits, KEYS, 1, v, call.v.strides[2], out, call.out.strides[2], block.key > 0
    );
  });
}

static void forward(const AttentionCall& call, int64_t threads, ParallelFor run) {
  const Tasks tasks(call, threads);
  const int64_t tokens = call.q.tokens, width = call.q.width, each = tasks.group / tasks.parts;
  parallel(run, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    Buffer keys_turned(width * KEYS), logits(QUERIES * KEYS), state(2 * each * tokens);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t kv = task / tasks.parts, batch = kv / call.k.heads, of_kv = kv % call.k.heads;
      const int64_t first = of_kv * tasks.group + task % tasks.parts * each;
      memset(state.data, 0, 2 * each * tokens * sizeof(float));
      for (int64_t key = 0; key < call.k.tokens; key += KEYS) {
        const int64_t keys = smaller(KEYS, call.k.tokens - key);
        turned(row(call.k, batch, of_kv, key), call.k.strides[2], keys, width, keys_turned.data);
        for (int64_t h = 0; h < each; ++h) {
          float* reference = state.data + 2 * h * tokens;
          forward_head(call, batch, first + h, keys_turned.data, key, keys, logits.data, reference, reference + tokens);
        }
      }
      for (int64_t h = 0; h < each; ++h) {
        const float *reference = state.data + 2 * h * tokens, *sum = reference + tokens;
        float* log_sum = call.log_sum + (batch * call.q.heads + first + h) * tokens;
        for (int64_t i = 0; i < tokens; ++i) {
          scale_row(row(call.out, batch, first + h, i), width, 1.0f / sum[i]);
          log_sum[i] = reference[i] + __builtin_logf(sum[i]);
        }
      }
    }
  });
}

// Scratch of one worker of the backward pass.
struct Scratch {
  explicit Scratch(int64_t width)
      : keys(width * KEYS),
        values(width * KEYS),
        p(QUERIES * KEYS),
        dp(QUERIES * KEYS),
        dk(KEYS * width),
        dv(KEYS * width) {}
  Buffer keys, values;  // turned
  Buffer p, dp;
  Buffer dk, dv;  // of one head of q
};

// The same; what the keys get of this head is left in to.dk and to.dv. products: of each query's o and do.
static void backward_head(
    const AttentionCall& call, int64_t batch, int64_t head, int64_t key, int64_t keys, const float* products,
    const Scratch& to
) {
  const int64_t width = call.q.width, of_kv = head / (call.q.heads / call.k.heads);
  const float* log_sum = call.log_sum + (batch * call.q.heads + head) * call.q.tokens;
  memset(to.dk.data, 0, keys * width * sizeof(float));
  memset(to.dv.data, 0, keys * width * sizeof(float));
  for_queries(call, key, keys, [&](const Block& block) {
    const int64_t columns = round_up(block.keys, W), stride = call.q.strides[2], dstride = call.dout.strides[2];
    const float *q = row(call.q, batch, head, block.query), *dout = row(call.dout, batch, head, block.query);
    dots(block.queries, columns, width, q, stride, to.keys.data, to.p.data);
    dots(block.queries, columns, width, dout, dstride, to.values.data, to.dp.data);
    for (int64_t i = 0; i < block.queries; ++i) {
      float *p = to.p.data + i * KEYS, *dp = to.dp.data + i * KEYS;
      exponentials(p, seen(call, block, i), columns, call.scale, log_sum[block.query + i]);
      const Vec c = set(call.scale), dot = set(products[block.query + i]);
      for (int64_t j = 0; j < columns; j += W) store(dp + j, mul(mul(c, load(p + j)), sub(load(dp + j), dot)));
    }
    product(block.keys, width, block.queries, to.p.data, 1, KEYS, dout, dstride, to.dv.data, width, true);
    product(block.keys, width, block.queries, to.dp.data, 1, KEYS, q, stride, to.dk.data, width, true);
    product(
        block.queries, width, block.keys, to.dp.data, KEYS, 1, row(call.k, batch, of_kv, key), call.k.strides[2],
        row(call.dq, batch, head, block.query), call.dq.strides[2], key > 0
    );
  });
}

// to[i] = or += from[i], rows of `width`.
static void put(
    const Heads& to, int64_t batch, int64_t head, int64_t token, int64_t rows, const float* from, bool add_to
) {
  for (int64_t i = 0; i < rows; ++i) {
    float* y = row(to, batch, head, token + i);
    const float* x = from + i * to.width;
    for (int64_t j = 0; j < to.width; j += W) store(y + j, add_to ? add(load(y + j), load(x + j)) : load(x + j));
  }
}

static void backward(const AttentionCall& call, int64_t threads, ParallelFor run) {
  const Tasks tasks(call, threads);
  const int64_t tokens = call.q.tokens, width = call.q.width, each = tasks.group / tasks.parts;
  const int64_t kv_tokens = call.k.tokens, kv_size = kv_tokens * width;
  // A part's share of dk and dv is written apart and added below, in the same order whatever the number of parts.
  Buffer shares(tasks.parts > 1 ? 2 * tasks.count() * kv_size : 0);
  parallel(run, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(width);
    Buffer products(each * tokens);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t kv = task / tasks.parts, batch = kv / call.k.heads, of_kv = kv % call.k.heads;
      const int64_t first = of_kv * tasks.group + task % tasks.parts * each;
      for (int64_t h = 0; h < each; ++h) {
        for (int64_t i = 0; i < tokens; ++i) {
          const float *out = row(call.out, batch, first + h, i), *dout = row(call.dout, batch, first + h, i);
          Vec dot = zero();
          for (int64_t j = 0; j < width; j += W) dot = fma(load(out + j), load(dout + j), dot);
          products.data[h * tokens + i] = total(dot);
        }
      }
      Heads dk = call.dk, dv = call.dv;
      if (tasks.parts > 1) {
        float* share = shares.data + 2 * task * kv_size;
        dk = {share, 1, 1, kv_tokens, width, {0, 0, width}, DType::f32};
        dv = {share + kv_size, 1, 1, kv_tokens, width, {0, 0, width}, DType::f32};
      }
      for (int64_t key = 0; key < kv_tokens; key += KEYS) {
        const int64_t keys = smaller(KEYS, kv_tokens - key);
        turned(row(call.k, batch, of_kv, key), call.k.strides[2], keys, width, scratch.keys.data);
        turned(row(call.v, batch, of_kv, key), call.v.strides[2], keys, width, scratch.values.data);
        for (int64_t h = 0; h < each; ++h) {
          backward_head(call, batch, first + h, key, keys, products.data + h * tokens, scratch);
          put(dk, batch, of_kv, key, keys, scratch.dk.data, h > 0);
          put(dv, batch, of_kv, key, keys, scratch.dv.data, h > 0);
        }
      }
    }
  });
  if (tasks.parts == 1) return;
  parallel(run, tasks.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t kv = begin; kv < end; ++kv) {
      for (int64_t part = 0; part < tasks.parts; ++part) {
        const float* share = shares.data + 2 * (kv * tasks.parts + part) * kv_size;
        const int64_t batch = kv / call.k.heads, of_kv = kv % call.k.heads;
        put(call.dk, batch, of_kv, 0, kv_tokens, share, part > 0);
        put(call.dv, batch, of_kv, 0, kv_tokens, share + kv_size, part > 0);
      }
    }
  });
}

}  // namespace attention

constexpr AttentionKernels attention_kernels = {attention::forward, attention::backward};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
