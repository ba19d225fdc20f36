// Norms, SwiGLU and rotary embedding.

#pragma once

#include "vectors.h"

namespace {

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

// Each head by itself, in place; `weight` is [num_heads][dim].
template <class T>
void norm_heads(T* heads, int64_t row_stride, const float* weight, float eps, int64_t rows,
                int64_t num_heads, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads_for(rows* num_heads* dim, threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < num_heads; ++head) {
      T* const own = heads + row * row_stride + head * dim;
      Floats squares = {};
      for (int64_t i = 0; i < dim; i += kLanes) {
        const Floats value = load(own + i, dim - i);
        squares += value * value;
      }
      const float inverse = 1.0f / std::sqrt(sum(squares) / dim + eps);
      for (int64_t i = 0; i < dim; i += kLanes) {
        const Floats scaled = load(own + i, dim - i) * inverse;
        store(own + i, scaled * load(weight + head * dim + i, dim - i), dim - i);
      }
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

}  // namespace
