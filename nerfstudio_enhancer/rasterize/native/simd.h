// One small vector vocabulary over AVX-512, AVX2 and portable 4-lane vectors (SSE2, NEON). Everything is static:
// each instruction set is its own translation unit.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define NSE_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

constexpr int VW = 16;
typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

NSE_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
NSE_INLINE vf vload(const float* p) { return _mm512_load_ps(p); }
NSE_INLINE vf vloadu(const float* p) { return _mm512_loadu_ps(p); }
NSE_INLINE void vstore(float* p, vf a) { _mm512_store_ps(p, a); }
NSE_INLINE void vstoreu(float* p, vf a) { _mm512_storeu_ps(p, a); }
NSE_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
NSE_INLINE vf vfnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
NSE_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
NSE_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
NSE_INLINE vf vsqrt(vf a) { return _mm512_sqrt_ps(a); }
NSE_INLINE vf vabs(vf a) { return _mm512_abs_ps(a); }
NSE_INLINE vm vge(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
NSE_INLINE vm vgt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
NSE_INLINE vm vand(vm a, vm b) { return a & b; }
NSE_INLINE vm vandnot(vm a, vm b) { return a & ~b; }  // a and not b
NSE_INLINE vm vor(vm a, vm b) { return a | b; }
NSE_INLINE vf vsel(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
NSE_INLINE vf vzero(vm m, vf a) { return _mm512_maskz_mov_ps(m, a); }  // a where m, else 0
NSE_INLINE bool vany(vm m) { return m != 0; }
NSE_INLINE uint32_t vbits(vm m) { return m; }
NSE_INLINE vi viset(int32_t x) { return _mm512_set1_epi32(x); }
NSE_INLINE vi viload(const int32_t* p) { return _mm512_load_si512(p); }
NSE_INLINE void vistore(int32_t* p, vi a) { _mm512_store_si512(p, a); }
NSE_INLINE vm vige(vi a, vi b) { return _mm512_cmpge_epi32_mask(a, b); }
NSE_INLINE vi visel(vm m, vi a, vi b) { return _mm512_mask_blend_epi32(m, b, a); }
NSE_INLINE vf vceil(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
NSE_INLINE vi vtrunc(vf a) { return _mm512_cvttps_epi32(a); }
NSE_INLINE vf vfloat(vi a) { return _mm512_cvtepi32_ps(a); }
NSE_INLINE vi viadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
NSE_INLINE vi vimul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
NSE_INLINE vi vimin(vi a, vi b) { return _mm512_min_epi32(a, b); }
NSE_INLINE vi vgather(const int32_t* p, vi at) { return _mm512_i32gather_epi32(at, p, 4); }
NSE_INLINE vi vlow16(vi a) { return _mm512_and_si512(a, _mm512_set1_epi32(0xffff)); }
NSE_INLINE vi vhigh16(vi a) { return _mm512_srli_epi32(a, 16); }
NSE_INLINE vf vrecip(vf a) {  // 14 bits and one Newton step: about 1 ulp
  const vf r = _mm512_rcp14_ps(a);
  return vfma(r, vfnma(a, r, vset(1.0f)), r);
}

#elif defined(__AVX2__)

constexpr int VW = 8;
typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm;

NSE_INLINE vf vset(float x) { return _mm256_set1_ps(x); }
NSE_INLINE vf vload(const float* p) { return _mm256_load_ps(p); }
NSE_INLINE vf vloadu(const float* p) { return _mm256_loadu_ps(p); }
NSE_INLINE void vstore(float* p, vf a) { _mm256_store_ps(p, a); }
NSE_INLINE void vstoreu(float* p, vf a) { _mm256_storeu_ps(p, a); }
NSE_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
NSE_INLINE vf vfnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
NSE_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
NSE_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
NSE_INLINE vf vsqrt(vf a) { return _mm256_sqrt_ps(a); }
NSE_INLINE vf vabs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
NSE_INLINE vm vge(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
NSE_INLINE vm vgt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
NSE_INLINE vm vand(vm a, vm b) { return _mm256_and_ps(a, b); }
NSE_INLINE vm vandnot(vm a, vm b) { return _mm256_andnot_ps(b, a); }
NSE_INLINE vm vor(vm a, vm b) { return _mm256_or_ps(a, b); }
NSE_INLINE vf vsel(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
NSE_INLINE vf vzero(vm m, vf a) { return _mm256_and_ps(m, a); }
NSE_INLINE bool vany(vm m) { return _mm256_movemask_ps(m) != 0; }
NSE_INLINE uint32_t vbits(vm m) { return (uint32_t)_mm256_movemask_ps(m); }
NSE_INLINE vi viset(int32_t x) { return _mm256_set1_epi32(x); }
NSE_INLINE vi viload(const int32_t* p) { return _mm256_load_si256((const __m256i*)p); }
NSE_INLINE void vistore(int32_t* p, vi a) { _mm256_store_si256((__m256i*)p, a); }
NSE_INLINE vm vige(vi a, vi b) {
  return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_cmpgt_epi32(b, a), _mm256_set1_epi32(-1)));
}
NSE_INLINE vi visel(vm m, vi a, vi b) { return _mm256_blendv_epi8(b, a, _mm256_castps_si256(m)); }
NSE_INLINE vf vceil(vf a) { return _mm256_ceil_ps(a); }
NSE_INLINE vi vtrunc(vf a) { return _mm256_cvttps_epi32(a); }
NSE_INLINE vf vfloat(vi a) { return _mm256_cvtepi32_ps(a); }
NSE_INLINE vi viadd(vi a, vi b) { return _mm256_add_epi32(a, b); }
NSE_INLINE vi vimul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
NSE_INLINE vi vimin(vi a, vi b) { return _mm256_min_epi32(a, b); }
NSE_INLINE vi vgather(const int32_t* p, vi at) { return _mm256_i32gather_epi32(p, at, 4); }
NSE_INLINE vi vlow16(vi a) { return _mm256_and_si256(a, _mm256_set1_epi32(0xffff)); }
NSE_INLINE vi vhigh16(vi a) { return _mm256_srli_epi32(a, 16); }
NSE_INLINE vf vrecip(vf a) { return vset(1.0f) / a; }

#else

constexpr int VW = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef int32_t vm __attribute__((vector_size(16)));

NSE_INLINE vf vset(float x) { return vf{x, x, x, x}; }
NSE_INLINE vf vload(const float* p) { return *(const vf*)p; }
NSE_INLINE vf vloadu(const float* p) { vf r; memcpy(&r, p, sizeof r); return r; }
NSE_INLINE void vstore(float* p, vf a) { *(vf*)p = a; }
NSE_INLINE void vstoreu(float* p, vf a) { memcpy(p, &a, sizeof a); }
NSE_INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
NSE_INLINE vf vfnma(vf a, vf b, vf c) { return c - a * b; }
NSE_INLINE vm vge(vf a, vf b) { return a >= b; }
NSE_INLINE vm vgt(vf a, vf b) { return a > b; }
NSE_INLINE vm vand(vm a, vm b) { return a & b; }
NSE_INLINE vm vandnot(vm a, vm b) { return a & ~b; }
NSE_INLINE vm vor(vm a, vm b) { return a | b; }
NSE_INLINE vf vsel(vm m, vf a, vf b) { return (vf)((m & (vi)a) | (~m & (vi)b)); }
NSE_INLINE vf vzero(vm m, vf a) { return (vf)(m & (vi)a); }
NSE_INLINE vf vmin(vf a, vf b) { return vsel(a < b, a, b); }
NSE_INLINE vf vmax(vf a, vf b) { return vsel(a > b, a, b); }
NSE_INLINE vf vsqrt(vf a) { return vf{sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
NSE_INLINE vf vabs(vf a) { return (vf)((vi)a & (vi){0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff}); }
NSE_INLINE uint32_t vbits(vm m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
NSE_INLINE bool vany(vm m) { return vbits(m) != 0; }
NSE_INLINE vi viset(int32_t x) { return vi{x, x, x, x}; }
NSE_INLINE vi viload(const int32_t* p) { return *(const vi*)p; }
NSE_INLINE void vistore(int32_t* p, vi a) { *(vi*)p = a; }
NSE_INLINE vm vige(vi a, vi b) { return a >= b; }
NSE_INLINE vi visel(vm m, vi a, vi b) { return (m & a) | (~m & b); }
NSE_INLINE vf vceil(vf a) { return vf{ceilf(a[0]), ceilf(a[1]), ceilf(a[2]), ceilf(a[3])}; }
NSE_INLINE vi vtrunc(vf a) { return vi{(int32_t)a[0], (int32_t)a[1], (int32_t)a[2], (int32_t)a[3]}; }
NSE_INLINE vf vfloat(vi a) { return vf{(float)a[0], (float)a[1], (float)a[2], (float)a[3]}; }
NSE_INLINE vi viadd(vi a, vi b) { return a + b; }
NSE_INLINE vi vimul(vi a, vi b) { return a * b; }
NSE_INLINE vi vimin(vi a, vi b) { return visel(a > b, b, a); }
NSE_INLINE vi vgather(const int32_t* p, vi at) { return vi{p[at[0]], p[at[1]], p[at[2]], p[at[3]]}; }
NSE_INLINE vi vlow16(vi a) { return a & 0xffff; }
NSE_INLINE vi vhigh16(vi a) { return (a >> 16) & 0xffff; }
NSE_INLINE vf vrecip(vf a) { return vset(1.0f) / a; }
#if defined(__clang__)  // it lacks __builtin_shuffle; GCC before 12 lacks __builtin_shufflevector
#define NSE_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define NSE_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, vi{i, j, k, l})
#endif

#endif

constexpr int kParts = 16 / VW;  // vectors per 4 x 4 block

// 2^x for x <= 1; polynomial of degree 5 (minimax, relative error 7.5e-8), 0 below 2^-125.
NSE_INLINE vf vexp2(vf x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  vf y = vset(0.0018775766706017034f);
  y = vfma(y, f, vset(0.008989340339822866f));
  y = vfma(y, f, vset(0.055826317588266054f));
  y = vfma(y, f, vset(0.24015361732998236f));
  y = vfma(y, f, vset(0.6931530731374507f));
  y = vfma(y, f, vset(0.9999999250670449f));
  return _mm512_scalef_ps(y, x);
#else
  const vf magic = vset(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = vmax(x, vset(-125.0f));
  const vf shifted = x + magic;
  const vf f = x - (shifted - magic);  // in [-0.5, 0.5]
  vf y = vset(0.0013276471959630426f);
  y = vfma(y, f, vset(0.00967554150263201f));
  y = vfma(y, f, vset(0.05550713275065755f));
  y = vfma(y, f, vset(0.2402211972075132f));
  y = vfma(y, f, vset(0.6931469670628834f));
  y = vfma(y, f, vset(1.0000000716553017f));
#if defined(__AVX2__)
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
#else
  return (vf)((vi)y + ((vi)shifted << 23));
#endif
#endif
}

// out[i] = sum of the lanes of v[i], i < 16, by a transposing tree (3 instructions per merge). Consumes v.
NSE_INLINE void reduce16(vf* v, float* out) {
#if defined(__AVX512F__)
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
    v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  const vf s = _mm512_shuffle_f32x4(v[0], v[1], 0x44) + _mm512_shuffle_f32x4(v[0], v[1], 0xEE);
  const vf t = _mm512_shuffle_f32x4(v[2], v[3], 0x44) + _mm512_shuffle_f32x4(v[2], v[3], 0xEE);
  vstoreu(out, _mm512_shuffle_f32x4(s, t, 0x88) + _mm512_shuffle_f32x4(s, t, 0xDD));
#elif defined(__AVX2__)
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256d a = _mm256_castps_pd(v[2 * i]), b = _mm256_castps_pd(v[2 * i + 1]);
    v[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)) + _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    vstoreu(out + 8 * i, _mm256_permute2f128_ps(v[2 * i], v[2 * i + 1], 0x20) + _mm256_permute2f128_ps(v[2 * i], v[2 * i + 1], 0x31));
#else
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vf a = v[4 * i], b = v[4 * i + 1], c = v[4 * i + 2], d = v[4 * i + 3];
    const vf ab = NSE_SHUFFLE(a, b, 0, 4, 1, 5) + NSE_SHUFFLE(a, b, 2, 6, 3, 7);
    const vf cd = NSE_SHUFFLE(c, d, 0, 4, 1, 5) + NSE_SHUFFLE(c, d, 2, 6, 3, 7);
    vstoreu(out + 4 * i, NSE_SHUFFLE(ab, cd, 0, 1, 4, 5) + NSE_SHUFFLE(ab, cd, 2, 3, 6, 7));
  }
#endif
}
