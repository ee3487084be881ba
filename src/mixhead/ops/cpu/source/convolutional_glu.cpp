// The PyTorch side of the convolutional GLU: tensors to pointers, threads, and the two operators of the library `mixhead`.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "convolutional_glu.h"

namespace mixhead {
namespace {

using at::Tensor;

// The inputs of one call, contiguous.
struct Call {
  Tensor hidden, bias, weight, conv_bias;
  int64_t Y;

  Call(const Tensor& hidden_, const Tensor& bias_, const Tensor& weight_, const Tensor& conv_bias_, int64_t Y_)
      : hidden(hidden_.contiguous()), bias(bias_.contiguous()), weight(weight_.contiguous()),
        conv_bias(conv_bias_.contiguous()), Y(Y_) {}

  int64_t M() const { return conv_bias.size(0); }

  template <class T>
  ConvolutionalGLU<T> kernel() const {
    return {hidden.size(0), Y, hidden.size(1) / Y, M(), static_cast<const T*>(hidden.const_data_ptr()),
            bias.const_data_ptr<float>(), weight.const_data_ptr<float>(), conv_bias.const_data_ptr<float>()};
  }

  // Calls `body` with the kernel of the dtype, memory, and one task after the other.
  template <class Body>
  void run(Body body) const {
    const auto with = [&](const auto& kernel) {
      at::parallel_for(0, kernel.tasks(), 1, [&](int64_t begin, int64_t end) {
        Arena arena(kernel.floats() * sizeof(float));
        float* memory = arena.take<float>(kernel.floats());
        for (int64_t task = begin; task < end; ++task) body(kernel, memory, task);
      });
    };
    hidden.scalar_type() == at::kFloat ? with(kernel<float>()) : with(kernel<BFloat>());
  }
};

// A tensor's data as a kernel of that type has it.
template <class T>
T* data(const ConvolutionalGLU<T>&, const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

Tensor glu(const Tensor& hidden, const Tensor& bias, const Tensor& weight, const Tensor& conv_bias, int64_t Y) {
  const Call call(hidden, bias, weight, conv_bias, Y);
  const Tensor out = at::empty({hidden.size(0), hidden.size(1), call.M()}, hidden.options());
  call.run([&](const auto& kernel, float* memory, int64_t task) { kernel.forward(memory, task, data(kernel, out)); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> glu_backward(const Tensor& grad_, const Tensor& hidden, const Tensor& bias,
                                                        const Tensor& weight, const Tensor& conv_bias, int64_t Y) {
  const Call call(hidden, bias, weight, conv_bias, Y);
  const Tensor grad = grad_.contiguous();
  const Tensor d_hidden = at::empty(hidden.sizes(), hidden.options());
  const Tensor sums = at::empty({hidden.size(0), kTaps + 3, call.M()}, bias.options());
  call.run([&](const auto& kernel, float* memory, int64_t task) {
    kernel.backward(memory, task, data(kernel, grad), data(kernel, d_hidden), sums.data_ptr<float>());
  });
  const Tensor sum = sums.sum(0);
  return {d_hidden, sum.slice(0, kTaps + 1).flatten(), sum.slice(0, 0, kTaps).t().contiguous().view(weight.sizes()),
          sum.select(0, kTaps).clone()};
}

}  // namespace

// The schemas, the fake and the autograd formulas are in Python, where they need no compiler.
TORCH_LIBRARY_IMPL(mixhead, CPU, library) {
  library.impl("convolutional_glu_cpu", glu);
  library.impl("convolutional_glu_cpu_backward", glu_backward);
}

}  // namespace mixhead
