// Arithmetic in float32: any dtype of the inputs is widened first.

// Keys, and channels, that are computed at once for a panel of NV vectors: as many as registers hold sums.
#if defined(__AVX512F__)
template <int NV>
constexpr int SCORE_ROWS = NV == 4 ? 6 : 12;
template <int NV>
constexpr int VALUE_COLUMNS = NV == 4 ? 4 : 8;
#elif defined(__ARM_NEON)
template <int NV>
constexpr int SCORE_ROWS = NV == 4 ? 4 : 8;
template <int NV>
constexpr int VALUE_COLUMNS = SCORE_ROWS<NV>;
#elif defined(__AVX2__)
template <int NV>
constexpr int SCORE_ROWS = NV == 2 ? 6 : 8;
template <int NV>
constexpr int VALUE_COLUMNS = SCORE_ROWS<NV>;
#else
template <int NV>
constexpr int SCORE_ROWS = NV == 2 ? 4 : 8;
template <int NV>
constexpr int VALUE_COLUMNS = SCORE_ROWS<NV>;
#endif

constexpr int UNROLL = STORE_EARLY ? 2 : 4;  // channels in a turn of the loop; with more, GCC spills sums

template <int M, int NV, int MODE, bool MASK>
NOINLINE void score_rows(const void *const *rows, const float *__restrict q, int64_t channels,
                         float *__restrict s, const Scores &a, int j) {
    const float *k[M];
    V x[M][NV];
    if (a.next_k) fetch_rows(a.next_k + j, M, a.next_first, a.next_last);
    if (!SPREAD_FETCH && a.next_v) fetch_rows(a.next_v + j, M, a.next_first, a.next_last);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
        k[i] = static_cast<const float *>(rows[j + i]);
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) x[i][n] = MODE == RAW ? set1(0.f) : load(a.neg_max + n * W);
    }
    if (!STORE_EARLY || a.biased)
#pragma GCC unroll 16
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) x[i][n] += set1(a.bias[j + i]);
    for (int64_t d = 0; d < channels; d += UNROLL)
#pragma GCC unroll 4
        for (int u = 0; u < UNROLL; u++, q += NV * W) {
            V b[NV];
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) b[n] = load(q + n * W);
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) {
                const V y = set1(k[i][d + u]);
#pragma GCC unroll 4
                for (int n = 0; n < NV; n++) x[i][n] = fma(y, b[n], x[i][n]);
            }
        }
    finish_scores<M, NV, MODE, MASK, STORE_EARLY>(x, a, j, s + int64_t{j} * NV * W);
    if (STORE_EARLY) return;
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) store(s + ((j + i) * NV + n) * W, x[i][n]);
}

template <int M, int NV>
NOINLINE void value_columns(const void *const *rows, int64_t d, const float *__restrict p, int n_keys,
                            float *__restrict o) {
    V x[M][NV];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) x[i][n] = set1(0.f);
#pragma GCC unroll 2
    for (int j = 0; j < n_keys; j++, p += NV * W) {
        const float *v = static_cast<const float *>(rows[j]) + d;
        V b[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) b[n] = load(p + n * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const V y = set1(v[i]);
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) x[i][n] = fma(y, b[n], x[i][n]);
        }
    }
    o += d * NV * W;
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++, o += W) store(o, load(o) + x[i][n]);
}

// Q is [channels, lanes] with the scale in it, P is [keys, lanes].
template <class T>
struct FloatPath {
    using Element = T;
    using Query = float;
    using Weight = float;
    static constexpr bool SCALES = false;  // whether scores apply the scale
    static constexpr int POOLED_PARTS = 1;

    static int64_t query_size(int64_t channels) { return channels; }

    // Rows that can be used in place: float32, dense, and not all in the same set of the cache.
    static INLINE bool in_place(const Tile &tile, const Strides &s) {
        return tile.pooled ||
               (sizeof(T) == 4 && s.channel == 1 && s.token * static_cast<int64_t>(sizeof(T)) % 4096);
    }
    static INLINE bool stage(const void *const *rows, const Tile &tile, const Strides &s,
                             int64_t channels, float *to, const void **staged) {
        if (in_place(tile, s)) return false;
        for (int j = 0; j < tile.n; j++, to += channels + PAD) {
            read_row(static_cast<const T *>(rows[j]), s.channel, channels, to);
            staged[j] = to;
        }
        return true;
    }
    static INLINE bool stage_k(const Tile &tile, const Strides &s, int64_t channels, float *to,
                               const void **staged) {
        return stage(tile.k, tile, s, channels, to, staged);
    }
    static INLINE bool stage_v(const Tile &tile, const Strides &s, int64_t channels, float *to,
                               const void **staged) {
        return stage(tile.v, tile, s, channels, to, staged);
    }
    static void hide_value(const void **rows, int j, int64_t) {
        static const float zeros[MAX_CHANNELS] = {};
        rows[j] = zeros;
    }

    static INLINE void pack8(const float *rows, int64_t channels, float *q, int64_t lanes) {
        for (int64_t d = 0; d < channels; d += 8) transpose8(rows + d, channels, q + d * lanes, lanes);
    }

    template <int NV, int MODE, bool MASK>
    static INLINE void scores(const Tile &, const void *const *rows, int n, const float *q,
                              int64_t channels, float *, float *p, const Scores &a) {
        constexpr int M = SCORE_ROWS<NV>;
        int j = 0;
        for (; j + M <= n; j += M) score_rows<M, NV, MODE, MASK>(rows, q, channels, p, a, j);
        if (M > 4 && j + 4 <= n) {
            score_rows<4, NV, MODE, MASK>(rows, q, channels, p, a, j);
            j += 4;
        }
        if (M > 8 && j + 4 <= n) {
            score_rows<4, NV, MODE, MASK>(rows, q, channels, p, a, j);
            j += 4;
        }
        for (; j < n; j++) score_rows<1, NV, MODE, MASK>(rows, q, channels, p, a, j);
    }

    // Exponentials of logits that RAW left in `s`; P is in the same place.
    template <int NV>
    static INLINE void exponentials(float *s, int n, const float *neg_max, float *sums, float *) {
        for (int v = 0; v < NV; v++) {
            V total = set1(0.f);
            const V shift = load(neg_max + v * W);
            for (int j = 0; j < n; j++) {
                float *at = s + (j * NV + v) * W;
                const V y = exp2_or_zero(load(at) + shift);
                store(at, y);
                total += y;
            }
            store(sums + v * W, total);
        }
    }

    template <int NV>
    static INLINE void values(const Tile &tile, const void *const *rows, const float *p, int64_t channels,
                              float *o, const Scores &a) {
        constexpr int M = VALUE_COLUMNS<NV>;  // 4, 6 or 8; what is left of a multiple of 8, after 6: 4 or 8
        const int64_t left = M == 6 ? (channels % 6 == 2 ? 8 : channels % 6) : 0;
        int64_t d = 0;
        if (SPREAD_FETCH && a.next_v) {
            const int each = channels < 96 ? 8 : 4;  // rows a turn, so that there are turns for all of BN
            for (int j = 0; j < BN && d < channels - left; j += each, d += M) {
                fetch_rows(a.next_v + j, each, a.next_first, a.next_last);
                value_columns<M, NV>(rows, d, p, tile.n, o);
            }
        }
        for (; d < channels - left; d += M) value_columns<M, NV>(rows, d, p, tile.n, o);
        for (; d < channels; d += 4) value_columns<4, NV>(rows, d, p, tile.n, o);
    }

    static float weight(const float *p, int j, int lane, int lanes) { return p[j * lanes + lane]; }
};
