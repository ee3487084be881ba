// Attention of the selected heads: forward and backward of one block of query rows, and the work split into blocks.
//
// Queries stand in the vector lanes. The rows that select any head of one key-value head are listed by position and cut
// into blocks of 64; a block is transposed once, Q^T [D][64], and then meets the keys in runs:
//     S^T [keys][64] = log2(e) K Q^T,   P^T = 2^(S^T - max),   O^T [D][64] += V^T P^T
// so that the softmax never reduces across lanes, and keys and values are read where they lie. The rows are in the order
// of their positions, so under a causal mask a run of keys ends at the last visible key, and lanes that see none of its
// keys (always the first ones) are left out. The maximum of a lane is only raised when it grew by more than
// kRaise, which spares nearly all corrections of O^T and changes nothing but the common factor of P and its sum.
//
// Legend: B batch, H query heads, K key-value heads, G = H / K, N queries, T keys, D head dim. `lane`: a row in a block.
// `In` is the type of the tensors and `Op` that of the operands of products: float, or bf16 where the CPU multiplies it.
#pragma once

#include "product.h"
#include "views.h"

namespace mixhead {

constexpr float kRaise = 8.f;       // P stays below 2^8
constexpr int64_t kKeyPairs = 32;   // keys transposed at a time when bf16 values are packed

// How operands are laid out. float operands of float tensors are read in place; all others are packed once per
// key-value head, with D and T padded by zeros.
template <class In, class Op>
struct Layout {
  static constexpr bool in_place = std::is_same_v<In, float> && std::is_same_v<Op, float>;
  static constexpr bool pairs = std::is_same_v<Op, BFloat>;
  static constexpr int64_t key_step = pairs ? 32 : 1;                   // products want this many keys at a time
  static constexpr int64_t lane_step = pairs ? 2 : 1;                   // and this many vectors of lanes
  static constexpr int64_t keys_in_run = pairs ? 64 : 66;               // the second is a multiple of a tile's six rows
  static int64_t padded_dim(int64_t D) { return round_up(D, pairs ? 32 : kLanes); }
  static int64_t depth(int64_t D) { return pairs ? padded_dim(D) : D; }
  static int64_t padded_keys(int64_t T) { return round_up(T, key_step); }
};

// Keys and values of one key-value head as left operands.
template <class Op>
struct KeyValue {
  Left<Op> k, v;    // [T][D]
  Left<Op> kT, vT;  // [D][T]; where packed, each run of keys is a matrix of its own
  int64_t run_size = 0;
  static Left<Op> run(Left<Op> columns, int64_t run_size, int64_t t0, int64_t keys_in_run) {
    if (run_size == 0) return columns.from(0, t0);
    return {columns.data + t0 / keys_in_run * run_size, columns.row, columns.col};
  }
};

// Copies `count` numbers, widened or narrowed, times `factor`.
template <class From, class To>
inline void copy_row(const From* from, int64_t count, float factor, To* to) {
  if (std::is_same_v<From, To> && factor == 1.f) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    const int64_t whole = count / kLanes * kLanes;
    const Vec times = all(factor);
    for (int64_t i = 0; i < whole; i += kLanes) store_narrow(to + i, load_wide(from + i) * times);
    if (whole < count) store_narrow_first(to + whole, load_wide_first(from + whole, count - whole) * times, count - whole);
  }
}

// Two rows' product, summed up in vectors.
template <class A, class B>
inline float dot(const A* a, const B* b, int64_t count) {
  const int64_t whole = count / kLanes * kLanes, left = count - whole;
  Vec sum = all(0.f);
  for (int64_t i = 0; i < whole; i += kLanes) sum += load_wide(a + i) * load_wide(b + i);
  if (left) sum += load_wide_first(a + whole, left) * load_wide_first(b + whole, left);
  return sum_of(sum);
}

