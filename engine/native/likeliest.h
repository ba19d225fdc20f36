// Which tokens of a row belong to the support that top_k and top_p leave, without sorting it: counts
// and sums by buckets of logits lead to the few around its last one.

#pragma once

#include <memory>

#include "weights.h"

namespace {

constexpr int64_t kBuckets = 512;
constexpr int64_t kFew = 32;  // sorted rather than put into buckets

// ---------------------------------------------------------------------------------- candidates

// In order of their ids. There is room for whole blocks.
struct Candidates {
  std::unique_ptr<float[]> logits, weights;
  std::unique_ptr<int32_t[]> ids;
  int64_t size = 0, room = 0;

  void make_room(int64_t most) {
    const int64_t needed = blocks_of(most) * kColumns + kLanes;
    if (needed <= room) return;
    room = needed;
    logits.reset(new float[room]);
    weights.reset(new float[room]);
    ids.reset(new int32_t[room]);
  }

  // Those of `count` (at most a vector's lanes) logits that are `least` or more.
  void add(const float* from, int64_t count, int64_t first_id, float least) {
#ifdef __AVX512F__
    const __m512 values = (__m512)load(from, count);
    const __mmask16 those = _mm512_cmp_ps_mask(values, _mm512_set1_ps(least), _CMP_GE_OQ) &
                            static_cast<__mmask16>((1u << count) - 1);
    const __m512i lanes =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i all_ids = _mm512_add_epi32(lanes, _mm512_set1_epi32(first_id));
    _mm512_storeu_ps(logits.get() + size, _mm512_maskz_compress_ps(those, values));
    _mm512_storeu_si512(ids.get() + size, _mm512_maskz_compress_epi32(those, all_ids));
    size += __builtin_popcount(those);
#else
    for (int64_t i = 0; i < count; ++i) {
      logits[size] = from[i];
      ids[size] = first_id + i;
      size += from[i] >= least;
    }
#endif
  }

  void collect(const float* row, int64_t row_size, const Highest& highest, float least) {
    size = 0;
    for (size_t block = 0; block < highest.of_block.size(); ++block) {
      if (highest.of_block[block] < least) continue;
      const int64_t end = std::min<int64_t>(row_size, (block + 1) * kColumns);
      for (int64_t i = block * kColumns; i < end; i += kLanes)
        add(row + i, std::min<int64_t>(kLanes, end - i), i, least);
    }
    std::fill(logits.get() + size, logits.get() + blocks_of(size) * kColumns, -kInfinity);
  }
};

// ------------------------------------------------------------------------------------- support

// The last of the support, likeliest first and lower ids first among equals.
struct Border {
  float logit;
  int32_t id;
};

struct Limit {
  double most;  // tokens
  double sum;   // that the weights before a token of the support are below

  bool reached_by(double num_tokens, double weights) const {
    return num_tokens >= most || weights >= sum;
  }
};

class BorderSearch {
 public:
  // The first candidate is always inside.
  Border find(const Candidates& all, const Limit& limit) {
    members_.make_room(all.size);
    num_before_ = sum_before_ = 0;
    const Candidates* from = &all;
    while (true) {
      range(*from);
      if (low_ == high_) return among_equals(*from, limit);
      if (from->size <= kFew) return among_few(*from, limit);
      const int64_t bucket = choose_bucket(*from, limit);
      if (bucket < 0) return {-kInfinity, 0};  // all are inside
      take(*from, bucket);
      from = &members_;
    }
  }

 private:
  void range(const Candidates& from) {
    Floats low = splat(kInfinity), high = -low;
    int64_t i = 0;
    for (; i + kLanes <= from.size; i += kLanes) {
      const Floats values = load(from.logits.get() + i);
      high = at_least(high, values);
      low = -at_least(-low, -values);
    }
    low_ = -highest(-low);
    high_ = highest(high);
    for (; i < from.size; ++i) {
      low_ = std::min(low_, from.logits[i]);
      high_ = std::max(high_, from.logits[i]);
    }
    scale_ = (kBuckets - 1) / (static_cast<double>(high_) - low_);
  }

  // From 0, for the highest.
  int64_t bucket_of(float logit) const {
    return static_cast<int64_t>((static_cast<double>(high_) - logit) * scale_);
  }

  // The one that the border is in, having counted what lies in those before; -1 without border.
  int64_t choose_bucket(const Candidates& from, const Limit& limit) {
    int64_t counts[kBuckets + 1] = {};
    double sums[kBuckets + 1] = {};
    for (int64_t i = 0; i < from.size; ++i) {
      const int64_t bucket = bucket_of(from.logits[i]);
      counts[bucket] += 1;
      sums[bucket] += from.weights[i];
    }
    for (int64_t bucket = 0; bucket <= kBuckets; ++bucket) {
      const double num = num_before_ + counts[bucket], sum = sum_before_ + sums[bucket];
      if (counts[bucket] > 0 && limit.reached_by(num, sum)) return bucket;
      num_before_ = num;
      sum_before_ = sum;
    }
    return -1;
  }

  void take(const Candidates& from, int64_t bucket) {
    int64_t size = 0;  // `from` may be the members themselves
    for (int64_t i = 0; i < from.size; ++i) {
      const float logit = from.logits[i];
      members_.logits[size] = logit;
      members_.weights[size] = from.weights[i];
      members_.ids[size] = from.ids[i];
      size += bucket_of(logit) == bucket;
    }
    members_.size = size;
  }

  Border among_equals(const Candidates& from, const Limit& limit) const {
    const double by_sum = std::ceil((limit.sum - sum_before_) / from.weights[0]);
    double inside = std::min(static_cast<double>(from.size), limit.most - num_before_);
    if (by_sum < inside) inside = by_sum;
    return {high_, from.ids[static_cast<int64_t>(std::max(inside, 1.0)) - 1]};
  }

  Border among_few(const Candidates& from, const Limit& limit) {
    int order[kFew];
    for (int i = 0; i < from.size; ++i) order[i] = i;
    std::sort(order, order + from.size, [&](int a, int b) {
      return from.logits[a] != from.logits[b] ? from.logits[a] > from.logits[b] : a < b;
    });
    Border last = {};
    for (int64_t i = 0; i < from.size; ++i) {
      if (i > 0 && limit.reached_by(num_before_, sum_before_)) break;
      const int at = order[i];
      last = {from.logits[at], from.ids[at]};
      num_before_ += 1;
      sum_before_ += from.weights[at];
    }
    return last;
  }

  Candidates members_;
  double num_before_, sum_before_, scale_;
  float low_, high_;
};

}  // namespace
