// The PyTorch side: tensors to views, lists of selected rows, threads, and the two operators of the library `mixhead`.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <optional>

#include "decode.h"
#include "dot_forward.h"
#include "matrix_forward.h"

namespace mixhead {
namespace {

using at::Tensor;

#if defined(__AVX512BF16__)
using BFloatOperand = BFloat;
#else
using BFloatOperand = float;
#endif

Tensor unit_stride(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

template <class T>
View<T> view(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// [B, N, H] addressed as (b, h, n).
template <class T>
View<T> view_of_gates(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(2), x.stride(1)};
}

Mask mask_of(const std::optional<Tensor>& x) {
  Mask mask;
  if (!x) return mask;
  mask.data = x->data_ptr();
  mask.type = x->scalar_type() == at::kBool ? MaskType::boolean
              : x->scalar_type() == at::kFloat ? MaskType::float32 : MaskType::bfloat16;
  int64_t* strides[] = {&mask.batch, &mask.head, &mask.row, &mask.key};
  for (int i = 0; i < 4; ++i) *strides[i] = x->size(i) == 1 ? 0 : x->stride(i);
  return mask;
}

// Refuses what the kernel would read past its end. A sentence for users is made in Python.
void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gates, const Tensor& selected,
           const std::optional<Tensor>& mask) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && gates.dim() == 3 && q.numel() > 0 && k.numel() > 0,
              "queries, keys and values must have 4 dimensions, gates 3, and none of size 0");
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), T = k.size(2), D = q.size(3);
  TORCH_CHECK(k.size(0) == B && H % k.size(1) == 0 && k.size(3) == D && v.sizes() == k.sizes(), "queries ", q.sizes(),
              ", keys ", k.sizes(), " and values ", v.sizes(), " do not fit");
  TORCH_CHECK(gates.size(0) == B && gates.size(1) == N && gates.size(2) == H && selected.sizes() == gates.sizes(), "gates ",
              gates.sizes(), " and selection ", selected.sizes(), " do not fit queries ", q.sizes());
  const auto dtype = q.scalar_type();
  TORCH_CHECK((dtype == at::kFloat || dtype == at::kBFloat16) && k.scalar_type() == dtype && v.scalar_type() == dtype &&
                  gates.scalar_type() == dtype && selected.scalar_type() == at::kBool,
              "queries, keys, values and gates must be float32 or bfloat16, all of one dtype, and the selection boolean");
  if (!mask) return;
  const int64_t sizes[] = {B, H, N, T};
  TORCH_CHECK(mask->dim() == 4, "the mask must have 4 dimensions, got ", mask->dim());
  for (int i = 0; i < 4; ++i) TORCH_CHECK(mask->size(i) == 1 || mask->size(i) == sizes[i], "the mask does not fit");
}

// Calls `body(next)` on every thread. A body takes pieces of work by counting `next` up, so that pieces may differ in size;
// which thread takes a piece has no influence on its result.
template <class Body>
void share_work(int64_t count, Body body) {
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body(next);
  });
}

