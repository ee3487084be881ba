// What forward passes with bf16 operands share: the keys and values of one head, packed for one thread.
//
// bf16 tensors are operands as they are, float tensors as three bf16 parts (see parts.h). How a block of queries meets a run
// of keys is told in matrix_forward.h, for matrix units, and in dot_forward.h, for the bf16 dot product of vectors.
#pragma once

#include "attention.h"
#include "parts.h"

#if defined(__AVX512BF16__)

namespace mixhead {

// `run`: keys whose weights meet the values together. `slice`: keys in a matrix of transposed values, at least a step.
template <class In, int64_t run_, int64_t slice>
class PackedForward : public Attention<In, BFloat> {
 public:
  using Base = Attention<In, BFloat>;
  using typename Base::Bias, typename Base::BiasKind, typename Base::Block, typename Base::L;
  using Base::s, Base::q, Base::k, Base::v;
  static constexpr int parts = kParts<In>;
  static constexpr int64_t step = 32, run = run_;

  explicit PackedForward(const Problem<In>& problem) { static_cast<Problem<In>&>(*this) = problem; }

  struct Memory {
    BFloat *keys, *values;           // of one head: [parts][keys][dim] and [parts][keys / slice][dim][slice]
    BFloat *rows, *qT, *weights;     // [parts][kRows][dim], [parts][dim / 2][kRows][2], [parts][run / 2][kRows][2]
    float *scores, *outT;            // [run][kRows], of which matrix units use a step, and [dim][kRows]
    Bias bias;
    const BFloat* key_rows;          // the keys there, or where they lie in the tensor
    int64_t head = -1;               // whose keys and values are there
    bool fits = true;                // whether parts represent them
  };

  int64_t dim() const { return L::padded_dim(s.D); }
  int64_t padded_keys() const { return round_up(s.T, run); }
  int64_t keys_part() const { return padded_keys() * dim(); }

  Memory memory(Arena& arena) const {
    Memory m;
    m.keys = arena.take<BFloat>(parts * keys_part());
    m.values = arena.take<BFloat>(parts * keys_part());
    m.rows = arena.take<BFloat>(parts * kRows * dim());
    m.qT = arena.take<BFloat>(parts * kRows * dim());
    m.weights = arena.take<BFloat>(parts * kRows * run);
    m.scores = arena.take<float>(run * kRows);
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
  // `meet_run(block, first key, keys)` does the rest.
  template <class MeetRun>
  bool forward(Memory& m, const BlockOfRows& ref, const View<In>& out, MeetRun meet_run) const {
    if (m.head != ref.bk) pack(m, ref.bk);
    if (!m.fits) return false;
    Block block;
    this->begin(block, ref);
    if (!transpose_queries(m, block)) return false;
    std::fill(block.max, block.max + kRows, kLowest);
    std::fill(block.sum, block.sum + kRows, 0.f);
    std::memset(m.outT, 0, kRows * dim() * sizeof(float));
    for (int64_t t0 = 0; t0 < block.end; t0 += run) meet_run(block, t0, std::min(run, block.end - t0));
    this->write_output(block, m.outT, out);
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
    for (int64_t t0 = 0; t0 < round_up(s.T, slice); t0 += step) {
      BFloat* to = m.values + t0 / slice * slice * dim() + t0 % slice;
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
          transpose_words(words[part], 16, 16, 16, reinterpret_cast<uint32_t*>(to + part * keys_part() + d0 * slice), slice / 2);
        }
      }
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
      std::memset(rows_ + block.count * dim(), 0, (block.vectors * kLanes - block.count) * dim() * sizeof(BFloat));
      this->transpose(block, rows_, m.qT + part * size);
    }
    return magnitude.fits();
  }
};

}  // namespace mixhead

#endif
