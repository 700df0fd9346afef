// One task: the rows of a query group against the keys that it sees, with an online softmax.

constexpr float BOUND = 16.f;             // exp(logit) in [2^-16, 2^16] needs no maximum
constexpr float UNCLAMPED = 126.f;        // exp2 of no more than this, either sign, needs no clamps
constexpr float RESCALE = 65536.f;        // a tile with larger sums moves the maximum

constexpr int SEED_KEYS = 4;              // whose largest logit is a first maximum

// A thread's own memory.
template <class Path>
struct Workspace {
    typename Path::Query *q;   // [panels][channels of keys, lanes]
    typename Path::Weight *p;  // [keys, lanes]
    float *s;                  // [keys, lanes]
    float *o;                  // [panels][channels of values, lanes]
    float *neg_max, *sum;      // [rows]
    float *stat, *alpha;       // [lanes]
    int32_t *start, *stop;     // [rows], the key tokens that each sees; 0 and 0 for none
    float *staged_k, *staged_v;  // [BN, channels + PAD]
    float *rows;               // [8, channels]
    float *blocks;             // [blocks, lanes of all panels], sums by block of keys; for mass

    static int64_t lay_out(const Call &call, char *base, Workspace *w) {
        const int64_t d = call.problem.channels, e = call.problem.value_channels;
        const int64_t panels = MAX_ROWS / LANES;
        int64_t at = 0;
        const auto take = [&](int64_t bytes) {
            char *p = base + at;
            at += (bytes + 63) / 64 * 64;
            return p;
        };
        Workspace here;
        here.q = (typename Path::Query *)take(panels * Path::query_size(d) * LANES *
                                              sizeof(typename Path::Query));
        here.p = (typename Path::Weight *)take(BN * LANES * 4);
        here.s = Path::SCALES ? (float *)take(BN * LANES * 4) : (float *)here.p;  // float: one and the same
        here.o = (float *)take(panels * e * LANES * 4);
        here.neg_max = (float *)take(MAX_ROWS * 4);
        here.sum = (float *)take(MAX_ROWS * 4);
        here.stat = (float *)take(LANES * 4);
        here.alpha = (float *)take(LANES * 4);
        here.start = (int32_t *)take(MAX_ROWS * 4);
        here.stop = (int32_t *)take(MAX_ROWS * 4);
        here.staged_k = (float *)take(BN * (2 * d + PAD) * 4);  // pooled rows in parts are longer
        here.staged_v = (float *)take(BN * (e + PAD) * 4);
        here.rows = (float *)take(8 * (d > e ? d : e) * 4);
        const Problem &p = call.problem;
        const int64_t blocks = p.mass ? (p.keys + p.mass_block - 1) / p.mass_block : 0;
        here.blocks = (float *)take(blocks * MAX_ROWS * 4);
        if (w) *w = here;
        return at;
    }
};

// A panel: some rows of the task in the lanes of `vectors` vectors.
struct Panel {
    int first, rows, vectors;
    bool ready;  // every row has seen a key, or needs no maximum
    bool begun;  // some tile was added
};

template <class Path>
struct TaskRun {
    using T = typename Path::Element;
    const Call &call;
    const Task &task;
    const Pattern &pattern;
    Workspace<Path> w{};
    Panel panels[MAX_ROWS / W]{};
    int num_panels = 0;
    bool bounded = false, by_lse = false;
    bool clamped = true;  // whether a logit minus a maximum may be out of the range of exp2
    const T *q = nullptr, *k = nullptr, *v = nullptr;
    T *out = nullptr;
    int64_t kv_head = 0, num_blocks = 0;

    int64_t query_token(int row) const {
        const int64_t sorted = task.first + row;
        return pattern.q_order ? pattern.q_order[sorted] : sorted;
    }

    // Vectors of the next panel for so many rows: as wide as they fill without a vector to spare.
    static int width(int rows) {
        if (NARROW == FULL || rows > (FULL == 4 && NARROW == 1 ? 3 : FULL / 2) * W) return FULL;
        return NARROW == 1 && FULL == 4 && rows > W ? 2 : NARROW;
    }

    void cut_into_panels() {
        num_panels = 0;
        for (int first = 0; first < task.rows;) {
            const int left = task.rows - first;
            const int vectors = width(left);
            const int lanes = vectors * W;
            panels[num_panels++] = {first, left < lanes ? left : lanes, vectors, false, false};
            first += lanes;
        }
    }

