// A transformer's operations between its matrix products, each in one pass over memory, for float, double, bfloat16.
//
// Plain C functions over contiguous arrays; sums are in float (in double for double). ``mta.kernels.functions`` calls
// them and documents each. ``mta.kernels.compile`` compiles this file on first use.

#include "low_rank.hpp"
#include "numbers.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

template <class T>
void rms_norm(T* y, wide<T>* scale, const T* x, const T* weight, int64_t n, int64_t d, double eps) {
#pragma omp parallel for if (large(n * d))
  for (int64_t i = 0; i < n; i++) {
    const T* row = x + i * d;
    wide<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < d; j++) sum += load(row[j]) * load(row[j]);
    const wide<T> r = 1 / std::sqrt(sum / d + wide<T>(eps));
    scale[i] = r;
#pragma omp simd
    for (int64_t j = 0; j < d; j++) y[i * d + j] = store<T>(load(row[j]) * r * load(weight[j]));
  }
}

template <class T>
void rms_norm_backward(
    T* dx, const T* dy, const wide<T>* scale, const T* x, const T* weight, int64_t n, int64_t d) {
#pragma omp parallel for if (large(n * d))
  for (int64_t i = 0; i < n; i++) {
    const T *row = x + i * d, *up = dy + i * d;
    wide<T> dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < d; j++) dot += load(up[j]) * load(weight[j]) * load(row[j]);
    const wide<T> r = scale[i], pull = r * r * r * dot / d;
#pragma omp simd
    for (int64_t j = 0; j < d; j++)
      dx[i * d + j] = store<T>(r * load(up[j]) * load(weight[j]) - pull * load(row[j]));
  }
}

// x, y (B, T, H, E); cos, sin (B or 1, T, E). The inverse rotation is the gradient.
template <class T>
void rotate(T* y, const T* x, const T* cos, const T* sin, int64_t batch, int64_t tokens, int64_t heads, int64_t e,
            int64_t angles, int64_t inverse) {
  const int64_t half = e / 2;
#pragma omp parallel for if (large(batch * tokens * heads * e))
  for (int64_t i = 0; i < batch * tokens; i++) {
    const int64_t angle = angles == 1 ? i % tokens : i;
    const T *c = cos + angle * e, *s = sin + angle * e;
    for (int64_t h = 0; h < heads; h++) {
      const T* from = x + (i * heads + h) * e;
      T* to = y + (i * heads + h) * e;
#pragma omp simd
      for (int64_t j = 0; j < half; j++) {
        const wide<T> a = load(from[j]), b = load(from[j + half]);
        const wide<T> low = inverse ? load(s[j + half]) : -load(s[j]);
        const wide<T> high = inverse ? -load(s[j]) : load(s[j + half]);
        to[j] = store<T>(a * load(c[j]) + b * low);
        to[j + half] = store<T>(b * load(c[j + half]) + a * high);
      }
    }
  }
}

// x (tokens, H, E) at places (G, n) -> out (G, H, n, E)
template <class T>
void gather(T* out, const T* x, const int64_t* places, int64_t groups, int64_t n, int64_t heads, int64_t e) {
#pragma omp parallel for if (large(groups * n * heads * e))
  for (int64_t g = 0; g < groups; g++)
    for (int64_t i = 0; i < n; i++)
      for (int64_t h = 0; h < heads; h++)
        std::copy_n(x + (places[g * n + i] * heads + h) * e, e, out + ((g * heads + h) * n + i) * e);
}

// x (tokens, H, E) -> out (G, H, n, E): token t at slots[t] of G * n, 0 in slots without a token
template <class T>
void spread(T* out, const T* x, const int64_t* slots, int64_t tokens, int64_t groups, int64_t n, int64_t heads, int64_t e) {
  std::fill(out, out + groups * n * heads * e, T{});
#pragma omp parallel for if (large(tokens * heads * e))
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++)
      std::copy_n(x + (t * heads + h) * e, e, out + ((slots[t] / n * heads + h) * n + slots[t] % n) * e);
}

constexpr int64_t COLUMNS = 1024;  // numbers of a token that are summed at a time, on the stack

// Gradient of gather and spread: out[t] = sum of x at the slots of token t, slots[starts[t] : starts[t + 1]] of G * n
template <class T>
void scatter(T* out, const T* x, const int64_t* slots, const int64_t* starts, int64_t tokens, int64_t n, int64_t heads,
             int64_t e) {
#pragma omp parallel for if (large(tokens * heads * e))
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t first = 0; first < e; first += COLUMNS) {
        const int64_t width = std::min(COLUMNS, e - first);
        wide<T> sum[COLUMNS];
        for (int64_t j = 0; j < width; j++) sum[j] = 0;
        for (int64_t k = starts[t]; k < starts[t + 1]; k++) {
          const T* from = x + ((slots[k] / n * heads + h) * n + slots[k] % n) * e + first;
#pragma omp simd
          for (int64_t j = 0; j < width; j++) sum[j] += load(from[j]);
        }
#pragma omp simd
        for (int64_t j = 0; j < width; j++) out[(t * heads + h) * e + first + j] = store<T>(sum[j]);
      }
}

