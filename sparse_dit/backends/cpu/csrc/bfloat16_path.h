// Arithmetic on pairs of bfloat16 with float32 sums (VDPBF16PS), at twice the rate of float32.
//
// Pairs lie along channels for Q K^T, so that K is read in place, and along keys for P V, so that V is
// copied tile by tile, two rows interleaved.

typedef uint32_t VP __attribute__((vector_size(4 * W)));

INLINE VP load_pairs(const uint32_t *p) {
    VP x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
INLINE V dot_pairs(V sum, VP a, VP b) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE VP broadcast_pair(const void *p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return (VP)_mm512_set1_epi32(x);
}

// bfloat16 pairs of two rows of lanes, the first in the lower half.
INLINE void store_pairs(uint32_t *to, V first, V second) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
        18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

template <int M, int NV, int MODE, bool MASK>
NOINLINE void score_pairs(const void *const *rows, const uint32_t *__restrict q, int64_t channels,
                          float *__restrict s, uint32_t *__restrict p, const Scores &a, int j) {
    const BFloat16 *k[M];
    V x[M][NV];
    if (a.next_k) fetch_rows(a.next_k + j, M, a.next_first, a.next_last);
    if (a.next_v) fetch_rows(a.next_v + j, M, a.next_first, a.next_last);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
        k[i] = static_cast<const BFloat16 *>(rows[j + i]);
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) x[i][n] = set1(0.f);
    }
    for (int part = 0; part < a.parts; part++) {
        const uint32_t *at = q;
        for (int64_t d = part * channels; d < (part + 1) * channels; d += 4)
#pragma GCC unroll 2
            for (int u = 0; u < 4; u += 2, at += NV * W) {
                VP b[NV];
#pragma GCC unroll 4
                for (int n = 0; n < NV; n++) b[n] = load_pairs(at + n * W);
#pragma GCC unroll 16
                for (int i = 0; i < M; i++) {
                    const VP y = broadcast_pair(k[i] + d + u);
#pragma GCC unroll 4
                    for (int n = 0; n < NV; n++) x[i][n] = dot_pairs(x[i][n], y, b[n]);
                }
            }
    }
    const V scale = set1(a.scale);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
            V shift = set1(a.bias[j + i]);
            if (MODE != RAW) shift += load(a.neg_max + n * W);
            x[i][n] = fma(x[i][n], scale, shift);
        }
    finish_scores<M, NV, MODE, MASK, false>(x, a, j, nullptr);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
            if (MODE == RAW)
                store(s + ((j + i) * NV + n) * W, x[i][n]);
            else if (i % 2 == 0)
                store_pairs(p + ((j + i) / 2 * NV + n) * W, x[i][n],
                            i + 1 < M ? x[i + 1 < M ? i + 1 : i][n] : set1(0.f));
        }
}

template <int M, int NV>
NOINLINE void value_pairs(const void *const *rows, int64_t d, const uint32_t *__restrict p, int pairs,
                          float *__restrict o) {
    V x[M][NV];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) x[i][n] = set1(0.f);
#pragma GCC unroll 2
    for (int j = 0; j < pairs; j++, p += NV * W) {
        const uint32_t *v = static_cast<const uint32_t *>(rows[j]) + d;
        VP b[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) b[n] = load_pairs(p + n * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const VP y = broadcast_pair(v + i);
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) x[i][n] = dot_pairs(x[i][n], y, b[n]);
        }
    }
    o += d * NV * W;
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++, o += W) store(o, load(o) + x[i][n]);
}

// Q is [channels / 2, lanes], P is [keys / 2, lanes], both pairs.
struct BFloat16Path {
    using Element = BFloat16;
    using Query = uint32_t;
    using Weight = uint32_t;
    static constexpr bool SCALES = true;
    static constexpr int POOLED_PARTS = 3;  // a mean of keys in bfloat16 thrice is as good as float32

    static int64_t query_size(int64_t channels) { return channels / 2; }

    static INLINE void pack8(const float *rows, int64_t channels, uint32_t *q, int64_t lanes) {
        for (int64_t d = 0; d < channels; d += 2, q += lanes)
            for (int r = 0; r < 8; r++) q[r] = pair(rows[r * channels + d], rows[r * channels + d + 1]);
    }

    // Values that are bfloat16 already: the upper halves.
    static INLINE uint32_t pair(float first, float second) {
        uint32_t a, b;
        __builtin_memcpy(&a, &first, 4);
        __builtin_memcpy(&b, &second, 4);
        return a >> 16 | (b & 0xffff0000u);
    }

    // A row in place where its channels lie side by side, else written to `to`.
    static INLINE const BFloat16 *row(const void *from, int64_t stride, int64_t channels, BFloat16 *to) {
        const auto *values = static_cast<const BFloat16 *>(from);
        if (stride == 1) return values;
        for (int64_t d = 0; d < channels; d++) to[d] = values[d * stride];
        return to;
    }

    static INLINE bool stage_k(const Tile &tile, const Strides &s, int64_t channels, float *to,
                               const void **staged) {
        if (!tile.pooled && s.channel == 1) return false;
        for (int j = 0; j < tile.n; j++, to += 2 * channels + PAD) {
            auto *values = reinterpret_cast<BFloat16 *>(to);
            if (tile.pooled)
                split(static_cast<const float *>(tile.k[j]), channels, values);
            else
                row(tile.k[j], s.channel, channels, values);
            staged[j] = values;
        }
        return true;
    }