    // Packs the queries; returns the largest squared norm.
    float pack_queries() {
        const Problem &p = call.problem;
        const int64_t d = p.channels;
        const V scale = set1(Path::SCALES ? 1.f : static_cast<float>(p.scale) * LOG2E);
        float largest = 0;
        for (int i = 0; i < num_panels; i++) {
            const Panel &panel = panels[i];
            const int lanes = panel.vectors * W;
            for (int lane = 0; lane < lanes; lane += 8) {
                for (int r = 0; r < 8; r++) {
                    float *row = w.rows + r * d;
                    if (lane + r >= panel.rows) {
                        __builtin_memset(row, 0, static_cast<size_t>(d) * 4);
                        continue;
                    }
                    read_row(q + query_token(panel.first + lane + r) * p.q_strides.token,
                             p.q_strides.channel, d, row);
                    V square = set1(0.f);
                    for (int64_t c = 0; c < d; c += 8)
                        for (int u = 0; u < 8; u += W < 8 ? W : 8) square = squares(row + c + u, scale, square);
                    const float norm = lane_sum(square);
                    if (!(norm <= largest)) largest = norm;
                }
                Path::pack8(w.rows, d, w.q + panel.first * Path::query_size(d) + lane, lanes);
            }
        }
        return largest;
    }

    // Adds squares of up to 8 values to a sum, and scales the values.
    static INLINE V squares(float *at, V scale, V sum) {
#if defined(__AVX512F__)
        const __m256 x = _mm256_loadu_ps(at);
        _mm256_storeu_ps(at, _mm256_mul_ps(x, _mm512_castps512_ps256((__m512)scale)));
        return fma((V)_mm512_zextps256_ps512(x), (V)_mm512_zextps256_ps512(x), sum);
#else
        const V x = load(at);
        store(at, x * scale);
        return fma(x, x, sum);
#endif
    }

    // Writes which keys each row may see; gives those that all may, and those that any may.
    void set_intervals(KeyRange &all, KeyRange &any) {
        const int lanes = rounded_rows();
        all = any = call.interval(task.batch, query_token(0));
        for (int r = 0; r < lanes; r++) {
            KeyRange range{0, 0};
            if (r < task.rows) {
                range = call.interval(task.batch, query_token(r));
                any.take(range);
                if (range.start > all.start) all.start = range.start;
                if (range.stop < all.stop) all.stop = range.stop;
            }
            w.start[r] = range.start;
            w.stop[r] = range.stop;
        }
    }

    // Rows of all panels, those that are only there to fill a vector too.
    int rounded_rows() const {
        const Panel &last = panels[num_panels - 1];
        return last.first + last.vectors * W;
    }

    void start_softmax() {
        const Problem &p = call.problem;
        const int64_t e = p.value_channels;
        const float q_norm = __builtin_sqrtf(pack_queries());
        const float k_norm = call.key_norms[task.batch * p.kv_heads + kv_head];
        const float far = pattern.cells ? 31.f : 0.f;
        const float largest = q_norm * k_norm * __builtin_fabsf(static_cast<float>(p.scale)) * LOG2E;
        bounded = !by_lse && largest + far <= BOUND;
        clamped = by_lse || !(2 * largest + far <= UNCLAMPED);
        const int lanes = rounded_rows();
        __builtin_memset(w.o, 0, static_cast<size_t>(lanes * e) * 4);
        __builtin_memset(w.sum, 0, static_cast<size_t>(lanes) * 4);
        for (int r = 0; r < lanes; r++)
            w.neg_max[r] = bounded || by_lse ? 0.f : INF;  // INF: nothing was seen
        for (int i = 0; i < num_panels; i++) panels[i].ready = bounded || by_lse;
        if (by_lse) {
            const float *lse = p.lse_in + (static_cast<int64_t>(task.batch) * p.heads + task.head) * p.queries;
            for (int r = 0; r < task.rows; r++) w.neg_max[r] = -lse[query_token(r)] * LOG2E;
        }
        if (p.mass)
            __builtin_memset(w.blocks, 0, static_cast<size_t>(num_blocks * rounded_rows()) * 4);
    }