// rows[r][c] -> pairs[r / 2][c][r % 2], `count` rows (even)
inline void pair_rows(const BFloat* rows, int64_t count, int64_t cols, BFloat* pairs) {
  for (int64_t r = 0; r < count; r += 2) {
    for (int64_t c = 0; c < cols; ++c) {
      pairs[r * cols + 2 * c] = rows[r * cols + c];
      pairs[r * cols + 2 * c + 1] = rows[(r + 1) * cols + c];
    }
  }
}

#if defined(__AVX512BF16__)
// P of keys t and t + 1 as pairs, B[t / 2][lane][2].
inline __m512i pairs_of(Vec first, Vec second) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}
inline void store_pair(BFloat* to, Vec first, Vec second) { _mm512_storeu_si512(to, pairs_of(first, second)); }
inline void store_row(BFloat* to, Vec x) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#else
inline void store_pair(BFloat*, Vec, Vec) {}
inline void store_row(BFloat*, Vec) {}
#endif

template <class In, class Op>
class Attention : public Problem<In> {
 public:
  using L = Layout<In, Op>;
  using Problem<In>::s, Problem<In>::q, Problem<In>::k, Problem<In>::v, Problem<In>::gates;
  using Problem<In>::mask, Problem<In>::rows, Problem<In>::stats;

  const Op *packed_k = nullptr, *packed_v = nullptr, *packed_kT = nullptr;
  int64_t first_packed = 0;  // the key-value head that stands first in them

  // What packing one key-value head takes, in numbers.
  int64_t packed_size() const { return round_up(s.T, L::keys_in_run) * L::padded_dim(s.D); }

  void pack_rows(const View<const In>& from, int64_t bk, Op* to) const {
    const int64_t dim = L::padded_dim(s.D), keys = L::padded_keys(s.T);
    for (int64_t t = 0; t < keys; ++t) {
      Op* row = to + t * dim;
      if (t < s.T) copy_row(from.at(bk / s.K, bk % s.K, t), s.D, 1.f, row);
      std::memset(row + (t < s.T ? s.D : 0), 0, (t < s.T ? dim - s.D : dim) * sizeof(Op));
    }
  }

  // Transposed, run by run: [T / keys_in_run][D][keys_in_run]. (Rows as long as all keys would often lie a power of two
  // apart, where a cache holds only a few of them.)
  void pack_columns(const View<const In>& from, int64_t bk, Op* to) const {
    const int64_t dim = L::padded_dim(s.D), run = L::keys_in_run;
    std::vector<Op> rows_(kKeyPairs * dim), pairs(kKeyPairs * dim);
    for (int64_t t0 = 0; t0 < L::padded_keys(s.T); t0 += kKeyPairs) {
      std::memset(rows_.data(), 0, rows_.size() * sizeof(Op));
      for (int64_t t = t0; t < std::min(t0 + kKeyPairs, s.T); ++t) {
        copy_row(from.at(bk / s.K, bk % s.K, t), s.D, 1.f, rows_.data() + (t - t0) * dim);
      }
      pair_rows(rows_.data(), kKeyPairs, dim, pairs.data());
      Op* block = to + t0 / run * run * dim + t0 % run;
      transpose_words(reinterpret_cast<const uint32_t*>(pairs.data()), dim, kKeyPairs / 2, dim,
                      reinterpret_cast<uint32_t*>(block), run / 2);
    }
  }

  KeyValue<Op> key_value(int64_t bk) const {
    if constexpr (L::in_place) {
      const float *keys = k.at(bk / s.K, bk % s.K, 0), *values = v.at(bk / s.K, bk % s.K, 0);
      return {{keys, k.row, 1}, {values, v.row, 1}, {keys, 1, k.row}, {values, 1, v.row}};
    } else {
      const int64_t dim = L::padded_dim(s.D), at = (bk - first_packed) * packed_size();
      const Left<Op> keys{packed_k + at, dim, 1}, values{packed_v + at, dim, 1};
      if constexpr (L::pairs) {
        const int64_t run = L::keys_in_run;
        return {keys, values, {packed_kT + at, run, 1}, {}, dim * run};  // only the gradients ask here
      } else {
        return {keys, values, {keys.data, 1, dim}, {values.data, 1, dim}};
      }
    }
  }