RowLists list_rows(const Shape& s, const Tensor& selected) {
  const bool* data = selected.const_data_ptr<bool>();
  const int64_t groups = s.groups(), sb = selected.stride(0), sn = selected.stride(1), sh = selected.stride(2);
  const int64_t lists = s.B * s.K;
  RowLists rows;
  rows.start.assign(lists + 1, 0);
  at::parallel_for(0, lists, 1, [&](int64_t begin, int64_t end) {
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
  at::parallel_for(0, lists, 1, [&](int64_t begin, int64_t end) {
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
  const bool* data = selected.const_data_ptr<bool>();
  const int64_t sb = selected.stride(0), sn = selected.stride(1), sh = selected.stride(2);
  at::parallel_for(0, s.B * s.N, 64, [&](int64_t begin, int64_t end) {
    for (int64_t bn = begin; bn < end; ++bn) {
      for (int64_t h = 0; h < s.H; ++h) {
        if (!data[bn / s.N * sb + bn % s.N * sn + h * sh]) {
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
  std::optional<Tensor> mask;
  RowLists rows;
  std::vector<BlockOfRows> blocks;
  std::optional<Packed<In, Op>> packed;
  A attention;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& gates_, const Tensor& selected_,
       const std::optional<Tensor>& mask_, bool causal, double scale)
      : q(unit_stride(q_)), k(unit_stride(k_)), v(unit_stride(v_)), gates(gates_), selected(selected_), mask(mask_) {
    attention.s = {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), causal, float(scale)};
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
      at::parallel_for(0, lists, 1, [&](int64_t begin, int64_t end) {
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

#if defined(__AVX512BF16__)
#if defined(__AMX_BF16__)
template <class In>
using BFloatForward = MatrixForward<In>;
#else
template <class In>
using BFloatForward = DotForward<In>;
#endif

// Consecutive blocks of a head. A thread packs the head's keys and values when it comes from another head.
struct Piece {
  int64_t first, end;
  bool in_bf16;
};

// Whole heads where there are plenty; else a few blocks at a time, so that threads which share heads end together.
template <class In>
std::vector<Piece> cut_into_pieces(const std::vector<BlockOfRows>& blocks, int64_t heads) {
  const int64_t count = int64_t(blocks.size()), size = heads >= 4 * at::get_num_threads() ? count : 4;
  std::vector<Piece> pieces;
  for (int64_t first = 0, end; first < count; first = end) {
    for (end = first; end < count && blocks[end].bk == blocks[first].bk;) ++end;
    for (int64_t at = first; at < end; at += size) {
      pieces.push_back({at, std::min(at + size, end), BFloatForward<In>::pays(end - first)});
    }
  }
  return pieces;
}

// Memory for the blocks that bf16 operands cannot represent, which only float tensors have.
template <class In, class Op>
struct Spare {
  explicit Spare(const Attention<In, Op>&) {}
};
template <class In>
struct Spare<In, float> {
  Arena arena;
  typename Attention<In, float>::ForwardMemory memory;
  explicit Spare(const Attention<In, float>& attention)
      : arena(attention.forward_bytes()), memory(attention.forward_memory(arena)) {}
};

template <class In, class Op>
void run_bf16_forward(Call<In, Op>& call, const View<In>& to) {
  const BFloatForward<In> forward(call.attention);
  const std::vector<Piece> pieces = cut_into_pieces<In>(call.blocks, int64_t(call.rows.start.size()) - 1);
  share_work(int64_t(pieces.size()), [&](std::atomic<int64_t>& next) {
    const MatrixUnits units;
    Arena arena(forward.bytes());
    auto memory = forward.memory(arena);
    [[maybe_unused]] Spare<In, Op> spare(call.attention);
    for (size_t i; (i = next.fetch_add(1)) < pieces.size();) {
      for (int64_t block = pieces[i].first; block < pieces[i].end; ++block) {
        const bool done = pieces[i].in_bf16 && forward.forward(memory, call.blocks[block], to);
        if constexpr (std::is_same_v<Op, float>) {
          if (!done) call.attention.forward(spare.memory, call.blocks[block], to);
        }
      }
    }
  });
}
#endif

template <class In, class Op>
void run_vector_forward(Call<In, Op>& call, const View<In>& to) {
  const int64_t count = int64_t(call.blocks.size());
  call.pack();
  share_work(count, [&](std::atomic<int64_t>& next) {
    Arena arena(call.attention.forward_bytes());
    auto memory = call.attention.forward_memory(arena);
    for (int64_t i; (i = next.fetch_add(1)) < count;) call.attention.forward(memory, call.blocks[i], to);
  });
}

// With the bf16 dot product alone, three parts of a float take longer than the float.
#if defined(__AMX_BF16__)
template <class Op>
constexpr bool in_bf16 = true;
#else
template <class Op>
constexpr bool in_bf16 = std::is_same_v<Op, BFloat>;
#endif

template <class In, class Op>
void run_forward(Call<In, Op>& call, const Tensor& out, float* stats) {
  const View<In> to = view<In>(out);
  call.attention.stats = stats;
  clear_unselected(call.attention.s, call.selected, to);
  if constexpr (in_bf16<Op>) {
    run_bf16_forward(call, to);
  } else {
    run_vector_forward(call, to);
  }
}

// Into how many pieces each of `lists` is cut, so that at most a tenth of the threads' time is idle.
inline int64_t even_pieces(int64_t lists, int64_t threads) {
  int64_t pieces = 1;
  const auto idle = [&] { return round_up(lists * pieces, threads) - lists * pieces; };
  while (lists > 0 && 10 * idle() > round_up(lists * pieces, threads)) ++pieces;
  return pieces;
}

template <class In, class Op>
void run_backward(Call<In, Op>& call, const Tensor& grad_, const Tensor& out, const Tensor& stats, const Tensor& dq,
                  const Tensor& dk, const Tensor& dv, const Tensor& dgates) {
  const Shape& s = call.attention.s;
  const Tensor grad = unit_stride(grad_);
  const auto grad_view = view<const In>(grad), out_view = view<const In>(out);
  const auto dq_view = view<In>(dq), dk_view = view<In>(dk), dv_view = view<In>(dv);
  const auto dgates_view = view_of_gates<In>(dgates);
  call.attention.stats = stats.data_ptr<float>();
  clear_unselected(s, call.selected, dq_view);

  // A piece of work owns the key and value gradients of one key-value head. Where whole heads would leave threads idle, a
  // head's blocks are dealt out to several pieces, whose sums are added up in order.
  const int64_t lists = s.B * s.K, pieces = even_pieces(lists, at::get_num_threads());
  const int64_t dim = Layout<In, Op>::padded_dim(s.D), size = Layout<In, Op>::padded_keys(s.T) * dim;
  std::vector<int64_t> first(lists + 1, 0);
  for (const BlockOfRows& block : call.blocks) ++first[block.bk + 1];
  for (int64_t bk = 0; bk < lists; ++bk) first[bk + 1] += first[bk];
  std::unique_ptr<float[]> partial(pieces > 1 ? new float[lists * pieces * 2 * size] : nullptr);
  if (partial) call.pack();

  const auto finish = [&](int64_t bk, const float* dk_sum, const float* dv_sum) {
    for (int64_t t = 0; t < s.T; ++t) {
      In *dk_row = dk_view.at(bk / s.K, bk % s.K, t), *dv_row = dv_view.at(bk / s.K, bk % s.K, t);
      for (int64_t d = 0; d < s.D; ++d) narrow(dk_sum[t * dim + d], dk_row + d);
      for (int64_t d = 0; d < s.D; ++d) narrow(dv_sum[t * dim + d], dv_row + d);
    }
  };
  share_work(lists * pieces, [&](std::atomic<int64_t>& next) {
    [[maybe_unused]] Units<Op> units;
    auto attention = call.attention;  // a copy: a thread that owns its heads packs one at a time
    Arena arena(attention.backward_bytes());
    auto memory = attention.backward_memory(arena);
    std::unique_ptr<float[]> own(partial ? nullptr : new float[2 * size]);
    Packed<In, Op> packed(attention, partial ? 0 : 1);
    for (int64_t i; (i = next.fetch_add(1)) < lists * pieces;) {
      const int64_t bk = i / pieces, piece = i % pieces;
      memory.dk = partial ? partial.get() + i * 2 * size : own.get();
      memory.dv = memory.dk + size;
      std::memset(memory.dk, 0, 2 * size * sizeof(float));
      if (!partial) {
        packed.pack(attention, bk, 0);
        packed.lend_to(attention, bk);
      }
      for (int64_t block = first[bk] + piece; block < first[bk + 1]; block += pieces) {
        attention.backward(memory, call.blocks[block], grad_view, out_view, dq_view, dgates_view);
      }
      if (!partial) finish(bk, memory.dk, memory.dv);
    }
  });
  if (partial) {
    at::parallel_for(0, lists, 1, [&](int64_t begin, int64_t end) {
      for (int64_t bk = begin; bk < end; ++bk) {
        float* sum = partial.get() + bk * pieces * 2 * size;
        for (int64_t piece = 1; piece < pieces; ++piece) {
          for (int64_t i = 0; i < 2 * size; ++i) sum[i] += sum[piece * 2 * size + i];
        }
        finish(bk, sum, sum + size);
      }
    });
  }
}

// A few rows against each key-value head.
template <class In>
void run_decode(const Shape& shape, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& gates,
                const Tensor& selected, const std::optional<Tensor>& mask, const Tensor& out, float* stats) {
  const Tensor q = unit_stride(q_), k = unit_stride(k_), v = unit_stride(v_);
  Decode<In> decode;
  decode.s = shape;
  decode.q = view<const In>(q);
  decode.k = view<const In>(k);
  decode.v = view<const In>(v);
  decode.gates = view_of_gates<const In>(gates);
  decode.selected = view_of_gates<const bool>(selected);
  decode.mask = mask_of(mask);
  decode.out = view<In>(out);
  decode.stats = stats;
  decode.reserve();
  share_work(decode.work(), [&](std::atomic<int64_t>& next) {
    Arena arena(decode.bytes());
    auto memory = decode.memory(arena);
    for (int64_t i; (i = next.fetch_add(1)) < decode.work();) decode.run(memory, i);
  });
}

// [B, H, N, D] with the heads of a token side by side, as the output projection wants them.
Tensor empty_by_token(const Tensor& q) {
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), D = q.size(3);
  return at::empty_strided({B, H, N, D}, {N * H * D, D, H * D, 1}, q.options());
}

Tensor run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gates, const Tensor& selected,
           const std::optional<Tensor>& mask, bool causal, double scale, float* stats) {
  check(q, k, v, gates, selected, mask);
  Tensor out = empty_by_token(q);
  const Shape shape{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), causal, float(scale)};
  const bool in_float = q.scalar_type() == at::kFloat;
  if ((in_float ? few_rows<float> : few_rows<BFloat>)(shape, view_of_gates<const bool>(selected))) {
    (in_float ? run_decode<float> : run_decode<BFloat>)(shape, q, k, v, gates, selected, mask, out, stats);
  } else if (in_float) {
    Call<float, float> call(q, k, v, gates, selected, mask, causal, scale);
    run_forward(call, out, stats);
  } else {
    Call<BFloat, BFloatOperand> call(q, k, v, gates, selected, mask, causal, scale);
    run_forward(call, out, stats);
  }
  return out;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gates,
                                  const Tensor& selected, const std::optional<Tensor>& mask, bool causal, double scale) {
  Tensor stats = at::zeros({2, q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  return {run(q, k, v, gates, selected, mask, causal, scale, stats.data_ptr<float>()), stats};
}

// Without what the backward needs.
Tensor attend_inference(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gates, const Tensor& selected,
                        const std::optional<Tensor>& mask, bool causal, double scale) {
  return run(q, k, v, gates, selected, mask, causal, scale, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                           const Tensor& v, const Tensor& gates, const Tensor& selected,
                                                           const std::optional<Tensor>& mask, const Tensor& out,
                                                           const Tensor& stats, bool causal, double scale) {
  Tensor dq = empty_by_token(q), dk = empty_by_token(k), dv = empty_by_token(v);
  Tensor dgates = at::zeros(gates.sizes(), gates.options());
  if (q.scalar_type() == at::kFloat) {
    Call<float, float> call(q, k, v, gates, selected, mask, causal, scale);
    run_backward(call, grad, out, stats, dq, dk, dv, dgates);
  } else {
    Call<BFloat, BFloatOperand> call(q, k, v, gates, selected, mask, causal, scale);
    run_backward(call, grad, out, stats, dq, dk, dv, dgates);
  }
  return {dq, dk, dv, dgates};
}

}  // namespace

// The schemas, the fake and the autograd formulas are in Python, where they need no compiler.
TORCH_LIBRARY_IMPL(mixhead, CPU, library) {
  library.impl("attend_cpu", attend);
  library.impl("attend_cpu_inference", attend_inference);
  library.impl("attend_cpu_backward", attend_backward);
}

}  // namespace mixhead
