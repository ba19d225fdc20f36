// What a decoder computes between its matrix products, on a CPU: kernels.py is its only caller
// and says what each function does.
//
// Plain C++17 with GCC's vectors, which the compiler lowers to what the machine has. Every
// function has an extern "C" entry for float32 (_f32) and for bfloat16 (_bf16), whose arithmetic
// is in float32 all the same. Tensors come as pointers and strides, counted in elements. Nothing
// is checked here, nothing is allocated that outlives a call.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct bfloat16 {
  uint16_t bits;
};

// ------------------------------------------------------------------------- loads and stores

Floats splat(float value) { return Floats{} + value; }

Floats load(const float* from) {
  Floats out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

Floats load(const bfloat16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Ints) << 16);
}

void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// To the nearest, ties to even; a NaN stays one.
void store(bfloat16* to, Floats value) {
#ifdef __AVX512BF16__
  const __m256bh out = _mm512_cvtneps_pbh((__m512)value);
#else
  const Ints bits = (Ints)value;
  const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Ints quiet = (bits >> 16) | 0x40;
  const Halves out = __builtin_convertvector(value == value ? rounded : quiet, Halves);
#endif
  std::memcpy(to, &out, sizeof out);
}

// The first `count` lanes; others are zero, and what lies behind is not touched.
template <class T>
Floats load(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}

template <class T>
void store(T* to, Floats value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  T lanes[kLanes];
  store(lanes, value);
  std::memcpy(to, lanes, count * sizeof(T));
}

// What `value` becomes by being stored as a T.
template <class T>
Floats rounded(Floats value) {
  T lanes[kLanes];
  store(lanes, value);
  return load(lanes);
}

float sum(Floats value) {
  float out = 0;
  for (int lane = 0; lane < kLanes; ++lane) out += value[lane];
  return out;
}

Floats at_least(Floats a, Floats b) { return a > b ? a : b; }

inline float highest(Floats value) {
  const Ints halves[4] = {{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7},
                          {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
                          {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
                          {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}};
  for (const Ints& half : halves) value = at_least(value, __builtin_shuffle(value, half));
  return value[0];
}

// e^x to within 2 units in the last place, for x within -87 and 88; beyond, that of the bound.
// Cephes' polynomial (Moshier) after the reduction of x by multiples of ln 2.
inline Floats exp(Floats x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // rounds: 1.5 * 2^23
  const Floats whole = shifted - 12582912.0f;
  const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  // The low bits of `shifted` are the multiple: 2 to its power, by adding it to the exponent.
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// Below so many elements one thread is done before another has woken up.
constexpr int64_t kWorthThreads = 16384;

int threads_for(int64_t elements, int threads) {
  return elements < kWorthThreads ? 1 : threads;
}

// ------------------------------------------------------------------------- norm and SwiGLU

template <class D, class T>
void add_rms_norm(float* x, const D* delta, const float* weight, float eps, T* out, int64_t rows,
                  int64_t features, int threads) {
#pragma omp parallel for num_threads(threads_for(rows* features, threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    float* own = x + row * features;
    Floats squares = {};
    for (int64_t i = 0; i < features; i += kLanes) {
      Floats value = load(own + i, features - i);
      if (delta != nullptr) {
        value += load(delta + row * features + i, features - i);
        store(own + i, value, features - i);
      }
      squares += value * value;
    }
    const float inverse = 1.0f / std::sqrt(sum(squares) / features + eps);
    for (int64_t i = 0; i < features; i += kLanes) {
      const Floats value = load(own + i, features - i) * inverse * load(weight + i, features - i);
      store(out + row * features + i, value, features - i);
    }
  }
}

template <class T>
void swiglu(const T* gate_up, T* out, int64_t rows, int64_t features, int threads) {
#pragma omp parallel for num_threads(threads_for(rows* features, threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* gate = gate_up + row * 2 * features;
    for (int64_t i = 0; i < features; i += kLanes) {
      const Floats g = load(gate + i, features - i);
      const Floats up = load(gate + features + i, features - i);
      const Floats silu = rounded<T>(g / (1.0f + exp(-g)));
      store(out + row * features + i, silu * up, features - i);
    }
  }
}

// ------------------------------------------------------------------------- rotary embedding

template <class T>
void rotate(T* heads, int64_t row_stride, int64_t head_stride, const float* cos, const float* sin,
            int64_t rows, int64_t num_heads, int64_t half, int threads) {
#pragma omp parallel for num_threads(threads_for(rows* num_heads* half * 2, threads)) \
    schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < num_heads; ++head) {
      T* first = heads + row * row_stride + head * head_stride;
      T* second = first + half;
      for (int64_t i = 0; i < half; i += kLanes) {
        const Floats c = rounded<T>(load(cos + row * half + i, half - i));
        const Floats s = rounded<T>(load(sin + row * half + i, half - i));
        const Floats a = load(first + i, half - i), b = load(second + i, half - i);
        store(first + i, rounded<T>(a * c) - b * s, half - i);
        store(second + i, rounded<T>(b * c) + a * s, half - i);
      }
    }
  }
}