  // Keys (or values) t0 ... t0 + count as rows. Rows of a float tensor that lie apart, because the heads of a token are side
  // by side, are first brought together: at distances of a power of two a cache holds only a few of them.
  static Left<Op> rows_of_run(const Left<Op>& rows_, int64_t t0, int64_t count, int64_t D, Op* scratch) {
    if (!L::in_place || rows_.row == D) return rows_.from(t0, 0);
    for (int64_t t = 0; t < count; ++t) std::memcpy(scratch + t * D, rows_.data + (t0 + t) * rows_.row, D * sizeof(Op));
    return {scratch, D, 1};
  }

  // Asks for keys (or values) t0 ... t0 + count, to be there when the products before theirs are done.
  static void ask_for(const Left<Op>& rows_, int64_t t0, int64_t count, int64_t D) {
    constexpr int64_t kLine = 64 / int64_t(sizeof(Op));
    for (int64_t t = t0; t < t0 + count; ++t) {
      for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(rows_.data + t * rows_.row + d);
    }
  }

  // The same, transposed: of `rows_of_run` where operands are read in place, else as packed.
  static Left<Op> columns_of_run(const KeyValue<Op>& kv, const Left<Op>& columns, const Left<Op>& run, int64_t t0) {
    if (L::in_place) return {run.data, 1, run.row};
    return kv.run(columns, kv.run_size, t0, L::keys_in_run);
  }

  // One block of rows while it is worked on. All arrays over lanes have kRows entries.
  struct Block {
    int64_t b, kv_head, count, vectors, end;  // end: keys that any lane sees
    int32_t n[kRows], h[kRows], limit[kRows];
    alignas(64) float max[kRows], sum[kRows];
  };

  void begin(Block& block, const BlockOfRows& ref) const {
    const int64_t groups = s.groups();
    block.b = ref.bk / s.K;
    block.kv_head = ref.bk % s.K;
    block.count = ref.count;
    block.vectors = round_up((ref.count + kLanes - 1) / kLanes, L::lane_step);
    for (int64_t lane = 0; lane < kRows; ++lane) {
      const int32_t code = rows->code[ref.first + std::min(lane, ref.count - 1)];
      block.n[lane] = int32_t(code / groups);
      block.h[lane] = int32_t(block.kv_head * groups + code % groups);
      block.limit[lane] = int32_t(s.visible(block.n[lane]));
    }
    block.end = block.limit[kRows - 1];
  }

  // Rows of a [B, H, N, D] tensor, padded by zeros to [lanes][padded_dim].
  void gather(const Block& block, const View<const In>& from, const float* factor, Op* to) const {
    const int64_t dim = L::padded_dim(s.D);
    for (int64_t lane = 0; lane < block.vectors * kLanes; ++lane) {
      Op* row = to + lane * dim;
      int64_t filled = 0;
      if (lane < block.count) {
        copy_row(from.at(block.b, block.h[lane], block.n[lane]), s.D, factor ? factor[lane] : 1.f, row);
        filled = s.D;
      }
      std::memset(row + filled, 0, (dim - filled) * sizeof(Op));
    }
  }

  // [lanes][padded_dim] -> the right operand over D.
  void transpose(const Block& block, const Op* from, Op* to) const {
    const int64_t words = L::padded_dim(s.D) * int64_t(sizeof(Op)) / 4, lanes = block.vectors * kLanes;
    transpose_words(reinterpret_cast<const uint32_t*>(from), words, lanes, words, reinterpret_cast<uint32_t*>(to), kRows);
  }

  // The first vector of lanes of which any lane sees key t0.
  int64_t first_vector(const Block& block, int64_t t0) const {
    int64_t vector = 0;
    while (block.limit[(vector + 1) * kLanes - 1] <= t0) ++vector;
    return vector / L::lane_step * L::lane_step;
  }

