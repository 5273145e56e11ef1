// Low-rank updates of many people: y += x a^T b and its gradients, with a (R, D) and b (R, O) of each person.
//
// Three products with a small R: rows times factors to R numbers (narrow), back from R numbers (widen), and gradients
// of factors (outer). General matrix products of these shapes reach a third of the processor's speed.

#pragma once

#include "numbers.hpp"

#include <algorithm>
#include <utility>

namespace {

constexpr int64_t RANKS = 8;  // ranks that are computed at a time, in registers
constexpr int64_t CHUNK = 32;  // rows that a thread computes at a time

// Calls f(constant) with n, 1 to 8, as a constant: loops of a known length are unrolled into registers.
template <class F> inline void unrolled(int64_t n, F f) {
  [&]<int64_t... I>(std::integer_sequence<int64_t, I...>) {
    ((n == I + 1 ? f(std::integral_constant<int64_t, I + 1>{}) : void()), ...);
  }(std::make_integer_sequence<int64_t, RANKS>{});
}

// Sum over the lanes, in the same order as ``sums_of``.
template <class T> inline wide<T> sum_of(vec<T> x) {
  for (int64_t half = LANES<T> / 2; half; half /= 2)
    for (int64_t i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}

// Blocks of S lanes, alternately from a and b: sums of each vector's even and odd blocks.
template <int S, class V, int... I> inline V folded(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / (2 * S) * 2 * S + I % S + I / S % 2 * lanes)...) +
         __builtin_shufflevector(a, b, (I / (2 * S) * 2 * S + I % S + I / S % 2 * lanes + S)...);
}

// As many vectors as they have lanes -> their sums in one vector, in order.
template <class T, int S = 1> inline vec<T> sums_of(const vec<T>* x, int64_t step = 1) {
  const auto all = std::make_integer_sequence<int, LANES<T>>{};
  if constexpr (S == LANES<T>) return x[0];
  else return folded<S>(sums_of<T, 2 * S>(x, 2 * step), sums_of<T, 2 * S>(x + step, 2 * step), all);
}

// sum[m * R + r] += x[m] . w[r], lane by lane, over the whole steps in d numbers; returns the number of summed numbers
template <int64_t M, int64_t R, class T>
inline int64_t add_dots(vec<T>* sum, const T* x, const T* w, int64_t d) {
  const int64_t whole = d / Dot<T>::STEP * Dot<T>::STEP;
  for (int64_t j = 0; j < whole; j += Dot<T>::STEP) {
    typename Dot<T>::side row[M];
    for (int64_t m = 0; m < M; m++) row[m] = Dot<T>::take(x + m * d + j);
    for (int64_t r = 0; r < R; r++) {
      const auto factor = Dot<T>::take(w + r * d + j);
      for (int64_t m = 0; m < M; m++) sum[m * R + r] = Dot<T>::add(sum[m * R + r], row[m], factor);
    }
  }
  return whole;
}

// found[m * R + r] = the sum over the lanes of sum[m * R + r]
template <int64_t M, int64_t R, class T> inline void add_lanes(wide<T>* found, const vec<T>* sum) {
  if constexpr (M * R % LANES<T> == 0)
    for (int64_t i = 0; i < M * R; i += LANES<T>) store_vector(found + i, sums_of<T>(sum + i));
  else
    for (int64_t i = 0; i < M * R; i++) found[i] = sum_of<T>(sum[i]);
}