// ------------------------------------------------------------------------- paged attention

}  // namespace

// Field for field the `_Pool` of kernels.py.
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

// Halves the number of vectors: i and i + Width become one, which keeps half of the lanes of
// either and adds their other halves to them.
template <int Width>
inline void fold(Floats each[kLanes]) {
  constexpr auto low = [](int lane) {
    return lane & Width ? kLanes + (lane ^ Width) : lane;
  };
  constexpr auto high = [](int lane) { return lane & Width ? kLanes + lane : lane ^ Width; };
  const Ints lows = {low(0), low(1), low(2),  low(3),  low(4),  low(5),  low(6),  low(7),
                     low(8), low(9), low(10), low(11), low(12), low(13), low(14), low(15)};
  const Ints highs = {high(0), high(1), high(2),  high(3),  high(4),  high(5),  high(6),  high(7),
                      high(8), high(9), high(10), high(11), high(12), high(13), high(14), high(15)};
#pragma GCC unroll 8
  for (int i = 0; i < Width; ++i) {
    const Floats a = each[i], b = each[i + Width];
    each[i] = __builtin_shuffle(a, b, lows) + __builtin_shuffle(a, b, highs);
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

// ------------------------------------------------------------------------- exact products

#ifdef __AVX512BF16__
namespace {

// A panel is the weights of so many outputs: [pair of inputs][output][2].
constexpr int64_t kPanel = 2 * kLanes;
constexpr int kMostRows = 12;  // whose sums stay in registers

template <int Rows>
void multiply(const bfloat16* x, int64_t stride, int64_t inputs, const bfloat16* panel,
              float* out, int64_t outputs, int64_t count) {
  Floats totals[Rows][2] = {};
  for (int64_t i = 0; i < inputs; i += 2, panel += 2 * kPanel) {
    const __m512bh first = (__m512bh)_mm512_loadu_si512(panel);
    const __m512bh second = (__m512bh)_mm512_loadu_si512(panel + kPanel);
#pragma GCC unroll 12
    for (int row = 0; row < Rows; ++row) {
      int32_t pair;
      std::memcpy(&pair, x + row * stride + i, sizeof pair);
      const __m512bh own = (__m512bh)_mm512_set1_epi32(pair);
      totals[row][0] = (Floats)_mm512_dpbf16_ps((__m512)totals[row][0], own, first);
      totals[row][1] = (Floats)_mm512_dpbf16_ps((__m512)totals[row][1], own, second);
    }
  }
  for (int row = 0; row < Rows; ++row) {
    store(out + row * outputs, totals[row][0], count);
    if (count > kLanes) store(out + row * outputs + kLanes, totals[row][1], count - kLanes);
  }
}

// The products of `Rows` rows of x, `stride` apart, with one panel, of which `count` outputs are
// written to rows of `out` that are `outputs` apart.
using Multiply = void (*)(const bfloat16*, int64_t, int64_t, const bfloat16*, float*, int64_t,
                          int64_t);
constexpr Multiply kMultiplies[kMostRows] = {
    multiply<1>, multiply<2>, multiply<3>, multiply<4>,  multiply<5>,  multiply<6>,
    multiply<7>, multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>};

}  // namespace

extern "C" void pack_panels(const bfloat16* weight, bfloat16* panels, int64_t outputs,
                            int64_t inputs, int threads) noexcept {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < outputs; first += kPanel) {
    bfloat16* panel = panels + first * inputs;
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t o = 0; o < kPanel; ++o)
        panel[(i / 2 * kPanel + o) * 2 + i % 2] =
            first + o < outputs ? weight[(first + o) * inputs + i] : bfloat16{0};
  }
}

extern "C" void multiply_panels(const bfloat16* x, const bfloat16* panels, float* out,
                                int64_t rows, int64_t outputs, int64_t inputs,
                                int threads) noexcept {
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < outputs; first += kPanel) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
      kMultiplies[count - 1](x + row * inputs, inputs, inputs, panels + first * inputs,
                             out + row * outputs + first, outputs, outputs - first);
    }
  }
}

// ------------------------------------------------------------------------- chunks of prompts

