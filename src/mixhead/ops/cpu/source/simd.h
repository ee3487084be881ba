// Vectors of float for the instruction set that this file is compiled for, and the few operations the kernel needs.
// AVX-512 and AVX2 have a few intrinsics; everything else is GCC and Clang vector arithmetic, which runs anywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mixhead {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline IntVec load(const int32_t* p) {
  IntVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec all(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

inline IntVec all(int32_t x) { return IntVec{} + x; }

// The larger one; `b` where either is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline bool any_greater(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
  IntVec greater = a > b;
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= greater[i];
  return any != 0;
#endif
}

// The first `count` numbers, then zeros.
inline Vec load_first(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), p);
#else
  if (count >= kLanes) return load(p);
  Vec v = all(0.f);
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

inline void store_first(float* p, Vec v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1u), (__m512)v);
#else
  if (count >= kLanes) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

inline float sum_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0.f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

inline float largest_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
#endif
}

// 2^f for f in [-1/2, 1/2]: a minimax polynomial, 1 at 0. Its relative error of 2e-9 is lost in the rounding.
inline Vec exp2_of_fraction(Vec f) {
  Vec p = all(0.00015353361959569156f);
  p = p * f + 0.0013398875016719103f;
  p = p * f + 0.00961843691766262f;
  p = p * f + 0.055503323674201965f;
  p = p * f + 0.24022647738456726f;
  p = p * f + 0.6931471824645996f;
  return p * f + 1.f;
}

// exp(x): 0 below -87.3 (so that no denormal slows the products down), NaN at NaN.
inline Vec exp(Vec x) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kSmallest = -87.3f;
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * kLog2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec bounded = x < all(-126.f) ? all(-126.f) : x;  // NaN stays
  const Vec n = (bounded * kLog2e + kRounder) - kRounder;
#endif
  const Vec p = exp2_of_fraction(x * kLog2e - n);
#if defined(__AVX512F__)
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, (__m512)all(kSmallest), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
#else
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return x < all(kSmallest) ? all(0.f) : p * (Vec)exponent;
#endif
}

// 2^y: 0 below -126 (so that no denormal slows the products down), NaN at NaN; exact where y is whole.
inline Vec exp2(Vec y) {
#if defined(__AVX512DQ__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // y - floor(y)
  Vec p = all(0.000216129191f);  // minimax as above, on [0, 1]
  p = p * f + 0.00124678453f;
  p = p * f + 0.00967545167f;
  p = p * f + 0.0554852806f;
  p = p * f + 0.240229306f;
  p = p * f + 0.693147044f;
  p = p * f + 1.f;
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)y, (__m512)all(-126.f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)y);  // p 2^floor(y)
#else
  constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec bounded = y < all(-126.f) ? all(-126.f) : y;  // NaN stays
  const Vec n = (bounded + kRounder) - kRounder;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return y < all(-126.f) ? all(0.f) : exp2_of_fraction(bounded - n) * (Vec)exponent;
#endif
}

// 2^y with a relative error of 1e-4, which a bf16 number cannot tell; 0 at -infinity, NaN at NaN.
inline Vec coarse_exp2(Vec y) {
#if defined(__AVX512DQ__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // y - floor(y)
  Vec p = all(0.0780245226f);
  p = p * f + 0.226067155f;
  p = p * f + 0.69583354f;
  p = p * f + 0.999925219f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)y);  // p 2^floor(y)
#else
  return exp2(y);
#endif
}

// A bfloat16 number: the upper half of a float.
struct BFloat {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(BFloat x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, BFloat* p) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
  p->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
}

// out[c][r] = in[r][c] for 32-bit words: `rows` is a multiple of kLanes. Rows of `in` are `ld_in` words apart.
inline void transpose_words(const uint32_t* in, int64_t ld_in, int64_t rows, int64_t cols, uint32_t* out, int64_t ld_out) {
  int64_t done = 0;
#if defined(__AVX512F__)
  for (; done + 16 <= cols; done += 16) {
    for (int64_t r = 0; r < rows; r += 16) {
      __m512i a[16], b[16];
      const uint32_t* from = in + r * ld_in + done;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * ld_in);
#pragma GCC unroll 8
      for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
      }
      uint32_t* to = out + done * ld_out + r;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(to + i * ld_out, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 4) * ld_out, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 8) * ld_out, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 12) * ld_out, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
      }
    }
  }
#endif
  for (int64_t c = done; c < cols; ++c) {
    for (int64_t r = 0; r < rows; ++r) out[c * ld_out + r] = in[r * ld_in + c];
  }
}

}  // namespace mixhead
