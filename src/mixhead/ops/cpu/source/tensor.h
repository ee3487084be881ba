// PyTorch as the operators see it, through its stable ABI: tensors, threads, and how an operator tells of a mistake.
//
// A library compiled against it runs with the PyTorch that TORCH_TARGET_VERSION names and with every later one.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <exception>
#include <optional>
#include <stdexcept>
#include <vector>

#include "views.h"

namespace mixhead {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline void require(bool holds, const char* sentence) {
  if (!holds) throw std::invalid_argument(sentence);
}

inline bool same(Sizes a, Sizes b) { return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()); }

// A new tensor on the CPU, not initialised.
inline Tensor empty_strided(Sizes sizes, Sizes strides, ScalarType type) {
  AtenTensorHandle made;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor empty(Sizes sizes, ScalarType type) {
  constexpr size_t kMostDimensions = 8;
  std::array<int64_t, kMostDimensions> strides;
  require(sizes.size() <= kMostDimensions, "a tensor has too many dimensions");
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return empty_strided(sizes, Sizes(strides.data(), sizes.size()), type);
}

// Zeros everywhere. The tensor must have no holes in memory.
inline void clear(const Tensor& x) { std::memset(x.data_ptr(), 0, x.numel() * x.element_size()); }

inline Tensor zeros(Sizes sizes, ScalarType type) {
  Tensor x = empty(sizes, type);
  clear(x);
  return x;
}

// [B, H, N, D] with the heads of a token side by side, as the output projection wants them.
inline Tensor empty_by_token(Sizes sizes, ScalarType type) {
  const int64_t H = sizes[1], N = sizes[2], D = sizes[3];
  return empty_strided(sizes, {N * H * D, D, H * D, 1}, type);
}
inline Tensor empty_by_token(const Tensor& x) { return empty_by_token(x.sizes(), x.scalar_type()); }

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline OptionalTensor as_contiguous(const OptionalTensor& x) { return x ? OptionalTensor(as_contiguous(*x)) : std::nullopt; }

inline Tensor unit_stride(const Tensor& x) {
  return x.strides().back() == 1 || x.sizes().back() == 1 ? x : torch::stable::contiguous(x);
}

// Gradients [B, ...] of every image -> their sum [...].
inline Tensor sum_of_images(const Tensor& x) {
  const int64_t first[] = {0};
  return torch::stable::sum(x, Sizes(first));
}

// The data of a tensor whose type the caller has looked at.
template <class T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <class T>
View<T> view(const Tensor& x) {
  const Sizes strides = x.strides();
  return {data_of<T>(x), strides[0], strides[1], strides[2]};
}

// [B, N, H] addressed as (b, h, n).
template <class T>
View<T> view_of_gates(const Tensor& x) {
  const Sizes strides = x.strides();
  return {data_of<T>(x), strides[0], strides[2], strides[1]};
}

// Calls `body(begin, end)` on PyTorch's threads until 0 to `count` are done, at least `grain` at a time.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  std::exception_ptr mistake;
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      if (!failed.exchange(true)) mistake = std::current_exception();
    }
  });
  if (mistake) std::rethrow_exception(mistake);
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

// Whether it ran; if not, `message` says why.
[[gnu::noinline]] inline bool run(Boxed boxed, StableIValue* stack, uint64_t inputs, uint64_t outputs, char* message,
                                  size_t size) {
  try {
    boxed(stack, inputs, outputs);
    return true;
  } catch (const std::exception& mistake) {
    std::strncpy(message, mistake.what(), size - 1);
  }
  return false;
}

// An operator for PyTorch. A mistake is raised by PyTorch itself: where the C++ runtime of this library is another one than
// PyTorch's, as in our wheels, an exception of ours could not be caught there.
template <Boxed boxed>
void guarded(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  char message[256] = "";
  if (!run(boxed, stack, inputs, outputs, message, sizeof message)) aoti_torch_check(false, "mixhead", "", 0, message);
}

}  // namespace mixhead

#define MIXHEAD_OPERATOR(function) guarded<TORCH_BOX(function)>
