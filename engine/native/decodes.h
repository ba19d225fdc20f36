// The paged KV pool: writing it, and attention of spans of one token each.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

// Field for field the `Pool` of kernels.py.
struct Pool {
  void* data;  // [block][pool head][layer][part][token][head_dim]
  int64_t num_pool_heads, num_layers, num_parts, block_size, head_dim, value_dim;
  int64_t first_head, num_heads;  // the KV heads that are this process's own
};

namespace {

template <class T>
T* tile(const Pool& pool, int64_t block, int64_t own_head, int64_t layer, int64_t part) {
  const int64_t head = block * pool.num_pool_heads + pool.first_head + own_head;
  const int64_t index = (head * pool.num_layers + layer) * pool.num_parts + part;
  return static_cast<T*>(pool.data) + index * pool.block_size * pool.head_dim;
}

template <class T>
void write_kv(const Pool& pool, int64_t layer, const T* kv, int64_t row_stride,
              const int64_t* slots, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = kv + row * row_stride;
    const int64_t block = slots[row] / pool.block_size, offset = slots[row] % pool.block_size;
    for (int64_t part = 0; part < pool.num_parts; ++part) {
      for (int64_t head = 0; head < pool.num_heads; ++head, from += pool.head_dim) {
        T* to = tile<T>(pool, block, head, layer, part) + offset * pool.head_dim;
        std::memcpy(to, from, pool.head_dim * sizeof(T));
      }
    }
  }
}

// Of every 2 * Width lanes, a's upper half and b's lower half change places.
template <int Width, class Vector>
inline void exchange(Vector& a, Vector& b) {
  constexpr auto low = [](int lane) { return lane & Width ? kLanes + (lane ^ Width) : lane; };
  constexpr auto high = [](int lane) { return lane & Width ? kLanes + lane : lane ^ Width; };
  const Ints lows = {low(0), low(1), low(2),  low(3),  low(4),  low(5),  low(6),  low(7),
                     low(8), low(9), low(10), low(11), low(12), low(13), low(14), low(15)};
  const Ints highs = {high(0), high(1), high(2),  high(3),  high(4),  high(5),  high(6),  high(7),
                      high(8), high(9), high(10), high(11), high(12), high(13), high(14), high(15)};
  const Vector first = __builtin_shuffle(a, b, lows);
  b = __builtin_shuffle(a, b, highs);
  a = first;
}

// Halves the number of vectors: i and i + Width become one, which keeps half of the lanes of
// either and adds their other halves to them.
template <int Width>
inline void fold(Floats each[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < Width; ++i) {
    exchange<Width>(each[i], each[i + Width]);
    each[i] += each[i + Width];
  }
}

// Lane i becomes the sum of the lanes of each[i].
inline Floats sums(Floats each[kLanes]) {
  fold<8>(each);
  fold<4>(each);
  fold<2>(each);
  fold<1>(each);
  return each[0];
}

// Tokens of one context that one task attends to. Where a context is cut depends on the token's
// position alone, so a sequence's result does not depend on what else is in the batch.
constexpr int64_t kSplit = 512;

// A run of one context's tokens in one layer and KV head.
struct Context {
  const Pool& pool;
  int64_t layer, own_head, first, last;
  const int32_t* blocks;

  // Calls work(rows, token, count): `count` tokens from `token` on, whose rows of `part` lie side
  // by side, at most `most` of them at once. Those of the block after next are on their way.
  template <class T, class Work>
  void for_rows(int64_t part, int64_t most, Work work) const {
    for (int64_t token = first; token < last;) {
      const int64_t offset = token % pool.block_size;
      const int64_t count = std::min({most, pool.block_size - offset, last - token});
      if (token + count + pool.block_size < last && offset + count == pool.block_size)
        fetch(tile<T>(pool, blocks[token / pool.block_size + 2], own_head, layer, part));
      const T* rows = tile<T>(pool, blocks[token / pool.block_size], own_head, layer, part);
      work(rows + offset * pool.head_dim, token, count);
      token += count;
    }
  }

  template <class T>
  void fetch(const T* rows) const {
    const char* from = reinterpret_cast<const char*>(rows);
    const int64_t size = pool.block_size * pool.head_dim * sizeof(T);
    for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(from + at);
  }
};

// What one task needs besides its result; a thread keeps it from task to task.
struct Scratch {
  std::vector<float> query, keys, scores;
  std::vector<bfloat16> few_keys;
};