  // What is added to the scores of a run of keys: nothing, a number per key, or one per key and lane.
  enum class BiasKind { none, per_key, per_lane };
  struct Bias {
    BiasKind kind = BiasKind::none;
    float* values = nullptr;   // [keys] or [keys][kRows]
    float* scratch = nullptr;  // [kRows][keys]
  };

  void mask_row(int64_t b, int64_t h, int64_t n, int64_t t0, int64_t keys, float* to) const {
    const int64_t at = b * mask.batch + h * mask.head + n * mask.row + t0 * mask.key;
    if (mask.type == MaskType::boolean) {
      const uint8_t* from = static_cast<const uint8_t*>(mask.data) + at;
      for (int64_t t = 0; t < keys; ++t) to[t] = from[t * mask.key] ? 0.f : -kInfinity;
    } else if (mask.type == MaskType::float32) {
      const float* from = static_cast<const float*>(mask.data) + at;
      for (int64_t t = 0; t < keys; ++t) to[t] = bias_of(from[t * mask.key]);
    } else {
      const BFloat* from = static_cast<const BFloat*>(mask.data) + at;
      for (int64_t t = 0; t < keys; ++t) to[t] = bias_of(widen(from[t * mask.key]));
    }
  }

  // False where the mask hides the whole run from all lanes.
  bool set_bias(const Block& block, int64_t t0, int64_t keys, Bias& bias) const {
    if (mask.type == MaskType::none) return true;
    if (mask.row == 0 && (mask.head == 0 || s.groups() == 1)) {
      bias.kind = BiasKind::per_key;
      mask_row(block.b, block.h[0], 0, t0, keys, bias.values);
      return !std::all_of(bias.values, bias.values + keys, [](float x) { return x == -kInfinity; });
    }
    bias.kind = BiasKind::per_lane;
    for (int64_t lane = 0; lane < block.vectors * kLanes; ++lane) {
      mask_row(block.b, block.h[lane], block.n[lane], t0, keys, bias.scratch + lane * L::keys_in_run);
    }
    transpose_words(reinterpret_cast<const uint32_t*>(bias.scratch), L::keys_in_run, block.vectors * kLanes, keys,
                    reinterpret_cast<uint32_t*>(bias.values), kRows);
    return true;
  }

  // One vector of lanes over a run of keys: `use(t, score)` gets each score, scaled, biased and masked, times log2(e).
  template <class Use>
  void for_scores(const Block& block, const float* scores, const Bias& bias, int64_t vector, int64_t t0, int64_t keys,
                  Use use) const {
    const float* column = scores + vector * kLanes;
    const IntVec limit = load(block.limit + vector * kLanes);
    const Vec scale = all(s.scale * kLog2e), hidden = all(-kInfinity);
    const int64_t seen_by_all = std::clamp<int64_t>(block.limit[vector * kLanes] - t0, 0, keys);
    const auto visit = [&](int64_t from, int64_t to, auto limited, auto bias_at) {
      for (int64_t t = from; t < to; ++t) {
        Vec x = load(column + t * kRows) * scale;
        x = bias_at(x, t);
        if constexpr (limited.value) x = all(int32_t(t0 + t)) < limit ? x : hidden;
        use(t, x);
      }
    };
    const auto both = [&](auto bias_at) {
      visit(0, seen_by_all, std::false_type{}, bias_at);
      visit(seen_by_all, keys, std::true_type{}, bias_at);
    };
    if (bias.kind == BiasKind::none) both([](Vec x, int64_t) { return x; });
    if (bias.kind == BiasKind::per_key) both([&](Vec x, int64_t t) { return x + all(bias.values[t]); });
    if (bias.kind == BiasKind::per_lane) {
      both([&](Vec x, int64_t t) { return x + load(bias.values + t * kRows + vector * kLanes); });
    }
  }

  struct ForwardMemory {
    Op *rows, *qT, *keys, *values;
    float *scores, *outT;
    Bias bias;
  };

