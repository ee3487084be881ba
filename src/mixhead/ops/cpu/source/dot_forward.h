// The forward pass of bf16 tensors by the bf16 dot product of vectors.
//
// The mathematics are those of attention.h. A whole run of scores is at hand before its weights are made, so that each
// weight stands under the largest score so far, as it is: the largest weight is 1, and rounded without an error.
#pragma once

#include "packed_forward.h"

#if defined(__AVX512BF16__)

namespace mixhead {

template <class In>
class DotForward : public PackedForward<In, 64, 64> {
 public:
  using Packed = PackedForward<In, 64, 64>;
  using typename Packed::Block, typename Packed::Memory;
  using Packed::dim, Packed::run, Packed::s, Packed::step;
  using Packed::Packed;

  bool forward(Memory& m, const BlockOfRows& ref, const View<In>& out) const {
    return Packed::forward(m, ref, out, [&](Block& block, int64_t t0, int64_t keys) { meet_run(m, block, t0, keys); });
  }

 private:
  void meet_run(Memory& m, Block& block, int64_t t0, int64_t keys) const {
    if (!this->set_bias(block, t0, keys, m.bias)) return;
    const int64_t lane = this->first_vector(block, t0) * kLanes, lanes = block.vectors * kLanes - lane;
    product(round_up(keys, step), lanes, dim(), {m.key_rows + t0 * dim(), dim(), 1}, m.qT + 2 * lane, kRows, m.scores + lane,
            kRows, false);
    for (int64_t vector = lane / kLanes; vector < block.vectors; ++vector) weigh(m, block, vector, t0, keys);
    product(dim(), lanes, round_up(keys, 2), {m.values + t0 * dim(), run, 1}, m.weights + 2 * lane, kRows, m.outT + lane, kRows,
            true);
  }

  // Scores of a run -> weights, for one vector of lanes.
  void weigh(Memory& m, Block& block, int64_t vector, int64_t t0, int64_t keys) const {
    const bool raw = this->raise_maximum(block, m.scores, m.outT, m.bias, vector, t0, keys, 0.f);
    const Vec factor = all(s.scale * kLog2e), max = load(block.max + vector * kLanes);
    if (raw) {
      store_weights(m, block, vector, keys, [&](Vec x) { return x * factor - max; });
    } else {
      store_weights(m, block, vector, keys, [&](Vec x) { return x - max; });
    }
  }

  // 2 to the power of `exponent`, as pairs; they are summed after rounding, so that the rounded weights sum up to 1.
  template <class Exponent>
  static void store_weights(Memory& m, Block& block, int64_t vector, int64_t keys, Exponent exponent) {
    const float* column = m.scores + vector * kLanes;
    BFloat* to = m.weights + 2 * vector * kLanes;
    __m512 sum = _mm512_loadu_ps(block.sum + vector * kLanes);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
#pragma GCC unroll 2
    for (int64_t t = 0; t < keys; t += 2) {
      const Vec first = coarse_exp2(exponent(load(column + t * kRows)));
      const Vec second = t + 1 < keys ? coarse_exp2(exponent(load(column + (t + 1) * kRows))) : all(0.f);
      const __m512i pairs = pairs_of(first, second);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)pairs, ones);
      _mm512_storeu_si512(to + t * kRows, pairs);
    }
    _mm512_storeu_ps(block.sum + vector * kLanes, sum);
  }
};

}  // namespace mixhead

#endif