// Scores of up to kLanes tokens, whose keys lie side by side at `rows`, with each query head:
// to scores[g * stride], kLanes at a time; those behind `count` mean nothing.
template <class T>
void score(const T* rows, int64_t count, int64_t dim, const T* query, int64_t group, float scale,
           Scratch& scratch, float* scores, int64_t stride) {
  const int64_t padded = (dim + kLanes - 1) / kLanes * kLanes;
  scratch.query.resize(padded);
  scratch.keys.resize(kLanes * padded);
  float* const keys = scratch.keys.data();
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < dim; i += kLanes)
      store(keys + t * padded + i, load(rows + t * dim + i, dim - i));
  for (int64_t g = 0; g < group; ++g) {
    Floats products[kLanes] = {};
    for (int64_t i = 0; i < dim; i += kLanes) {
      const Floats q = load(query + g * dim + i, dim - i);
#pragma GCC unroll 16
      for (int t = 0; t < kLanes; ++t) products[t] += q * load(keys + t * padded + i);
    }
    store(scores + g * stride, sums(products) * scale);
  }
}

#ifdef __AVX512BF16__
// Where the machine multiplies pairs of bfloat16 and adds them up in float32.
template <>
void score(const bfloat16* rows, int64_t count, int64_t dim, const bfloat16* query, int64_t group,
           float scale, Scratch& scratch, float* scores, int64_t stride) {
  constexpr int64_t kPairs = 2 * kLanes;
  const int64_t padded = (dim + kPairs - 1) / kPairs * kPairs;
  if (count < kLanes || padded != dim) {  // nothing behind them may be read
    scratch.few_keys.assign((kLanes + group) * padded, bfloat16{0});
    bfloat16* const few = scratch.few_keys.data();
    for (int64_t t = 0; t < count; ++t)
      std::memcpy(few + t * padded, rows + t * dim, dim * sizeof(bfloat16));
    for (int64_t g = 0; g < group; ++g)
      std::memcpy(few + (kLanes + g) * padded, query + g * dim, dim * sizeof(bfloat16));
    rows = few;
    query = few + kLanes * padded;
  }
  for (int64_t g = 0; g < group; ++g) {
    Floats products[kLanes] = {};
    for (int64_t i = 0; i < padded; i += kPairs) {
      const __m512bh q = (__m512bh)_mm512_loadu_si512(query + g * padded + i);
#pragma GCC unroll 16
      for (int t = 0; t < kLanes; ++t) {
        const __m512bh k = (__m512bh)_mm512_loadu_si512(rows + t * padded + i);
        products[t] = (Floats)_mm512_dpbf16_ps((__m512)products[t], q, k);
      }
    }
    store(scores + g * stride, sums(products) * scale);
  }
}
#endif

// `Heads` sums of values, each weighted by its own `weights`; they stay in registers.
template <int Heads, class T>
void weigh(const Context& context, const float* weights, int64_t stride, float* out) {
  const Pool& pool = context.pool;
  const int64_t part = pool.num_parts - 1, value_dim = pool.value_dim;
  int64_t at = 0;
  for (; at + 4 * kLanes <= value_dim; at += 4 * kLanes) {
    Floats totals[Heads][4] = {};
    context.for_rows<T>(part, kSplit, [&](const T* rows, int64_t token, int64_t count) {
      for (int64_t t = 0; t < count; ++t) {
        const T* row = rows + t * pool.head_dim + at;
        const Floats values[4] = {load(row), load(row + kLanes), load(row + 2 * kLanes),
                                  load(row + 3 * kLanes)};
#pragma GCC unroll 4
        for (int g = 0; g < Heads; ++g) {
          const float weight = weights[g * stride + token - context.first + t];
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) totals[g][v] += values[v] * weight;
        }
      }
    });
    for (int g = 0; g < Heads; ++g)
      for (int v = 0; v < 4; ++v) store(out + g * (value_dim + 2) + at + v * kLanes, totals[g][v]);
  }
  for (; at < value_dim; at += kLanes) {  // what is left of an odd length
    Floats totals[Heads] = {};
    context.for_rows<T>(part, kSplit, [&](const T* rows, int64_t token, int64_t count) {
      for (int64_t t = 0; t < count; ++t) {
        const Floats value = load(rows + t * pool.head_dim + at, value_dim - at);
        for (int g = 0; g < Heads; ++g)
          totals[g] += value * weights[g * stride + token - context.first + t];
      }
    });
    for (int g = 0; g < Heads; ++g)
      store(out + g * (value_dim + 2) + at, totals[g], value_dim - at);
  }
}

