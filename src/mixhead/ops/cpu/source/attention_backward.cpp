// Attention, backward: how the work is dealt out to threads, and an operator of the library `mixhead`.
#include "call.h"

namespace mixhead {
namespace {

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
  call.attention.stats = data_of<float>(stats);
  clear_unselected(s, call.selected, dq_view);

  // A piece of work owns the key and value gradients of one key-value head. Where whole heads would leave threads idle, a
  // head's blocks are dealt out to several pieces, whose sums are added up in order.
  const int64_t lists = s.B * s.K, pieces = even_pieces(lists, int64_t(torch::stable::get_num_threads()));
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
    Workspace space([&](Arena& arena) { return attention.backward_memory(arena); });
    auto& memory = space.memory;
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
    parallel_for(lists, 1, [&](int64_t begin, int64_t end) {
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

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                           const Tensor& v, const Tensor& gates, const Tensor& selected,
                                                           const OptionalTensor& mask, const Tensor& out,
                                                           const Tensor& stats, bool causal, double scale) {
  Tensor dq = empty_by_token(q), dk = empty_by_token(k), dv = empty_by_token(v);
  Tensor dgates = zeros(gates.sizes(), gates.scalar_type());
  if (q.scalar_type() == ScalarType::Float) {
    Call<float, float> call(q, k, v, gates, selected, mask, causal, scale);
    run_backward(call, grad, out, stats, dq, dk, dv, dgates);
  } else {
    Call<BFloat, BFloatOperand> call(q, k, v, gates, selected, mask, causal, scale);
    run_backward(call, grad, out, stats, dq, dk, dv, dgates);
  }
  return {dq, dk, dv, dgates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixhead, CPU, library) {
  library.impl("attend_cpu_backward", MIXHEAD_OPERATOR(attend_backward));
}

}  // namespace mixhead
