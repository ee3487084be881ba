// Numbers as sums of bf16 numbers ("parts"), and tile products of them, for CPUs that multiply bf16.
//
// A bf16 number is its own single part. A float is exactly the sum of three: its leading 8 bits, the next 8 and the last 8.
// The product of two floats is then the sum of six products of parts; the three left out are below 2^-24 of it, the
// rounding error of a float. On matrix units six products cost less than one in float.
#pragma once

#include "product.h"

#if defined(__AVX512BF16__)

namespace mixhead {

template <class In>
constexpr int kParts = std::is_same_v<In, float> ? 3 : 1;

// Largest of the magnitudes as bits; of bf16 numbers nothing is asked.
struct Magnitude {
  __m512i bits = _mm512_setzero_si512();
  void add(__m512i x) { bits = _mm512_max_epu32(bits, _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff))); }
  // Whether parts represent all numbers: none is infinite or NaN, and the last parts of the large ones are not flushed to 0.
  bool fits() const {
    const uint32_t largest = _mm512_reduce_max_epu32(bits);
    return largest == 0 || (largest > 0x21800000u && largest < 0x7f000000u);  // 2^-60, 2^127
  }
};

// 16 numbers of each of two rows -> for every part 16 words, the first row's in the lower half. `rest` leaves `count` of them.
inline void pair_words(const BFloat* row0, const BFloat* row1, int64_t count, __m512i* words, Magnitude&) {
  const __mmask16 mask = first_lanes(count);
  const auto widened = [&](const BFloat* row) {
    return row ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row)) : _mm512_setzero_si512();
  };
  words[0] = _mm512_or_si512(widened(row0), _mm512_slli_epi32(widened(row1), 16));
}

// x -> its leading 8 bits as a float; x keeps the rest.
inline __m512i take_part(__m512& x) {
  const __m512i part = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(int32_t(0xffff0000)));
  x = _mm512_sub_ps(x, _mm512_castsi512_ps(part));
  return part;
}

inline void pair_words(__m512 x0, __m512 x1, __m512i* words) {
#pragma GCC unroll 3
  for (int part = 0; part < 3; ++part) {
    const __m512i first = take_part(x0), second = take_part(x1);
    words[part] = _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
  }
}

inline void pair_words(const float* row0, const float* row1, int64_t count, __m512i* words, Magnitude& magnitude) {
  const __mmask16 mask = first_lanes(count);
  const __m512 x0 = row0 ? _mm512_maskz_loadu_ps(mask, row0) : _mm512_setzero_ps();
  const __m512 x1 = row1 ? _mm512_maskz_loadu_ps(mask, row1) : _mm512_setzero_ps();
  magnitude.add(_mm512_castps_si512(x0));
  magnitude.add(_mm512_castps_si512(x1));
  pair_words(x0, x1, words);
}

// `count` numbers -> rows of their parts, `part_size` apart, padded by zeros to `dim` (a multiple of 32).
inline void split_row(const BFloat* from, int64_t count, int64_t dim, BFloat* to, int64_t, Magnitude&) {
  for (int64_t d = 0; d < dim; d += 32) {
    const int64_t left = std::clamp<int64_t>(count - d, 0, 32);
    _mm512_storeu_si512(to + d, _mm512_maskz_loadu_epi16(left == 32 ? ~0u : (1u << left) - 1, from + d));
  }
}

inline void split_row(const float* from, int64_t count, int64_t dim, BFloat* to, int64_t part_size, Magnitude& magnitude) {
  for (int64_t d = 0; d < dim; d += 16) {
    __m512 x = _mm512_maskz_loadu_ps(first_lanes(std::clamp<int64_t>(count - d, 0, 16)), from + d);
    magnitude.add(_mm512_castps_si512(x));
    for (int part = 0; part < 3; ++part) {
      const __m512i words = take_part(x);
      _mm256_storeu_si256((__m256i*)(to + part * part_size + d), _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
    }
  }
}

#if defined(__AMX_BF16__)
// C[32][32] (+)= A B over `depth` (a multiple of 32), summed over the parts, the small products first. Parts of A and of B
// are `a_part` and `b_part` numbers apart, slices of A that are 32 deep `a.col`. A streams through the caches: each of its
// tiles is used once or twice.
template <int Parts>
inline void product_of_parts(int64_t depth, Left<BFloat> a, int64_t a_part, const BFloat* b, int64_t b_part, int64_t ldb,
                             float* c, int64_t ldc, bool accumulate) {
  const int64_t stride = ldc * 4, a_stride = a.row * 2, b_stride = ldb * 4;
  if (accumulate) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 16, stride);
    _tile_loadd(2, c + 16 * ldc, stride);
    _tile_loadd(3, c + 16 * ldc + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int order = Parts - 1; order >= 0; --order) {
    for (int i = 0; i <= order; ++i) {
      const BFloat *left = a.data + i * a_part, *right = b + (order - i) * b_part;
      for (int64_t k = 0; k < depth; k += 32) {
        _tile_stream_loadd(4, left + k / 32 * a.col, a_stride);
        _tile_loadd(6, right + k * ldb, b_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + k * ldb + 32, b_stride);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(5, left + 16 * a.row + k / 32 * a.col, a_stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 16, stride);
  _tile_stored(2, c + 16 * ldc, stride);
  _tile_stored(3, c + 16 * ldc + 16, stride);
}
#endif

}  // namespace mixhead

#endif
