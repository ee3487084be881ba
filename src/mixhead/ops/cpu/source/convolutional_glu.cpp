// The PyTorch side of the convolutional GLU: tensors to pointers, threads, and the two operators of the library `mixhead`.

#include "convolutional_glu.h"
#include "tensor.h"

namespace mixhead {
namespace {

// The inputs of one call, contiguous.
struct Call {
  Tensor hidden, bias, weight, conv_bias;
  int64_t Y;

  Call(const Tensor& hidden_, const Tensor& bias_, const Tensor& weight_, const Tensor& conv_bias_, int64_t Y_)
      : hidden(as_contiguous(hidden_)), bias(as_contiguous(bias_)), weight(as_contiguous(weight_)),
        conv_bias(as_contiguous(conv_bias_)), Y(Y_) {}

  int64_t M() const { return conv_bias.size(0); }

  template <class T>
  ConvolutionalGLU<T> kernel() const {
    return {hidden.size(0), Y, hidden.size(1) / Y, M(), data_of<const T>(hidden),
            data_of<const float>(bias), data_of<const float>(weight), data_of<const float>(conv_bias)};
  }

  // Calls `body` with the kernel of the dtype, memory, and one task after the other.
  template <class Body>
  void run(Body body) const {
    const auto with = [&](const auto& kernel) {
      parallel_for(kernel.tasks(), 1, [&](int64_t begin, int64_t end) {
        Workspace space([&](Arena& arena) { return kernel.memory(arena); });
        for (int64_t task = begin; task < end; ++task) body(kernel, space.memory, task);
      });
    };
    hidden.scalar_type() == ScalarType::Float ? with(kernel<float>()) : with(kernel<BFloat>());
  }
};

// A tensor's data as a kernel of that type has it.
template <class T>
T* data_for(const ConvolutionalGLU<T>&, const Tensor& x) {
  return data_of<T>(x);
}

Tensor glu(const Tensor& hidden, const Tensor& bias, const Tensor& weight, const Tensor& conv_bias, int64_t Y) {
  const Call call(hidden, bias, weight, conv_bias, Y);
  const Tensor out = empty({hidden.size(0), hidden.size(1), call.M()}, hidden.scalar_type());
  call.run([&](const auto& kernel, float* memory, int64_t task) { kernel.forward(memory, task, data_for(kernel, out)); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> glu_backward(const Tensor& grad_, const Tensor& hidden, const Tensor& bias,
                                                        const Tensor& weight, const Tensor& conv_bias, int64_t Y) {
  const Call call(hidden, bias, weight, conv_bias, Y);
  const Tensor grad = as_contiguous(grad_);
  const Tensor d_hidden = empty(hidden.sizes(), hidden.scalar_type());
  const Tensor sums = empty({hidden.size(0), kTaps + 3, call.M()}, ScalarType::Float);
  call.run([&](const auto& kernel, float* memory, int64_t task) {
    kernel.backward(memory, task, data_for(kernel, grad), data_for(kernel, d_hidden), data_of<float>(sums));
  });
  // [kTaps + 3, M]: the taps of the convolution, its bias, and the two halves of the hidden layer's bias.
  const Tensor sum = sum_of_images(sums), d_bias = empty(bias.sizes(), ScalarType::Float);
  const Tensor d_weight = empty(weight.sizes(), ScalarType::Float), d_conv_bias = empty({call.M()}, ScalarType::Float);
  const int64_t M = call.M();
  const float* from = data_of<const float>(sum);
  float* to = data_of<float>(d_weight);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t tap = 0; tap < kTaps; ++tap) to[m * kTaps + tap] = from[tap * M + m];
  }
  std::copy_n(from + kTaps * M, M, data_of<float>(d_conv_bias));
  std::copy_n(from + (kTaps + 1) * M, 2 * M, data_of<float>(d_bias));
  return {d_hidden, d_bias, d_weight, d_conv_bias};
}

}  // namespace

// The schemas, the fake and the autograd formulas are in Python, where they need no compiler.
STABLE_TORCH_LIBRARY_IMPL(mixhead, CPU, library) {
  library.impl("convolutional_glu_cpu", MIXHEAD_OPERATOR(glu));
  library.impl("convolutional_glu_cpu_backward", MIXHEAD_OPERATOR(glu_backward));
}

}  // namespace mixhead