// h (M, R) = x (M, D) w^T for M rows of x and R rows of w; rows of h have length ``stride``
template <int64_t M, int64_t R, class T>
inline void narrow_tile(wide<T>* h, const T* x, const T* w, int64_t stride, int64_t d) {
  vec<T> sum[M * R] = {};
  const int64_t whole = add_dots<M, R>(sum, x, w, d);
  wide<T> found[M * R];
  add_lanes<M, R, T>(found, sum);
  for (int64_t m = 0; m < M; m++)
    for (int64_t r = 0; r < R; r++) {
      for (int64_t j = whole; j < d; j++) found[m * R + r] += load(x[m * d + j]) * load(w[r * d + j]);
      h[m * stride + r] = found[m * R + r];
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

// N vectors of columns of g (ranks, D) = h^T x over all rows; rows of h have length ``stride``
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

// From dy, x, and h: dh (U, M, R), the gradient added to dx (if not null), and da, db of the first ``trained`` ranks.
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

// Prefetch part ``part`` of ``parts`` of the ``count`` numbers at ``next``, which are read after the current ones.
template <class T> inline void fetch(const T* next, int64_t count, int64_t part, int64_t parts) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t share = (count / line + parts) / parts * line;
  for (int64_t i = part * share; i < std::min((part + 1) * share, count); i += line) __builtin_prefetch(next + i, 0, 2);
}

// Calls f(m, r, x[m] . w[r]) for every row m of x and N rows of w.
template <int64_t N, class T, class F>
inline void each_dot(const T* x, const T* w, int64_t rows, int64_t d, F f) {
  wide<T> tile[2 * RANKS];
  for (int64_t m = 0; m < rows; m += 2) {
    const int64_t pair = std::min<int64_t>(2, rows - m);
    fetch(w + N * d, N * d, m / 2, (rows + 1) / 2);
    unrolled(pair, [&](auto count) {
      if constexpr (count <= 2) narrow_tile<count, N>(tile, x + m * d, w, RANKS, d);
    });
    for (int64_t i = 0; i < pair; i++)
      for (int64_t r = 0; r < N; r++) f(m + i, r, tile[i * RANKS + r]);
  }
}

// y (M, R) = x (M, D) w^T + h (M, P) b^T + bias + own updates for M rows and R of the O outputs. Lanes are summed once
// for both products.
template <int64_t M, int64_t R, class T>
inline void adapted_tile(T* y, const T* x, const T* w, const T* h, const T* b, const T* bias, const wide<T>* g,
                         const T* q, int64_t ranks, int64_t own, int64_t d, int64_t o) {
  vec<T> sum[M * R] = {};
  wide<T> found[M * R];
  const int64_t whole = add_dots<M, R>(sum, x, w, d), gated = add_dots<M, R>(sum, h, b, ranks);
  add_lanes<M, R, T>(found, sum);
  for (int64_t m = 0; m < M; m++) {
    wide<T>* at = found + m * R;
    for (int64_t r = 0; r < R; r++) {
      for (int64_t j = whole; j < d; j++) at[r] += load(x[m * d + j]) * load(w[r * d + j]);
      for (int64_t j = gated; j < ranks; j++) at[r] += load(h[m * ranks + j]) * load(b[r * ranks + j]);
    }
    if (bias)
      for (int64_t r = 0; r < R; r++) at[r] += load(bias[r]);
    for (int64_t s = 0; s < own; s++)
      for (int64_t r = 0; r < R; r++) at[r] += g[m * own + s] * load(q[(m * own + s) * o + r]);
    for (int64_t r = 0; r < R; r++) y[m * o + r] = store<T>(at[r]);
  }
}

// y += (gate * (x a^T)) b^T + (x p^T) q. The shared w (O, D), a (P, D), and b (O, P) are read
// from memory once; gate (M, P), p (M, S, D), and q (M, S, O) are each row's own. h (M, P) and g (M, S) are buffers.
template <class T>
void adapted_rows(T* y, T* h, wide<T>* g, const T* x, const T* w, const T* bias, const T* a, const T* b, const T* gate,
                  const T* p, const T* q, int64_t rows, int64_t ranks, int64_t own, int64_t d, int64_t o) {
#pragma omp parallel if (large((d + ranks) * o))
  {
#pragma omp for nowait
    for (int64_t first = 0; first < ranks; first += RANKS)
      unrolled(std::min(RANKS, ranks - first), [&](auto n) {
        each_dot<n>(x, a + first * d, rows, d, [&](int64_t m, int64_t r, wide<T> sum) {
          h[m * ranks + first + r] = store<T>(sum * load(gate[m * ranks + first + r]));
        });
      });
#pragma omp for
    for (int64_t m = 0; m < rows; m++) narrow(g + m * own, x + m * d, p + m * own * d, 1, own, d);
#pragma omp for
    for (int64_t first = 0; first < o; first += RANKS)
      unrolled(std::min(RANKS, o - first), [&](auto n) {
        const auto tile = [&](auto count, int64_t m) {
          fetch(w + (first + n) * d, n * d, m / 2, (rows + 1) / 2);
          fetch(b + (first + n) * ranks, n * ranks, m / 2, (rows + 1) / 2);
          adapted_tile<count, n>(y + m * o + first, x + m * d, w + first * d, h + m * ranks, b + first * ranks,
                                 bias ? bias + first : nullptr, g + m * own, q + m * own * o + first, ranks, own, d, o);
        };
        int64_t m = 0;
        for (; m + 2 <= rows; m += 2) tile(std::integral_constant<int64_t, 2>{}, m);
        if (m < rows) tile(std::integral_constant<int64_t, 1>{}, m);
      });
  }
}

}  // namespace
