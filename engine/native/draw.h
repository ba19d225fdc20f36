// The next token of each row of logits: the highest, or one drawn. draw.py is its only caller and
// engine/sampling/draw.py says what is drawn from.
//
// A row is read once for the highest logit of each block, unless the head's product has told it,
// and once for the sum of each block's weights; then one block is looked through. Under top_k or
// top_p only candidates are, which the blocks' maxima or the sum tell from the rest. Sums are
// float64, in an order that depends on the row alone.

#pragma once

#include <cfloat>

#include "likeliest.h"
#include "weights.h"

namespace {

class RowDraw {
 public:
  // The token's id, -1 where the logits are no distribution's.
  int64_t draw(const float* logits, const float* told, int64_t size, const RowToDraw& row) {
    if (told == nullptr)
      highest_.find(logits, size);
    else
      highest_.take(told, size);
    if (row.temperature == 0) return highest_.place(logits, size);
    if (!std::isfinite(highest_.of_row)) return -1;
    const Scale scale(highest_.of_row, row);
    const bool has_top_k = row.top_k > 0 && row.top_k < size;
    if (!has_top_k) sum_blocks(logits, size, scale);
    if (has_top_k || row.top_p < 1) return draw_likeliest(logits, size, row, scale, has_top_k);
    return inverse_of(sums_, row.uniform, [&](int64_t block) {
      float memory[kColumns];
      weigh(block_of(logits, size, block, memory), scale, weights_);
      return weights_;
    });
  }

 private:
  void sum_blocks(const float* logits, int64_t size, const Scale& scale) {
    sums_.assign(blocks_of(size), 0.0);
    float memory[kColumns];
    const double least = least_logit(scale);
    for (size_t block = 0; block < sums_.size(); ++block) {
      if (highest_.of_block[block] < least) continue;
      weigh(block_of(logits, size, block, memory), scale, weights_);
      sums_[block] = sum_of_block(weights_);
    }
  }

  // Below it all weights are 0.
  static double least_logit(const Scale& scale) {
    const double least = scale.min_p > 0 ? std::log(static_cast<double>(scale.min_p)) : kLowest;
    return std::max<double>(scale.least(std::max<double>(least, kLowest)), -FLT_MAX);
  }

  int64_t draw_likeliest(const float* logits, int64_t size, const RowToDraw& row,
                         const Scale& scale, bool has_top_k) {
    kept_.make_room(size);
    double bound = kInfinity;
    if (has_top_k) {
      keep(logits, size, scale, some_logit_of_top(row.top_k));
      cut({static_cast<double>(row.top_k), kInfinity});
      if (row.top_p < 1) bound = row.top_p * sum_of(sums_);
    } else {
      bound = row.top_p * sum_of(sums_);
      keep_share(logits, size, scale, row.top_p, sum_of(sums_));
    }
    if (row.top_p < 1) cut({kInfinity, bound});
    return kept_.ids[inverse_of(sums_, row.uniform, [&](int64_t block) {
      return kept_.weights.get() + block * kColumns;
    })];
  }

  // Candidates that are at least so high, their weights and their sums.
  void keep(const float* logits, int64_t size, const Scale& scale, double least) {
    kept_.collect(logits, size, highest_, std::max(least, least_logit(scale)));
    for (int64_t i = 0; i < kept_.size; i += kColumns)
      weigh(kept_.logits.get() + i, scale, kept_.weights.get() + i);
    sum_kept();
  }

  // The likeliest that have at least a share of `top_p`. It is enough to leave out tokens that have
  // less than the rest together: at first as if that rest was shared by few.
  void keep_share(const float* logits, int64_t size, const Scale& scale, double top_p,
                  double total) {
    const double most = 2.0 * size;
    for (double sharing = 64; true; sharing = std::min(8 * sharing, most)) {
      keep(logits, size, scale, scale.least(std::log((1 - top_p) * total / sharing)));
      if (sharing >= most || sum_of(sums_) >= top_p * total) return;
    }
  }

  // At least `top_k` are this high.
  double some_logit_of_top(int64_t top_k) {
    if (top_k > static_cast<int64_t>(highest_.of_block.size())) return -FLT_MAX;
    ordered_ = highest_.of_block;
    const auto at = ordered_.begin() + top_k - 1;
    std::nth_element(ordered_.begin(), at, ordered_.end(), std::greater<float>());
    return *at;
  }

  // Makes the weights beyond the limit 0.
  void cut(const Limit& limit) {
    const Border border = search_.find(kept_, limit);
    for (int64_t i = 0; i < kept_.size; ++i) {
      const float logit = kept_.logits[i];
      const bool inside =
          (logit > border.logit) | ((logit == border.logit) & (kept_.ids[i] <= border.id));
      kept_.weights[i] = inside ? kept_.weights[i] : 0.0f;
    }
    sum_kept();
  }

  void sum_kept() {
    sums_.resize(blocks_of(kept_.size));
    for (size_t block = 0; block < sums_.size(); ++block)
      sums_[block] = sum_of_block(kept_.weights.get() + block * kColumns);
  }

  Highest highest_;
  Candidates kept_;
  BorderSearch search_;
  std::vector<float> ordered_;
  std::vector<double> sums_;
  float weights_[kColumns];
};

// Threads have gone to sleep since the model's last product: to wake them takes 0.1 ms, and 1 ms
// where others use their cores. One thread draws 32 tokens of 49,152 in half of that.
int threads_to_draw(const RowToDraw* rows, int64_t num_rows, int64_t size, bool is_told,
                    int threads) {
  constexpr int64_t kWorthWaking = int64_t{1} << 23;
  int64_t work = 0;
  for (int64_t row = 0; row < num_rows; ++row)
    work += size * ((is_told ? 0 : 1) + (rows[row].temperature > 0 ? 2 : 0));
  return work < kWorthWaking ? 1 : std::min<int64_t>(threads, num_rows);
}

}  // namespace

extern "C" void draw_tokens(const float* logits, int64_t row_stride, const float* told,
                            int64_t told_stride, int64_t size, const RowToDraw* rows,
                            int64_t num_rows, int64_t* out, int threads) noexcept {
  const bool is_told = told != nullptr;
#pragma omp parallel num_threads(threads_to_draw(rows, num_rows, size, is_told, threads))
  {
    RowDraw drawing;
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < num_rows; ++row)
      out[row] = drawing.draw(logits + row * row_stride,
                              is_told ? told + row * told_stride : nullptr, size, rows[row]);
  }
}
