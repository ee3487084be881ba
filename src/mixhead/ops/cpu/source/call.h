// One call of attention: its tensors as the kernel wants them, lists of selected rows, and threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>

#include "attention.h"
#include "decode.h"
#include "tensor.h"

namespace mixhead {

#if defined(__AVX512BF16__)
using BFloatOperand = BFloat;
#else
using BFloatOperand = float;
#endif

inline Mask mask_of(const OptionalTensor& x) {
  Mask mask;
  if (!x) return mask;
  const ScalarType type = x->scalar_type();
  mask.data = x->data_ptr();
  mask.type = type == ScalarType::Bool ? MaskType::boolean
              : type == ScalarType::Float ? MaskType::float32 : MaskType::bfloat16;
  int64_t* strides[] = {&mask.batch, &mask.head, &mask.row, &mask.key};
  for (int i = 0; i < 4; ++i) *strides[i] = x->size(i) == 1 ? 0 : x->stride(i);
  return mask;
}

// Refuses what the kernel would read past its end. Sentences for users are made in Python.
inline void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gates, const Tensor& selected,
                  const OptionalTensor& mask) {
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && gates.dim() == 3 && q.numel() > 0 && k.numel() > 0,
          "queries, keys and values must have 4 dimensions, gates 3, and none of size 0");
  const Sizes queries = q.sizes(), keys = k.sizes();
  const int64_t B = queries[0], H = queries[1], N = queries[2];
  require(keys[0] == B && H % keys[1] == 0 && keys[3] == queries[3] && same(v.sizes(), keys),
          "the shapes of queries, keys and values do not fit");
  require(same(gates.sizes(), {B, N, H}) && same(selected.sizes(), {B, N, H}),
          "gates and selection do not fit the shape of the queries");
  const ScalarType dtype = q.scalar_type();
  require((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && k.scalar_type() == dtype &&
              v.scalar_type() == dtype && gates.scalar_type() == dtype && selected.scalar_type() == ScalarType::Bool,
          "queries, keys, values and gates must be float32 or bfloat16, all of one dtype, and the selection boolean");
  if (!mask) return;
  const int64_t sizes[] = {B, H, N, keys[2]};
  require(mask->dim() == 4, "the mask must have 4 dimensions");
  for (int i = 0; i < 4; ++i) require(mask->size(i) == 1 || mask->size(i) == sizes[i], "the mask does not fit");
}

inline Shape shape_of(const Tensor& q, const Tensor& k, bool causal, double scale) {
  const Sizes queries = q.sizes(), keys = k.sizes();
  return {queries[0], queries[1], keys[1], queries[2], keys[2], queries[3], causal, float(scale)};
}

// Calls `body(next)` on every thread. A body takes pieces of work by counting `next` up, so that pieces may differ in size;
// which thread takes a piece has no influence on its result.
template <class Body>
void share_work(int64_t count, Body body) {
  const int64_t threads = std::min<int64_t>(count, int64_t(torch::stable::get_num_threads()));
  std::atomic<int64_t> next{0};
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body(next);
  });
}

// A few rows against each key-value head.
template <class In>
void run(Decode<In>& decode) {
  decode.reserve();
  share_work(decode.work(), [&](std::atomic<int64_t>& next) {
    Workspace space([&](Arena& arena) { return decode.memory(arena); });
    for (int64_t i; (i = next.fetch_add(1)) < decode.work();) decode.run(space.memory, i);
  });
}

inline RowLists list_rows(const Shape& s, const Tensor& selected) {
  const bool* data = data_of<const bool>(selected);
  const Sizes strides = selected.strides();
  const int64_t groups = s.groups(), sb = strides[0], sn = strides[1], sh = strides[2];
  const int64_t lists = s.B * s.K;
  RowLists rows;
  rows.start.assign(lists + 1, 0);
  parallel_for(lists, 1, [&](int64_t begin, int64_t end) {
    for (int64_t bk = begin; bk < end; ++bk) {
      const bool* from = data + bk / s.K * sb + bk % s.K * groups * sh;
      int64_t count = 0;
      for (int64_t n = 0; n < s.N; ++n) {
        for (int64_t g = 0; g < groups; ++g) count += from[n * sn + g * sh];
      }
      rows.start[bk + 1] = count;
    }
  });
  for (int64_t bk = 0; bk < lists; ++bk) rows.start[bk + 1] += rows.start[bk];
  rows.code.resize(rows.start[lists] + 1);
  parallel_for(lists, 1, [&](int64_t begin, int64_t end) {
    for (int64_t bk = begin; bk < end; ++bk) {
      const bool* from = data + bk / s.K * sb + bk % s.K * groups * sh;
      int64_t at = rows.start[bk];
      for (int64_t n = 0; n < s.N; ++n) {
        for (int64_t g = 0; g < groups; ++g) {
          if (from[n * sn + g * sh]) rows.code[at++] = int32_t(n * groups + g);
        }
      }
    }
  });
  return rows;
}

