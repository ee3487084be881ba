// Attention of a few rows against a long cache, as in decoding: bound by the reading of keys and values.
//
// A row is a query and one of the heads that it selects. All rows of one key-value head are few enough to be worked on
// together, so that each of its keys and values is read once, where it lies, and widened in registers; a key-value head
// that no query selects is not read at all. Here the dimensions of the heads stand in the vector lanes.
//
// The keys are cut into pieces of kPiece. A piece is attended by itself,
//     score = log2(e) q K^T,   max = largest score,   P = 2^(score - max),   sum of P,   O = P V,
// and a row's pieces are then combined in order, as partial softmaxes (flash-decoding). So threads share the keys of one
// head, and since pieces do not depend on the number of threads, neither does the result.
//
// Legend: as in attention.h. `rows`: of one key-value head. Keys that a mask hides from all rows at the start or the end of
// a piece (padding, the unused end of a static cache) are not read.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "attention.h"

namespace mixhead {

constexpr int64_t kPiece = 256;       // keys in a piece
constexpr int64_t kMostRows = 32;     // of any key-value head
constexpr int64_t kFewScores = 2;     // of a row
constexpr int64_t kKeyBlock = 64;     // values that stay in the first cache while several tiles of rows pass
constexpr int64_t kAheadBytes = 4096; // how far ahead of its use memory is asked for

// Rows of a key-value head, on average; with more, whole blocks are faster. In bf16 that is sooner where the CPU multiplies
// it, unless there are too few keys to make up for packing them.
template <class In>
inline int64_t most_rows(const Shape& s) {
#if defined(__AVX512BF16__)
  if (std::is_same_v<In, BFloat> && s.T > 64) return 8;
#endif
  return 16;
}

template <class In>
inline bool few_rows(const Shape& s, const View<const bool>& selected) {
  const int64_t few = most_rows<In>(s), most = s.N * s.groups();
  if (most <= few || most > 2 * few) return most <= few;
  int64_t count = 0;
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t n = 0; n < s.N; ++n) {
      for (int64_t h = 0; h < s.H; ++h) count += *selected.at(b, h, n);
    }
  }
  return count <= few * s.B * s.K;
}

// Calls `use(number of rows at a time, first row)` with 4, 2 or 1 at a time, known when compiling.
template <class Use>
inline void for_tiles_of_rows(int64_t count, Use use) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) use(std::integral_constant<int, 4>{}, r);
  for (; r + 2 <= count; r += 2) use(std::integral_constant<int, 2>{}, r);
  if (r < count) use(std::integral_constant<int, 1>{}, r);
}

// Scores of kLanes / R keys for R rows; past `keys` the last key is read again.
template <int R, class In>
[[gnu::always_inline]] inline void score_tile(const float* q, int64_t ldq, const In* k, int64_t row, int64_t keys, int64_t D,
                                              float* scores) {
  constexpr int kKeys = kLanes / R;
  constexpr int64_t ahead = kAheadBytes / sizeof(In);
  const In* key[kKeys];
  Vec sum[R * kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) key[i] = k + std::min<int64_t>(i, keys - 1) * row;
#pragma GCC unroll 16
  for (int i = 0; i < R * kKeys; ++i) sum[i] = all(0.f);
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      __builtin_prefetch(key[i] + d + ahead);
      const Vec x = load_wide(key[i] + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r * kKeys + i] += load(q + r * ldq + d) * x;
    }
  }
  if (d < D) {
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const Vec x = load_wide_first(key[i] + d, D - d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r * kKeys + i] += load(q + r * ldq + d) * x;
    }
  }
  const Vec total = sums_of(sum);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    std::memcpy(scores + r * kPiece, reinterpret_cast<const float*>(&total) + r * kKeys, kKeys * sizeof(float));
  }
}

// Scores of so few keys that a tile, which adds up the lanes of many sums together, does not pay.
template <class In>
inline void score_one_by_one(const float* q, int64_t rows, int64_t ldq, const In* k, int64_t row, int64_t keys, int64_t D,
                             float* scores) {
  const int64_t whole = D / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < keys; ++t) {
      const float* query = q + r * ldq;
      const In* key = k + t * row;
      Vec sum = all(0.f);
      for (int64_t d = 0; d < whole; d += kLanes) sum += load(query + d) * load_wide(key + d);
      if (whole < D) sum += load(query + whole) * load_wide_first(key + whole, D - whole);
      scores[r * kPiece + t] = sum_of(sum);
    }
  }
}

