// The forward pass on matrix units: bf16 tensors, and float tensors as three bf16 parts (see parts.h).
//
// The mathematics are those of attention.h. Tiles of 32 keys x 32 lanes are multiplied, turned into weights and forgotten
// while they lie in the nearest cache; the weights of a run of keys meet the values together. Maxima are whole powers of
// two, so that raising one changes no digit of the weights and sums that stand under it.
#pragma once

#include "attention.h"
#include "parts.h"

#if defined(__AVX512BF16__)

namespace mixhead {

// 2^y: a bf16 number cannot tell the relative error of 1e-4 of the coarse one.
template <int Parts>
inline Vec weight(Vec y) {
  if constexpr (Parts == 1) {
    return coarse_exp2(y);
  } else {
    return exp2(y);
  }
}

template <class In>
class MatrixForward : public Attention<In, BFloat> {
 public:
  using Base = Attention<In, BFloat>;
  using typename Base::Bias, typename Base::BiasKind, typename Base::Block, typename Base::L;
  using Base::s, Base::q, Base::k, Base::v;
  static constexpr int parts = kParts<In>;
  static constexpr int64_t step = 32, run = 128;  // keys in a tile, and keys whose weights meet the values together

  explicit MatrixForward(const Problem<In>& problem) { static_cast<Problem<In>&>(*this) = problem; }

  struct Memory {
    BFloat *keys, *values;           // of one head: [parts][keys][dim] and [parts][keys / 32][dim][32]
    BFloat *rows, *qT, *weights;     // [parts][kRows][dim], [parts][dim / 2][kRows][2], [parts][run / 2][kRows][2]
    float *scores, *outT;            // [step][kRows], [dim][kRows]
    Bias bias;
    const BFloat* key_rows;          // the keys there, or where they lie in the tensor
    int64_t head = -1;               // whose keys and values are there
    bool fits = true;                // whether parts represent them
  };

  int64_t dim() const { return L::padded_dim(s.D); }
  int64_t padded_keys() const { return round_up(s.T, run); }
  int64_t keys_part() const { return padded_keys() * dim(); }

  int64_t bytes() const {
    const int64_t numbers = 2 * keys_part() + 2 * kRows * dim() + run * kRows;
    return parts * numbers * sizeof(BFloat) + (dim() * kRows + (1 + 4) * L::keys_in_run * kRows) * sizeof(float) + 4096;
  }

  Memory memory(Arena& arena) const {
    Memory m;
    m.keys = arena.take<BFloat>(parts * keys_part());
    m.values = arena.take<BFloat>(parts * keys_part());
    m.rows = arena.take<BFloat>(parts * kRows * dim());
    m.qT = arena.take<BFloat>(parts * kRows * dim());
    m.weights = arena.take<BFloat>(parts * kRows * run);
    m.scores = arena.take<float>(step * kRows);
    m.outT = arena.take<float>(kRows * dim());
    m.bias.values = arena.take<float>(kRows * L::keys_in_run);
    m.bias.scratch = arena.take<float>(kRows * L::keys_in_run);
    return m;
  }

  // Whether the products of so many blocks with a head's keys and values make up for packing those.
  static constexpr bool pays(int64_t blocks) { return parts == 1 || blocks >= 3; }

  // Keys as rows, values transposed: what the products of one key-value head take as left operands.
  void pack(Memory& m, int64_t bk) const {
    Magnitude of_keys, of_values;
    pack_keys(m, bk / s.K, bk % s.K, of_keys);
    pack_values(m, bk / s.K, bk % s.K, of_values);
    m.head = bk;
    m.fits = of_keys.fits() && of_values.fits();
  }

  // False where the block needs float products: its numbers, or those of its head, are not sums of parts.
  bool forward(Memory& m, const BlockOfRows& ref, const View<In>& out) const {
    if (m.head != ref.bk) pack(m, ref.bk);
    if (!m.fits) return false;
    Block block;
    this->begin(block, ref);
    if (!transpose_queries(m, block)) return false;
    std::fill(block.max, block.max + kRows, kLowest);
    std::fill(block.sum, block.sum + kRows, 0.f);
    std::memset(m.outT, 0, kRows * dim() * sizeof(float));
    for (int64_t t0 = 0; t0 < block.end; t0 += run) meet_run(m, block, t0, std::min(run, block.end - t0));
    float log2_max[kRows];
    std::memcpy(log2_max, block.max, sizeof log2_max);
    for (int64_t lane = 0; lane < kRows; ++lane) block.max[lane] = log2_max[lane] * kLn2;
    this->write_output(block, m.outT, out);
    correct_sums(block, log2_max);
    return true;
  }

