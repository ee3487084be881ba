// Weights cut into panels, as products want them.
//
// Legend: k depth of a product, n a column of its right operand.
#pragma once

#include <algorithm>
#include <new>

#include "attention.h"

namespace mixhead {

constexpr int64_t kPanel = 64;  // columns of a packed panel of weights: as wide as a usual head, whose rows are then read once

// An array on a boundary of a cache line, so that no load of a vector needs two lines.
template <class T>
class Lines {
 public:
  explicit Lines(int64_t size = 0) { reserve(size); }
  ~Lines() { ::operator delete[](data_, std::align_val_t(64)); }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  // Room for `size` numbers; what was there is lost.
  T* reserve(int64_t size) {
    if (size > size_) {
      ::operator delete[](data_, std::align_val_t(64));
      data_ = static_cast<T*>(::operator new[](size * sizeof(T), std::align_val_t(64)));
      size_ = size;
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

inline uint32_t* words(float* p) { return reinterpret_cast<uint32_t*>(p); }

// to[k][n] = from[k * by_k + n * by_n]
inline void pack_panel(const float* from, int64_t by_k, int64_t by_n, int64_t depth, int64_t columns, float* to) {
  if (columns == kPanel && by_n == 1) {
    for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * kPanel, from + k * by_k, kPanel * sizeof(float));
  } else if (columns == kPanel && by_k == 1) {
    transpose_words(reinterpret_cast<const uint32_t*>(from), by_n, kPanel, depth, words(to), kPanel);
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t n = 0; n < kPanel; ++n) to[k * kPanel + n] = n < columns ? from[k * by_k + n * by_n] : 0.f;
    }
  }
}

// to[k / 2][n][k % 2] = from[k * by_k + n * by_n]
inline void pack_panel(const BFloat* from, int64_t by_k, int64_t by_n, int64_t depth, int64_t columns, BFloat* to) {
  const int64_t padded = round_up(depth, 32);
  const bool whole = columns == kPanel && depth == padded;
  if (whole && by_k == 1 && by_n % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
    transpose_words(reinterpret_cast<const uint32_t*>(from), by_n / 2, kPanel, depth / 2, reinterpret_cast<uint32_t*>(to),
                    kPanel);
    return;
  }
  if (whole && by_n == 1) {
    for (int64_t k = 0; k < depth; k += 2) {
      const BFloat *first = from + k * by_k, *second = first + by_k;
      for (int64_t n = 0; n < kPanel; ++n) {
        to[k * kPanel + 2 * n] = first[n];
        to[k * kPanel + 2 * n + 1] = second[n];
      }
    }
    return;
  }
  for (int64_t k = 0; k < padded; k += 2) {
    for (int64_t n = 0; n < kPanel; ++n) {
      for (int64_t i = 0; i < 2; ++i) {
        const bool inside = k + i < depth && n < columns;
        to[k * kPanel + 2 * n + i] = inside ? from[(k + i) * by_k + n * by_n] : BFloat{0};
      }
    }
  }
}

// A panel of weights: `depth` x `columns` numbers of the right operand of products, element (k, n) = data[k * by_k + n *
// by_n], as [k][kPanel], for bf16 [k / 2][kPanel][2]; what is missing is 0. Packed into `memory` unless it lies so already.
inline const float* panel(const float* from, int64_t by_k, int64_t by_n, int64_t depth, int64_t columns,
                          Lines<float>& memory) {
  if (by_n == 1 && by_k == kPanel && columns == kPanel) return from;
  pack_panel(from, by_k, by_n, depth, columns, memory.reserve(depth * kPanel));
  return memory.data();
}

inline const BFloat* panel(const BFloat* from, int64_t by_k, int64_t by_n, int64_t depth, int64_t columns,
                           Lines<BFloat>& memory) {
  pack_panel(from, by_k, by_n, depth, columns, memory.reserve(round_up(depth, 32) * kPanel));
  return memory.data();
}

}  // namespace mixhead
