// Attention, forward: the choice of a kernel, and two operators of the library `mixhead`.
#include "call.h"
#include "decode.h"
#include "dot_forward.h"
#include "matrix_forward.h"

namespace mixhead {
namespace {

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
  const int64_t count = int64_t(blocks.size()), size = heads >= 4 * int64_t(torch::stable::get_num_threads()) ? count : 4;
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
      : arena(bytes_of([&](Arena& count) { attention.forward_memory(count); })), memory(attention.forward_memory(arena)) {}
};

template <class In, class Op>
void run_bf16_forward(Call<In, Op>& call, const View<In>& to) {
  const BFloatForward<In> forward(call.attention);
  const std::vector<Piece> pieces = cut_into_pieces<In>(call.blocks, int64_t(call.rows.start.size()) - 1);
  share_work(int64_t(pieces.size()), [&](std::atomic<int64_t>& next) {
    const MatrixUnits units;
    Workspace space([&](Arena& arena) { return forward.memory(arena); });
    [[maybe_unused]] Spare<In, Op> spare(call.attention);
    for (size_t i; (i = next.fetch_add(1)) < pieces.size();) {
      for (int64_t block = pieces[i].first; block < pieces[i].end; ++block) {
        const bool done = pieces[i].in_bf16 && forward.forward(space.memory, call.blocks[block], to);
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
    Workspace space([&](Arena& arena) { return call.attention.forward_memory(arena); });
    for (int64_t i; (i = next.fetch_add(1)) < count;) call.attention.forward(space.memory, call.blocks[i], to);
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

template <class In>
void run_decode(const Shape& shape, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& gates,
                const Tensor& selected, const OptionalTensor& mask, const Tensor& out, float* stats) {
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
  run(decode);
}

Tensor run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gates, const Tensor& selected,
           const OptionalTensor& mask, bool causal, double scale, float* stats) {
  check(q, k, v, gates, selected, mask);
  Tensor out = empty_by_token(q);
  const Shape shape = shape_of(q, k, causal, scale);
  const bool in_float = q.scalar_type() == ScalarType::Float;
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
                                  const Tensor& selected, const OptionalTensor& mask, bool causal, double scale) {
  Tensor stats = zeros({2, q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  return {run(q, k, v, gates, selected, mask, causal, scale, data_of<float>(stats)), stats};
}

// Without what the backward needs.
Tensor attend_inference(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gates, const Tensor& selected,
                        const OptionalTensor& mask, bool causal, double scale) {
  return run(q, k, v, gates, selected, mask, causal, scale, nullptr);
}

}  // namespace

// The schemas, the fake and the autograd formulas are in Python, where they need no compiler.
STABLE_TORCH_LIBRARY_IMPL(mixhead, CPU, library) {
  library.impl("attend_cpu", MIXHEAD_OPERATOR(attend));
  library.impl("attend_cpu_inference", MIXHEAD_OPERATOR(attend_inference));
}

}  // namespace mixhead