 private:
  void pack_keys(Memory& m, int64_t b, int64_t head, Magnitude& magnitude) const {
    m.key_rows = m.keys;
    if constexpr (parts == 1) {
      if (s.D == dim() && k.row == dim() && s.T % step == 0) {
        m.key_rows = k.at(b, head, 0);
        return;
      }
    }
    for (int64_t t = 0; t < s.T; ++t) {
      split_row(k.at(b, head, t), s.D, dim(), m.keys + t * dim(), keys_part(), magnitude);
    }
    for (int part = 0; part < parts; ++part) {
      std::memset(m.keys + part * keys_part() + s.T * dim(), 0, (round_up(s.T, step) - s.T) * dim() * sizeof(BFloat));
    }
  }

  void pack_values(Memory& m, int64_t b, int64_t head, Magnitude& magnitude) const {
    alignas(64) uint32_t words[parts][16 * 16];
    for (int64_t t0 = 0; t0 < round_up(s.T, step); t0 += step) {
      BFloat* to = m.values + t0 * dim();
      for (int64_t d0 = 0; d0 < dim(); d0 += 16) {
        const int64_t count = std::clamp<int64_t>(s.D - d0, 0, 16);
        for (int64_t pair = 0; pair < 16; ++pair) {
          const int64_t t = t0 + 2 * pair;
          __m512i out[parts];
          pair_words(t < s.T ? v.at(b, head, t) + d0 : nullptr, t + 1 < s.T ? v.at(b, head, t + 1) + d0 : nullptr, count, out,
                     magnitude);
          for (int part = 0; part < parts; ++part) _mm512_store_si512(words[part] + pair * 16, out[part]);
        }
        for (int part = 0; part < parts; ++part) {
          transpose_words(words[part], 16, 16, 16, reinterpret_cast<uint32_t*>(to + part * keys_part() + d0 * step), step / 2);
        }
      }
    }
  }

  // The statistics hold a maximum times ln 2, rounded, while the sum stands under the exact one.
  void correct_sums(const Block& block, const float* log2_max) const {
    for (int64_t lane = 0; lane < block.count; ++lane) {
      float& inverse = this->stats[((s.B + block.b) * s.H + block.h[lane]) * s.N + block.n[lane]];
      inverse = float(inverse * (1. + (block.max[lane] - log2_max[lane] * 0.69314718055994531)));
    }
  }

  bool transpose_queries(Memory& m, const Block& block) const {
    const int64_t size = kRows * dim();
    Magnitude magnitude;
    for (int64_t lane = 0; lane < block.count; ++lane) {
      split_row(q.at(block.b, block.h[lane], block.n[lane]), s.D, dim(), m.rows + lane * dim(), size, magnitude);
    }
    for (int part = 0; part < parts; ++part) {
      BFloat* rows_ = m.rows + part * size;
      std::memset(rows_ + block.count * dim(), 0, (kRows - block.count) * dim() * sizeof(BFloat));
      this->transpose(rows_, m.qT + part * size);
    }
    return magnitude.fits();
  }

  // The keys t0 ... t0 + count, all of one run.
  void meet_run(Memory& m, Block& block, int64_t t0, int64_t count) const {
    const int64_t lanes = block.vectors * kLanes, first = this->first_vector(block, t0) * kLanes;
    for (int64_t at = 0; at < count; at += step) {
      const int64_t keys = std::min(step, count - at);
      const int64_t seeing = this->set_bias(block, t0 + at, keys, m.bias)
                                 ? this->first_vector(block, t0 + at) * kLanes : lanes;
      for (int64_t lane = first; lane < seeing; lane += 32) clear_weights(m, at, lane);
      for (int64_t lane = seeing; lane < lanes; lane += 32) {
        product_of_parts<parts>(dim(), {m.key_rows + (t0 + at) * dim(), dim(), step}, keys_part(), m.qT + 2 * lane, kRows * dim(),
                                kRows, m.scores + lane, kRows, false);
        for (int64_t vector = lane / kLanes; vector < lane / kLanes + 2; ++vector) {
          weigh(m, block, vector, t0, at, keys);
        }
      }
    }
    const BFloat* values = m.values + t0 * dim();
    for (int64_t lane = first; lane < lanes; lane += 32) {
      for (int64_t d = 0; d < dim(); d += 32) {
        product_of_parts<parts>(round_up(count, step), {values + d * step, step, dim() * step}, keys_part(),
                                m.weights + 2 * lane, run * kRows, kRows, m.outT + d * kRows + lane, kRows, true);
      }
    }
  }

