// Products of the rows that select a head with that head's weights, for projections to heads and from heads.
//
// Both projections, forward and backward, are made of three products over the rows r that select head h:
//     to_heads:    Y[r, s] = X[r] W_h^T              rows of C numbers to rows of D
//     from_heads:  Y[r]   += gate[r, s] X[r, s] W_h   rows of D numbers to rows of C, summed over the heads in their order
//     weights:     W_h     = sum_r gate[r, s] X[r, s]^T Y[r]
// A row has S slots, and s is the one that head h stands in: s = h with a slot for every head, or, with as many slots as a
// row has heads (experts), the one that a table names.
// float rows are multiplied where they lie, through pointers to rows. bf16 rows are first brought together, a block that
// fits into the cache at a time, as the matrix units want them. All sums are in float, and none depends on the threads.
//
// Legend: H heads, S slots, D head dim, C hidden size, R rows (batch x tokens), k depth of a product.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "attention.h"

namespace mixhead {

#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif
constexpr int64_t kPanel = kPanelVectors * kLanes;  // columns of a packed panel of weights
constexpr int64_t kDepth = 128;                     // numbers of a row that are multiplied at a time
constexpr int64_t kBlock = 96;                      // rows that are multiplied at a time: a multiple of 6 and of 32
constexpr int64_t kColumns = 256;                   // columns of the output that are summed up at a time ...
constexpr int64_t kRowsOfSum = 1024;                // ... and how many rows of it
constexpr int64_t kRowsOfWeights = 256;             // rows that are summed up at a time in the gradient of weights

// An array on a boundary of a cache line, so that no load of a vector needs two lines.
template <class T>
class Lines {
 public:
  explicit Lines(int64_t size = 0) { reserve(size); }
  ~Lines() { ::operator delete[](data_, std::align_val_t(64)); }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  // Room for `size` numbers; what was there is lost.
  T* reserve(int64_t size) {
    if (size > size_) {
      ::operator delete[](data_, std::align_val_t(64));
      data_ = static_cast<T*>(::operator new[](size * sizeof(T), std::align_val_t(64)));
      size_ = size;
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// The rows that select each head, in rising order, and the slot that the head has in each.
struct Selection {
  std::vector<int64_t> start;  // [H + 1]
  std::vector<int64_t> row, slot;
  int64_t count(int64_t h) const { return start[h + 1] - start[h]; }
};

// Rows of D numbers, one for each row r = b N + n and slot, in a tensor [B, S, N, D] with any strides but the last.
template <class T>
struct HeadRows {
  View<T> view;
  int64_t N = 1;
  T* at(int64_t r, int64_t s) const { return view.at(r / N, s, r % N); }
};

// Weights [H, D, C] with any strides.
template <class T>
struct Weights {
  T* data;
  int64_t head, dim, column;
};

// The right operand of products: `depth` x `width` numbers of it at element (k, n) = data[k * by_k + n * by_n], cut into
// panels of kPanel columns, [k][kPanel], for bf16 [k / 2][kPanel][2]; what is missing is 0.
template <class T>
struct Panels {
  static constexpr bool pairs = std::is_same_v<T, BFloat>;
  int64_t depth, width;
  int64_t padded_depth() const { return round_up(depth, pairs ? 32 : 1); }
  int64_t panel_size() const { return padded_depth() * kPanel; }
  int64_t count() const { return (width + kPanel - 1) / kPanel; }
  int64_t size() const { return count() * panel_size(); }
  int64_t columns(int64_t panel) const { return std::min(kPanel, width - panel * kPanel); }
};

// The packed weights of every head.
template <class T>
struct Packed {
  const T* data;
  int64_t head;
  const T* at(int64_t h) const { return data + h * head; }
};

inline uint32_t* words(float* p) { return reinterpret_cast<uint32_t*>(p); }

// to[k][n] = from[k * by_k + n * by_n]
inline void pack_panel(const float* from, int64_t by_k, int64_t by_n, int64_t depth, int64_t columns, float* to) {
  if (columns == kPanel && by_n == 1) {
    for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * kPanel, from + k * by_k, kPanel * sizeof(float));
  } else if (columns == kPanel && by_k == 1) {
    transpose_words(reinterpret_cast<const uint32_t*>(from), by_n, kPanel, depth, words(to), kPanel);
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t n = 0; n < kPanel; ++n) to[k * kPanel + n] = n < columns ? from[k * by_k + n * by_n] : 0.f;
    }
  }
}

// to[k / 2][n][k % 2] = from[k * by_k + n * by_n]
inline void pack_panel(const BFloat* from, int64_t by_k, int64_t by_n, int64_t depth, int64_t columns, BFloat* to) {
  const int64_t padded = round_up(depth, 32);
  const bool whole = columns == kPanel && depth == padded;
  if (whole && by_k == 1 && by_n % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
    transpose_words(reinterpret_cast<const uint32_t*>(from), by_n / 2, kPanel, depth / 2, reinterpret_cast<uint32_t*>(to),
                    kPanel);
    return;
  }
  if (whole && by_n == 1) {
    for (int64_t k = 0; k < depth; k += 2) {
      const BFloat *first = from + k * by_k, *second = first + by_k;
      for (int64_t n = 0; n < kPanel; ++n) {
        to[k * kPanel + 2 * n] = first[n];
        to[k * kPanel + 2 * n + 1] = second[n];
      }
    }
    return;
  }
  for (int64_t k = 0; k < padded; k += 2) {
    for (int64_t n = 0; n < kPanel; ++n) {
      for (int64_t i = 0; i < 2; ++i) {
        const bool inside = k + i < depth && n < columns;
        to[k * kPanel + 2 * n + i] = inside ? from[(k + i) * by_k + n * by_n] : BFloat{0};
      }
    }
  }
}

template <class T>
void pack(const Panels<T>& panels, const T* from, int64_t by_k, int64_t by_n, T* to) {
  for (int64_t p = 0; p < panels.count(); ++p) {
    pack_panel(from + p * kPanel * by_n, by_k, by_n, panels.depth, panels.columns(p), to + p * panels.panel_size());
  }
}

// c[i] (+)= scale[i] * (a[i] B): M rows, wherever they lie, times N vectors of columns that stay in registers.
// Not inlined: the pointers have to stay in registers too.
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

// C[rows][columns] (+)= sum_k a[k]^T b[k]; whole vectors of columns are read and written.
inline void outer_product(int64_t rows, int64_t columns, int64_t depth, const float* const* a, const float* const* b, float* c,
                          int64_t ldc, bool accumulate) {
  for (int64_t n = 0; n < columns; n += kPanel) {
    const int64_t vectors = (std::min(kPanel, columns - n) + kLanes - 1) / kLanes;
    if (vectors == 1) outer_panel<1>(rows, depth, a, b, n, c + n, ldc, accumulate);
    if (vectors == 2) outer_panel<2>(rows, depth, a, b, n, c + n, ldc, accumulate);
#if defined(__AVX512F__)
    if (vectors == 3) outer_panel<3>(rows, depth, a, b, n, c + n, ldc, accumulate);
    if (vectors == 4) outer_panel<4>(rows, depth, a, b, n, c + n, ldc, accumulate);
#endif
  }
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
  static constexpr int64_t ld = kDepth + 32;  // not a power of two, so that rows do not compete for a line of the cache
  alignas(64) BFloat rows[kBlock * ld];
  alignas(64) float product[kBlock * kPanel];
};

// The rows' numbers k0 ... k0 + depth, brought together; float rows stay where they are.
inline void gather(const Rows<float>&, int64_t, int64_t, Gather<float>&) {}
inline void gather(const Rows<BFloat>& rows, int64_t k0, int64_t depth, Gather<BFloat>& into) {
  const int64_t padded = round_up(depth, 32);
  for (int64_t i = 0; i < rows.count; ++i) {
    BFloat* to = into.rows + i * into.ld;
    std::memcpy(to, rows.from[i] + k0, depth * sizeof(BFloat));
    std::memset(to + depth, 0, (padded - depth) * sizeof(BFloat));
  }
  for (int64_t i = rows.count; i < round_up(rows.count, 16); ++i) std::memset(into.rows + i * into.ld, 0, padded * 2);
}

// to[i][column ...] (+)= scale[i] * (from[i][k0 ...] B), for the `columns` columns of one panel; whole vectors are written.
inline void multiply(const Rows<float>& rows, int64_t k0, int64_t depth, const float* b, int64_t columns, int64_t column,
                     bool accumulate, Gather<float>&) {
  const float* from[kBlock];
  for (int64_t i = 0; i < rows.count; ++i) from[i] = rows.from[i] + k0;
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  if (vectors == 1) rows_panel<1>(rows.count, depth, from, b, rows.scale, rows.to, column, accumulate);
  if (vectors == 2) rows_panel<2>(rows.count, depth, from, b, rows.scale, rows.to, column, accumulate);
#if defined(__AVX512F__)
  if (vectors == 3) rows_panel<3>(rows.count, depth, from, b, rows.scale, rows.to, column, accumulate);
  if (vectors == 4) rows_panel<4>(rows.count, depth, from, b, rows.scale, rows.to, column, accumulate);
#endif
}

#if defined(__AVX512BF16__)
inline void multiply(const Rows<BFloat>& rows, int64_t, int64_t depth, const BFloat* b, int64_t columns, int64_t column,
                     bool accumulate, Gather<BFloat>& gathered) {
  const int64_t width = round_up(columns, kLanes);
  product(round_up(rows.count, 16), width, round_up(depth, 32), {gathered.rows, gathered.ld, 1}, b, kPanel,
          gathered.product, kPanel, false);
  for (int64_t i = 0; i < rows.count; ++i) {
    const Vec factor = all(rows.scale[i]);
    float* to = rows.to[i] + column;
    for (int64_t n = 0; n < width; n += kLanes) {
      const Vec one = factor * load(gathered.product + i * kPanel + n);
      store(to + n, accumulate ? load(to + n) + one : one);
    }
  }
}
#endif

// One projection: its sizes, the selection and the gates (null: 1).
template <class T>
struct Projection {
  int64_t H, S, D, C, R;
  const Selection* selection;
  const float* gates = nullptr;  // [R, S]
  float gate(int64_t r, int64_t s) const { return gates ? gates[r * S + s] : 1.f; }

