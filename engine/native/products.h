// Products of bfloat16 that are added up and written in float32, where the processor multiplies
// pairs of it.

#pragma once

#include "vectors.h"

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

#endif
