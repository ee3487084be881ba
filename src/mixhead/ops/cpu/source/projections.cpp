// The PyTorch side of the projections: tensors to views, lists of selected rows, threads, and four operators.

#include <cstddef>

#include "projections.h"
#include "tensor.h"

namespace mixhead {
namespace {

// The rows of each head. `head_of(r, s)` is the head in a slot; what is no head leaves it empty.
template <class HeadOf>
Selection list_rows(int64_t H, int64_t R, int64_t S, HeadOf head_of) {
  Selection list;
  list.start.assign(H + 1, 0);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t s = 0; s < S; ++s) {
      if (const int64_t h = head_of(r, s); uint64_t(h) < uint64_t(H)) ++list.start[h + 1];
    }
  }
  for (int64_t h = 0; h < H; ++h) list.start[h + 1] += list.start[h];
  list.row.resize(list.start[H]);
  list.slot.resize(list.start[H]);
  std::vector<int64_t> next(list.start.begin(), list.start.end() - 1);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t s = 0; s < S; ++s) {
      if (const int64_t h = head_of(r, s); uint64_t(h) < uint64_t(H)) {
        list.row[next[h]] = r;
        list.slot[next[h]++] = s;
      }
    }
  }
  return list;
}

// A choice is bool [B, N, H], which heads a token uses, or int64 [B, N, S], which head stands in each of its slots.
Selection list_rows(int64_t H, const Tensor& choice) {
  const Tensor whole = as_contiguous(choice);
  const int64_t R = whole.size(0) * whole.size(1), S = whole.size(2);
  if (whole.scalar_type() == ScalarType::Bool) {
    const bool* selected = data_of<const bool>(whole);
    return list_rows(H, R, S, [=](int64_t r, int64_t h) { return selected[r * S + h] ? h : H; });
  }
  const int64_t* head = data_of<const int64_t>(whole);
  return list_rows(H, R, S, [=](int64_t r, int64_t s) { return head[r * S + s]; });
}

template <class T>
HeadRows<T> head_rows(const Tensor& x_BHND) {
  return {view<T>(x_BHND), x_BHND.size(2)};
}

// [B, S, N, D] with the slots of a token side by side; zero where there are empty ones.
Tensor rows_by_token(const Tensor& choice, const Selection& selection, int64_t D, ScalarType type) {
  const Sizes slots = choice.sizes();
  Tensor rows = empty_by_token({slots[0], slots[2], slots[1], D}, type);
  if (int64_t(selection.row.size()) < choice.numel()) clear(rows);
  return rows;
}

template <class T>
struct Units {};
#if defined(__AVX512BF16__)
template <>
struct Units<BFloat> : MatrixUnits {};
#endif

// What every product of one call shares.
template <class T>
struct Call {
  Selection selection;
  Tensor weight;
  OptionalTensor gates;
  Projection<T> projection;

  Call(const Tensor& weight_HDC, const Tensor& choice, const OptionalTensor& gates_BNS)
      : selection(list_rows(weight_HDC.size(0), choice)),
        weight(weight_HDC),
        gates(as_contiguous(gates_BNS)) {
    projection = {weight.size(0), choice.size(2),  weight.size(1), weight.size(2), choice.size(0) * choice.size(1),
                  &selection};
    if (gates) projection.gates = data_of<const float>(*gates);
  }

  Weights<const T> weights_of_heads() const {
    const Sizes strides = weight.strides();
    return {data_of<const T>(weight), strides[0], strides[1], strides[2]};
  }

  // Rows [B, N, C] to heads [B, S, N, D], into `to`.
  void to_heads(const Tensor& from, const OptionalTensor& bias, const Tensor& to, const OptionalTensor& other, float* gate_gradient) {
    const auto target = head_rows<T>(to);
    const auto compared = other ? head_rows<const T>(*other) : HeadRows<const T>{};
    const auto pieces = projection.pieces();
    const T* bias_data = bias ? data_of<const T>(*bias) : nullptr;
    parallel_for(int64_t(pieces.size()), 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Units<T> units;
      auto memory = std::make_unique<typename Projection<T>::MemoryTo>();
      for (int64_t i = begin; i < end; ++i) {
        projection.to_heads(pieces[i], data_of<const T>(from), weights_of_heads(), bias_data, target,
                            other ? &compared : nullptr, gate_gradient, *memory);
      }
    });
  }

  // Heads [B, S, N, D] to rows [B, N, C].
  Tensor from_heads(const Tensor& from, const OptionalTensor& bias, Sizes sizes) {
    Tensor to = empty(sizes, from.scalar_type());
    const auto source = head_rows<const T>(from);
    const T* bias_data = bias ? data_of<const T>(*bias) : nullptr;
    const int64_t columns = (projection.C + kColumns - 1) / kColumns;
    const int64_t rows = (projection.R + kRowsOfSum - 1) / kRowsOfSum;
    parallel_for(rows * columns, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Units<T> units;
      auto memory = std::make_unique<typename Projection<T>::MemoryFrom>();
      for (int64_t i = begin; i < end; ++i) {
        projection.from_heads(i / columns * kRowsOfSum, i % columns * kColumns, source, weights_of_heads(), bias_data,
                              data_of<T>(to), *memory);
      }
    });
    return to;
  }

  // The gradient of the weights, laid out as they are.
  Tensor weights(const Tensor& left_BHND, const Tensor& right) {
    Tensor out = torch::stable::empty_like(weight);
    const Sizes strides = out.strides();
    const Weights<T> to{data_of<T>(out), strides[0], strides[1], strides[2]};
    const auto left = head_rows<const T>(left_BHND);
    parallel_for(projection.H, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Units<T> units;
      auto memory = std::make_unique<typename Projection<T>::MemoryWeights>();
      for (int64_t h = begin; h < end; ++h) {
        projection.weights(h, left, data_of<const T>(right), to, *memory);
      }
    });
    return out;
  }
};

