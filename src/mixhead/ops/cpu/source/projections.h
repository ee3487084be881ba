// Products of the rows that select a head with that head's weights, for projections to heads and from heads.
//
// Both projections, forward and backward, are made of three products over the rows r that select head h:
//     to_heads:    Y[r, s] = X[r] W_h^T              rows of C numbers to rows of D
//     from_heads:  Y[r]   += gate[r, s] X[r, s] W_h   rows of D numbers to rows of C, summed over the heads in their order
//     weights:     W_h     = sum_r gate[r, s] X[r, s]^T Y[r]
// A row has S slots, and s is the one that head h stands in: s = h with a slot for every head, or, with as many slots as a
// row has heads (experts), the one that a table names.
// All sums are in float, and none depends on the threads.
//
// Legend: H heads, S slots, D head dim, C hidden size, R rows (batch x tokens), k depth of a product.
#pragma once

#include <memory>
#include <vector>

#include "rows.h"

namespace mixhead {

constexpr int64_t kColumns = 256;                   // columns of the output that are summed up at a time ...
constexpr int64_t kRowsOfSum = 1024;                // ... and how many rows of it
constexpr int64_t kRowsOfWeights = 256;             // rows that are summed up at a time in the gradient of weights

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
  T* at(int64_t h, int64_t d, int64_t c) const { return data + h * head + d * dim + c * column; }
};

// One projection: its sizes, the selection and the gates (null: 1).
template <class T>
struct Projection {
  int64_t H, S, D, C, R;
  const Selection* selection;
  const float* gates = nullptr;  // [R, S]
  float gate(int64_t r, int64_t s) const { return gates ? gates[r * S + s] : 1.f; }

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
    Lines<T> panel;
    Lines<float> sum{kBlock * kPanel};
    Rows<T> rows;
    float dot[kBlock];
  };

  // to[r, s] = gate (from[r] W_h^T + bias_h). Where there is `other`, gate_gradient[r, s] = other[r, s] . from[r] W_h^T.
  void to_heads(const Piece& piece, const T* from, const Weights<const T>& weights, const T* bias, const HeadRows<T>& to,
                const HeadRows<const T>* other, float* gate_gradient, MemoryTo& m) const {
    const int64_t h = piece.head, *row = selection->row.data() + piece.first, *slot = selection->slot.data() + piece.first;
    m.rows.count = piece.count;
    for (int64_t i = 0; i < piece.count; ++i) {
      m.rows.from[i] = from + row[i] * C;
      m.rows.to[i] = m.sum.data() + i * kPanel;
      m.rows.scale[i] = 1.f;
      m.dot[i] = 0.f;
    }
    gather(m.rows, C, m.gathered);
    for (int64_t d0 = 0; d0 < D; d0 += kPanel) {
      const int64_t columns = std::min(kPanel, D - d0);
      for (int64_t k = 0; k < C; k += kDepth) {
        const int64_t depth = std::min(kDepth, C - k);
        const T* b = panel(weights.at(h, d0, k), weights.column, weights.dim, depth, columns, m.panel);
        multiply(m.rows, k, depth, b, columns, 0, k > 0, m.gathered);
      }
      for (int64_t i = 0; i < piece.count; ++i) {
        const float *sum = m.rows.to[i], factor = gate(row[i], slot[i]);
        T* out = to.at(row[i], slot[i]) + d0;
        if (other) m.dot[i] += dot(sum, other->at(row[i], slot[i]) + d0, columns);
        if (bias) {
          for (int64_t d = 0; d < columns; ++d) narrow(factor * (sum[d] + widen(bias[h * D + d0 + d])), out + d);
        } else {
          copy_row(sum, columns, factor, out);
        }
      }
    }
    if (!other) return;
    for (int64_t i = 0; i < piece.count; ++i) gate_gradient[row[i] * S + slot[i]] = m.dot[i];
  }

  struct MemoryFrom {
    Gather<T> gathered;
    Lines<T> panel;
    Lines<float> sum;
    Rows<T> rows;
  };

  // to[r] = bias + sum over the heads of r of gate from[r, s] W_h, for rows r0 ... and columns c0 ...
  void from_heads(int64_t r0, int64_t c0, const HeadRows<const T>& from, const Weights<const T>& weights,
                  const T* bias, T* to, MemoryFrom& m) const {
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
        gather(m.rows, D, m.gathered);
        for (int64_t c = c0; c < c1; c += kPanel) {
          const int64_t columns = std::min(kPanel, C - c);
          for (int64_t k = 0; k < D; k += kDepth) {
            const int64_t depth = std::min(kDepth, D - k);
            const T* b = panel(weights.at(h, k, c), weights.dim, weights.column, depth, columns, m.panel);
            multiply(m.rows, k, depth, b, columns, c - c0, true, m.gathered);
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