namespace {

int64_t up_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One KV head's context as panels: keys as the weights of scores (outputs are tokens), values as
// those of sums over tokens (outputs are elements).
struct Packed {
  int64_t dim, value_dim, tokens;  // `tokens` of either, up to a whole panel
  bfloat16 *keys, *values;

  static int64_t size(int64_t dim, int64_t value_dim, int64_t tokens) {
    return tokens * (dim + up_to(value_dim, kPanel));
  }

  // A panel's tokens, of which `count` are there; others become zeros.
  void pack(int64_t first, int64_t count, const bfloat16* const* key,
            const bfloat16* const* value) {
    bfloat16* to = keys + first * dim;
    for (int64_t t = 0; t < kPanel; ++t)
      for (int64_t i = 0; i < dim; i += 2) {
        uint32_t pair = 0;
        if (t < count) std::memcpy(&pair, key[t] + i, sizeof pair);
        std::memcpy(to + (i / 2 * kPanel + t) * 2, &pair, sizeof pair);
      }
    for (int64_t panel = 0; panel < up_to(value_dim, kPanel); panel += kPanel) {
      bfloat16* sums = values + panel * tokens + first * kPanel;
      for (int64_t t = 0; t < kPanel; ++t)
        for (int64_t i = 0; i < kPanel; ++i)
          sums[(t / 2 * kPanel + i) * 2 + t % 2] =
              t < count && panel + i < value_dim ? value[t][panel + i] : bfloat16{0};
    }
  }
};

struct Chunk {
  int64_t num_before, group, window;  // tokens before its first row; a window of 0 is none
  float scale;

  // Keys that row r sees, which is a token's and, within it, a query head's.
  int64_t last(int64_t r) const { return num_before + r / group + 1; }
  int64_t first(int64_t r) const { return window > 0 ? std::max<int64_t>(0, last(r) - window) : 0; }
};

// Attends rows row .. row + count of one KV head: `query` and `out` give each one's place.
template <class Query, class Out>
void attend_rows(const Packed& packed, const Chunk& chunk, int64_t row, int64_t count,
                 Query query, Out out, std::vector<float>& scratch) {
  const int64_t dim = packed.dim, value_width = up_to(packed.value_dim, kPanel);
  const int64_t begin = chunk.first(row) / kPanel * kPanel;
  const int64_t keys = up_to(chunk.last(row + count - 1), kPanel) - begin;
  scratch.resize(count * (keys + keys / 2 + dim / 2 + value_width));
  float* const scores = scratch.data();
  float* const sums = scores + count * keys;
  bfloat16* const weights = reinterpret_cast<bfloat16*>(sums + count * value_width);
  bfloat16* const own = weights + count * keys;

  const Multiply multiply = kMultiplies[count - 1];
  for (int64_t r = 0; r < count; ++r) std::memcpy(own + r * dim, query(row + r), dim * 2);
  for (int64_t at = 0; at < keys; at += kPanel)
    multiply(own, dim, dim, packed.keys + (begin + at) * dim, scores + at, keys, kPanel);

  float totals[kMostRows];
  for (int64_t r = 0; r < count; ++r) {
    float* const each = scores + r * keys;
    const int64_t first = chunk.first(row + r) - begin, last = chunk.last(row + r) - begin;
    std::fill(each, each + first, -INFINITY);
    std::fill(each + last, each + keys, -INFINITY);
    Floats most = splat(-INFINITY);
    for (int64_t i = 0; i < keys; i += kLanes) most = at_least(most, load(each + i));
    const Floats shift = splat(highest(most) * chunk.scale);
    Floats total = {};
    for (int64_t i = 0; i < keys; i += kLanes) {
      const Floats score = load(each + i) * chunk.scale - shift;
      const Floats weight = rounded<bfloat16>(score > -87.0f ? exp(score) : Floats{});
      store(weights + r * keys + i, weight);
      total += weight;
    }
    totals[r] = sum(total);
  }

  for (int64_t at = 0; at < value_width; at += kPanel)
    multiply(weights, keys, keys, packed.values + at * packed.tokens + begin * kPanel, sums + at,
             value_width, kPanel);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < packed.value_dim; i += kLanes) {
      const int64_t left = packed.value_dim - i;
      store(out(row + r) + i, load(sums + r * value_width + i, left) / totals[r], left);
    }
}

}  // namespace

