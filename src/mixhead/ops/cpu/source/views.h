// What a call is about: tensors as pointers and strides, the sizes, the mask, and the rows of queries that select a head.
//
// Legend: B batch, H query heads, K key-value heads, G = H / K, N queries, T keys, D head dim. `lane`: a row in a block.
#pragma once

#include <algorithm>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace mixhead {

constexpr int64_t kRows = 64;  // queries in a block

template <class T>
struct View {  // of a tensor with unit stride in its last dimension
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  T* at(int64_t b, int64_t h, int64_t n) const { return data + b * batch + h * head + n * row; }
};

enum class MaskType { none, boolean, float32, bfloat16 };

struct Mask {
  MaskType type = MaskType::none;
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, key = 0;  // 0 where the mask is broadcast
};

struct Shape {
  int64_t B, H, K, N, T, D;
  bool causal;
  float scale;
  int64_t groups() const { return H / K; }
  // How many keys the query at position n sees.
  int64_t visible(int64_t n) const { return causal ? std::clamp<int64_t>(n + 1 + T - N, 0, T) : T; }
};

constexpr float kLog2e = 1.44269504088896341f;

// A number that a mask adds to scores, times log2(e). The lowest one stays finite: it hides a key only as long as another
// key has a higher score.
inline float bias_of(float x) { return x == -kInfinity ? x : std::max(x * kLog2e, kLowest); }

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Memory of one thread, aligned and given out piece by piece. Without memory it only counts what is taken.
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes) : memory_(new (std::align_val_t(64)) char[bytes]), size_(bytes) {}
  ~Arena() { ::operator delete[](memory_, std::align_val_t(64)); }
  Arena(const Arena&) = delete;
  int64_t used() const { return used_; }
  template <class T>
  T* take(int64_t count) {
    const int64_t begin = used_;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    if (memory_ == nullptr) return nullptr;
    if (used_ > size_) throw std::length_error("an arena was asked for more than it has");
    return reinterpret_cast<T*>(memory_ + begin);
  }

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

// The bytes that `describe(arena)` takes.
template <class Describe>
int64_t bytes_of(const Describe& describe) {
  Arena count;
  describe(count);
  return std::max<int64_t>(count.used(), 64);
}

// What a piece of work computes in. `describe(arena)` takes all of it, and is the only description: run once to count the
// bytes, and once to hand them out.
template <class Describe>
struct Workspace {
  Arena arena;
  std::invoke_result_t<const Describe&, Arena&> memory;
  explicit Workspace(const Describe& describe) : arena(bytes_of(describe)), memory(describe(arena)) {}
};

// The rows of every key-value head: for (b, k), codes n * G + g of its selected queries in the order of n.
struct RowLists {
  std::vector<int64_t> start;  // [B K + 1]
  std::vector<int32_t> code;
};

struct BlockOfRows {
  int64_t bk, first, count;
};

inline std::vector<BlockOfRows> cut_into_blocks(const RowLists& rows) {
  std::vector<BlockOfRows> blocks;
  for (size_t bk = 0; bk + 1 < rows.start.size(); ++bk) {
    for (int64_t at = rows.start[bk]; at < rows.start[bk + 1]; at += kRows) {
      blocks.push_back({int64_t(bk), at, std::min(kRows, rows.start[bk + 1] - at)});
    }
  }
  return blocks;
}

// The inputs of one call, and the statistics that go with its output.
template <class In>
struct Problem {
  Shape s;
  View<const In> q, k, v, gates;  // gates: [B, N, H], so `head` and `row` are those of that tensor
  Mask mask;
  const RowLists* rows;
  float* stats;                   // for the backward pass, or null: [2][B][H][N], the subtracted maximum times
                                  // log2(e), and 1 / sum (0 where nothing is visible)
};

}  // namespace mixhead
