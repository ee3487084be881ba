// Vectors of float for the instruction set that this file is compiled for, and the few operations the kernels need.
// Each has its own intrinsics for AVX-512 and AVX2, where they help; everything else is vector arithmetic of GCC and Clang,
// which runs anywhere (four lanes there: SSE2, NEON).
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
typedef uint32_t WordVec __attribute__((vector_size(4 * kLanes)));

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
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  const IntVec greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
#endif
}

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1u); }
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first `count` numbers, then zeros; nothing behind them is read.
inline Vec load_first(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(first_lanes(count), p);
#elif defined(__AVX2__)
  return count >= kLanes ? load(p) : (Vec)_mm256_maskload_ps(p, first_lanes(count));
#else
  if (count >= kLanes) return load(p);
  Vec v = all(0.f);
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

inline void store_first(float* p, Vec v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
#elif defined(__AVX2__)
  if (count >= kLanes) return store(p, v);  // masked stores take long on some processors
  _mm256_maskstore_ps(p, first_lanes(count), (__m256)v);
#else
  if (count >= kLanes) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// Numbers of a table at kLanes indices.
inline Vec load_at(const float* table, IntVec index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (Vec)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  return Vec{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
#endif
}

inline float sum_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

inline float largest_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
#else
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
#endif
}

// The sum of each of kLanes vectors, as one vector.
inline Vec sums_of(const Vec* a) {
#if defined(__AVX512F__)
  __m512 b[8], c[4], d[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[2 * i], (__m512)a[2 * i + 1]),
                         _mm512_unpackhi_ps((__m512)a[2 * i], (__m512)a[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
  }
  return (Vec)_mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
#elif defined(__AVX2__)
  __m256 b[4], c[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_add_ps(_mm256_unpacklo_ps((__m256)a[2 * i], (__m256)a[2 * i + 1]),
                         _mm256_unpackhi_ps((__m256)a[2 * i], (__m256)a[2 * i + 1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256d x = _mm256_castps_pd(b[2 * i]), y = _mm256_castps_pd(b[2 * i + 1]);
    c[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  return (Vec)_mm256_add_ps(_mm256_permute2f128_ps(c[0], c[1], 0x20), _mm256_permute2f128_ps(c[0], c[1], 0x31));
#else
  const Vec b = Vec{a[0][0], a[1][0], a[0][1], a[1][1]} + Vec{a[0][2], a[1][2], a[0][3], a[1][3]};
  const Vec c = Vec{a[2][0], a[3][0], a[2][1], a[3][1]} + Vec{a[2][2], a[3][2], a[2][3], a[3][3]};
  return Vec{b[0], b[1], c[0], c[1]} + Vec{b[2], b[3], c[2], c[3]};
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

#if !defined(__AVX512DQ__)
// 2^(x * log2_base), where that is at least -125.5; else 0, so that no denormal slows the products down. NaN at NaN.
inline Vec power(Vec x, float log2_base) {
  constexpr float kRounder = 12582912.f + 126.f;  // 1.5 * 2^23: adding it rounds to an integer, which the last bits hold
  const Vec bounded = larger(all(-126.f / log2_base), x);  // NaN stays
  const Vec rounded = bounded * log2_base + kRounder, n = rounded - kRounder;
  const Vec p = exp2_of_fraction(bounded * log2_base - n);
  return (p + p) * (Vec)((IntVec)rounded << 23);  // 2 p 2^(n - 1): the factor is 0 where n = -126
}
#endif

// exp(x): 0 below -86.9 (so that no denormal slows the products down), NaN at NaN.
inline Vec exp(Vec x) {
  constexpr float kLog2e = 1.44269504088896341f;
#if defined(__AVX512DQ__)
  constexpr float kSmallest = -87.3f;
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * kLog2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec p = exp2_of_fraction(x * kLog2e - n);
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, (__m512)all(kSmallest), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
#else
  return power(x, kLog2e);
#endif
}

// 2^y: 0 below -125.5 (so that no denormal slows the products down), NaN at NaN; exact where y is whole.
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
  return power(y, 1.f);
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

inline Vec load_wide(const float* p) { return load(p); }
inline Vec load_wide(const BFloat* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (Vec)(WordVec{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
#endif
}

// The first `count` numbers, then zeros; nothing behind them is read.
inline Vec load_wide_first(const float* p, int64_t count) { return load_first(p, count); }
inline Vec load_wide_first(const BFloat* p, int64_t count) {
  if (count >= kLanes) return load_wide(p);
  BFloat numbers[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) numbers[i] = p[i];
  return load_wide(numbers);
}

inline void store_narrow(float* p, Vec v) { store(p, v); }
inline void store_narrow(BFloat* p, Vec v) {
#if defined(__AVX2__)  // the steps of `narrow`
  const WordVec bits = (WordVec)v, nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordVec narrowed = v == v ? nearest : WordVec{} + 0x7fc0u;
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)narrowed));
#else
  const __m256i packed = _mm256_packus_epi32((__m256i)narrowed, (__m256i)narrowed);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#endif
#else
  for (int i = 0; i < kLanes; ++i) narrow(v[i], p + i);
#endif
}

inline void store_narrow_first(float* p, Vec v, int64_t count) { store_first(p, v, count); }
inline void store_narrow_first(BFloat* p, Vec v, int64_t count) {
  if (count >= kLanes) return store_narrow(p, v);
  BFloat numbers[kLanes];
  store_narrow(numbers, v);
  for (int64_t i = 0; i < count; ++i) p[i] = numbers[i];
}

// to[c][r] = from[r][c] for kLanes rows and columns of 32-bit words; rows are ld_from and ld_to words apart.
inline void transpose_square(const uint32_t* from, int64_t ld_from, uint32_t* to, int64_t ld_to) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * ld_from);
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
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * ld_to, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 4) * ld_to, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 8) * ld_to, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 12) * ld_to, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
  }
#elif defined(__AVX2__)
  // Rows i and i + 4 are loaded as halves of a vector, so that nothing has to cross them later.
  const auto halves = [&](int row, int column) {
    const float* at = reinterpret_cast<const float*>(from) + row * ld_from + column;
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at)), _mm_loadu_ps(at + 4 * ld_from), 1);
  };
