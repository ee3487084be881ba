// The PyTorch side of the projections: tensors to views, lists of selected rows, threads, and four operators.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstddef>

#include "projections.h"

namespace mixhead {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

Selection list_selected(const Tensor& selected_BNH) {
  const Tensor selected = selected_BNH.contiguous();
  const bool* data = selected.const_data_ptr<bool>();
  const int64_t H = selected.size(2), R = selected.size(0) * selected.size(1);
  Selection s;
  s.start.assign(H + 1, 0);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t h = 0; h < H; ++h) s.start[h + 1] += data[r * H + h];
  }
  for (int64_t h = 0; h < H; ++h) s.start[h + 1] += s.start[h];
  s.row.resize(s.start[H]);
  std::vector<int64_t> next(s.start.begin(), s.start.end() - 1);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t h = 0; h < H; ++h) {
      if (data[r * H + h]) s.row[next[h]++] = r;
    }
  }
  return s;
}

template <class T>
HeadRows<T> head_rows(const Tensor& x_BHND) {
  return {{static_cast<T*>(x_BHND.data_ptr()), x_BHND.stride(0), x_BHND.stride(1), x_BHND.stride(2)}, x_BHND.size(2)};
}

Tensor unit_stride(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

// [B, H, N, D] with the heads of a token side by side.
Tensor zeros_by_token(const Tensor& selected_BNH, int64_t D, const at::TensorOptions& options) {
  return at::zeros({selected_BNH.size(0), selected_BNH.size(1), selected_BNH.size(2), D}, options).transpose(1, 2);
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
  Tensor weight, gates;
  Projection<T> projection;
  Lines<T> packed;

  Call(const Tensor& weight_HDC, const Tensor& selected_BNH, const Optional& gates_BNH)
      : selection(list_selected(selected_BNH)), weight(weight_HDC), gates(gates_BNH ? gates_BNH->contiguous() : Tensor()) {
    projection = {weight.size(0), weight.size(1), weight.size(2), selected_BNH.size(0) * selected_BNH.size(1), &selection};
    if (gates.defined()) projection.gates = gates.const_data_ptr<float>();
  }

  void pack_weights(const Panels<T>& panels, int64_t by_k, int64_t by_n) {
    packed.reserve(projection.H * panels.size());
    const T* data = static_cast<const T*>(weight.data_ptr());
    at::parallel_for(0, projection.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        if (selection.count(h)) pack(panels, data + h * weight.stride(0), by_k, by_n, packed.data() + h * panels.size());
      }
    });
  }

  // Rows [B, N, C] to heads [B, H, N, D], into `to`.
  void to_heads(const Tensor& from, const Optional& bias, const Tensor& to, const Optional& other, float* gate_gradient) {
    pack_weights(projection.panels_to(), weight.stride(2), weight.stride(1));
    const auto target = head_rows<T>(to);
    const auto compared = other ? head_rows<const T>(*other) : HeadRows<const T>{};
    const auto pieces = projection.pieces();
    const T* bias_data = bias ? static_cast<const T*>(bias->data_ptr()) : nullptr;
    at::parallel_for(0, int64_t(pieces.size()), 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Units<T> units;
      auto memory = std::make_unique<typename Projection<T>::MemoryTo>();
      for (int64_t i = begin; i < end; ++i) {
        projection.to_heads(pieces[i], static_cast<const T*>(from.data_ptr()), packed.data(), bias_data, target,
                            other ? &compared : nullptr, gate_gradient, *memory);
      }
    });
  }

  // Heads [B, H, N, D] to rows [B, N, C].
  Tensor from_heads(const Tensor& from, const Optional& bias, at::IntArrayRef sizes) {
    pack_weights(projection.panels_from(), weight.stride(1), weight.stride(2));
    Tensor to = at::empty(sizes, from.options());
    const auto source = head_rows<const T>(from);
    const T* bias_data = bias ? static_cast<const T*>(bias->data_ptr()) : nullptr;
    const int64_t columns = (projection.C + kColumns - 1) / kColumns;
    const int64_t rows = (projection.R + kRowsOfSum - 1) / kRowsOfSum;
    at::parallel_for(0, rows * columns, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Units<T> units;
      auto memory = std::make_unique<typename Projection<T>::MemoryFrom>();
      for (int64_t i = begin; i < end; ++i) {
        projection.from_heads(i / columns * kRowsOfSum, i % columns * kColumns, source, packed.data(), bias_data,
                              static_cast<T*>(to.data_ptr()), *memory);
      }
    });
    return to;
  }

  // The gradient of the weights, laid out as they are.
  Tensor weights(const Tensor& left_BHND, const Tensor& right) {
    Tensor out = at::empty_like(weight);
    const Weights<T> to{static_cast<T*>(out.data_ptr()), out.stride(0), out.stride(1), out.stride(2)};
    const auto left = head_rows<const T>(left_BHND);
    at::parallel_for(0, projection.H, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Units<T> units;
      auto memory = std::make_unique<typename Projection<T>::MemoryWeights>();
      for (int64_t h = begin; h < end; ++h) {
        projection.weights(h, left, static_cast<const T*>(right.data_ptr()), to, *memory);
      }
    });
    return out;
  }
};

