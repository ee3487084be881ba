// Products of rows that lie anywhere in memory, reached through pointers: with a panel of weights, and with other rows.
//
// float rows are multiplied where they lie. bf16 rows are first brought together, a block that fits into the cache at a
// time, as the matrix units want them. M rows (or columns of the transposed left operand) and N vectors of columns stay in
// registers; the functions are not inlined, since their pointers have to stay in registers too.
#pragma once

#include "panels.h"

namespace mixhead {

constexpr int64_t kDepth = 256;  // numbers of a row that are multiplied at a time
constexpr int64_t kBlock = kLanes == 16 ? 480 : 240;  // rows that are multiplied at a time: a multiple of 6 and of 16

// c[i] (+)= scale[i] * (a[i] B): M rows, wherever they lie, times N vectors of columns that stay in registers.
template <int M, int N>
[[gnu::noinline]] void rows_tile(int64_t depth, const float* const* a, const float* b, const float* scale, float* const* c,
                      int64_t column, bool accumulate) {
  Vec sum[M][N];
  const float* row[M];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
    row[i] = a[i];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = all(0.f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) right[j] = load(b + k * kPanel + j * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) {
      const Vec left = all(row[i][k]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
    const Vec factor = all(scale[i]);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      float* to = c[i] + column + j * kLanes;
      store(to, accumulate ? load(to) + factor * sum[i][j] : factor * sum[i][j]);
    }
  }
}

template <int M, int N>
inline void rows_rest(int64_t m, int64_t depth, const float* const* a, const float* b, const float* scale, float* const* c,
                      int64_t column, bool accumulate) {
  if constexpr (M > 0) {
    if (m == M) {
      rows_tile<M, N>(depth, a, b, scale, c, column, accumulate);
    } else {
      rows_rest<M - 1, N>(m, depth, a, b, scale, c, column, accumulate);
    }
  }
}

template <int N>
inline void rows_panel(int64_t m, int64_t depth, const float* const* a, const float* b, const float* scale, float* const* c,
                       int64_t column, bool accumulate) {
  constexpr int kTall = 6;
  int64_t i = 0;
  for (; i + kTall <= m; i += kTall) {
    for (int64_t next = i + kTall; next < std::min(i + 2 * kTall, m); ++next) {
      for (int64_t k = 0; k < depth; k += 16) __builtin_prefetch(a[next] + k);
    }
    rows_tile<kTall, N>(depth, a + i, b, scale + i, c + i, column, accumulate);
  }
  rows_rest<kTall - 1, N>(m - i, depth, a + i, b, scale + i, c + i, column, accumulate);
}

// C[i][j] (+)= sum_k a[k][m + i] b[k][n + j]: the product of two matrices whose rows lie anywhere. M rows and N vectors of
// columns stay in registers.
template <int M, int N>
[[gnu::noinline]] void outer_tile(int64_t depth, const float* const* a, int64_t m, const float* const* b, int64_t n, float* c,
                                  int64_t ldc, bool accumulate) {
  Vec sum[M][N];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = all(0.f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float *left = a[k] + m, *right = b[k] + n;
    Vec columns[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) columns[j] = load(right + j * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) {
      const Vec one = all(left[i]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] += one * columns[j];
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

template <int M, int N>
inline void outer_rest(int64_t rows, int64_t depth, const float* const* a, int64_t m, const float* const* b, int64_t n,
                       float* c, int64_t ldc, bool accumulate) {
  if constexpr (M > 0) {
    if (rows == M) {
      outer_tile<M, N>(depth, a, m, b, n, c, ldc, accumulate);
    } else {
      outer_rest<M - 1, N>(rows, depth, a, m, b, n, c, ldc, accumulate);
    }
  }
}

template <int N>
inline void outer_panel(int64_t rows, int64_t depth, const float* const* a, const float* const* b, int64_t n, float* c,
                        int64_t ldc, bool accumulate) {
  constexpr int kTall = 6;
  int64_t m = 0;
  for (; m + kTall <= rows; m += kTall) outer_tile<kTall, N>(depth, a, m, b, n, c + m * ldc, ldc, accumulate);
  outer_rest<kTall - 1, N>(rows - m, depth, a, m, b, n, c + m * ldc, ldc, accumulate);
}

// Calls `use(vectors of columns at a time, first column)`, as many at a time as the registers hold, known when compiling.
template <class Use>
inline void for_tiles_of_columns(int64_t columns, Use use) {
  constexpr int kWide = kLanes == 16 ? 4 : 2;
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  int64_t v = 0;
  for (; v + kWide <= vectors; v += kWide) use(std::integral_constant<int, kWide>{}, v * kLanes);
  if constexpr (kWide == 4) {
    if (vectors - v == 3) use(std::integral_constant<int, 3>{}, v * kLanes);
    if (vectors - v == 2) use(std::integral_constant<int, 2>{}, v * kLanes);
  }
  if (vectors - v == 1) use(std::integral_constant<int, 1>{}, v * kLanes);
}

// C[rows][columns] (+)= sum_k a[k]^T b[k]; whole vectors of columns are read and written.
inline void outer_product(int64_t rows, int64_t columns, int64_t depth, const float* const* a, const float* const* b, float* c,
                          int64_t ldc, bool accumulate) {
  for_tiles_of_columns(columns, [&](auto vectors, int64_t n) {
    outer_panel<vectors.value>(rows, depth, a, b, n, c + n, ldc, accumulate);
  });
}

// Rows on their way through a product: where they come from and go to, and their factors. At most kBlock.
template <class T>
struct Rows {
  int64_t count = 0;
  const T* from[kBlock];
  float* to[kBlock];
  float scale[kBlock];
};

// Memory in which bf16 rows are brought together.
template <class T>
struct Gather {};
template <>
struct Gather<BFloat> {
  int64_t ld = 0;
  Lines<BFloat> rows;
  Lines<float> product{kBlock * kPanel};
};

// The rows' `depth` numbers, brought together; float rows stay where they are.
inline void gather(const Rows<float>&, int64_t, Gather<float>&) {}
inline void gather(const Rows<BFloat>& rows, int64_t depth, Gather<BFloat>& into) {
  const int64_t padded = round_up(depth, 32);
  into.ld = padded + 32;  // not a power of two, so that rows do not compete for a line of the cache
  into.rows.reserve(kBlock * into.ld);
  for (int64_t i = 0; i < rows.count; ++i) {
    BFloat* to = into.rows.data() + i * into.ld;
    std::memcpy(to, rows.from[i], depth * sizeof(BFloat));
    std::memset(to + depth, 0, (padded - depth) * sizeof(BFloat));
  }
  for (int64_t i = rows.count; i < round_up(rows.count, 16); ++i) {
    std::memset(into.rows.data() + i * into.ld, 0, padded * sizeof(BFloat));
  }
}

// to[i][column ...] (+)= scale[i] * (from[i][k0 ...] B), for the `columns` columns of one panel; whole vectors are written.
inline void multiply(const Rows<float>& rows, int64_t k0, int64_t depth, const float* b, int64_t columns, int64_t column,
                     bool accumulate, Gather<float>&) {
  const float* from[kBlock];
  for (int64_t i = 0; i < rows.count; ++i) from[i] = rows.from[i] + k0;
  for_tiles_of_columns(columns, [&](auto vectors, int64_t n) {
    rows_panel<vectors.value>(rows.count, depth, from, b + n, rows.scale, rows.to, column + n, accumulate);
  });
}

#if defined(__AVX512BF16__)
inline void multiply(const Rows<BFloat>& rows, int64_t k0, int64_t depth, const BFloat* b, int64_t columns, int64_t column,
                     bool accumulate, Gather<BFloat>& gathered) {
  const int64_t width = round_up(columns, kLanes);
  product(round_up(rows.count, 16), width, round_up(depth, 32), {gathered.rows.data() + k0, gathered.ld, 1}, b, kPanel,
          gathered.product.data(), kPanel, false);
  for (int64_t i = 0; i < rows.count; ++i) {
    const Vec factor = all(rows.scale[i]);
    float* to = rows.to[i] + column;
    for (int64_t n = 0; n < width; n += kLanes) {
      const Vec one = factor * load(gathered.product.data() + i * kPanel + n);
      store(to + n, accumulate ? load(to + n) + one : one);
    }
  }
}
#endif

}  // namespace mixhead
