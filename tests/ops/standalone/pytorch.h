// Tensors and operators of the stand-in for PyTorch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace standin {

enum DType : int32_t { kFloat32, kBFloat16, kBool, kInt64 };

struct Array {
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
  std::shared_ptr<std::vector<char>> memory;
};

using Operator = void (*)(StableIValue*, uint64_t, uint64_t);
std::map<std::string, Operator>& operators();

Array make(std::vector<int64_t> sizes, int32_t dtype);
Array contiguous(const Array& x);
int64_t count(const Array& x);
AtenTensorHandle handle(const Array& array);
Array& array(AtenTensorHandle handle);

}  // namespace standin