// The gradient of the biases [H, D]: the sum of each head's rows, in their order.
template <class T>
Tensor sum_of_rows(const Call<T>& call, const Tensor& rows_BHND) {
  const int64_t H = call.projection.H, D = call.projection.D;
  Tensor out = empty({H, D}, rows_BHND.scalar_type());
  const auto rows = head_rows<const T>(rows_BHND);
  parallel_for(H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(D);
    for (int64_t h = begin; h < end; ++h) {
      std::fill(sum.begin(), sum.end(), 0.f);
      for (int64_t i = call.selection.start[h]; i < call.selection.start[h + 1]; ++i) {
        const T* row = rows.at(call.selection.row[i], call.selection.slot[i]);
        for (int64_t d = 0; d < D; ++d) sum[d] += widen(row[d]);
      }
      for (int64_t d = 0; d < D; ++d) narrow(sum[d], data_of<T>(out) + h * D + d);
    }
  });
  return out;
}

// Calls `body` with a number of the tensor's type.
template <class Body>
auto with_type_of(const Tensor& x, Body body) {
#if defined(__AVX512BF16__)
  if (x.scalar_type() == ScalarType::BFloat16) return body(BFloat{});
#endif
  require(x.scalar_type() == ScalarType::Float, "the projections have no kernel for this dtype");
  return body(0.f);
}

Tensor project_to_heads(const Tensor& hidden_BNC, const Tensor& weight_HDC, const OptionalTensor& bias_HD,
                        const Tensor& choice) {
  return with_type_of(hidden_BNC, [&](auto number) {
    const Tensor hidden = as_contiguous(hidden_BNC);
    const OptionalTensor bias = as_contiguous(bias_HD);
    Call<decltype(number)> call(weight_HDC, choice, {});
    Tensor out = rows_by_token(choice, call.selection, weight_HDC.size(1), hidden.scalar_type());
    call.to_heads(hidden, bias, out, {}, nullptr);
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor> project_to_heads_backward(const Tensor& grad_BSND, const Tensor& hidden_BNC,
                                                             const Tensor& weight_HDC, const Tensor& choice,
                                                             bool has_bias) {
  return with_type_of(hidden_BNC, [&](auto number) {
    const Tensor grad = unit_stride(grad_BSND), hidden = as_contiguous(hidden_BNC);
    Call<decltype(number)> call(weight_HDC, choice, {});
    const Tensor dbias = has_bias ? sum_of_rows(call, grad) : empty({0}, grad.scalar_type());
    return std::make_tuple(call.from_heads(grad, {}, hidden.sizes()), call.weights(grad, hidden), dbias);
  });
}

Tensor project_from_heads(const Tensor& out_BSND, const Tensor& weight_HDC, const OptionalTensor& bias_C,
                          const Tensor& choice, const OptionalTensor& gates_BNS) {
  return with_type_of(out_BSND, [&](auto number) {
    const Tensor out = unit_stride(out_BSND);
    const OptionalTensor bias = as_contiguous(bias_C);
    return Call<decltype(number)>(weight_HDC, choice, gates_BNS)
        .from_heads(out, bias, {choice.size(0), choice.size(1), weight_HDC.size(2)});
  });
}

std::tuple<Tensor, Tensor, Tensor> project_from_heads_backward(const Tensor& grad_BNC, const Tensor& out_BSND,
                                                               const Tensor& weight_HDC, const Tensor& choice,
                                                               const OptionalTensor& gates_BNS) {
  return with_type_of(out_BSND, [&](auto number) {
    const Tensor grad = as_contiguous(grad_BNC), out = unit_stride(out_BSND);
    Call<decltype(number)> call(weight_HDC, choice, gates_BNS);
    Tensor dout = rows_by_token(choice, call.selection, weight_HDC.size(1), out.scalar_type());
    Tensor dgates = gates_BNS ? zeros(gates_BNS->sizes(), gates_BNS->scalar_type()) : empty({0}, grad.scalar_type());
    call.to_heads(grad, {}, dout, gates_BNS ? OptionalTensor(out) : std::nullopt,
                  gates_BNS ? data_of<float>(dgates) : nullptr);
    return std::make_tuple(dout, call.weights(out, grad), dgates);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixhead, CPU, library) {
  library.impl("project_to_heads_cpu", MIXHEAD_OPERATOR(project_to_heads));
  library.impl("project_to_heads_cpu_backward", MIXHEAD_OPERATOR(project_to_heads_backward));
  library.impl("project_from_heads_cpu", MIXHEAD_OPERATOR(project_from_heads));
  library.impl("project_from_heads_cpu_backward", MIXHEAD_OPERATOR(project_from_heads_backward));
}

}  // namespace mixhead
