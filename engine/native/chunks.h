// Attention of chunks of prompts.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "decodes.h"
#include "products.h"

#ifdef __AVX512BF16__

namespace {

int64_t up_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

typedef uint16_t Words __attribute__((vector_size(2 * kPanel)));

// The first `count` bfloat16s of a row; others are zero, and what lies behind is not touched.
Words load_words(const bfloat16* from, int64_t count) {
  Words out = {};
  std::memcpy(&out, from, std::min(count, kPanel) * sizeof *from);
  return out;
}

// a[from], b[from], a[from + 1], b[from + 1] and so on.
template <int from>
Words interleave(Words a, Words b) {
  Words order;
#pragma GCC unroll 32
  for (int i = 0; i < kPanel; ++i) order[i] = from + i / 2 + i % 2 * kPanel;
  return __builtin_shuffle(a, b, order);
}

// Lane j of rows[i] and lane i of rows[j] change places.
void transpose(Ints rows[kLanes]) {
  const auto swap = [&](auto width) {
    constexpr int Width = decltype(width)::value;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & Width) == 0) exchange<Width>(rows[i], rows[i + Width]);
  };
  swap(std::integral_constant<int, 8>{});
  swap(std::integral_constant<int, 4>{});
  swap(std::integral_constant<int, 2>{});
  swap(std::integral_constant<int, 1>{});
}

// 2^x, to within 3e-6 of it: x is cut in a whole number and a rest of at most 1/2, for which this
// is the polynomial of the fourth degree with the least relative error (by Remez' exchange).
inline Floats exp2(Floats x) {
  const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, 0), r = x - whole;
  Floats p = splat(9.570101908e-3f);
  p = p * r + 5.591786032e-2f;
  p = p * r + 2.402474483e-1f;
  p = p * r + 6.931218147e-1f;
  p = p * r + 9.999992614e-1f;
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)whole);
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
    for (int64_t half = 0; half < kPanel; half += kLanes)
      for (int64_t i = 0; i < dim; i += kPanel) {
        Ints pairs[kLanes];  // of each token, and then of each pair of elements
        for (int64_t t = 0; t < kLanes; ++t)
          pairs[t] = half + t < count ? (Ints)load_words(key[half + t] + i, dim - i) : Ints{};
        transpose(pairs);
        for (int64_t pair = 0; pair < std::min<int64_t>(kLanes, (dim - i) / 2); ++pair)
          std::memcpy(keys + first * dim + ((i / 2 + pair) * kPanel + half) * 2, &pairs[pair],
                      sizeof pairs[pair]);
      }
    for (int64_t panel = 0; panel < up_to(value_dim, kPanel); panel += kPanel) {
      bfloat16* sums = values + panel * tokens + first * kPanel;
      for (int64_t t = 0; t < kPanel; t += 2, sums += 2 * kPanel) {
        const int64_t left = value_dim - panel;
        const Words even = t < count ? load_words(value[t] + panel, left) : Words{};
        const Words odd = t + 1 < count ? load_words(value[t + 1] + panel, left) : Words{};
        const Words both[2] = {interleave<0>(even, odd), interleave<kLanes>(even, odd)};
        std::memcpy(sums, both, sizeof both);
      }
    }
  }
};

// The score of a key that a row does not see: its weight is nothing beside any other's.
constexpr float kUnseen = -1e30f;

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

  const Multiply<float> multiply = kMultiplies<float>[count - 1];
  for (int64_t r = 0; r < count; ++r) std::memcpy(own + r * dim, query(row + r), dim * 2);
  for (int64_t at = 0; at < keys; at += kPanel)
    multiply(own, dim, dim, packed.keys + (begin + at) * dim, nullptr, scores + at, keys, kPanel,
             Ahead{});

  float totals[kMostRows];
  const float scale = chunk.scale * 1.44269504f;  // so that e^x is a power of 2
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t r = 0; r < count; ++r) {
    float* const each = scores + r * keys;
    const int64_t first = chunk.first(row + r) - begin, last = chunk.last(row + r) - begin;
    std::fill(each, each + first, kUnseen);
    std::fill(each + last, each + keys, kUnseen);
    // Two at a time, so that one's latency hides the other's.
    Floats most[2] = {splat(kUnseen), splat(kUnseen)};
    for (int64_t i = 0; i < keys; i += kPanel)
      for (int v = 0; v < 2; ++v) most[v] = at_least(most[v], load(each + i + v * kLanes));
    const Floats highest_score = splat(highest(at_least(most[0], most[1])));
    Floats total = {};  // of what the weights are rounded to
    for (int64_t i = 0; i < keys; i += kPanel) {
      const Floats low = exp2((load(each + i) - highest_score) * scale);
      const Floats high = exp2((load(each + i + kLanes) - highest_score) * scale);
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      std::memcpy(weights + r * keys + i, &both, sizeof both);
      total = (Floats)_mm512_dpbf16_ps((__m512)total, both, ones);
    }
    totals[r] = sum(total);
  }

  for (int64_t at = 0; at < value_width; at += kPanel)
    multiply(weights, keys, keys, packed.values + at * packed.tokens + begin * kPanel, nullptr,
             sums + at, value_width, kPanel, Ahead{});
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
  const std::unique_ptr<bfloat16[]> memory(new bfloat16[pool->num_heads * size]);
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