// Short rows do not pay for a call of memset.
template <class In>
void clear(In* row, int64_t count) {
  constexpr int64_t step = sizeof(Vec) / sizeof(In);
  int64_t d = 0;
  for (; d + step <= count; d += step) store(reinterpret_cast<float*>(row + d), all(0.f));
  for (; d < count; ++d) row[d] = In{};
}

// Zeros in the rows of [B, H, N, D] that no token selects.
template <class In>
void clear_unselected(const Shape& s, const Tensor& selected, const View<In>& out) {
  const View<const bool> chosen = view_of_gates<const bool>(selected);
  parallel_for(s.B * s.N, 64, [&](int64_t begin, int64_t end) {
    for (int64_t bn = begin; bn < end; ++bn) {
      for (int64_t h = 0; h < s.H; ++h) {
        if (!*chosen.at(bn / s.N, h, bn % s.N)) {
          clear(out.at(bn / s.N, h, bn % s.N), s.D);
        }
      }
    }
  });
}

// Some key-value heads as products want them; empty where they are read in place.
template <class In, class Op>
struct Packed {
  using A = Attention<In, Op>;
  std::unique_ptr<Op[]> keys, values, keysT;

  Packed(const A& attention, int64_t heads) {
    if constexpr (!A::L::in_place) {
      const int64_t size = attention.packed_size() * heads;
      keys.reset(new Op[size]);
      values.reset(new Op[size]);
      if (A::L::pairs) keysT.reset(new Op[size]);
    }
  }

  // Packs a head into a place.
  void pack(const A& attention, int64_t bk, int64_t place) {
    if constexpr (!A::L::in_place) {
      const int64_t at = place * attention.packed_size();
      attention.pack_rows(attention.k, bk, keys.get() + at);
      attention.pack_rows(attention.v, bk, values.get() + at);
      if constexpr (A::L::pairs) attention.pack_columns(attention.k, bk, keysT.get() + at);
    }
  }

  // Shows `attention` what was packed: heads from `first` on.
  void lend_to(A& attention, int64_t first) const {
    attention.packed_k = keys.get();
    attention.packed_v = values.get();
    attention.packed_kT = keysT.get();
    attention.first_packed = first;
  }
};

// The inputs of one call, as the kernel wants them.
template <class In, class Op>
struct Call {
  using A = Attention<In, Op>;
  Tensor q, k, v, gates, selected;
  OptionalTensor mask;
  RowLists rows;
  std::vector<BlockOfRows> blocks;
  std::optional<Packed<In, Op>> packed;
  A attention;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& gates_, const Tensor& selected_,
       const OptionalTensor& mask_, bool causal, double scale)
      : q(unit_stride(q_)), k(unit_stride(k_)), v(unit_stride(v_)), gates(gates_), selected(selected_), mask(mask_) {
    attention.s = shape_of(q, k, causal, scale);
    attention.q = view<const In>(q);
    attention.k = view<const In>(k);
    attention.v = view<const In>(v);
    attention.gates = view_of_gates<const In>(gates);
    attention.mask = mask_of(mask);
    rows = list_rows(attention.s, selected);
    blocks = cut_into_blocks(rows);
    attention.rows = &rows;
  }

  // Packs all key-value heads, for threads that share them.
  void pack() {
    const int64_t lists = attention.s.B * attention.s.K;
    packed.emplace(attention, lists);
    if constexpr (!A::L::in_place) {
      parallel_for(lists, 1, [&](int64_t begin, int64_t end) {
        for (int64_t bk = begin; bk < end; ++bk) packed->pack(attention, bk, bk);
      });
    }
    packed->lend_to(attention, 0);
  }
};

template <class Op>
struct Units {};
template <>
struct Units<BFloat> : MatrixUnits {};

}  // namespace mixhead