  void clear_weights(Memory& m, int64_t at, int64_t lane) const {
    for (int part = 0; part < parts; ++part) {
      for (int64_t t = 0; t < step; t += 2) {
        std::memset(m.weights + part * run * kRows + (at + t) * kRows + 2 * lane, 0, 64 * sizeof(BFloat));
      }
    }
  }

  // Scores of a tile -> weights, for one vector of lanes.
  void weigh(Memory& m, Block& block, int64_t vector, int64_t t0, int64_t at, int64_t keys) const {
    const int64_t lane = vector * kLanes;
    float* column = m.scores + lane;
    Vec max = load(block.max + lane);
    const bool started = !any_greater(all(kLowest / 2), max);
    if (started && keys == step && m.bias.kind == BiasKind::none && s.scale > 0.f && block.limit[lane] >= t0 + at + keys) {
      const Vec factor = all(s.scale * kLog2e);
      Vec sum = all(0.f);
      const Vec largest = store_weights(m, lane, at, step, sum, [&](Vec x) { return x * factor - max; });
      if (!any_greater(largest * factor, max + kRoom)) {
        store(block.sum + lane, load(block.sum + lane) + sum);
        return;
      }
    }
    Vec largest = all(kLowest);
    this->for_scores(block, m.scores, m.bias, vector, t0 + at, keys, [&](int64_t t, Vec x) {
      store(column + t * kRows, x * kLog2e);
      largest = larger(x * kLog2e, largest);
    });
    if (any_greater(largest, max + kRoom)) {
      const Vec raised = larger(max, (Vec)_mm512_roundscale_ps((__m512)largest, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
      lower(m, block, lane, at, exp2(max - raised));
      max = raised;
      store(block.max + lane, max);
    }
    Vec sum = all(0.f);
    store_weights(m, lane, at, keys, sum, [&](Vec x) { return x - max; });
    store(block.sum + lane, load(block.sum + lane) + sum);
  }

  // Applies a new maximum to what stands under the old one: the output, the sums, and the weights of this run.
  void lower(Memory& m, Block& block, int64_t lane, int64_t at, Vec factor) const {
    for (int64_t d = 0; d < dim(); ++d) {
      float* out = m.outT + d * kRows + lane;
      store(out, load(out) * factor);
    }
    store(block.sum + lane, load(block.sum + lane) * factor);
    for (int part = 0; part < parts; ++part) {
      for (int64_t t = 0; t < at; t += 2) {
        __m512i* pairs = (__m512i*)(m.weights + part * run * kRows + t * kRows + 2 * lane);
        const __m512i both = _mm512_loadu_si512(pairs);
        const __m512 first = (__m512)((Vec)_mm512_slli_epi32(both, 16) * factor);
        const __m512 second = (__m512)((Vec)_mm512_and_si512(both, _mm512_set1_epi32(int32_t(0xffff0000))) * factor);
        _mm512_storeu_si512(pairs, _mm512_or_si512(_mm512_srli_epi32((__m512i)first, 16),
                                                   _mm512_and_si512((__m512i)second, _mm512_set1_epi32(int32_t(0xffff0000)))));
      }
    }
  }

  // Adds to `sum`, after rounding, so that the rounded weights sum up to 1; returns the largest of the scores, as they are before `exponent`.
  template <class Exponent>
  static Vec store_weights(Memory& m, int64_t lane, int64_t at, int64_t keys, Vec& sum, Exponent exponent) {
    const float* column = m.scores + lane;
    BFloat* to = m.weights + at * kRows + 2 * lane;
    Vec largest = all(kLowest), odd_sum = all(0.f);
#pragma GCC unroll 2
    for (int64_t t = 0; t < step; t += 2) {
      Vec p0 = all(0.f), p1 = all(0.f);
      if (t < keys) {
        const Vec x = load(column + t * kRows);
        largest = larger(x, largest);
        p0 = weight<parts>(exponent(x));
      }
      if (t + 1 < keys) {
        const Vec x = load(column + (t + 1) * kRows);
        largest = larger(x, largest);
        p1 = weight<parts>(exponent(x));
      }
      if constexpr (parts == 1) {
        const __m512i pairs = pairs_of(p0, p1);
        sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi16(0x3f80));
        _mm512_storeu_si512(to + t * kRows, pairs);
      } else {
        sum += p0;
        odd_sum += p1;
        __m512i words[parts];
        pair_words((__m512)p0, (__m512)p1, words);
        for (int part = 0; part < parts; ++part) _mm512_storeu_si512(to + part * run * kRows + t * kRows, words[part]);
      }
    }
    sum += odd_sum;
    return largest;
  }

  static constexpr float kRoom = 8.f;  // a weight stays below 2^8
};

}  // namespace mixhead

#endif