    // A float32 row as the sum of POOLED_PARTS rows of bfloat16.
    static NOINLINE void split(const float *from, int64_t channels, BFloat16 *to) {
        float left[8];
        for (int64_t d = 0; d < channels; d += 8) {
            __builtin_memcpy(left, from + d, 32);
            for (int part = 0; part < POOLED_PARTS; part++) {
                BFloat16 *at = to + part * channels + d;
                write8(left, at);
                for (int i = 0; i < 8; i++) {
                    const float rest = left[i] - widen(at[i]);
                    left[i] = rest == rest ? rest : 0.f;  // nothing is left of Inf and NaN
                }
            }
        }
    }

    // Pairs of rows of V. Of pooled ones there are two lists, what the first lost to rounding in the second.
    static INLINE bool stage_v(const Tile &tile, const Strides &s, int64_t channels, float *to,
                               const void **staged) {
        BFloat16 copies[2][POOLED_PARTS * MAX_CHANNELS];
        static const BFloat16 zeros[POOLED_PARTS * MAX_CHANNELS] = {};
        const auto of = [&](int j) -> const BFloat16 * {
            if (j >= tile.n) return zeros;
            if (!tile.pooled) return row(tile.v[j], s.channel, channels, copies[j % 2]);
            split(static_cast<const float *>(tile.v[j]), channels, copies[j % 2]);
            return copies[j % 2];
        };
        for (int j = 0; j < tile.n; j += 2, to += channels + PAD) {
            const BFloat16 *first = of(j), *second = of(j + 1);
            interleave(first, second, channels, to);
            if (tile.pooled)
                interleave(first + channels, second + channels, channels, to + lost(channels));
            staged[j / 2] = to;
        }
        return true;
    }

    // Floats from a row of the first list to that of the second.
    static int64_t lost(int64_t channels) { return BN / 2 * (channels + PAD); }

    static INLINE void interleave(const BFloat16 *first, const BFloat16 *second, int64_t channels,
                                  float *to) {
        for (int64_t d = 0; d < channels; d += 8) {
            const __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(first + d)));
            const __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(second + d)));
            _mm256_storeu_si256((__m256i *)(to + d), _mm256_or_si256(a, _mm256_slli_epi32(b, 16)));
        }
    }

    static void hide_value(const void **rows, int j, int64_t channels) {
        auto *values = static_cast<uint16_t *>(const_cast<void *>(rows[j / 2]));
        for (int64_t d = 0; d < channels; d++) values[2 * d + j % 2] = 0;
    }

    template <int NV, int MODE, bool MASK>
    static INLINE void scores(const Tile &, const void *const *rows, int n, const uint32_t *q,
                              int64_t channels, float *s, uint32_t *p, const Scores &a) {
        constexpr int M = SCORE_ROWS<NV>;
        int j = 0;
        for (; j + M <= n; j += M) score_pairs<M, NV, MODE, MASK>(rows, q, channels, s, p, a, j);
        for (; j + 4 <= n; j += 4) score_pairs<4, NV, MODE, MASK>(rows, q, channels, s, p, a, j);
        if (j + 2 <= n) {
            score_pairs<2, NV, MODE, MASK>(rows, q, channels, s, p, a, j);
            j += 2;
        }
        if (j < n) score_pairs<1, NV, MODE, MASK>(rows, q, channels, s, p, a, j);
    }

    template <int NV>
    static INLINE void exponentials(float *s, int n, const float *neg_max, float *sums, uint32_t *p) {
        for (int v = 0; v < NV; v++) {
            V total = set1(0.f);
            const V shift = load(neg_max + v * W);
            for (int j = 0; j < n; j += 2) {
                const float *at = s + (j * NV + v) * W;
                const V first = exp2_or_zero(load(at) + shift);
                V second = set1(0.f);
                if (j + 1 < n) second = exp2_or_zero(load(at + NV * W) + shift);
                store_pairs(p + (j / 2 * NV + v) * W, first, second);
                total += first + second;
            }
            store(sums + v * W, total);
        }
    }

    template <int NV>
    static INLINE void values(const Tile &tile, const void *const *rows, const uint32_t *p,
                              int64_t channels, float *o, const Scores &) {
        constexpr int M = VALUE_COLUMNS<NV>;
        const int pairs = (tile.n + 1) / 2;
        for (int64_t d = 0; d < channels; d += M) value_pairs<M, NV>(rows, d, p, pairs, o);
        if (!tile.pooled) return;
        const void *others[BN / 2];
        for (int j = 0; j < pairs; j++) others[j] = static_cast<const float *>(rows[j]) + lost(channels);
        for (int64_t d = 0; d < channels; d += M) value_pairs<M, NV>(others, d, p, pairs, o);
    }

    static float weight(const uint32_t *p, int j, int lane, int lanes) {
        const uint32_t bits = p[j / 2 * lanes + lane];
        return widen(BFloat16{static_cast<uint16_t>(j % 2 ? bits >> 16 : bits)});
    }
};
