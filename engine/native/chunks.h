// Attention of chunks of prompts.

#pragma once

#include <algorithm>
#include <vector>

#include "decodes.h"
#include "products.h"

#ifdef __AVX512BF16__

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

  const Multiply<float> multiply = kMultiplies<float>[count - 1];
  for (int64_t r = 0; r < count; ++r) std::memcpy(own + r * dim, query(row + r), dim * 2);
  for (int64_t at = 0; at < keys; at += kPanel)
    multiply(own, dim, dim, packed.keys + (begin + at) * dim, nullptr, scores + at, keys, kPanel);

  float totals[kMostRows];
  for (int64_t r = 0; r < count; ++r) {
    float* const each = scores + r * keys;
    const int64_t first = chunk.first(row + r) - begin, last = chunk.last(row + r) - begin;
    std::fill(each, each + first, -INFINITY);
    std::fill(each + last, each + keys, -INFINITY);
    // Two at a time, so that one's latency hides the other's.
    Floats most[2] = {splat(-INFINITY), splat(-INFINITY)};
    for (int64_t i = 0; i < keys; i += kPanel)
      for (int v = 0; v < 2; ++v) most[v] = at_least(most[v], load(each + i + v * kLanes));
    const Floats shift = splat(highest(at_least(most[0], most[1])) * chunk.scale);
    Floats total[2] = {};
    for (int64_t i = 0; i < keys; i += kPanel)
      for (int v = 0; v < 2; ++v) {
        const Floats score = load(each + i + v * kLanes) * chunk.scale - shift;
        const Floats weight = rounded<bfloat16>(score > -87.0f ? exp(score) : Floats{});
        store(weights + r * keys + i + v * kLanes, weight);
        total[v] += weight;
      }
    totals[r] = sum(total[0] + total[1]);
  }

  for (int64_t at = 0; at < value_width; at += kPanel)
    multiply(weights, keys, keys, packed.values + at * packed.tokens + begin * kPanel, nullptr,
             sums + at, value_width, kPanel);
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