// Attends `group` query heads to the tokens first..last of one context. `out` gets, head after
// head, the sum of the values weighted by e^(score - most); then `most` and the weights' sum.
template <class T>
void attend(const Pool& pool, int64_t layer, int64_t own_head, const int32_t* blocks,
            int64_t first, int64_t last, const T* query, int64_t group, float scale,
            Scratch& scratch, float* out) {
  const int64_t dim = pool.head_dim, value_dim = pool.value_dim;
  const int64_t stride = (last - first + kLanes - 1) / kLanes * kLanes + kLanes;
  scratch.scores.resize(group * stride);
  const Context context{pool, layer, own_head, first, last, blocks};
  context.for_rows<T>(0, kLanes, [&](const T* rows, int64_t token, int64_t count) {
    // What lies behind the last token is overwritten by the next, or by the filling below.
    score(rows, count, dim, query, group, scale, scratch, &scratch.scores[token - first], stride);
  });

  const int64_t length = last - first;
  for (int64_t g = 0; g < group; ++g) {
    float* scores = &scratch.scores[g * stride];
    std::fill(scores + length, scores + stride, -INFINITY);
    Floats each = splat(-INFINITY);
    for (int64_t i = 0; i < length; i += kLanes) each = at_least(each, load(scores + i));
    const float most = highest(each);
    Floats total = {};
    for (int64_t i = 0; i < length; i += kLanes) {
      const Floats weight = exp(load(scores + i) - most);
      store(scores + i, weight);
      total += weight;
    }
    out[g * (value_dim + 2) + value_dim] = most;
    out[g * (value_dim + 2) + value_dim + 1] = sum(total);
  }

  for (int64_t g = 0; g < group; g += 4) {
    const float* weights = &scratch.scores[g * stride];
    float* to = out + g * (value_dim + 2);
    switch (std::min<int64_t>(4, group - g)) {
      case 1: weigh<1, T>(context, weights, stride, to); break;
      case 2: weigh<2, T>(context, weights, stride, to); break;
      case 3: weigh<3, T>(context, weights, stride, to); break;
      default: weigh<4, T>(context, weights, stride, to);
    }
  }
}

template <class T>
void attend_decodes(const Pool& pool, int64_t layer, const T* query, int64_t query_stride,
                    T* out, const int32_t* block_table, int64_t table_width,
                    const int32_t* contexts, int64_t spans, int64_t group, float scale,
                    int64_t window, int threads) {
  const int64_t value_dim = pool.value_dim, part_size = group * (value_dim + 2);
  struct Task {
    int64_t span, head, first, last, part;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> first_part;  // of each span and head
  int64_t parts = 0;
  for (int64_t span = 0; span < spans; ++span) {
    const int64_t context = contexts[span];
    const int64_t begin = window > 0 ? std::max<int64_t>(0, context - window) : 0;
    for (int64_t head = 0; head < pool.num_heads; ++head) {
      first_part.push_back(parts);
      for (int64_t first = begin; first < context;) {
        const int64_t last = std::min(context, (first / kSplit + 1) * kSplit);
        tasks.push_back({span, head, first, last, parts++});
        first = last;
      }
    }
  }
  first_part.push_back(parts);
  std::vector<float> results(parts * part_size);

#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (size_t index = 0; index < tasks.size(); ++index) {
      const Task& task = tasks[index];
      const T* own = query + task.span * query_stride + task.head * group * pool.head_dim;
      attend(pool, layer, task.head, block_table + task.span * table_width, task.first,
             task.last, own, group, scale, scratch, &results[task.part * part_size]);
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < spans * pool.num_heads; ++pair) {
      const float* begin = &results[first_part[pair] * part_size];
      const int64_t count = first_part[pair + 1] - first_part[pair];
      for (int64_t g = 0; g < group; ++g) {
        const float* own = begin + g * (value_dim + 2);
        float most = -INFINITY;
        for (int64_t part = 0; part < count; ++part)
          most = std::max(most, own[part * part_size + value_dim]);
        float total = 0;
        for (int64_t part = 0; part < count; ++part)
          total += own[part * part_size + value_dim + 1] *
                   std::exp(own[part * part_size + value_dim] - most);
        T* to = out + (pair * group + g) * value_dim;
        for (int64_t i = 0; i < value_dim; i += kLanes) {
          Floats value = {};
          for (int64_t part = 0; part < count; ++part) {
            const float* from = own + part * part_size;
            value += load(from + i, value_dim - i) * (std::exp(from[value_dim] - most) / total);
          }
          store(to + i, value, value_dim - i);
        }
      }
    }
  }
}

}  // namespace