  Panels<T> panels_to() const { return {C, D}; }
  // A panel does not cross the edge of a block of columns, since kColumns is a multiple of kPanel.
  Panels<T> panels_from() const { return {D, C}; }

  // Pieces of work of `to_heads`: blocks of rows of all heads.
  struct Piece {
    int64_t head, first, count;
  };
  std::vector<Piece> pieces() const {
    std::vector<Piece> all;
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t at = selection->start[h]; at < selection->start[h + 1]; at += kBlock) {
        all.push_back({h, at, std::min(kBlock, selection->start[h + 1] - at)});
      }
    }
    return all;
  }

  struct MemoryTo {
    Gather<T> gathered;
    Lines<float> sum;  // [kBlock][D, padded]
    Rows<T> rows;
  };

  // to[r, s] = gate (from[r] W_h^T + bias_h). Where there is `other`, gate_gradient[r, s] = other[r, s] . from[r] W_h^T.
  void to_heads(const Piece& piece, const T* from, const Packed<T>& packed, const T* bias, const HeadRows<T>& to,
                const HeadRows<const T>* other, float* gate_gradient, MemoryTo& m) const {
    const Panels<T> panels = panels_to();
    const int64_t h = piece.head, ld = round_up(D, kPanel);
    float* all_sums = m.sum.reserve(kBlock * ld);
    m.rows.count = piece.count;
    for (int64_t i = 0; i < piece.count; ++i) {
      m.rows.from[i] = from + selection->row[piece.first + i] * C;
      m.rows.to[i] = all_sums + i * ld;
      m.rows.scale[i] = 1.f;
    }
    for (int64_t k = 0; k < C; k += kDepth) {
      const int64_t depth = std::min(kDepth, C - k);
      gather(m.rows, k, depth, m.gathered);
      for (int64_t p = 0; p < panels.count(); ++p) {
        const T* b = packed.at(h) + p * panels.panel_size() + k * kPanel;
        multiply(m.rows, k, depth, b, panels.columns(p), p * kPanel, k > 0, m.gathered);
      }
    }
    for (int64_t i = 0; i < piece.count; ++i) {
      const int64_t r = selection->row[piece.first + i], s = selection->slot[piece.first + i];
      const float* sum = m.rows.to[i];
      const float factor = gate(r, s);
      T* row = to.at(r, s);
      if (other) {
        const T* x = other->at(r, s);
        float dot = 0.f;
        for (int64_t d = 0; d < D; ++d) dot += sum[d] * widen(x[d]);
        gate_gradient[r * S + s] = dot;
      }
      if (bias) {
        for (int64_t d = 0; d < D; ++d) narrow(factor * (sum[d] + widen(bias[h * D + d])), row + d);
      } else {
        for (int64_t d = 0; d < D; ++d) narrow(factor * sum[d], row + d);
      }
    }
  }

  struct MemoryFrom {
    Gather<T> gathered;
    Lines<float> sum;
    Rows<T> rows;
  };

  // to[r] = bias + sum over the heads of r of gate from[r, s] W_h, for rows r0 ... and columns c0 ...
  void from_heads(int64_t r0, int64_t c0, const HeadRows<const T>& from, const Packed<T>& packed, const T* bias, T* to,
                  MemoryFrom& m) const {
    const Panels<T> panels = panels_from();
    const int64_t r1 = std::min(R, r0 + kRowsOfSum), c1 = std::min(C, c0 + kColumns);
    // Summed up in the result itself where that is float and made of whole vectors.
    const bool in_place = std::is_same_v<T, float> && C % kLanes == 0;
    float* sums = in_place ? reinterpret_cast<float*>(to) + r0 * C + c0 : m.sum.reserve(kRowsOfSum * kColumns);
    const int64_t ld = in_place ? C : kColumns;
    for (int64_t r = r0; r < r1; ++r) {
      float* sum = sums + (r - r0) * ld;
      if (bias) {
        for (int64_t c = c0; c < c1; ++c) sum[c - c0] = widen(bias[c]);
      } else {
        std::memset(sum, 0, (c1 - c0) * sizeof(float));
      }
    }
    const auto row = selection->row.begin();
    for (int64_t h = 0; h < H; ++h) {
      const auto head = row + selection->start[h], head_end = row + selection->start[h + 1];
      const auto last = std::lower_bound(head, head_end, r1);
      for (auto at = std::lower_bound(head, head_end, r0); at < last; at += m.rows.count) {
        m.rows.count = std::min<int64_t>(kBlock, last - at);
        const int64_t* slot = selection->slot.data() + (at - row);
        for (int64_t i = 0; i < m.rows.count; ++i) {
          m.rows.from[i] = from.at(at[i], slot[i]);
          m.rows.to[i] = sums + (at[i] - r0) * ld;
          m.rows.scale[i] = gate(at[i], slot[i]);
        }
        for (int64_t k = 0; k < D; k += kDepth) {
          const int64_t depth = std::min(kDepth, D - k);
          gather(m.rows, k, depth, m.gathered);
          for (int64_t c = c0; c < c1; c += kPanel) {
            const T* b = packed.at(h) + c / kPanel * panels.panel_size() + k * kPanel;
            multiply(m.rows, k, depth, b, panels.columns(c / kPanel), c - c0, true, m.gathered);
          }
        }
      }
    }
    if (in_place) return;
    for (int64_t r = r0; r < r1; ++r) {
      for (int64_t c = c0; c < c1; ++c) narrow(sums[(r - r0) * ld + c - c0], to + r * C + c);
    }
  }

  struct MemoryWeights {
    Lines<T> row, pairs, left, right;
    Lines<float> sum;  // [D, padded][C, padded], or for float weights whose rows are along D [C][D, padded]
  };

  // W_h = sum_r gate left[r, s]^T right[r]
  void weights(int64_t h, const HeadRows<const float>& left, const float* right, const Weights<float>& to,
               MemoryWeights& m) const {
    // Which of D and C is along the vectors: the one that is contiguous in the weights.
    const bool along_D = to.dim == 1 && to.column != 1;
    const int64_t rows = along_D ? C : D, columns = along_D ? D : C, wide = round_up(columns, kLanes);
    float* out = to.data + h * to.head;
    const int64_t ld = along_D ? to.column : to.dim;
    const bool in_place = columns == wide && (along_D || to.column == 1);
    float* sum = in_place ? out : m.sum.reserve(rows * wide);
    const int64_t ld_sum = in_place ? ld : wide;
    if (selection->count(h) == 0) {
      for (int64_t i = 0; i < rows; ++i) std::memset(sum + i * ld_sum, 0, columns * sizeof(float));
    }
    for (int64_t first = selection->start[h]; first < selection->start[h + 1]; first += kRowsOfWeights) {
      const int64_t depth = std::min(kRowsOfWeights, selection->start[h + 1] - first);
      const float *l[kRowsOfWeights], *r[kRowsOfWeights];
      pointers_to_left(first, depth, left, along_D && columns != wide, l, m.left);
      pointers_to_right(first, depth, right, !along_D && columns != wide, r, m.right);
      const bool accumulate = first > selection->start[h];
      outer_product(rows, columns, depth, along_D ? r : l, along_D ? l : r, sum, ld_sum, accumulate);
    }
    if (in_place) return;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) out[along_D ? i * to.column + j : i * to.dim + j * to.column] = sum[i * wide + j];
    }
  }

  // Where the rows of `left` are; copies where gates scale them or vectors would reach beyond their ends.
  void pointers_to_left(int64_t first, int64_t depth, const HeadRows<const float>& left, bool pad, const float** to,
                        Lines<float>& copies) const {
    const int64_t wide = round_up(D, kLanes);
    if (gates || pad) copies.reserve(kRowsOfWeights * wide);
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t r = selection->row[first + k], s = selection->slot[first + k];
      to[k] = left.at(r, s);
      if (gates || pad) {
        copy_row(to[k], D, gate(r, s), copies.data() + k * wide);
        std::memset(copies.data() + k * wide + D, 0, (wide - D) * sizeof(float));
        to[k] = copies.data() + k * wide;
      }
    }
  }

  // Likewise for the rows of `right`.
  void pointers_to_right(int64_t first, int64_t depth, const float* right, bool pad, const float** to,
                         Lines<float>& copies) const {
    const int64_t wide = round_up(C, kLanes);
    if (pad) copies.reserve(kRowsOfWeights * wide);
    for (int64_t k = 0; k < depth; ++k) {
      to[k] = right + selection->row[first + k] * C;
      if (pad) {
        std::memcpy(copies.data() + k * wide, to[k], C * sizeof(float));
        std::memset(copies.data() + k * wide + C, 0, (wide - C) * sizeof(float));
        to[k] = copies.data() + k * wide;
      }
    }
  }

