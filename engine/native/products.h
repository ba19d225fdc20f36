// Products of bfloat16 that are added up in float32, where the processor multiplies pairs of it.

#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

#ifdef __AVX512BF16__

namespace {

// A panel is the weights of so many outputs: [pair of inputs][output][2].
constexpr int64_t kPanel = 2 * kLanes;
constexpr int kMostRows = 12;  // whose sums stay in registers
constexpr int64_t kLine = 64;  // bytes of a cache's line

// Memory that is fetched into the second level of caches while a product is computed: so many lines
// with each pair of inputs, until the end.
struct Ahead {
  const char *from, *end;
  int lines;
};

// Of tile `tile` of `tiles` that a panel of `size` bytes is multiplied with, panels following each
// other: their shares of the next panel, so that memory is never idle; of a single tile what lies
// some way ahead, which processors by themselves fetch too late.
Ahead ahead_of(const bfloat16* panel, int64_t size, int64_t tile, int64_t tiles) {
  constexpr int64_t kDistance = 8192;
  const char* const own = reinterpret_cast<const char*>(panel);
  if (tiles == 1) return {own + kDistance, own + kDistance + size, 2};
  const auto share = [&](int64_t part) { return own + size + size * part / tiles / kLine * kLine; };
  return {share(tile), share(tile + 1), 1};
}

// The products of `Rows` rows of x, `stride` apart, with one panel, and the panel's biases if there
// are any; `count` outputs are written to rows of `out` that are `outputs` apart.
template <int Rows, class T>
void multiply(const bfloat16* x, int64_t stride, int64_t inputs, const bfloat16* panel,
              const float* bias, T* out, int64_t outputs, int64_t count, Ahead ahead) {
  Floats totals[Rows][2] = {};
  if (bias != nullptr) {
    const Floats first = load(bias, std::min<int64_t>(count, kLanes));
    const Floats second = load(bias + kLanes, std::max<int64_t>(0, count - kLanes));
    for (int row = 0; row < Rows; ++row) totals[row][0] = first, totals[row][1] = second;
  }
  for (int64_t i = 0; i < inputs; i += 2, panel += 2 * kPanel) {
    for (int line = 0; line < ahead.lines && ahead.from < ahead.end; ++line, ahead.from += kLine)
      __builtin_prefetch(ahead.from, 0, 2);
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

template <class T>
using Multiply = void (*)(const bfloat16*, int64_t, int64_t, const bfloat16*, const float*, T*,
                          int64_t, int64_t, Ahead);
template <class T>
constexpr Multiply<T> kMultiplies[kMostRows] = {
    multiply<1, T>, multiply<2, T>, multiply<3, T>, multiply<4, T>,
    multiply<5, T>, multiply<6, T>, multiply<7, T>, multiply<8, T>,
    multiply<9, T>, multiply<10, T>, multiply<11, T>, multiply<12, T>};

// The highest of `count` products, at most a panel's; NaN where one of these is.
float highest_of_panel(const float* products, int64_t count) {
  if (count < kPanel) {
    float own[kPanel];
    std::fill(std::copy(products, products + count, own), own + kPanel, -__builtin_inff());
    return highest_of_panel(own, kPanel);
  }
  const Floats first = load(products), second = load(products + kLanes);
  if (_mm512_cmp_ps_mask((__m512)first, (__m512)second, _CMP_UNORD_Q)) return __builtin_nanf("");
  return highest(at_least(first, second));
}

// In float32 `told` gets the highest product of each row and panel, [rows][panels], unless null.
template <class T>
void multiply_panels(const bfloat16* x, const bfloat16* panels, const float* bias, T* out,
                     int64_t rows, int64_t outputs, int64_t inputs, int threads,
                     float* told = nullptr) {
  const int64_t num_panels = (outputs + kPanel - 1) / kPanel;
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < outputs; first += kPanel) {
    const bfloat16* const panel = panels + first * inputs;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
      const Ahead ahead = ahead_of(panel, kPanel * inputs * sizeof *panel, tile, tiles);
      kMultiplies<T>[count - 1](x + row * inputs, inputs, inputs, panel,
                                bias == nullptr ? nullptr : bias + first,
                                out + row * outputs + first, outputs, outputs - first, ahead);
      if constexpr (std::is_same_v<T, float>)
        for (int64_t own = row; told != nullptr && own < row + count; ++own)
          told[own * num_panels + first / kPanel] =
              highest_of_panel(out + own * outputs + first, outputs - first);
    }
  }
}

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

#define BATON_PRODUCTS(SUFFIX, T)                                                              \
  extern "C" void multiply_panels_##SUFFIX(const bfloat16* x, const bfloat16* panels,           \
                                           const float* bias, T* out, float* told,              \
                                           int64_t rows, int64_t outputs, int64_t inputs,       \
                                           int threads) noexcept {                              \
    multiply_panels(x, panels, bias, out, rows, outputs, inputs, threads, told);                \
  }

BATON_PRODUCTS(f32, float)
BATON_PRODUCTS(bf16, bfloat16)

#endif