    void run() {
        KeyRange all, any;
        set_intervals(all, any);
        const Problem &p = call.problem;
        const int32_t *far = pattern.far_offsets;
        const int32_t *runs = pattern.run_offsets;
        Tiles<T> tiles{
            call, pattern,
            call.pooled_of(task.batch, kv_head, call.head_to_pattern[task.head]),
            reinterpret_cast<const char *>(k), reinterpret_cast<const char *>(v),
            p.k_strides.token * static_cast<int64_t>(sizeof(T)),
            p.v_strides.token * static_cast<int64_t>(sizeof(T)),
            all, any, p.mass != nullptr,
            runs[task.group], runs[task.group + 1], 0,
            far && !by_lse ? far[task.group] : 0, far && !by_lse ? far[task.group + 1] : 0, 0,
        };
        Tile both[2];
        int now = 0;
        bool more = tiles.next(both[0]);
        if (more && !both[0].pooled) {  // on their way while the queries are packed
            fetch_rows(both[0].k, both[0].n, 0, p.channels * static_cast<int64_t>(sizeof(T)));
            if (!SPREAD_FETCH)
                fetch_rows(both[0].v, both[0].n, 0, p.value_channels * static_cast<int64_t>(sizeof(T)));
        }
        start_softmax();
        while (more) {
            more = tiles.next(both[1 - now]);
            compute(both[now], more ? &both[1 - now] : nullptr);
            now = 1 - now;
        }
    }

    void compute(const Tile &tile, const Tile *next) {
        const Problem &p = call.problem;
        const void *const *rows_k = tile.k, *const *rows_v = tile.v;
        const void *staged_k[BN], *staged_v[BN];
        if (Path::stage_k(tile, p.k_strides, p.channels, w.staged_k, staged_k)) rows_k = staged_k;
        if (!by_lse && Path::stage_v(tile, p.v_strides, p.value_channels, w.staged_v, staged_v))
            rows_v = staged_v;
        const bool fetch = next && next->n == BN && !next->pooled;
        Scores a{};
        a.bias = tile.bias;
        a.first = tile.first();
        a.last = tile.last;
        a.biased = tile.pooled;
        a.next_k = fetch ? next->k : nullptr;
        a.next_v = fetch ? next->v : nullptr;
        a.next_last = p.channels * static_cast<int64_t>(sizeof(T));  // for V a hint, where it is of another width
        const int64_t lines = (a.next_last + 63) / 64;
        a.scale = static_cast<float>(p.scale) * LOG2E;
        a.parts = tile.pooled ? Path::POOLED_PARTS : 1;
        for (int i = 0; i < num_panels; i++) {
            if (SPREAD_FETCH) {  // each panel its share of the lines
                a.next_first = lines * i / num_panels * 64;
                a.next_last = lines * (i + 1) / num_panels * 64;
            } else {
                a.next_k = fetch && i == 0 ? next->k : nullptr;
                a.next_v = fetch && i == num_panels - 1 ? next->v : nullptr;
            }
            if (panels[i].vectors == FULL)
                step<FULL>(tile, rows_k, rows_v, panels[i], a);
            else if (panels[i].vectors == NARROW)
                step<NARROW>(tile, rows_k, rows_v, panels[i], a);
            else
                step<2>(tile, rows_k, rows_v, panels[i], a);
        }
    }

    template <int NV>
    NOINLINE void step(const Tile &tile, const void *const *rows_k, const void *const *rows_v,
                       Panel &panel, Scores a) {
        const int64_t d = call.problem.channels, e = call.problem.value_channels;
        const typename Path::Query *queries = w.q + panel.first * Path::query_size(d);
        float *neg_max = w.neg_max + panel.first, *sum = w.sum + panel.first;
        float *o = w.o + panel.first * e;
        a.start = w.start + panel.first;
        a.stop = w.stop + panel.first;
        a.neg_max = neg_max;
        a.stat = w.stat;
        bool done = false;
        if (!panel.ready && !panel.begun && !tile.masked && tile.n > SEED_KEYS)
            seed_maximum<NV>(tile, rows_k, panel, a, queries);
        panel.begun = true;
        if (panel.ready) {
            for (int n = 0; n < NV; n++) store(w.stat + n * W, set1(0.f));
            if (tile.masked)
                Path::template scores<NV, SAFE, true>(tile, rows_k, tile.n, queries, d, w.s, w.p, a);
            else if (!clamped)
                Path::template scores<NV, BOUNDED, false>(tile, rows_k, tile.n, queries, d, w.s, w.p, a);
            else
                Path::template scores<NV, SAFE, false>(tile, rows_k, tile.n, queries, d, w.s, w.p, a);
            done = bounded || by_lse || !too_large<NV>();
        }
        if (!done) move_maximum<NV>(tile, rows_k, panel, a, queries, o);
        for (int n = 0; n < NV; n++)
            store(sum + n * W, load(sum + n * W) + load(w.stat + n * W));
        if (tile.block >= 0) {
            float *at = w.blocks + tile.block * rounded_rows() + panel.first;
            for (int n = 0; n < NV; n++) store(at + n * W, load(at + n * W) + load(w.stat + n * W));
        }
        if (by_lse) return;
        const void *finite[BN];
        if (tile.masked) rows_v = without_nonfinite<NV>(tile, rows_v, finite, panel, o);
        Path::template values<NV>(tile, rows_v, w.p, e, o, a);
    }