#pragma GCC unroll 2
  for (int c = 0; c < 8; c += 4) {
    const __m256 a0 = halves(0, c), a1 = halves(1, c), a2 = halves(2, c), a3 = halves(3, c);
    const __m256 b0 = _mm256_unpacklo_ps(a0, a1), b1 = _mm256_unpackhi_ps(a0, a1);
    const __m256 b2 = _mm256_unpacklo_ps(a2, a3), b3 = _mm256_unpackhi_ps(a2, a3);
    float* out = reinterpret_cast<float*>(to) + c * ld_to;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(b0, b2, 0x44));
    _mm256_storeu_ps(out + ld_to, _mm256_shuffle_ps(b0, b2, 0xee));
    _mm256_storeu_ps(out + 2 * ld_to, _mm256_shuffle_ps(b1, b3, 0x44));
    _mm256_storeu_ps(out + 3 * ld_to, _mm256_shuffle_ps(b1, b3, 0xee));
  }
#else
  WordVec a[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) std::memcpy(&a[i], from + i * ld_from, sizeof a[i]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const WordVec column{a[0][i], a[1][i], a[2][i], a[3][i]};
    std::memcpy(to + i * ld_to, &column, sizeof column);
  }
#endif
}

// out[c][r] = in[r][c] for 32-bit words: `rows` is a multiple of kLanes. Rows of `in` are `ld_in` words apart.
inline void transpose_words(const uint32_t* in, int64_t ld_in, int64_t rows, int64_t cols, uint32_t* out, int64_t ld_out) {
  const int64_t whole = cols / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) transpose_square(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out);
  }
  for (int64_t c = whole; c < cols; ++c) {
    for (int64_t r = 0; r < rows; ++r) out[c * ld_out + r] = in[r * ld_in + c];
  }
}

}  // namespace mixhead