extern "C" void attend_chunk(const Pool* pool, int64_t layer, const bfloat16* query,
                             int64_t query_stride, bfloat16* out, int64_t out_stride,
                             const int32_t* blocks, int64_t num_before, int64_t num_tokens,
                             int64_t group, float scale, int64_t window, int threads) noexcept {
  const Chunk chunk{num_before, group, window, scale};
  const int64_t dim = pool->head_dim, value_dim = pool->value_dim;
  const int64_t context = num_before + num_tokens;
  const int64_t unseen = chunk.first(0) / kPanel * kPanel;  // of no row's window
  const int64_t tokens = up_to(context, kPanel), size = Packed::size(dim, value_dim, tokens);
  std::vector<bfloat16> memory(pool->num_heads * size);
  const auto packed = [&](int64_t head) {
    bfloat16* const keys = &memory[head * size];
    return Packed{dim, value_dim, tokens, keys, keys + tokens * dim};
  };
  const int64_t panels = (tokens - unseen) / kPanel;
  const int64_t rows = num_tokens * group, tiles = (rows + kMostRows - 1) / kMostRows;

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t index = 0; index < pool->num_heads * panels; ++index) {
      const int64_t head = index / panels, first = unseen + index % panels * kPanel;
      const int64_t count = std::min(kPanel, context - first);
      const bfloat16 *keys[kPanel], *values[kPanel];
      for (int64_t t = 0; t < count; ++t) {
        const int64_t block = blocks[(first + t) / pool->block_size];
        const int64_t offset = (first + t) % pool->block_size * dim;
        keys[t] = tile<bfloat16>(*pool, block, head, layer, 0) + offset;
        values[t] = tile<bfloat16>(*pool, block, head, layer, pool->num_parts - 1) + offset;
      }
      packed(head).pack(first, count, keys, values);
    }
    std::vector<float> scratch;
#pragma omp for schedule(dynamic, 4)
    for (int64_t index = 0; index < pool->num_heads * tiles; ++index) {
      // The longest first, so that threads end together.
      const int64_t head = index % pool->num_heads, tile = tiles - 1 - index / pool->num_heads;
      const int64_t row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
      const auto place = [&](auto* base, int64_t stride, int64_t width, int64_t r) {
        return base + r / group * stride + (head * group + r % group) * width;
      };
      attend_rows(
          packed(head), chunk, row, count,
          [&](int64_t r) { return place(query, query_stride, dim, r); },
          [&](int64_t r) { return place(out, out_stride, value_dim, r); }, scratch);
    }
  }
}
#endif

// ------------------------------------------------------------------------- what Python calls

#define BATON_ENTRIES(SUFFIX, T)                                                                 \
  extern "C" void add_rms_norm_##SUFFIX(float* x, const T* delta, const float* weight,           \
                                        float eps, T* out, int64_t rows, int64_t features,       \
                                        int threads) noexcept {                                  \
    add_rms_norm(x, delta, weight, eps, out, rows, features, threads);                           \
  }                                                                                              \
  extern "C" void swiglu_##SUFFIX(const T* gate_up, T* out, int64_t rows, int64_t features,      \
                                  int threads) noexcept {                                        \
    swiglu(gate_up, out, rows, features, threads);                                               \
  }                                                                                              \
  extern "C" void rotate_##SUFFIX(T* heads, int64_t row_stride, int64_t head_stride,             \
                                  const float* cos, const float* sin, int64_t rows,              \
                                  int64_t num_heads, int64_t half, int threads) noexcept {       \
    rotate(heads, row_stride, head_stride, cos, sin, rows, num_heads, half, threads);            \
  }                                                                                              \
  extern "C" void write_kv_##SUFFIX(const Pool* pool, int64_t layer, const T* kv,                \
                                    int64_t row_stride, const int64_t* slots,                    \
                                    int64_t rows) noexcept {                                     \
    write_kv(*pool, layer, kv, row_stride, slots, rows);                                         \
  }                                                                                              \
  extern "C" void attend_decodes_##SUFFIX(                                                       \
      const Pool* pool, int64_t layer, const T* query, int64_t query_stride, T* out,             \
      const int32_t* block_table, int64_t table_width, const int32_t* contexts, int64_t spans,   \
      int64_t group, float scale, int64_t window, int threads) noexcept {                        \
    attend_decodes(*pool, layer, query, query_stride, out, block_table, table_width, contexts,   \
                   spans, group, scale, window, threads);                                        \
  }

BATON_ENTRIES(f32, float)
BATON_ENTRIES(bf16, bfloat16)

// A sum over ranks comes in float32 whatever the weights are.
extern "C" void add_rms_norm_f32_bf16(float* x, const float* delta, const float* weight, float eps,
                                      bfloat16* out, int64_t rows, int64_t features,
                                      int threads) noexcept {
  add_rms_norm(x, delta, weight, eps, out, rows, features, threads);
}