  ForwardMemory forward_memory(Arena& arena) const {
    const int64_t dim = L::padded_dim(s.D), run = L::keys_in_run;
    ForwardMemory m;
    m.keys = arena.take<Op>(L::in_place ? run * s.D : 0);
    m.values = arena.take<Op>(L::in_place ? run * s.D : 0);
    m.rows = arena.take<Op>(kRows * dim);
    m.qT = arena.take<Op>(kRows * dim);
    m.scores = arena.take<float>(kRows * run);
    m.outT = arena.take<float>(kRows * dim);
    m.bias.values = arena.take<float>(kRows * run);
    m.bias.scratch = arena.take<float>(kRows * run);
    return m;
  }

  // With float operands; for others see packed_forward.h.
  void forward(ForwardMemory& m, const BlockOfRows& ref, const View<In>& out) const {
    Block block;
    begin(block, ref);
    const KeyValue<Op> kv = key_value(ref.bk);
    gather(block, q, nullptr, m.rows);
    transpose(block, m.rows, m.qT);
    std::fill(block.max, block.max + kRows, kLowest);
    std::fill(block.sum, block.sum + kRows, 0.f);
    std::memset(m.outT, 0, kRows * L::padded_dim(s.D) * sizeof(float));

    for (int64_t t0 = 0; t0 < block.end; t0 += L::keys_in_run) {
      const int64_t keys = std::min(L::keys_in_run, block.end - t0);
      if (!set_bias(block, t0, keys, m.bias)) continue;
      const int64_t first = first_vector(block, t0), lane0 = first * kLanes, lanes = block.vectors * kLanes - lane0;
      const Left<Op> keys_run = rows_of_run(kv.k, t0, keys, s.D, m.keys);
      ask_for(kv.v, t0, keys, s.D);
      score(keys, lanes, keys_run, m.qT + lane0, m.scores + lane0);
      for (int64_t vector = first; vector < block.vectors; ++vector) softmax(block, m, vector, t0, keys);
      ask_for(kv.k, t0 + keys, std::clamp<int64_t>(block.end - t0 - keys, 0, L::keys_in_run), s.D);
      const Left<Op> values = columns_of_run(kv, kv.vT, rows_of_run(kv.v, t0, keys, s.D, m.values), t0);
      product(s.D, lanes, keys, values, m.scores + lane0, kRows, m.outT + lane0, kRows, true);
    }
    write_output(block, m.outT, out);
  }

  // How many products of a score are summed up at a time. Short sums have smaller rounding errors; among many keys those of
  // the long sums over keys outweigh them.
  int64_t short_sum() const { return s.T <= 16 ? 8 : s.T <= 64 ? 32 : s.D; }

  void score(int64_t keys, int64_t lanes, const Left<Op>& rows_, const Op* queriesT, float* scores) const {
    const int64_t most = short_sum();
    for (int64_t d = 0; d < s.D; d += most) {
      product(keys, lanes, std::min(most, s.D - d), rows_.from(0, d), queriesT + d * kRows, kRows, scores, kRows, d > 0);
    }
  }

  // 2^y, as exact as an operand can tell.
  static Vec probability(Vec y) {
    if constexpr (L::pairs) {
      return coarse_exp2(y);
    } else {
      return exp2(y);
    }
  }

  // Scores of a run -> probabilities, the new maximum and sum.
  void softmax(Block& block, ForwardMemory& m, int64_t vector, int64_t t0, int64_t keys) const {
    const bool raw = raise_maximum(block, m.scores, m.outT, m.bias, vector, t0, keys, kRaise);
    const Vec factor = all(s.scale * kLog2e), max = load(block.max + vector * kLanes);
    Vec sum = load(block.sum + vector * kLanes);
    if (raw) {
      to_probabilities(m.scores + vector * kLanes, keys, sum, [&](Vec x) { return x * factor - max; });
    } else {
      to_probabilities(m.scores + vector * kLanes, keys, sum, [&](Vec x) { return x - max; });
    }
    store(block.sum + vector * kLanes, sum);
  }