    // Takes the maximum of a few keys for that of all, which the sums then confirm or don't.
    template <int NV>
    void seed_maximum(const Tile &tile, const void *const *rows_k, Panel &panel, Scores a,
                      const typename Path::Query *queries) {
        float *neg_max = w.neg_max + panel.first;
        for (int n = 0; n < NV; n++) store(w.stat + n * W, -load(neg_max + n * W));
        a.next_k = a.next_v = nullptr;
        Path::template scores<NV, RAW, false>(tile, rows_k, SEED_KEYS, queries, call.problem.channels, w.s,
                                              w.p, a);
        for (int lane = 0; lane < panel.rows; lane++)
            if (!(__builtin_fabsf(w.stat[lane]) < INF)) return;
        for (int n = 0; n < NV; n++) store(neg_max + n * W, -load(w.stat + n * W));
        panel.ready = true;
    }

    template <int NV>
    bool too_large() const {
        for (int n = 0; n < NV; n++)
            if (any_above(load(w.stat + n * W), RESCALE)) return true;
        return false;
    }

    // The general step of an online softmax: finds the new maximum, and brings sums and outputs to it.
    template <int NV>
    NOINLINE void move_maximum(const Tile &tile, const void *const *rows_k, Panel &panel, Scores a,
                               const typename Path::Query *queries, float *o) {
        const int64_t d = call.problem.channels, e = call.problem.value_channels;
        float *neg_max = w.neg_max + panel.first, *sum = w.sum + panel.first;
        for (int n = 0; n < NV; n++) store(w.stat + n * W, -load(neg_max + n * W));
        a.next_k = a.next_v = nullptr;
        if (tile.masked)
            Path::template scores<NV, RAW, true>(tile, rows_k, tile.n, queries, d, w.s, w.p, a);
        else
            Path::template scores<NV, RAW, false>(tile, rows_k, tile.n, queries, d, w.s, w.p, a);
        panel.ready = true;
        for (int lane = 0; lane < NV * W; lane++) {
            const float before = -neg_max[lane], now = w.stat[lane];
            w.alpha[lane] = before == -INF || before == now ? 1.f : __builtin_exp2f(before - now);
            neg_max[lane] = -now;
            w.stat[lane] = now == -INF ? 0.f : -now;  // what to add; nothing seen: all are -inf
            if (now == -INF && lane < panel.rows) panel.ready = false;
        }
        for (int n = 0; n < NV; n++) {
            const V alpha = load(w.alpha + n * W);
            store(sum + n * W, load(sum + n * W) * alpha);
            for (int64_t c = 0; c < e; c++) {
                float *at = o + (c * NV + n) * W;
                store(at, load(at) * alpha);
            }
            for (int64_t block = 0; block < num_blocks; block++) {
                float *at = w.blocks + block * rounded_rows() + panel.first + n * W;
                store(at, load(at) * alpha);
            }
        }
        Path::template exponentials<NV>(w.s, tile.n, w.stat, w.stat, w.p);
    }

    // A value that isn't finite reaches only the rows that see its key: 0 * Inf would be NaN elsewhere.
    // Adds such keys to `o` row by row, and returns rows of V without them.
    template <int NV>
    NOINLINE const void *const *without_nonfinite(const Tile &tile, const void *const *rows_v,
                                                  const void **finite, const Panel &panel, float *o) {
        const int64_t e = call.problem.value_channels;
        constexpr int lanes = NV * W;
        for (int j = 0; j < tile.n; j++) {
            finite[j] = rows_v[j];
            read_value(tile, j);
            if (is_finite(w.rows, e)) continue;
            for (int lane = 0; lane < panel.rows; lane++) {
                const int row = panel.first + lane;
                if (w.start[row] > tile.first()[j] || w.stop[row] <= tile.last[j]) continue;
                const float weight = Path::weight(w.p, j, lane, lanes);
                for (int64_t c = 0; c < e; c++) o[c * lanes + lane] += weight * w.rows[c];
            }
            Path::hide_value(finite, j, e);
        }
        return finite;
    }