// out[r][N vectors] += sum over keys of probs[r][t] v[t], for R rows. `some`: numbers of the last vector, if not all.
template <int R, int N, class In>
inline void value_tile(const float* probs, const In* v, int64_t row, int64_t keys, int64_t some, float* out, int64_t ldo) {
  constexpr int64_t ahead = kAheadBytes / sizeof(In);
  Vec sum[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[r][j] = all(0.f);
  }
  for (int64_t t = 0; t < keys; ++t, v += row) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      __builtin_prefetch(v + j * kLanes + ahead);
      const Vec x = some ? load_wide_first(v, some) : load_wide(v + j * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][j] += all(probs[r * kPiece + t]) * x;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      float* to = out + r * ldo + j * kLanes;
      store(to, load(to) + sum[r][j]);
    }
  }
}

template <class In>
class Decode {
 public:
  Shape s;
  View<const In> q, k, v, gates;  // gates: [B, N, H] addressed as (b, h, n), and so is `selected`
  View<const bool> selected;
  Mask mask;
  View<In> out;
  float* stats;  // as in views.h

  void reserve() {
    partial_.reset(new float[lists() * pieces() * partial_size()]);
    left_.reset(new std::atomic<int32_t>[lists()]);
    for (int64_t i = 0; i < lists(); ++i) left_[i] = int32_t(pieces());
  }

  // Pieces of work, for any thread in any order.
  int64_t work() const { return lists() * pieces(); }

  struct Memory {
    float *q, *scores, *bias;
  };
  Memory memory(Arena& arena) const {
    const int64_t rows = all_rows();
    return {arena.take<float>(rows * dim()), arena.take<float>(rows * kPiece), arena.take<float>(rows * kPiece)};
  }

  void run(Memory& m, int64_t item) const {
    const int64_t bk = item / pieces(), piece = item % pieces();
    const Rows rows = list_rows(bk);
    if (piece == 0) clear_unselected(bk);
    if (rows.count == 0) return;
    attend(m, rows, piece * kPiece, partial(bk, piece));
    if (left_[bk].fetch_sub(1) == 1) combine(rows, bk);
  }

 private:
  std::unique_ptr<float[]> partial_;               // of every piece
  std::unique_ptr<std::atomic<int32_t>[]> left_;  // pieces of every key-value head that are not done yet

  struct Rows {
    int64_t b, kv_head, count = 0;
    int32_t n[kMostRows], h[kMostRows];
  };

  // Of one piece: [rows][dim], then the rows' maxima, then their sums.
  int64_t partial_size() const { return all_rows() * (dim() + 2); }
  float* partial(int64_t bk, int64_t piece) const { return partial_.get() + (bk * pieces() + piece) * partial_size(); }
  int64_t lists() const { return s.B * s.K; }
  int64_t all_rows() const { return s.N * s.groups(); }  // of one key-value head, selected or not: at most kMostRows
  int64_t pieces() const { return (s.T + kPiece - 1) / kPiece; }
  int64_t dim() const { return round_up(s.D, kLanes); }

  Rows list_rows(int64_t bk) const {
    Rows rows{bk / s.K, bk % s.K};
    for (int64_t n = 0; n < s.N; ++n) {
      for (int64_t h = rows.kv_head * s.groups(); h < (rows.kv_head + 1) * s.groups(); ++h) {
        if (!*selected.at(rows.b, h, n)) continue;
        rows.n[rows.count] = int32_t(n);
        rows.h[rows.count++] = int32_t(h);
      }
    }
    return rows;
  }

  void clear_unselected(int64_t bk) const {
    for (int64_t n = 0; n < s.N; ++n) {
      for (int64_t h = bk % s.K * s.groups(); h < (bk % s.K + 1) * s.groups(); ++h) {
        if (!*selected.at(bk / s.K, h, n)) std::memset(out.at(bk / s.K, h, n), 0, s.D * sizeof(In));
      }
    }
  }

  // The keys of a piece that any row may see, and what is added to the scores of a row: -infinity at keys hidden from it.
  struct Visible {
    int64_t begin, end;
    const float* bias[kMostRows];  // from key `begin` on; null where nothing is added
  };