  // Four maxima at once, since each has to wait for the one before it.
  static Vec largest_score(const float* column, int64_t keys) {
    constexpr int64_t kChains = 4;
    Vec largest[kChains] = {all(kLowest), all(kLowest), all(kLowest), all(kLowest)};
    int64_t t = 0;
    for (; t + kChains <= keys; t += kChains) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kChains; ++i) largest[i] = larger(load(column + (t + i) * kRows), largest[i]);
    }
    for (; t < keys; ++t) largest[0] = larger(load(column + t * kRows), largest[0]);
    return larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
  }

  // Brings a vector's maximum up to its scores where they are more than `room` above it; the sum and O^T, which stand under
  // the old one, are lowered. Returns whether the scores are still raw; if not, they are scaled, biased and masked.
  bool raise_maximum(Block& block, float* scores, float* outT, const Bias& bias, int64_t vector, int64_t t0, int64_t keys,
                     float room) const {
    float* column = scores + vector * kLanes;
    const bool raw = bias.kind == BiasKind::none && block.limit[vector * kLanes] >= t0 + keys && s.scale > 0.f;
    Vec largest = all(kLowest);
    if (raw) {
      largest = largest_score(column, keys) * all(s.scale * kLog2e);
    } else {
      for_scores(block, scores, bias, vector, t0, keys, [&](int64_t t, Vec x) {
        store(column + t * kRows, x);
        largest = larger(x, largest);
      });
    }
    const Vec max = load(block.max + vector * kLanes);
    if (any_greater(largest, max + room)) {
      const Vec raised = larger(max, largest), lowered = exp2(max - raised);
      for (int64_t d = 0; d < L::depth(s.D); ++d) {
        float* out = outT + d * kRows + vector * kLanes;
        store(out, load(out) * lowered);
      }
      store(block.sum + vector * kLanes, load(block.sum + vector * kLanes) * lowered);
      store(block.max + vector * kLanes, raised);
    }
    return raw;
  }

  // Scores of a run -> probabilities in their place, 2 to the power of `exponent`; adds them to `sum`.
  template <class Exponent>
  static void to_probabilities(float* column, int64_t keys, Vec& sum, Exponent exponent) {
    Vec added = all(0.f);
#pragma GCC unroll 4
    for (int64_t t = 0; t < keys; ++t) {
      const Vec p = exp2(exponent(load(column + t * kRows)));
      added += p;
      store(column + t * kRows, p);
    }
    sum += added;
  }

  void write_output(const Block& block, const float* outT, const View<In>& out) const {
    const int64_t size = s.B * s.H * s.N;
    float factor[kRows];
    for (int64_t lane = 0; lane < block.count; ++lane) {
      const int64_t h = block.h[lane], n = block.n[lane], at = (block.b * s.H + h) * s.N + n;
      const float inverse = block.sum[lane] == 0.f ? 0.f : 1.f / block.sum[lane];
      if (stats) {
        stats[at] = block.max[lane];
        stats[size + at] = inverse;
      }
      factor[lane] = inverse * widen(*gates.at(block.b, h, n));
    }
    store_rows(block, outT, factor, out);
  }

  // columns[d][lane], times a factor of the lane if there are any -> the rows of a [B, H, N, D] tensor.
  void store_rows(const Block& block, const float* columns, const float* factor, const View<In>& to) const {
    alignas(64) float rows_[kLanes * kLanes];
    for (int64_t lane0 = 0; lane0 < block.count; lane0 += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, block.count - lane0);
      for (int64_t d0 = 0; d0 < s.D; d0 += kLanes) {
        transpose_square(reinterpret_cast<const uint32_t*>(columns + d0 * kRows + lane0), kRows,
                         reinterpret_cast<uint32_t*>(rows_), kLanes);
        for (int64_t i = 0; i < count; ++i) {
          In* row = to.at(block.b, block.h[lane0 + i], block.n[lane0 + i]) + d0;
          const Vec x = load(rows_ + i * kLanes) * all(factor ? factor[lane0 + i] : 1.f);
          if (d0 + kLanes <= s.D) {
            store_narrow(row, x);
          } else {
            store_narrow_first(row, x, s.D - d0);
          }
        }
      }
    }
  }

  // ---------------------------------------------------------------------------------------------- backward
  // With g the gate, c the scale, P the probabilities and dO the gradient of the output:
  //     dP = dO V^T,  dgate = sum_t P dP,  delta = <dO, output> = g dgate,  dS = P (g dP - delta)
  //     dV += P^T (g dO),   dK += c dS^T Q,   dQ = c dS K

  struct BackwardMemory {
    Op *keys, *values, *rows, *qT, *gradT, *q_right, *grad_right, *probs, *d_scores, *d_scores_right;
    float *scores, *d_probs, *dqT, *dk, *dv;
    Bias bias;
  };

  BackwardMemory backward_memory(Arena& arena) const {
    const int64_t dim = L::padded_dim(s.D), run = L::keys_in_run;
    BackwardMemory m;
    m.keys = arena.take<Op>(L::in_place ? run * s.D : 0);
    m.values = arena.take<Op>(L::in_place ? run * s.D : 0);
    m.rows = arena.take<Op>(kRows * dim);
    m.qT = arena.take<Op>(kRows * dim);
    m.gradT = arena.take<Op>(kRows * dim);
    m.q_right = arena.take<Op>(kRows * dim);
    m.grad_right = arena.take<Op>(kRows * dim);
    m.scores = arena.take<float>(kRows * run);
    m.d_probs = arena.take<float>(kRows * run);
    m.dqT = arena.take<float>(kRows * dim);
    m.bias.values = arena.take<float>(kRows * run);
    m.bias.scratch = arena.take<float>(kRows * run);
    if constexpr (L::pairs) {
      m.probs = arena.take<Op>(kRows * run);
      m.d_scores = arena.take<Op>(kRows * run);
      m.d_scores_right = arena.take<Op>(kRows * run);
    } else {
      m.probs = m.scores;
      m.d_scores = m.d_scores_right = m.d_probs;
    }
    return m;
  }

  void right_operand(const Block& block, const Op* from, Op* to) const {
    const int64_t lanes = block.vectors * kLanes;
    if constexpr (L::pairs) {
      pair_rows(from, lanes, L::padded_dim(s.D), to);
    } else {
      std::memcpy(to, from, lanes * L::padded_dim(s.D) * sizeof(Op));
    }
  }

  // Adds to m.dk, m.dv [padded keys][padded dim]; writes the rows of dq and of the gates' gradient.
  void backward(BackwardMemory& m, const BlockOfRows& ref, const View<const In>& grad, const View<const In>& out,
                const View<In>& dq, const View<In>& dgates) const {
    Block block;
    begin(block, ref);
    const KeyValue<Op> kv = key_value(ref.bk);
    const int64_t depth = L::depth(s.D), dim = L::padded_dim(s.D), size = s.B * s.H * s.N;
    alignas(64) float gate[kRows] = {}, scaled_gate[kRows] = {}, delta[kRows] = {}, inverse[kRows] = {}, dgate[kRows] = {};
    std::fill(block.max, block.max + kRows, kInfinity);  // a lane without a row has no probabilities
    for (int64_t lane = 0; lane < block.count; ++lane) {
      const int64_t h = block.h[lane], n = block.n[lane], at = (block.b * s.H + h) * s.N + n;
      block.max[lane] = stats[at];
      inverse[lane] = stats[size + at];
      gate[lane] = widen(*gates.at(block.b, h, n));
      scaled_gate[lane] = gate[lane] * s.scale;
      delta[lane] = dot(grad.at(block.b, h, n), out.at(block.b, h, n), s.D) * s.scale;
    }
    gather(block, q, nullptr, m.rows);
    transpose(block, m.rows, m.qT);
    right_operand(block, m.rows, m.q_right);
    gather(block, grad, nullptr, m.rows);
    transpose(block, m.rows, m.gradT);
    gather(block, grad, gate, m.rows);
    right_operand(block, m.rows, m.grad_right);
    std::memset(m.dqT, 0, kRows * dim * sizeof(float));

    for (int64_t t0 = 0; t0 < block.end; t0 += L::keys_in_run) {
      const int64_t keys = std::min(L::keys_in_run, block.end - t0), padded = L::padded_keys(keys);
      if (!set_bias(block, t0, keys, m.bias)) continue;
      const int64_t first = first_vector(block, t0), lane0 = first * kLanes, lanes = block.vectors * kLanes - lane0;
      const int64_t right = lane0 * (L::pairs ? 2 : 1), rows_left = L::pairs ? lanes : block.count - lane0;
      const Left<Op> keys_run = rows_of_run(kv.k, t0, keys, s.D, m.keys);
      product(padded, lanes, depth, keys_run, m.qT + right, kRows, m.scores + lane0, kRows, false);
      product(padded, lanes, depth, rows_of_run(kv.v, t0, keys, s.D, m.values), m.gradT + right, kRows, m.d_probs + lane0, kRows, false);
      for (int64_t vector = first; vector < block.vectors; ++vector) {
        const int64_t at = vector * kLanes;
        differentiate(block, m, vector, t0, keys, padded, load(scaled_gate + at), load(delta + at), load(inverse + at),
                      dgate + at);
      }
      const Left<Op> probs{m.probs + lane0, kRows, 1}, d_scores{m.d_scores + lane0, kRows, 1};
      product(padded, dim, rows_left, probs, m.grad_right + lane0 * dim, dim, m.dv + t0 * dim, dim, true);
      product(padded, dim, rows_left, d_scores, m.q_right + lane0 * dim, dim, m.dk + t0 * dim, dim, true);
      const Left<Op> columns = columns_of_run(kv, kv.kT, keys_run, t0);
      product(depth, lanes, padded, columns, m.d_scores_right + right, kRows, m.dqT + lane0, kRows, true);
    }
    store_rows(block, m.dqT, nullptr, dq);
    for (int64_t lane = 0; lane < block.count; ++lane) {
      narrow(dgate[lane], dgates.at(block.b, block.h[lane], block.n[lane]));
    }
  }

  // Scores and dP of a run -> P and c dS as left operands (and c dS as a right one), and the gates' gradient.
  void differentiate(const Block& block, BackwardMemory& m, int64_t vector, int64_t t0, int64_t keys, int64_t padded,
                     Vec scaled_gate, Vec delta, Vec inverse, float* dgate) const {
    const int64_t lane0 = vector * kLanes;
    const Vec max = load(block.max + lane0);
    Vec total = load(dgate);
    for_scores(block, m.scores, m.bias, vector, t0, keys, [&](int64_t t, Vec x) {
      const int64_t at = t * kRows + lane0;
      const Vec p = probability(x - max) * inverse, dp = load(m.d_probs + at);
      total += p * dp;
      const Vec ds = p * (dp * scaled_gate - delta);
      if constexpr (L::pairs) {
        store_row(m.probs + at, p);
        store_row(m.d_scores + at, ds);
      } else {
        store(m.probs + at, p);
      }
      store(m.d_probs + at, ds);
    });
    store(dgate, total);
    if constexpr (L::pairs) {
      for (int64_t t = keys; t < padded; ++t) {
        store_row(m.probs + t * kRows + lane0, all(0.f));
        store_row(m.d_scores + t * kRows + lane0, all(0.f));
        store(m.d_probs + t * kRows + lane0, all(0.f));
      }
      for (int64_t t = 0; t < padded; t += 2) {
        const float* ds = m.d_probs + t * kRows + lane0;
        store_pair(m.d_scores_right + t * kRows + 2 * lane0, load(ds), load(ds + kRows));
      }
    }
  }
};

}  // namespace mixhead
