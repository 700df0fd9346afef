// Rows of tokens: read from any dtype and stride as float32, turned, and written back.

// Eight values of consecutive channels.
INLINE void read8(const float *from, float *to) { __builtin_memcpy(to, from, 32); }

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}
INLINE float widen(Float16 x) {
#if defined(__F16C__)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
#elif defined(__ARM_NEON)
    __fp16 y;
    __builtin_memcpy(&y, &x, 2);
    return y;
#else
    const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    uint32_t bits = rest << 13;
    float y;
    if (rest >= 0x7c00u) {
        bits |= 0x7f800000u;
    } else {  // scales by 2^112, denormals too
        __builtin_memcpy(&y, &bits, 4);
        y *= 5.192296858534828e33f;
        __builtin_memcpy(&bits, &y, 4);
    }
    bits |= sign;
    __builtin_memcpy(&y, &bits, 4);
    return y;
#endif
}

// Round to the nearest, ties to even; NaN stays NaN.
INLINE void narrow(float x, float *to) { *to = x; }
INLINE void narrow(float x, BFloat16 *to) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u
                                         : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
INLINE void narrow(float x, Float16 *to) {
#if defined(__F16C__)
    to->bits = static_cast<uint16_t>(
        _mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
#elif defined(__ARM_NEON)
    const __fp16 y = static_cast<__fp16>(x);
    __builtin_memcpy(to, &y, 2);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 31 << 15;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) {
        to->bits = static_cast<uint16_t>(sign | 0x7e00u);
    } else if (bits >= 0x477ff000u) {  // rounds to 2^16 or more
        to->bits = static_cast<uint16_t>(sign | 0x7c00u);
    } else if (bits < 0x38800000u) {  // a denormal: adding .5 puts its bits at the end
        float y;
        __builtin_memcpy(&y, &bits, 4);
        y += 0.5f;
        __builtin_memcpy(&bits, &y, 4);
        to->bits = static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    } else {
        bits += 0xfffu + ((bits >> 13) & 1u);
        to->bits = static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
    }
#endif
}

INLINE void read8(const BFloat16 *from, float *to) {
#if defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
    _mm256_storeu_ps(to, _mm256_castsi256_ps(wide));
#else
    for (int i = 0; i < 8; i++) to[i] = widen(from[i]);
#endif
}
INLINE void read8(const Float16 *from, float *to) {
#if defined(__F16C__)
    _mm256_storeu_ps(to,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
#else
    for (int i = 0; i < 8; i++) to[i] = widen(from[i]);
#endif
}

INLINE void write8(const float *from, float *to) { __builtin_memcpy(to, from, 32); }
INLINE void write8(const float *from, BFloat16 *to) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
    const __m128bh y = _mm256_cvtneps_pbh(_mm256_loadu_ps(from));
    __builtin_memcpy(to, &y, 16);
#else
    for (int i = 0; i < 8; i++) narrow(from[i], to + i);
#endif
}
INLINE void write8(const float *from, Float16 *to) {
#if defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < 8; i++) narrow(from[i], to + i);
#endif
}

// A row of `channels` values, a multiple of 8, `stride` apart.
template <class T>
INLINE void read_row(const T *from, int64_t stride, int64_t channels, float *to) {
    if (stride == 1) {
        for (int64_t d = 0; d < channels; d += 8) read8(from + d, to + d);
    } else {
        for (int64_t d = 0; d < channels; d++) to[d] = widen(from[d * stride]);
    }
}
template <class T>
INLINE void write_row(const float *from, int64_t stride, int64_t channels, T *to) {
    if (stride == 1) {
        for (int64_t d = 0; d < channels; d += 8) write8(from + d, to + d);
    } else {
        for (int64_t d = 0; d < channels; d++) narrow(from[d], to + d * stride);
    }
}

// Turns 8 x 8 values: to[c][r] = from[r][c].
INLINE void transpose8(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
#if defined(__AVX2__)
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * from_stride);
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
#else
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}
