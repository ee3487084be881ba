// Small matrix products: C[m][n] (+)= sum_k A[m][k] B[k][n], C in float.
//
// Two kinds of operands. float: A has any two strides, B has rows of n. bf16: A has rows of k; B keeps pairs of k side by
// side, B[k / 2][n][k % 2], as AMX and the bf16 dot product of AVX-512 want it. n is a multiple of kLanes throughout;
// for bf16 operands m is a multiple of 16 and k of 32 (the caller pads).
#pragma once

#include <algorithm>

#include "simd.h"

namespace mixhead {

// The left operand: element (m, k) is data[m * row + k * col].
template <class T>
struct Left {
  const T* data;
  int64_t row;
  int64_t col;
  Left from(int64_t m, int64_t k) const { return {data + m * row + k * col, row, col}; }
};

// C tile of M rows and N vectors that stays in registers. It is summed up from 0 and added to C at the end: many short sums
// have smaller rounding errors than one long sum.
template <int M, int N>
inline void float_tile(int64_t depth, Left<float> a, const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  Vec sum[M][N];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = all(0.f);
  }
  const float* row[M];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) row[i] = a.data + i * a.row;
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) right[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) {
      const Vec left = all(row[i][k * a.col]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      float* to = c + i * ldc + j * kLanes;
      store(to, accumulate ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// The rows that are left when M does not divide them.
template <int M, int N>
inline void float_rest(int64_t m, int64_t depth, Left<float> a, const float* b, int64_t ldb, float* c, int64_t ldc, bool acc) {
  if constexpr (M > 0) {
    if (m == M) {
      float_tile<M, N>(depth, a, b, ldb, c, ldc, acc);
    } else {
      float_rest<M - 1, N>(m, depth, a, b, ldb, c, ldc, acc);
    }
  }
}

template <int M, int N>
inline void float_panel(int64_t m, int64_t depth, Left<float> a, const float* b, int64_t ldb, float* c, int64_t ldc, bool acc) {
  int64_t i = 0;
  for (; i + M <= m; i += M) float_tile<M, N>(depth, a.from(i, 0), b, ldb, c + i * ldc, ldc, acc);
  float_rest<M - 1, N>(m - i, depth, a.from(i, 0), b, ldb, c + i * ldc, ldc, acc);
}

// Panels as wide as the registers allow: 32 of them with AVX-512, 16 without.
inline void product(int64_t m, int64_t n, int64_t depth, Left<float> a, const float* b, int64_t ldb, float* c, int64_t ldc,
                    bool acc) {
#if defined(__AVX512F__)
  constexpr int kWidest = 4;
  constexpr int kRows[] = {0, 12, 12, 8, 6};
#else
  constexpr int kWidest = 2;
  constexpr int kRows[] = {0, 8, 6};
#endif
  for (int64_t vectors = n / kLanes; vectors > 0;) {
    const int64_t width = vectors > kWidest && vectors < 2 * kWidest ? (vectors + 1) / 2 : std::min<int64_t>(vectors, kWidest);
    if (width == 1) float_panel<kRows[1], 1>(m, depth, a, b, ldb, c, ldc, acc);
    if (width == 2) float_panel<kRows[2], 2>(m, depth, a, b, ldb, c, ldc, acc);
#if defined(__AVX512F__)
    if (width == 3) float_panel<kRows[3], 3>(m, depth, a, b, ldb, c, ldc, acc);
    if (width == 4) float_panel<kRows[4], 4>(m, depth, a, b, ldb, c, ldc, acc);
#endif
    vectors -= width;
    b += width * kLanes;
    c += width * kLanes;
  }
}

#if defined(__AMX_BF16__)

// Tiles 0-3 hold C, 4-5 rows of A, 6-7 columns of B; each is 16 rows of 64 bytes.
struct MatrixUnits {
  MatrixUnits() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    _tile_loadconfig(config);
  }
  ~MatrixUnits() { _tile_release(); }
};

// C tile of 16 M rows and 16 N columns.
template <int M, int N>
inline void bf16_tile(int64_t depth, Left<BFloat> a, const BFloat* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  const int64_t stride = ldc * 4;
  if (accumulate) {
    _tile_loadd(0, c, stride);
    if constexpr (N == 2) _tile_loadd(1, c + 16, stride);
    if constexpr (M == 2) _tile_loadd(2, c + 16 * ldc, stride);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, c + 16 * ldc + 16, stride);
  } else {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (M == 2) _tile_zero(2);
    if constexpr (M == 2 && N == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 32) {
    _tile_loadd(4, a.data + k, a.row * 2);
    _tile_loadd(6, b + k * ldb, ldb * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, b + k * ldb + 32, ldb * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M == 2) {
      _tile_loadd(5, a.data + 16 * a.row + k, a.row * 2);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, stride);
  if constexpr (N == 2) _tile_stored(1, c + 16, stride);
  if constexpr (M == 2) _tile_stored(2, c + 16 * ldc, stride);
  if constexpr (M == 2 && N == 2) _tile_stored(3, c + 16 * ldc + 16, stride);
}

inline void product(int64_t m, int64_t n, int64_t depth, Left<BFloat> a, const BFloat* b, int64_t ldb, float* c, int64_t ldc,
                    bool acc) {
  for (int64_t i = 0; i < m; i += 32) {
    for (int64_t j = 0; j < n; j += 32) {
      const bool tall = i + 32 <= m, wide = j + 32 <= n;
      float* to = c + i * ldc + j;
      if (tall && wide) bf16_tile<2, 2>(depth, a.from(i, 0), b + 2 * j, ldb, to, ldc, acc);
      if (tall && !wide) bf16_tile<2, 1>(depth, a.from(i, 0), b + 2 * j, ldb, to, ldc, acc);
      if (!tall && wide) bf16_tile<1, 2>(depth, a.from(i, 0), b + 2 * j, ldb, to, ldc, acc);
      if (!tall && !wide) bf16_tile<1, 1>(depth, a.from(i, 0), b + 2 * j, ldb, to, ldc, acc);
    }
  }
}

#elif defined(__AVX512BF16__)

struct MatrixUnits {};

template <int M, int N>
inline void bf16_tile(int64_t depth, Left<BFloat> a, const BFloat* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  __m512 sum[M][N];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = accumulate ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 32 * j);
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) {
      int32_t pair;
      std::memcpy(&pair, a.data + i * a.row + k, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
  }
}

// m is a multiple of 16 = 6 + 6 + 4.
template <int N>
inline void bf16_panel(int64_t m, int64_t depth, Left<BFloat> a, const BFloat* b, int64_t ldb, float* c, int64_t ldc, bool acc) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6) bf16_tile<6, N>(depth, a.from(i, 0), b, ldb, c + i * ldc, ldc, acc);
  for (; i + 2 <= m; i += 2) bf16_tile<2, N>(depth, a.from(i, 0), b, ldb, c + i * ldc, ldc, acc);
}

inline void product(int64_t m, int64_t n, int64_t depth, Left<BFloat> a, const BFloat* b, int64_t ldb, float* c, int64_t ldc,
                    bool acc) {
  for (int64_t vectors = n / 16; vectors > 0;) {
    const int64_t width = std::min<int64_t>(vectors, 4);
    if (width == 1) bf16_panel<1>(m, depth, a, b, ldb, c, ldc, acc);
    if (width == 2) bf16_panel<2>(m, depth, a, b, ldb, c, ldc, acc);
    if (width == 3) bf16_panel<3>(m, depth, a, b, ldb, c, ldc, acc);
    if (width == 4) bf16_panel<4>(m, depth, a, b, ldb, c, ldc, acc);
    vectors -= width;
    b += width * 32;
    c += width * 16;
  }
}

#else

struct MatrixUnits {};

#endif

}  // namespace mixhead