// The gradient of the biases [H, D]: the sum of each head's rows, in their order.
template <class T>
Tensor sum_of_rows(const Call<T>& call, const Tensor& rows_BHND) {
  const int64_t H = call.projection.H, D = call.projection.D;
  Tensor out = at::empty({H, D}, rows_BHND.options());
  const auto rows = head_rows<const T>(rows_BHND);
  at::parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(D);
    for (int64_t h = begin; h < end; ++h) {
      std::fill(sum.begin(), sum.end(), 0.f);
      for (int64_t i = call.selection.start[h]; i < call.selection.start[h + 1]; ++i) {
        const T* row = rows.at(call.selection.row[i], h);
        for (int64_t d = 0; d < D; ++d) sum[d] += widen(row[d]);
      }
      for (int64_t d = 0; d < D; ++d) narrow(sum[d], static_cast<T*>(out.data_ptr()) + h * D + d);
    }
  });
  return out;
}

// Calls `body` with a number of the tensor's type.
template <class Body>
auto with_type_of(const Tensor& x, Body body) {
#if defined(__AVX512BF16__)
  if (x.scalar_type() == at::kBFloat16) return body(BFloat{});
#endif
  TORCH_CHECK(x.scalar_type() == at::kFloat, "the projections have no kernel for ", x.scalar_type());
  return body(0.f);
}

Tensor project_to_heads(const Tensor& hidden_BNC, const Tensor& weight_HDC, const Optional& bias_HD,
                        const Tensor& selected_BNH) {
  return with_type_of(hidden_BNC, [&](auto number) {
    const Tensor hidden = hidden_BNC.contiguous();
    const Optional bias = bias_HD ? Optional(bias_HD->contiguous()) : std::nullopt;
    Tensor out = zeros_by_token(selected_BNH, weight_HDC.size(1), hidden.options());
    Call<decltype(number)>(weight_HDC, selected_BNH, {}).to_heads(hidden, bias, out, {}, nullptr);
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor> project_to_heads_backward(const Tensor& grad_BHND, const Tensor& hidden_BNC,
                                                             const Tensor& weight_HDC, const Tensor& selected_BNH) {
  return with_type_of(hidden_BNC, [&](auto number) {
    const Tensor grad = unit_stride(grad_BHND), hidden = hidden_BNC.contiguous();
    Call<decltype(number)> call(weight_HDC, selected_BNH, {});
    return std::make_tuple(call.from_heads(grad, {}, hidden.sizes()), call.weights(grad, hidden), sum_of_rows(call, grad));
  });
}

Tensor project_from_heads(const Tensor& out_BHND, const Tensor& weight_HDC, const Optional& bias_C,
                          const Tensor& selected_BNH, const Optional& gates_BNH) {
  return with_type_of(out_BHND, [&](auto number) {
    const Tensor out = unit_stride(out_BHND);
    const Optional bias = bias_C ? Optional(bias_C->contiguous()) : std::nullopt;
    return Call<decltype(number)>(weight_HDC, selected_BNH, gates_BNH)
        .from_heads(out, bias, {selected_BNH.size(0), selected_BNH.size(1), weight_HDC.size(2)});
  });
}

std::tuple<Tensor, Tensor, Tensor> project_from_heads_backward(const Tensor& grad_BNC, const Tensor& out_BHND,
                                                               const Tensor& weight_HDC, const Tensor& selected_BNH,
                                                               const Optional& gates_BNH) {
  return with_type_of(out_BHND, [&](auto number) {
    const Tensor grad = grad_BNC.contiguous(), out = unit_stride(out_BHND);
    Tensor dout = zeros_by_token(selected_BNH, weight_HDC.size(1), out.options());
    Tensor dgates = gates_BNH ? at::zeros(gates_BNH->sizes(), gates_BNH->options()) : at::empty({0}, grad.options());
    Call<decltype(number)> call(weight_HDC, selected_BNH, gates_BNH);
    call.to_heads(grad, {}, dout, gates_BNH ? Optional(out) : std::nullopt,
                  gates_BNH ? dgates.mutable_data_ptr<float>() : nullptr);
    return std::make_tuple(dout, call.weights(out, grad), dgates);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, CPU, library) {
  library.impl("project_to_heads_cpu", project_to_heads);
  library.impl("project_to_heads_cpu_backward", project_to_heads_backward);
  library.impl("project_from_heads_cpu", project_from_heads);
  library.impl("project_from_heads_cpu_backward", project_from_heads_backward);
}

}  // namespace mixhead
