// The forward pass on matrix units: bf16 tensors, and float tensors as three bf16 parts (see parts.h).
//
// The mathematics are those of attention.h. Tiles of 32 keys x 32 lanes are multiplied, turned into weights and forgotten
// while they lie in the nearest cache; the weights of a run of keys meet the values together. Maxima are whole powers of
// two, so that raising one changes no digit of the weights and sums that stand under it.
#pragma once

#include "packed_forward.h"

#if defined(__AMX_BF16__)

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
class MatrixForward : public PackedForward<In, 128, 32> {
 public:
  using Packed = PackedForward<In, 128, 32>;
  using typename Packed::BiasKind, typename Packed::Block, typename Packed::Memory;
  using Packed::dim, Packed::keys_part, Packed::parts, Packed::run, Packed::s, Packed::step;
  using Packed::Packed;

  bool forward(Memory& m, const BlockOfRows& ref, const View<In>& out) const {
    return Packed::forward(m, ref, out, [&](Block& block, int64_t t0, int64_t keys) { meet_run(m, block, t0, keys); });
  }

 private:
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
      store(column + t * kRows, x);
      largest = larger(x, largest);
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
