// Vectors of float32 for the instruction set that a file is compiled for.
//
// Included by variant files only, inside of their own namespace: nothing in here may be shared between
// files that are compiled with different flags, so there are no templates of the standard library.

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));

INLINE V load(const float *p) {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
INLINE void store(float *p, V x) { __builtin_memcpy(p, &x, sizeof x); }
INLINE VI load_int(const int32_t *p) {
    VI x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

INLINE V set1(float x) {
#if defined(__AVX512F__)
    return (V)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (V)_mm256_set1_ps(x);
#else
    return V{x, x, x, x};
#endif
}

// a * b + c
INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The larger of each pair; `b` where one is NaN.
INLINE V max_or_second(V a, V b) {
#if defined(__AVX512F__)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
INLINE V min_or_second(V a, V b) {
#if defined(__AVX512F__)
    return (V)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (V)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

INLINE float lane_sum(V x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x),
                                   _mm256_extractf128_ps((__m256)x, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// Whether a lane is above `limit`; NaN isn't.
INLINE bool any_above(V x, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_GT_OQ));
#else
    for (int i = 0; i < W; i++)
        if (x[i] > limit) return true;
    return false;
#endif
}

// 2 to the power of x, relative error 1.6e-7 (a minimax polynomial on [-.5, .5]). Below -126 it is 0 or
// 2^-126; NaN stays NaN. Without CLAMP, x must lie in [-126, 127].
template <bool CLAMP>
INLINE V exp2(V x) {
    const V c5 = set1(0.001326472731307149f), c4 = set1(0.009671512991189957f),
            c3 = set1(0.05550733581185341f), c2 = set1(0.24022242426872253f),
            c1 = set1(0.6931470036506653f), c0 = set1(1.0f);
#if defined(__AVX512F__)
    if (CLAMP) x = max_or_second(set1(-200.f), x);
    const __m512 whole =
        _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    if (CLAMP) x = min_or_second(set1(127.f), max_or_second(set1(-126.f), x));
#if defined(__AVX2__)
    const V whole =
        (V)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const V magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    const V whole = (x + magic) - magic;
#endif
#endif
    const V part = x - (V)whole;
    V y = fma(c5, part, c4);
    y = fma(y, part, c3);
    y = fma(y, part, c2);
    y = fma(y, part, c1);
    y = fma(y, part, c0);
#if defined(__AVX512F__)
    return (V)_mm512_scalef_ps((__m512)y, whole);
#elif defined(__AVX2__)
    const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32((__m256)whole), 23);
    return (V)_mm256_add_epi32((__m256i)y, shift);
#else
    const VI bits = (VI)y + (__builtin_convertvector(whole, VI) << 23);
    return (V)bits;
#endif
}

// As exp2, and exactly 0 below -126.
INLINE V exp2_or_zero(V x) {
    const V y = exp2<true>(x);
#if defined(__AVX512F__)
    return y;
#else
    return (V)((VI)y & ~(VI)(x < set1(-126.f)));
#endif
}

INLINE void prefetch(const void *p) {
#if defined(__SSE2__)
    _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1);
#else
    __builtin_prefetch(p, 0, 2);
#endif
}
