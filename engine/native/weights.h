// A row of logits by blocks: their maxima, the sums of their tokens' weights, and the token at which
// running sums reach a share of the total. A weight is e^((logit - highest) / temperature).

#pragma once

#include "vectors.h"

// What draw.py packs, field for field.
struct RowToDraw {
  double uniform;      // in [0, 1), of 53 bits
  double temperature;  // 0: the highest logit
  double min_p;        // 0: off
  double top_p;        // 1: off
  int64_t top_k;       // 0: off
};

namespace {

constexpr int64_t kColumns = 256;  // of a block
constexpr int64_t kTold = 32;      // columns whose highest logit products.h can tell
static_assert(kColumns % kTold == 0);
constexpr float kInfinity = __builtin_inff();
constexpr float kLeastTemperature = 1e-30f;  // as with torch
constexpr float kLowest = -87.0f;  // of logarithms of weights; those below are 0

typedef double Doubles __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32)));

int64_t blocks_of(int64_t size) { return (size + kColumns - 1) / kColumns; }

// One block; one that is not whole is filled up with -inf in `memory`.
const float* block_of(const float* logits, int64_t size, int64_t block, float* memory) {
  const int64_t first = block * kColumns, count = size - first;
  if (count >= kColumns) return logits + first;
  std::copy(logits + first, logits + size, memory);
  std::fill(memory + count, memory + kColumns, -kInfinity);
  return memory;
}

// ---------------------------------------------------------------------------- highest logits

struct Highest {
  std::vector<float> of_block;
  float of_row;  // NaN where one is

  void find(const float* logits, int64_t size) {
    of_block.resize(blocks_of(size));
    of_row = -kInfinity;
    Ints unordered = {};
    float memory[kColumns];
    for (size_t block = 0; block < of_block.size(); ++block) {
      const float* const own = block_of(logits, size, block, memory);
      Floats best = load(own);
      unordered |= best != best;
      for (int64_t i = kLanes; i < kColumns; i += kLanes) {
        const Floats value = load(own + i);
        unordered |= value != value;
        best = at_least(best, value);
      }
      of_block[block] = highest(best);
      of_row = std::max(of_row, of_block[block]);
    }
    for (int lane = 0; lane < kLanes; ++lane)
      if (unordered[lane] != 0) of_row = __builtin_nanf("");
  }

  // What `find` would, from the highest of each `kTold` columns; NaN where one of these is.
  void take(const float* told, int64_t size) {
    constexpr int64_t kOfBlock = kColumns / kTold;
    of_block.assign(blocks_of(size), -kInfinity);
    of_row = -kInfinity;
    bool has_nan = false;
    for (int64_t i = 0; i < (size + kTold - 1) / kTold; ++i) {
      float& own = of_block[i / kOfBlock];
      own = std::max(own, told[i]);
      has_nan |= is_nan(told[i]);
    }
    for (const float own : of_block) of_row = std::max(of_row, own);
    if (has_nan) of_row = __builtin_nanf("");
  }

  // The first that is as high; of rows with a NaN, the first of these.
  int64_t place(const float* logits, int64_t size) const {
    if (of_row != of_row) return std::find_if(logits, logits + size, is_nan) - logits;
    const auto block = std::find(of_block.begin(), of_block.end(), of_row) - of_block.begin();
    const float* const first = logits + block * kColumns;
    return std::find(first, logits + size, of_row) - logits;
  }

  static bool is_nan(float value) { return value != value; }
};

// ------------------------------------------------------------------------------------ weights

struct Scale {
  float highest, min_p;
  float inverse, rest;  // of the temperature, and what float32 leaves of it
  double temperature;

  Scale(float highest, const RowToDraw& row) : highest(highest), min_p(row.min_p) {
    temperature = std::max(static_cast<float>(row.temperature), kLeastTemperature);
    inverse = 1.0 / temperature;
    rest = 1.0 / temperature - inverse;
  }

  // A logit below which weights are certainly less than e^`logarithm`.
  double least(double logarithm) const {
    return highest + temperature * (logarithm - 1e-3) - std::abs(highest) * 1e-6;
  }
};

// Of one block. Not inlined: every caller gets the same bits.
template <bool kIsPlain>
__attribute__((noinline)) void weigh_as(const float* logits, const Scale& scale, float* weights) {
  for (int64_t i = 0; i < kColumns; i += kLanes) {
    const Floats below = load(logits + i) - scale.highest;
    Floats x = below * scale.inverse;
    if (!kIsPlain) x += below * scale.rest;
    Floats weight = exp(x);
    weight = x >= kLowest ? weight : Floats{};
    if (!kIsPlain) weight = weight >= scale.min_p ? weight : Floats{};
    store(weights + i, weight);
  }
}

void weigh(const float* logits, const Scale& scale, float* weights) {
  if (scale.min_p == 0 && scale.rest == 0)
    weigh_as<true>(logits, scale, weights);
  else
    weigh_as<false>(logits, scale, weights);
}

double sum_of_block(const float* weights) {
  Doubles sums[2] = {};
  for (int64_t i = 0; i < kColumns; i += kLanes)
    for (int half = 0; half < 2; ++half) {
      HalfFloats values;
      std::memcpy(&values, weights + i + half * kLanes / 2, sizeof values);
      sums[half] += __builtin_convertvector(values, Doubles);
    }
  const Doubles both = sums[0] + sums[1];
  double out = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) out += both[lane];
  return out;
}

double sum_of(const std::vector<double>& sums) {
  double out = 0;
  for (const double sum : sums) out += sum;
  return out;
}

// The first place at which running sums exceed `uniform` times their total, which is not 0;
// `weights_of` gives a block's weights, and `sums` has their sums.
template <class Weights>
int64_t inverse_of(const std::vector<double>& sums, double uniform, const Weights& weights_of) {
  // A number of 53 bits below 1 times a total is, rounded, below that total.
  const double bound = uniform * sum_of(sums);
  double reached = 0;
  int64_t block = 0, place = 0;
  const int64_t last = sums.size() - 1;
  while (block < last && reached + sums[block] <= bound) reached += sums[block++];
  const float* const weights = weights_of(block);
  // Sums in another order may be rounded to less than the block's: then it is the last weight.
  double within = 0;
  for (int64_t i = 0; i < kColumns && within <= bound - reached; ++i) {
    if (weights[i] > 0) place = i;
    within += weights[i];
  }
  return block * kColumns + place;
}

}  // namespace
