// Stands in for PyTorch's C interface, as far as the kernels call it: contiguous tensors on the CPU, one thread. It lets
// the kernels run where no PyTorch is, as on an emulated processor. Whatever else is called ends the program.
#include "pytorch.h"

#include <torch/csrc/stable/c/shim.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

struct StableListOpaque {
  std::vector<StableIValue> items;
};

namespace standin {

std::map<std::string, Operator>& operators() {
  static std::map<std::string, Operator> all;
  return all;
}

AtenTensorHandle handle(const Array& array) { return reinterpret_cast<AtenTensorHandle>(new Array(array)); }
Array& array(AtenTensorHandle handle) { return *reinterpret_cast<Array*>(handle); }

size_t size_of(int32_t dtype) { return dtype == kBool ? 1 : dtype == kBFloat16 ? 2 : dtype == kInt64 ? 8 : 4; }

Array make(std::vector<int64_t> sizes, std::vector<int64_t> strides, int32_t dtype) {
  int64_t count = 1;
  for (size_t i = 0; i < sizes.size(); ++i) count += std::max<int64_t>(sizes[i] - 1, 0) * strides[i];
  return {dtype, sizes, strides, std::make_shared<std::vector<char>>(count * size_of(dtype))};
}

Array make(std::vector<int64_t> sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return make(sizes, strides, dtype);
}

int64_t count(const Array& x) { return std::accumulate(x.sizes.begin(), x.sizes.end(), int64_t{1}, std::multiplies<>()); }

int64_t place(const Array& x, int64_t i) {
  int64_t at = 0;
  for (size_t d = x.sizes.size(); d-- > 0; i /= x.sizes[d]) at += i % x.sizes[d] * x.strides[d];
  return at;
}

Array contiguous(const Array& x) {
  Array to = make(x.sizes, x.dtype);
  const size_t size = size_of(x.dtype);
  for (int64_t i = 0; i < count(x); ++i) std::memcpy(to.memory->data() + i * size, x.memory->data() + place(x, i) * size, size);
  return to;
}

Array sum_of_first(const Array& x) {
  Array to = make({x.sizes.begin() + 1, x.sizes.end()}, x.dtype);
  const float* from = reinterpret_cast<float*>(x.memory->data());
  for (int64_t i = 0; i < count(x); ++i) reinterpret_cast<float*>(to.memory->data())[i % count(to)] += from[i];
  return to;
}

[[noreturn]] void end(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::exit(2);
}

}  // namespace standin

using namespace standin;

extern "C" {

uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }
void aoti_torch_check(bool holds, const char*, const char*, uint32_t, const char* message) {
  if (!holds) end(message);
}
const char* torch_exception_get_what() { return ""; }
const char* torch_exception_get_what_without_backtrace() { return ""; }

AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle*) { return 0; }
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return 0; }
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, Operator function, uint64_t) {
  operators()[name] = function;
  return 0;
}

AOTITorchError torch_get_num_threads(uint32_t* threads) { return *threads = 2, 0; }
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc body, void* context) {
  if (begin < end) body(begin, end, context);
  return 0;
}

int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_memory_format_contiguous_format() { return 0; }
size_t aoti_torch_dtype_element_size(int32_t dtype) { return size_of(dtype); }
int32_t aoti_torch_dtype_float32() { return kFloat32; }
int32_t aoti_torch_dtype_bfloat16() { return kBFloat16; }
int32_t aoti_torch_dtype_bool() { return kBool; }
int32_t aoti_torch_dtype_int64() { return kInt64; }
#define NO_SUCH_DTYPE(name, number) \
  int32_t name() { return number; }