#if defined(__AVX512BF16__)
  void weights(int64_t h, const HeadRows<const BFloat>& left, const BFloat* right, const Weights<BFloat>& to,
               MemoryWeights& m) const {
    const int64_t dims = round_up(D, 16), width = round_up(C, 16);
    std::memset(m.sum.reserve(dims * width), 0, dims * width * sizeof(float));
    for (int64_t first = selection->start[h]; first < selection->start[h + 1]; first += kDepth) {
      const int64_t depth = std::min(kDepth, selection->start[h + 1] - first);
      add_to_weights(selection->row.data() + first, selection->slot.data() + first, depth, left, right, dims, width, m);
    }
    BFloat* out = to.data + h * to.head;
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t c = 0; c < C; ++c) narrow(m.sum.data()[d * width + c], out + d * to.dim + c * to.column);
    }
  }

  void add_to_weights(const int64_t* r, const int64_t* s, int64_t depth, const HeadRows<const BFloat>& left,
                      const BFloat* right, int64_t dims, int64_t width, MemoryWeights& m) const {
    const int64_t padded = round_up(depth, 32), ld = kDepth + 32, wide = std::max(dims, kPanel);
    std::memset(m.row.reserve(2 * wide), 0, 2 * wide * sizeof(BFloat));
    m.pairs.reserve(kDepth * dims);
    m.left.reserve(dims * ld);
    m.right.reserve(kDepth * kPanel);
    for (int64_t k = 0; k < padded; k += 2) {
      for (int64_t i = 0; i < 2; ++i) {
        BFloat* row = m.row.data() + i * dims;
        if (k + i < depth) {
          copy_row(left.at(r[k + i], s[k + i]), D, gate(r[k + i], s[k + i]), row);
        } else {
          std::memset(row, 0, D * sizeof(BFloat));
        }
      }
      pair_rows(m.row.data(), 2, dims, m.pairs.data() + k * dims);
    }
    transpose_words(reinterpret_cast<uint32_t*>(m.pairs.data()), dims, padded / 2, dims,
                    reinterpret_cast<uint32_t*>(m.left.data()), ld / 2);
    for (int64_t c = 0; c < C; c += kPanel) {
      const int64_t columns = std::min(kPanel, C - c);
      for (int64_t k = 0; k < padded; k += 2) {
        for (int64_t i = 0; i < 2; ++i) {
          BFloat* row = m.row.data() + i * kPanel;
          const int64_t inside = k + i < depth ? columns : 0;
          if (inside) std::memcpy(row, right + r[k + i] * C + c, inside * sizeof(BFloat));
          std::memset(row + inside, 0, (kPanel - inside) * sizeof(BFloat));
        }
        pair_rows(m.row.data(), 2, kPanel, m.right.data() + k * kPanel);
      }
      product(dims, round_up(columns, 16), padded, {m.left.data(), ld, 1}, m.right.data(), kPanel, m.sum.data() + c, width,
              true);
    }
  }
#endif
};

}  // namespace mixhead