  Visible look(Memory& m, const Rows& rows, int64_t t0) const {
    const int64_t t1 = std::min(t0 + kPiece, s.T);
    Visible seen{t1, t0, {}};
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t limit = std::clamp(s.visible(rows.n[r]), t0, t1);
      if (mask.type == MaskType::none && limit == t1) {
        seen.begin = t0;
        seen.end = t1;
        continue;
      }
      const bool as_before = r > 0 && limit == std::clamp(s.visible(rows.n[r - 1]), t0, t1) &&
                             mask_offset(rows, r) == mask_offset(rows, r - 1);
      if (as_before) {
        seen.bias[r] = seen.bias[r - 1];
        continue;
      }
      float* bias = m.bias + r * kPiece;
      seen.bias[r] = bias;
      set_bias(rows, r, t0, limit - t0, bias);
      std::fill(bias + (limit - t0), bias + (t1 - t0), -kInfinity);
      int64_t first = t0, last = limit;
      while (first < last && bias[first - t0] == -kInfinity) ++first;
      while (first < last && bias[last - 1 - t0] == -kInfinity) --last;
      if (first == last) continue;
      seen.begin = std::min(seen.begin, first);
      seen.end = std::max(seen.end, last);
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      if (seen.bias[r]) seen.bias[r] += seen.begin - t0;
    }
    return seen;
  }

  int64_t mask_offset(const Rows& rows, int64_t r) const {
    return rows.b * mask.batch + rows.h[r] * mask.head + rows.n[r] * mask.row;
  }

  void set_bias(const Rows& rows, int64_t r, int64_t t0, int64_t keys, float* to) const {
    const int64_t at = mask_offset(rows, r) + t0 * mask.key;
    const auto copy = [&](const auto* from, auto bias) {
      for (int64_t t = 0; t < keys; ++t) to[t] = bias(from[at + t * mask.key]);
    };
    if (mask.type == MaskType::none) std::fill(to, to + keys, 0.f);
    if (mask.type == MaskType::boolean) {
      copy(static_cast<const uint8_t*>(mask.data), [](uint8_t x) { return x ? 0.f : -kInfinity; });
    }
    if (mask.type == MaskType::float32) copy(static_cast<const float*>(mask.data), [](float x) { return bias_of(x); });
    if (mask.type == MaskType::bfloat16) copy(static_cast<const BFloat*>(mask.data), [](BFloat x) { return bias_of(widen(x)); });
  }

  void attend(Memory& m, const Rows& rows, int64_t t0, float* to) const {
    float *max = to + all_rows() * dim(), *sum = max + rows.count;
    std::memset(to, 0, rows.count * dim() * sizeof(float));
    const Visible seen = look(m, rows, t0);
    const int64_t keys = seen.end - seen.begin;
    if (keys <= 0) {
      std::fill(max, max + rows.count, kLowest);
      std::fill(sum, sum + rows.count, 0.f);
      return;
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      const In* from = q.at(rows.b, rows.h[r], rows.n[r]);
      copy_row(from, s.D, 1.f, m.q + r * dim());
      std::fill(m.q + r * dim() + s.D, m.q + (r + 1) * dim(), 0.f);
    }
    const In* first_key = k.at(rows.b, rows.kv_head, seen.begin);
    if (keys <= kFewScores) {
      score_one_by_one(m.q, rows.count, dim(), first_key, k.row, keys, s.D, m.scores);
    } else {
      score(m.q, rows.count, first_key, keys, m.scores);
    }
    for (int64_t r = 0; r < rows.count; ++r) softmax(m.scores + r * kPiece, seen.bias[r], keys, max + r, sum + r);
    add_values(m.scores, rows.count, v.at(rows.b, rows.kv_head, seen.begin), keys, to);
  }

  void score(const float* query, int64_t rows, const In* keys_, int64_t keys, float* scores) const {
    for (int64_t block = 0; block < keys; block += kLanes) {
      for_tiles_of_rows(rows, [&](auto tile, int64_t r) {
        constexpr int kRows_ = std::min<int>(tile.value, kLanes), kKeys = kLanes / kRows_;
        for (int64_t t = block; t < std::min(block + kLanes, keys); t += kKeys) {
          score_tile<kRows_>(query + r * dim(), dim(), keys_ + t * k.row, k.row, keys - t, s.D, scores + r * kPiece + t);
        }
      });
    }
  }

  // Scores -> probabilities over their sum, in place. Scores of hidden keys may be anything.
  void softmax(float* scores, const float* bias, int64_t keys, float* max, float* sum) const {
    const int64_t padded = round_up(keys, kLanes);
    const Vec factor = all(s.scale * kLog2e), hidden = all(-kInfinity);
    for (int64_t t = 0; t < padded; t += kLanes) {
      const Vec x = load(scores + t) * factor;
      const Vec b = bias == nullptr ? all(0.f) : load(bias + t);
      store(scores + t, b == hidden ? hidden : x + b);
    }
    std::fill(scores + keys, scores + padded, -kInfinity);
    Vec largest = all(kLowest), total = all(0.f);
    for (int64_t t = 0; t < padded; t += kLanes) largest = larger(load(scores + t), largest);
    *max = largest_of(largest);
    for (int64_t t = 0; t < padded; t += kLanes) {
      const Vec p = exp2(load(scores + t) - *max);
      store(scores + t, p);
      total += p;
    }
    *sum = sum_of(total);
  }

  void add_values(const float* probs, int64_t rows, const In* values, int64_t keys, float* to) const {
    const int64_t whole = s.D / kLanes * kLanes, some = s.D - whole;
    for (int64_t t = 0; t < keys; t += kKeyBlock) {
      const int64_t block = std::min(kKeyBlock, keys - t);
      const In* from = values + t * v.row;
      for_tiles_of_rows(rows, [&](auto tile, int64_t r) {
        constexpr int kRows_ = tile.value, kWidest = std::min(8, (kLanes == 16 ? 16 : 8) / kRows_);
        const float* p = probs + r * kPiece + t;
        float* sums = to + r * dim();
        const auto slices = [&](auto vectors, int64_t& d) {
          for (; d + vectors.value * kLanes <= whole; d += vectors.value * kLanes) {
            value_tile<kRows_, vectors.value>(p, from + d, v.row, block, 0, sums + d, dim());
          }
        };
        int64_t d = 0;
        slices(std::integral_constant<int, kWidest>{}, d);
        if constexpr (kWidest > 4) slices(std::integral_constant<int, 4>{}, d);
        if constexpr (kWidest > 2) slices(std::integral_constant<int, 2>{}, d);
        slices(std::integral_constant<int, 1>{}, d);
        if (some) value_tile<kRows_, 1>(p, from + d, v.row, block, some, sums + d, dim());
      });
    }
  }

  // Adds up a key-value head's pieces in order, and writes its rows of the output.
  void combine(const Rows& rows, int64_t bk) const {
    const int64_t size = s.B * s.H * s.N;
    for (int64_t r = 0; r < rows.count; ++r) {
      const auto max_of = [&](int64_t piece) { return partial(bk, piece)[all_rows() * dim() + r]; };
      const auto sum_of = [&](int64_t piece) { return partial(bk, piece)[all_rows() * dim() + rows.count + r]; };
      float max = kLowest, sum = 0.f;
      for (int64_t piece = 0; piece < pieces(); ++piece) max = std::max(max, max_of(piece));
      float* total = partial(bk, 0) + r * dim();
      for (int64_t piece = 0; piece < pieces(); ++piece) {
        const float factor = pieces() == 1 ? 1.f : std::exp2(max_of(piece) - max);
        const float* from = partial(bk, piece) + r * dim();
        sum += factor * sum_of(piece);
        for (int64_t d = 0; d < s.D; ++d) total[d] = (piece == 0 ? 0.f : total[d]) + factor * from[d];
      }
      const int64_t h = rows.h[r], n = rows.n[r], at = (rows.b * s.H + h) * s.N + n;
      const float inverse = sum == 0.f ? 0.f : 1.f / sum, factor = inverse * widen(*gates.at(rows.b, h, n));
      if (stats) {
        stats[at] = max;
        stats[size + at] = inverse;
      }
      In* to = out.at(rows.b, h, n);
      for (int64_t d = 0; d < s.D; ++d) narrow(total[d] * factor, to + d);
    }
  }
};

}  // namespace mixhead
