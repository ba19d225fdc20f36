// What a decoder computes between its matrix products, on a CPU: kernels.py is its only caller
// and says what each function does.
//
// Plain C++17 with GCC's vectors. Every function has an extern "C" entry for float32 (_f32) and for
// bfloat16 (_bf16), whose arithmetic is in float32 all the same; what multiplies pairs of bfloat16
// has one, where the processor can, and what draws tokens has one. Tensors come as pointers and
// strides, counted in elements. Nothing is checked here, nothing is allocated that outlives a call.

#include "chunks.h"
#include "copies.h"
#include "decodes.h"
#include "draw.h"
#include "elementwise.h"
#include "layers.h"
#include "products.h"

#ifdef __AVX512BF16__
static_assert(kPanel == kTold, "products.h tells the highest logit of each panel");
#endif

#define BATON_ENTRIES(SUFFIX, T)                                                                 \
  extern "C" void add_rms_norm_##SUFFIX(float* x, const T* delta, const float* weight,           \
                                        float eps, T* out, int64_t rows, int64_t features,       \
                                        int threads) noexcept {                                  \
    add_rms_norm(x, delta, weight, eps, out, rows, features, threads);                           \
  }                                                                                              \
  extern "C" void norm_heads_##SUFFIX(T* heads, int64_t row_stride, const float* weight,         \
                                      float eps, int64_t rows, int64_t num_heads, int64_t dim,   \
                                      int threads) noexcept {                                    \
    norm_heads(heads, row_stride, weight, eps, rows, num_heads, dim, threads);                   \
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
