// Low-rank updates of many people: y += x a^T b and its gradients, with a (R, D) and b (R, O) of each person.
//
// Three products, all with R small: rows times factors (narrow), its inverse (widen), and the factors' gradient
// (outer). A general matrix product of such a shape reaches a tenth of what the processor can do.

#pragma once

#include "numbers.hpp"

#include <algorithm>
#include <utility>

namespace {

constexpr int64_t RANKS = 8;  // at a time, all held in registers
constexpr int64_t CHUNK = 32;  // rows that one thread takes at a time

// f(constant) for the constant that equals n, 1 to 8: loops of a known length are unrolled into registers.
template <class F> inline void unrolled(int64_t n, F f) {
  [&]<int64_t... I>(std::integer_sequence<int64_t, I...>) {
    ((n == I + 1 ? f(std::integral_constant<int64_t, I + 1>{}) : void()), ...);
  }(std::make_integer_sequence<int64_t, RANKS>{});
}

template <class T> inline wide<T> sum_of(vec<T> x) {
  wide<T> sum = 0;
  for (int64_t i = 0; i < LANES<T>; i++) sum += x[i];
  return sum;
}

// h (M, R) = x (M, D) w^T for M rows of x and R rows of w; h has rows of ``stride``
template <int64_t M, int64_t R, class T>
inline void narrow_tile(wide<T>* h, const T* x, const T* w, int64_t stride, int64_t d) {
  vec<T> sum[M][R] = {};
  const int64_t whole = d / Dot<T>::STEP * Dot<T>::STEP;
  for (int64_t j = 0; j < whole; j += Dot<T>::STEP) {
    typename Dot<T>::side row[M];
    for (int64_t m = 0; m < M; m++) row[m] = Dot<T>::take(x + m * d + j);
    for (int64_t r = 0; r < R; r++) {
      const auto factor = Dot<T>::take(w + r * d + j);
      for (int64_t m = 0; m < M; m++) sum[m][r] = Dot<T>::add(sum[m][r], row[m], factor);
    }
  }
  for (int64_t m = 0; m < M; m++)
    for (int64_t r = 0; r < R; r++) {
      wide<T> rest = sum_of<T>(sum[m][r]);
      for (int64_t j = whole; j < d; j++) rest += load(x[m * d + j]) * load(w[r * d + j]);
      h[m * stride + r] = rest;
    }
}

template <class T>
void narrow(wide<T>* h, const T* x, const T* w, int64_t rows, int64_t ranks, int64_t d) {
  for (int64_t r = 0; r < ranks; r += RANKS)
    unrolled(std::min(RANKS, ranks - r), [&](auto n) {
      int64_t m = 0;
      for (; m + 2 <= rows; m += 2) narrow_tile<2, n>(h + m * ranks + r, x + m * d, w + r * d, ranks, d);
      if (m < rows) narrow_tile<1, n>(h + m * ranks + r, x + m * d, w + r * d, ranks, d);
    });
}

// y (M, O) += h (M, R) w for M rows
template <int64_t M, class T>
inline void widen_tile(T* y, const wide<T>* h, const T* w, int64_t ranks, int64_t o) {
  int64_t j = 0;
  for (; j + LANES<T> <= o; j += LANES<T>) {
    vec<T> sum[M];
    for (int64_t m = 0; m < M; m++) sum[m] = load_vector(y + m * o + j);
    for (int64_t r = 0; r < ranks; r++) {
      const vec<T> factor = load_vector(w + r * o + j);
      for (int64_t m = 0; m < M; m++) sum[m] += h[m * ranks + r] * factor;
    }
    for (int64_t m = 0; m < M; m++) store_vector(y + m * o + j, sum[m]);
  }
  for (; j < o; j++)
    for (int64_t m = 0; m < M; m++) {
      wide<T> sum = load(y[m * o + j]);
      for (int64_t r = 0; r < ranks; r++) sum += h[m * ranks + r] * load(w[r * o + j]);
      y[m * o + j] = store<T>(sum);
    }
}

template <class T> void widen(T* y, const wide<T>* h, const T* w, int64_t rows, int64_t ranks, int64_t o) {
  for (int64_t m = 0; m < rows; m += RANKS)
    unrolled(std::min(RANKS, rows - m), [&](auto n) { widen_tile<n>(y + m * o, h + m * ranks, w, ranks, o); });
}

// g (ranks, D) at columns j to j + N vectors = h^T x over all rows; h has rows of ``stride``
template <int64_t R, int64_t N, class T>
inline void outer_tile(T* g, const wide<T>* h, const T* x, int64_t rows, int64_t stride, int64_t d) {
  vec<T> sum[R][N] = {};
  for (int64_t m = 0; m < rows; m++) {
    vec<T> row[N];
    for (int64_t n = 0; n < N; n++) row[n] = load_vector(x + m * d + n * LANES<T>);
    for (int64_t r = 0; r < R; r++)
      for (int64_t n = 0; n < N; n++) sum[r][n] += h[m * stride + r] * row[n];
  }
  for (int64_t r = 0; r < R; r++)
    for (int64_t n = 0; n < N; n++) store_vector(g + r * d + n * LANES<T>, sum[r][n]);
}

// Columns start to stop of g (ranks, D) = h^T x
template <class T>
void outer(T* g, const wide<T>* h, const T* x, int64_t rows, int64_t ranks, int64_t stride, int64_t d, int64_t start,
           int64_t stop) {
  for (int64_t r = 0; r < ranks; r += RANKS)
    unrolled(std::min(RANKS, ranks - r), [&](auto n) {
      int64_t j = start;
      for (; j + 2 * LANES<T> <= stop; j += 2 * LANES<T>)
        outer_tile<n, 2>(g + r * d + j, h + r, x + j, rows, stride, d);
      for (; j < stop; j++)
        for (int64_t i = r; i < r + n; i++) {
          wide<T> sum = 0;
          for (int64_t m = 0; m < rows; m++) sum += h[m * stride + i] * load(x[m * d + j]);
          g[i * d + j] = store<T>(sum);
        }
    });
}

// y (U, M, O) += h b with h (U, M, R) = x (U, M, D) a^T; a (U, R, D), b (U, R, O)
template <class T>
void low_rank(T* y, wide<T>* h, const T* x, const T* a, const T* b, int64_t people, int64_t rows, int64_t ranks,
              int64_t d, int64_t o) {
  const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for if (large(people * rows * ranks * (d + o) / 8))
  for (int64_t i = 0; i < people * chunks; i++) {
    const int64_t u = i / chunks, first = i % chunks * CHUNK, row = u * rows + first;
    const int64_t count = std::min(CHUNK, rows - first);
    narrow(h + row * ranks, x + row * d, a + u * ranks * d, count, ranks, d);
    widen(y + row * o, h + row * ranks, b + u * ranks * o, count, ranks, o);
  }
}

// From dy, x and h: dh (U, M, R), what is to be added to dx (if there is one), and da, db of the first ``trained`` ranks.
template <class T>
void low_rank_backward(T* dx, T* da, T* db, wide<T>* dh, const T* dy, const T* x, const wide<T>* h, const T* a,
                       const T* b, int64_t people, int64_t rows, int64_t ranks, int64_t d, int64_t o,
                       int64_t trained) {
  const int64_t chunks = (rows + CHUNK - 1) / CHUNK, width = 2 * LANES<T>;
  const int64_t parts_d = (d + width - 1) / width, parts_o = (o + width - 1) / width;
#pragma omp parallel if (large(people * rows * ranks * (d + o) / 8))
  {
#pragma omp for
    for (int64_t i = 0; i < people * chunks; i++) {
      const int64_t u = i / chunks, first = i % chunks * CHUNK, row = u * rows + first;
      const int64_t count = std::min(CHUNK, rows - first);
      narrow(dh + row * ranks, dy + row * o, b + u * ranks * o, count, ranks, o);
      if (dx) widen(dx + row * d, dh + row * ranks, a + u * ranks * d, count, ranks, d);
    }
#pragma omp for
    for (int64_t i = 0; i < people * (parts_d + parts_o); i++) {
      const int64_t u = i / (parts_d + parts_o), part = i % (parts_d + parts_o), row = u * rows;
      if (part < parts_d)
        outer(da + u * trained * d, dh + row * ranks, x + row * d, rows, trained, ranks, d, part * width,
              std::min((part + 1) * width, d));
      else
        outer(db + u * trained * o, h + row * ranks, dy + row * o, rows, trained, ranks, o, (part - parts_d) * width,
              std::min((part - parts_d + 1) * width, o));
    }
  }
}

}  // namespace