// In place: scores (G, H, Q, K) become softmax(scale * scores + mask), mask (G, Q, K).
template <class T>
void softmax(T* scores, const T* mask, int64_t groups, int64_t heads, int64_t q, int64_t k, double factor) {
  const wide<T> scale = factor;
#pragma omp parallel if (large(groups * heads * q * k))
  {
    std::vector<wide<T>> buffer(k);
    wide<T>* e = buffer.data();
#pragma omp for
    for (int64_t row = 0; row < groups * heads * q; row++) {
      T* s = scores + row * k;
      const T* m = mask + (row / (heads * q) * q + row % q) * k;
      wide<T> most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
      for (int64_t j = 0; j < k; j++) {
        e[j] = scale * load(s[j]) + load(m[j]);
        most = std::max(most, e[j]);
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < k; j++) {
        e[j] = exponential(e[j] - most);
        sum += e[j];
      }
      const wide<T> share = 1 / sum;
#pragma omp simd
      for (int64_t j = 0; j < k; j++) s[j] = store<T>(e[j] * share);
    }
  }
}

// In place: the gradient (rows, K) of the shares becomes the gradient of the unscaled scores.
template <class T> void softmax_backward(T* gradient, const T* shares, int64_t rows, int64_t k, double factor) {
  const wide<T> scale = factor;
#pragma omp parallel for if (large(rows * k))
  for (int64_t row = 0; row < rows; row++) {
    T* d = gradient + row * k;
    const T* p = shares + row * k;
    wide<T> dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < k; j++) dot += load(d[j]) * load(p[j]);
#pragma omp simd
    for (int64_t j = 0; j < k; j++) d[j] = store<T>(scale * load(p[j]) * (load(d[j]) - dot));
  }
}

// AdamW for rows (U, P), each with its own rates; gradients are scaled by ``clip`` before and set to 0 after.
template <class T>
void adamw(T* values, T* gradient, T* mean, T* square, const T* clip, const T* size, const T* correction,
           const T* decay, int64_t people, int64_t p, double beta1, double beta2, double epsilon) {
  const T b1 = beta1, b2 = beta2, c1 = 1 - beta1, c2 = 1 - beta2, eps = epsilon;
  for (int64_t u = 0; u < people; u++) {
    T *w = values + u * p, *g = gradient + u * p, *m = mean + u * p, *s = square + u * p;
    const T by = clip[u], step = size[u], root = 1 / correction[u], keep = decay[u];
#pragma omp parallel for simd if (large(p))
    for (int64_t i = 0; i < p; i++) {
      const T d = g[i] * by;
      m[i] = b1 * m[i] + c1 * d;
      s[i] = b2 * s[i] + c2 * d * d;
      w[i] = w[i] * keep - step * m[i] / (std::sqrt(s[i]) * root + eps);
      g[i] = 0;
    }
  }
}

// An entry of the table for ``mta.kernels.compile``; ``arguments``: p is a pointer, i an int64_t, d a double.
struct Kernel {
  const char* name;
  const char* arguments;
  void* address;
};

template <class A> constexpr char letter() {
  static_assert(std::is_pointer_v<A> || std::is_same_v<A, int64_t> || std::is_same_v<A, double>);
  return std::is_pointer_v<A> ? 'p' : std::is_same_v<A, int64_t> ? 'i' : 'd';
}
template <class... A> constexpr char letters[] = {letter<A>()..., 0};
template <class... A> Kernel described(const char* name, void (*function)(A...)) {
  return {name, letters<A...>, (void*)function};
}

}  // namespace

// Compiled once for each NUMBER (float, double, bf16), to table_float, table_double, and table_bf16.
#define JOINED(a, b, c) a##b##c
#define NAMED(number, after) JOINED(table_, number, after)
#define KERNEL(name) described(#name, name<NUMBER>)

extern "C" {
Kernel NAMED(NUMBER, )[] = {
    KERNEL(rms_norm),
    KERNEL(rms_norm_backward),
    KERNEL(rotate),
    KERNEL(gather),
    KERNEL(spread),
    KERNEL(scatter),
    KERNEL(softmax),
    KERNEL(softmax_backward),
    KERNEL(low_rank),
    KERNEL(low_rank_backward),
    described("adamw", adamw<wide<NUMBER>>),
    KERNEL(adapted_rows),
};
int64_t NAMED(NUMBER, _size) = sizeof(NAMED(NUMBER, )) / sizeof(Kernel);
}
