// All layers of a dense decoder over one packed step, by the functions that compute them one by
// one: what a call from Python for each of them costs is paid once a step.

#pragma once

#include "chunks.h"
#include "decodes.h"
#include "elementwise.h"
#include "products.h"

#ifdef __AVX512BF16__

// The structures of layers.py, field for field. Weights of products are panels; what a layer does
// not have is null.
struct LayerWeights {
  const float *attention_norm, *head_norm, *mlp_norm;
  const bfloat16 *qkv, *out, *gate_up, *down;
  const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;
  int64_t window;  // 0: none
  int64_t rotates;
};

struct LayerSizes {
  int64_t num_layers, hidden, inner, num_heads;
  double norm_eps, scale;
};

struct ChunkSpan {
  const int32_t* blocks;
  int64_t first_row, num_tokens, num_before;
};

struct PackedStep {
  int64_t rows;
  const float *cos, *sin;  // [rows, head_dim / 2]
  const int64_t* slots;
  const int32_t *block_table, *contexts;  // of the first rows, which decode
  int64_t num_decodes, table_width;
  const ChunkSpan* chunks;
  int64_t num_chunks;
};

namespace {

// Of one step, in memory of the caller's.
struct Activations {
  bfloat16 *normed, *qkv, *attended, *gate_up, *activated;

  static int64_t size(const Pool& pool, const LayerSizes& sizes, int64_t rows) {
    const int64_t heads = sizes.num_heads * (pool.head_dim + pool.value_dim);
    const int64_t key_value = pool.num_parts * pool.num_heads * pool.head_dim;
    return rows * (sizes.hidden + heads + key_value + 3 * sizes.inner);
  }

  Activations(const Pool& pool, const LayerSizes& sizes, int64_t rows, bfloat16* memory) {
    const auto take = [&](int64_t features) {
      bfloat16* const own = memory;
      memory += rows * features;
      return own;
    };
    normed = take(sizes.hidden);
    qkv = take((sizes.num_heads + pool.num_parts * pool.num_heads) * pool.head_dim);
    attended = take(sizes.num_heads * pool.value_dim);
    gate_up = take(2 * sizes.inner);
    activated = take(sizes.inner);
  }
};

void attend_spans(const Pool& pool, int64_t layer, const LayerSizes& sizes, int64_t window,
                  const PackedStep& step, const bfloat16* query, int64_t stride, bfloat16* out,
                  int threads) {
  const int64_t group = sizes.num_heads / pool.num_heads;
  const int64_t out_stride = sizes.num_heads * pool.value_dim;
  const float scale = sizes.scale;
  if (step.num_decodes > 0)
    attend_decodes(pool, layer, query, stride, out, step.block_table, step.table_width,
                   step.contexts, step.num_decodes, group, scale, window, threads);
  for (int64_t index = 0; index < step.num_chunks; ++index) {
    const ChunkSpan& span = step.chunks[index];
    attend_chunk(&pool, layer, query + span.first_row * stride, stride,
                 out + span.first_row * out_stride, out_stride, span.blocks, span.num_before,
                 span.num_tokens, group, scale, window, threads);
  }
}

}  // namespace

extern "C" int64_t activations_size(const Pool* pool, const LayerSizes* sizes,
                                    int64_t rows) noexcept {
  return Activations::size(*pool, *sizes, rows);
}

extern "C" void compute_layers(const Pool* pool, const LayerSizes* sizes,
                               const LayerWeights* layers, const PackedStep* step, float* x,
                               bfloat16* delta, bfloat16* memory, int threads) noexcept {
  const int64_t rows = step->rows, hidden = sizes->hidden, inner = sizes->inner;
  const int64_t dim = pool->head_dim, rotated = sizes->num_heads + pool->num_heads;
  const int64_t width = (sizes->num_heads + pool->num_parts * pool->num_heads) * dim;
  const float eps = sizes->norm_eps;
  const Activations own(*pool, *sizes, rows, memory);
  for (int64_t index = 0; index < sizes->num_layers; ++index) {
    const LayerWeights& layer = layers[index];
    const bfloat16* const before = index > 0 ? delta : nullptr;
    add_rms_norm(x, before, layer.attention_norm, eps, own.normed, rows, hidden, threads);
    multiply_panels(own.normed, layer.qkv, layer.qkv_bias, own.qkv, rows, width, hidden, threads);
    if (layer.head_norm != nullptr)
      norm_heads(own.qkv, width, layer.head_norm, eps, rows, rotated, dim, threads);
    if (layer.rotates)
      rotate(own.qkv, width, dim, step->cos, step->sin, rows, rotated, dim / 2, threads);
    write_kv(*pool, index, own.qkv + sizes->num_heads * dim, width, step->slots, rows);
    attend_spans(*pool, index, *sizes, layer.window, *step, own.qkv, width, own.attended, threads);
    multiply_panels(own.attended, layer.out, layer.out_bias, delta, rows, hidden,
                    sizes->num_heads * pool->value_dim, threads);
    add_rms_norm(x, delta, layer.mlp_norm, eps, own.normed, rows, hidden, threads);
    multiply_panels(own.normed, layer.gate_up, layer.gate_up_bias, own.gate_up, rows, 2 * inner,
                    hidden, threads);
    swiglu(own.gate_up, own.activated, rows, inner, threads);
    multiply_panels(own.activated, layer.down, layer.down_bias, delta, rows, hidden, inner,
                    threads);
  }
}

#endif