NO_SUCH_DTYPE(aoti_torch_dtype_uint8, 100)
NO_SUCH_DTYPE(aoti_torch_dtype_int8, 101)
NO_SUCH_DTYPE(aoti_torch_dtype_int16, 102)
NO_SUCH_DTYPE(aoti_torch_dtype_int32, 103)
NO_SUCH_DTYPE(aoti_torch_dtype_uint16, 104)
NO_SUCH_DTYPE(aoti_torch_dtype_uint32, 105)
NO_SUCH_DTYPE(aoti_torch_dtype_uint64, 106)
NO_SUCH_DTYPE(aoti_torch_dtype_float16, 107)
NO_SUCH_DTYPE(aoti_torch_dtype_float64, 108)
NO_SUCH_DTYPE(aoti_torch_dtype_complex32, 109)
NO_SUCH_DTYPE(aoti_torch_dtype_complex64, 110)
NO_SUCH_DTYPE(aoti_torch_dtype_complex128, 111)
NO_SUCH_DTYPE(aoti_torch_dtype_float8_e5m2, 112)
NO_SUCH_DTYPE(aoti_torch_dtype_float8_e4m3fn, 113)
NO_SUCH_DTYPE(aoti_torch_dtype_float8_e5m2fnuz, 114)
NO_SUCH_DTYPE(aoti_torch_dtype_float8_e4m3fnuz, 115)
NO_SUCH_DTYPE(torch_dtype_float8_e8m0fnu, 116)
NO_SUCH_DTYPE(torch_dtype_float4_e2m1fn_x2, 117)

AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t,
                                        int32_t, AtenTensorHandle* made) {
  *made = handle(make({sizes, sizes + dims}, {strides, strides + dims}, dtype));
  std::memset(array(*made).memory->data(), 0xff, array(*made).memory->size());  // NaN: what is not written shows
  return 0;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle x, AtenTensorHandle* to) { return *to = handle(array(x)), 0; }
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle x) { return delete &array(x), 0; }
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle x, void** to) { return *to = array(x).memory->data(), 0; }
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle x, int32_t* to) { return *to = array(x).dtype, 0; }
AOTITorchError aoti_torch_get_dim(AtenTensorHandle x, int64_t* to) { return *to = int64_t(array(x).sizes.size()), 0; }
AOTITorchError aoti_torch_get_numel(AtenTensorHandle x, int64_t* to) { return *to = count(array(x)), 0; }
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle x, int64_t** to) { return *to = array(x).sizes.data(), 0; }
AOTITorchError aoti_torch_get_strides(AtenTensorHandle x, int64_t** to) { return *to = array(x).strides.data(), 0; }
AOTITorchError aoti_torch_get_size(AtenTensorHandle x, int64_t i, int64_t* to) {
  return *to = array(x).sizes[i < 0 ? i + array(x).sizes.size() : i], 0;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle x, int64_t i, int64_t* to) {
  return *to = array(x).strides[i < 0 ? i + array(x).strides.size() : i], 0;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle x, bool* to) {
  *to = true;
  for (int64_t i = 0; i < count(array(x)); ++i) *to = *to && place(array(x), i) == i;
  return 0;
}

AOTITorchError torch_call_dispatcher(const char* name, const char*, StableIValue* stack, uint64_t) {
  const AtenTensorHandle x = reinterpret_cast<AtenTensorHandle>(stack[0]);
  AtenTensorHandle made;
  if (!std::strcmp(name, "aten::contiguous")) {
    made = handle(contiguous(array(x)));
  } else if (!std::strcmp(name, "aten::sum")) {
    made = handle(sum_of_first(array(x)));
  } else if (!std::strcmp(name, "aten::empty_like")) {
    made = handle(make(array(x).sizes, array(x).strides, array(x).dtype));
  } else {
    end(name);
  }
  aoti_torch_delete_tensor_object(x);
  stack[0] = reinterpret_cast<StableIValue>(made);
  return 0;
}

AOTITorchError torch_new_list_reserve_size(size_t, StableListHandle* to) { return *to = new StableListOpaque, 0; }
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue item) { return list->items.push_back(item), 0; }
AOTITorchError torch_list_size(StableListHandle list, size_t* to) { return *to = list->items.size(), 0; }
AOTITorchError torch_list_get_item(StableListHandle list, size_t i, StableIValue* to) { return *to = list->items[i], 0; }
AOTITorchError torch_delete_list(StableListHandle list) { return delete list, 0; }
AOTITorchError torch_new_stable_ivalue(StableIValue** to) { return *to = new StableIValue, 0; }
AOTITorchError torch_delete_stable_ivalue(StableIValue* value) { return delete value, 0; }
}