    void read_value(const Tile &tile, int j) {
        const int64_t e = call.problem.value_channels;
        if (tile.pooled)
            read_row(static_cast<const float *>(tile.v[j]), 1, e, w.rows);
        else
            read_row(static_cast<const T *>(tile.v[j]), call.problem.v_strides.channel, e, w.rows);
    }

    static bool is_finite(const float *row, int64_t e) {
        V sum = set1(0.f);
        for (int64_t c = 0; c + W <= e; c += W) sum += load(row + c) * set1(0.f);
        float total = lane_sum(sum);
        for (int64_t c = e / W * W; c < e; c++) total += row[c] * 0.f;
        return total == 0.f;  // NaN where one is Inf or NaN
    }

    void finish() {
        const Problem &p = call.problem;
        const int64_t first = (static_cast<int64_t>(task.batch) * p.heads + task.head) * p.queries;
        if (!by_lse) write_rows(first);
        if (p.mass) add_mass();
    }

    // Outputs and LSE; `first` is where the LSE of the head begins.
    void write_rows(int64_t first) {
        const Problem &p = call.problem;
        const int64_t e = p.value_channels;
        for (int i = 0; i < num_panels; i++) {
            const Panel &panel = panels[i];
            const int lanes = panel.vectors * W;
            float *sum = w.sum + panel.first, *o = w.o + panel.first * e;
            for (int lane = 0; lane < panel.rows; lane++) {
                const float l = sum[lane], m = -w.neg_max[panel.first + lane];
                const bool nothing = l == 0.f;
                if (p.lse)
                    p.lse[first + query_token(panel.first + lane)] =
                        nothing ? -INF : m * LN2 + __builtin_logf(l);
                w.alpha[lane] = nothing ? 0.f : 1.f / l;
            }
            for (int lane = 0; lane < panel.rows; lane += 8) {
                for (int64_t c = 0; c < e; c += 8)
                    transpose8(o + c * lanes + lane, lanes, w.rows + c, e);
                for (int r = 0; r < 8 && lane + r < panel.rows; r++) {
                    float *row = w.rows + r * e;
                    const float factor = w.alpha[lane + r];
                    for (int64_t c = 0; c < e; c++) row[c] *= factor;
                    write_row(row, p.out_strides.channel, e,
                              out + query_token(panel.first + lane + r) * p.out_strides.token);
                }
            }
        }
    }

    // Sums of each block over the rows, divided by the sums of all weights.
    void add_mass() {
        const int lanes = rounded_rows();
        for (int r = 0; r < lanes; r++) {
            const bool seen = r < task.rows && w.sum[r] != 0.f;
            w.neg_max[r] = !seen ? 0.f : by_lse ? 1.f : 1.f / w.sum[r];
        }
        for (int64_t block = 0; block < num_blocks; block++) {
            const float *at = w.blocks + block * lanes;
            V total = set1(0.f);
            for (int r = 0; r < lanes; r += W) {
                const VI real = load_int(w.stop + r) > 0;  // other lanes may hold NaN
                total = fma((V)(real & (VI)load(at + r)), load(w.neg_max + r), total);
            }
            task.mass[block] = lane_sum(total);
        }
    }
};

template <class Path>
void attend_task(const Call &call, const Task &task, void *scratch) {
    using T = typename Path::Element;
    const Problem &p = call.problem;
    const int64_t kv_head = task.head / (p.heads / p.kv_heads);
    TaskRun<Path> run{call, task, call.patterns[call.head_to_pattern[task.head]]};
    Workspace<Path>::lay_out(call, static_cast<char *>(scratch), &run.w);
    run.kv_head = kv_head;
    run.by_lse = p.lse_in != nullptr;
    run.num_blocks = p.mass ? (p.keys + p.mass_block - 1) / p.mass_block : 0;
    const auto at = [&](const void *base, const Strides &s, int64_t head) {
        return static_cast<const T *>(base) + task.batch * s.batch + head * s.head;
    };
    run.q = at(p.q, p.q_strides, task.head);
    run.k = at(p.k, p.k_strides, kv_head);
    run.v = run.by_lse ? run.k : at(p.v, p.v_strides, kv_head);
    run.out = run.by_lse ? nullptr : const_cast<T *>(at(p.out, p.out_strides, task.head));
    run.cut_into_panels();
    run.run();
    run.finish();
}
