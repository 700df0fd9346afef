// Small pieces that both arithmetic paths share.
//
// Everything is transposed: S^T = K Q^T and O^T = V^T P^T, with one query row in each vector lane. So rows
// of K and V are read in place, as broadcasts, whatever keys a group sees; only queries are packed; and the
// softmax needs no sum or maximum across lanes.

// Panels are 1, 2 or FULL vectors wide. A wide one reads each key once for more rows.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int FULL = 4;
#else
constexpr int FULL = 2;
#endif
constexpr int NARROW = W < 8 ? 2 : 1;  // vectors of the narrowest panel, which holds 8 rows or more
constexpr int LANES = FULL * W;

// AVX2 has registers for the sums and little else: results are stored as soon as they are there. And it
// asks for the next tile's rows bit by bit, as its narrow panels leave time for it: all at once they would
// hold up the loads of this tile.
constexpr bool STORE_EARLY = W == 8, SPREAD_FETCH = W == 8;

constexpr int PAD = 16;  // floats after a staged row, so that rows fall into different sets of the cache

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float INF = __builtin_inff();

// RAW stores logits and their maximum; the others store exp2(logit - maximum) and the sums.
// BOUNDED knows that a logit minus its maximum lies in the range of exp2, and needs no clamps.
enum Mode { RAW, BOUNDED, SAFE };

// What scores need beside K and Q. Arrays of lanes belong to the panel, arrays of keys to the tile.
struct Scores {
    const float *neg_max;    // [lanes], what is added to logits: minus the maximum so far
    float *stat;             // [lanes], the maximum (RAW) or the sum of exponentials
    const int32_t *start, *stop;  // [lanes], a row sees keys whose tokens lie from start to before stop
    const float *bias;       // [n]
    const int32_t *first, *last;  // [n], the tokens of a key: two where it is pooled
    const void *const *next_k, *const *next_v;  // [n] rows of the next tile, to be fetched; or null
    int64_t next_first, next_last;  // bytes of such a row to be fetched
    bool biased;             // whether some bias isn't 0
    float scale;             // of logits, where it isn't in the queries already
    int parts;               // rows of K that add up to one, behind each other
};

INLINE void fetch_rows(const void *const *rows, int count, int64_t first, int64_t last) {
    for (int64_t at = first; at < last; at += 64)
        for (int i = 0; i < count; i++) prefetch(static_cast<const char *>(rows[i]) + at);
}

// Turns logits of M keys into what is stored, and keeps the statistics. With EARLY, stores it to `s`.
template <int M, int NV, int MODE, bool MASK, bool EARLY>
INLINE void finish_scores(V (&x)[M][NV], const Scores &a, int j, float *s) {
    V stat[NV];
    VI start[NV], stop[NV];
    for (int n = 0; n < NV; n++) {
        stat[n] = load(a.stat + n * W);
        if (MASK) {
            start[n] = load_int(a.start + n * W);
            stop[n] = load_int(a.stop + n * W);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
            if (MODE != RAW) x[i][n] = exp2<MODE == SAFE>(x[i][n]);
            if (MASK) {
                const VI seen = (start[n] <= a.first[j + i]) & (stop[n] > a.last[j + i]);
                const V hidden = set1(MODE == RAW ? -INF : 0.f);
                x[i][n] = (V)((seen & (VI)x[i][n]) | (~seen & (VI)hidden));
            }
            stat[n] = MODE == RAW ? max_or_second(x[i][n], stat[n]) : stat[n] + x[i][n];
            if (EARLY) store(s + (i * NV + n) * W, x[i][n]);
        }
    for (int n = 0; n < NV; n++) store(a.stat + n * W, stat[n]);
}
