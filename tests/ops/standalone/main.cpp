// Runs the operators on the cases of a file, which cases.py beside this file wrote, and compares with what stands there.
#include <torch/csrc/stable/c/shim.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "pytorch.h"

using namespace standin;

namespace {

enum class Returns { separate, as_list, in_place };  // by number, as in cases.py

template <class T>
T read(std::istream& from) {
  T x;
  if (!from.read(reinterpret_cast<char*>(&x), sizeof x)) throw std::runtime_error("the file of cases ends too early");
  return x;
}

std::string read_text(std::istream& from) {
  std::string text(read<int64_t>(from), ' ');
  from.read(text.data(), std::streamsize(text.size()));
  return text;
}

Array read_array(std::istream& from) {
  const auto dtype = int32_t(read<int64_t>(from));
  std::vector<int64_t> sizes(read<int64_t>(from));
  for (int64_t& size : sizes) size = read<int64_t>(from);
  Array x = make(sizes, dtype);
  from.read(x.memory->data(), std::streamsize(read<int64_t>(from)));
  return x;
}

StableIValue stack_value(const Array& x) { return reinterpret_cast<StableIValue>(handle(x)); }

// One argument: what it is, and the thing itself.
StableIValue read_argument(std::istream& from, const std::vector<Array>& before) {
  switch (read<char>(from)) {
    case 't': return stack_value(read_array(from));
    case 'r': return stack_value(before.at(read<int64_t>(from)));  // a result of the case before
    case 'o': return reinterpret_cast<StableIValue>(new StableIValue(stack_value(read_array(from))));  // Tensor?
    case 'n': return 0;
    default: return read<StableIValue>(from);  // a number
  }
}

float number(const Array& x, int64_t i) {
  if (x.dtype == kFloat32) return reinterpret_cast<const float*>(x.memory->data())[i];
  const uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(x.memory->data())[i]) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// The largest difference, over 1 or the largest expected number.
double error(const Array& found_, const Array& expected) {
  const Array found = contiguous(found_);
  if (found.sizes != expected.sizes) return INFINITY;
  double worst = 0, largest = 1;
  for (int64_t i = 0; i < count(expected); ++i) {
    const double difference = std::fabs(double(number(found, i)) - number(expected, i));
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
    largest = std::max(largest, std::fabs(double(number(expected, i))));
  }
  return worst / largest;
}

}  // namespace

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  std::vector<Array> results;
  int failures = 0;
  const auto cases = read<int64_t>(file);
  for (int64_t i = 0; i < cases; ++i) {
    const std::string name = read_text(file), title = read_text(file);
    const auto inputs = read<int64_t>(file), outputs = read<int64_t>(file);
    const auto returns = Returns(read<int64_t>(file));
    const auto tolerance = read<double>(file);
    std::vector<StableIValue> stack(std::max(inputs, outputs));
    for (int64_t at = 0; at < inputs; ++at) stack[at] = read_argument(file, results);
    const Array first = array(reinterpret_cast<AtenTensorHandle>(stack[0]));
    operators().at(name)(stack.data(), inputs, returns == Returns::separate ? outputs : returns == Returns::as_list);
    if (returns == Returns::in_place) stack[0] = stack_value(first);
    if (returns == Returns::as_list) {
      const auto list = reinterpret_cast<StableListHandle>(stack[0]);
      for (int64_t at = 0; at < outputs; ++at) torch_list_get_item(list, at, &stack[at]);
    }
    results.clear();
    for (int64_t at = 0; at < outputs; ++at) {
      results.push_back(array(reinterpret_cast<AtenTensorHandle>(stack[at])));
      if (read<char>(file) == 'n') continue;
      const double wrong = error(results.back(), read_array(file));
      if (wrong <= tolerance) continue;
      std::printf("%s, %s: result %d is off by %g, allowed %g\n", name.c_str(), title.c_str(), int(at), wrong, tolerance);
      ++failures;
    }
  }
  std::printf("%d cases, %d results differ from the reference.\n", int(cases), failures);
  return failures != 0;
}
