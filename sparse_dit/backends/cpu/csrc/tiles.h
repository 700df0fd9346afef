// The keys that a task sees, in tiles of up to BN: exact keys in the index's order, then pooled ones.

constexpr int BN = 64;

struct Tile {
    const void *k[BN], *v[BN];  // rows; float32 if pooled, of the call's dtype otherwise
    float bias[BN];             // added to the logit, in units of log 2
    int32_t last[BN];           // the (last valid) token
    int n;
    bool pooled;
    bool masked;     // whether some row of the task does not see some key

    const int32_t *first() const { return pooled ? earliest : last; }
    int64_t block;   // of sorted keys, where all exact keys of the tile lie in one (for mass)
    int32_t earliest[BN];  // the first valid token of a pooled key; not filled for others
};

// Walks over the runs of a group; `next` fills a tile and says whether there was anything left.
template <class T>
struct Tiles {
    const Call &call;
    const Pattern &pattern;
    const Pooled &pooled;
    const char *k, *v;
    int64_t k_step, v_step;  // bytes from token to token
    KeyRange all, any;       // tokens that all rows of the task may see, and that any may
    bool by_block;
    int32_t run, last_run, at;  // the run, and how many of its keys are done
    int32_t far_run, last_far_run, far_at;

    INLINE bool next(Tile &tile) {
        tile.n = 0;
        tile.masked = false;
        tile.pooled = false;
        tile.block = -1;
        while (run < last_run && tile.n < BN)
            if (!take_keys(tile)) break;
        if (tile.n) return true;
        tile.pooled = true;
        tile.block = -1;
        while (far_run < last_far_run && tile.n < BN) take_cells(tile);
        return tile.n > 0;
    }

    // Takes keys of the current run; false if the tile must end before it.
    INLINE bool take_keys(Tile &tile) {
        if (!pattern.k_order && !skip_unseen()) return true;
        const int32_t start = pattern.runs[2 * run] + at;
        int64_t stop = pattern.runs[2 * run] + static_cast<int64_t>(pattern.runs[2 * run + 1]);
        if (by_block) {
            const int64_t block = start / call.problem.mass_block;
            if (tile.n && tile.block != block) return false;
            tile.block = block;
            const int64_t end = (block + 1) * call.problem.mass_block;
            if (stop > end) stop = end;
        }
        if (stop - start > BN - tile.n) stop = start + BN - tile.n;
        if (pattern.k_order)
            take_ordered(tile, start, stop);
        else
            take_range(tile, start, stop);
        at += static_cast<int32_t>(stop - start);
        if (at == pattern.runs[2 * run + 1]) {
            run++;
            at = 0;
        }
        return true;
    }

    // Where tokens stay in place: leaves out what lies before all rows' keys; false if the run is over.
    INLINE bool skip_unseen() {
        const int32_t start = pattern.runs[2 * run], length = pattern.runs[2 * run + 1];
        if (start + at >= any.stop) {
            run = last_run;
            return false;
        }
        if (start + at >= any.start) return true;
        at = length < any.start - start ? length : any.start - start;
        if (at < length) return true;
        run++;
        at = 0;
        return false;
    }

    // Takes tokens that lie side by side.
    INLINE void take_range(Tile &tile, int64_t start, int64_t stop) {
        if (stop > any.stop) stop = any.stop;
        const int n = tile.n, count = static_cast<int>(stop - start);
        const char *const first_k = k + start * k_step, *const first_v = v + start * v_step;
        for (int i = 0; i < count; i++) tile.k[n + i] = first_k + i * k_step;
        for (int i = 0; i < count; i++) tile.v[n + i] = first_v + i * v_step;
        for (int i = 0; i < count; i++) tile.bias[n + i] = 0;
        for (int i = 0; i < count; i++) tile.last[n + i] = static_cast<int32_t>(start) + i;
        tile.masked |= start < all.start || stop > all.stop;
        tile.n = n + count;
    }

    INLINE void take_ordered(Tile &tile, int64_t start, int64_t stop) {
        int n = tile.n;
        for (int64_t position = start; position < stop; position++) {
            const int32_t token = pattern.k_order[position];
            if (token < any.start || token >= any.stop) continue;
            tile.k[n] = k + token * k_step;
            tile.v[n] = v + token * v_step;
            tile.bias[n] = 0;
            tile.last[n] = token;
            tile.masked |= token < all.start || token >= all.stop;
            n++;
        }
        tile.n = n;
    }

    INLINE void take_cells(Tile &tile) {
        const int32_t start = pattern.far_runs[2 * far_run], length = pattern.far_runs[2 * far_run + 1];
        const Problem &p = call.problem;
        for (; far_at < length && tile.n < BN; far_at++) {
            const int64_t cell = start + far_at;
            const int32_t first = pooled.first[cell], last = pooled.last[cell];
            if (last < 0 || first < any.start || last >= any.stop) continue;
            tile.k[tile.n] = pooled.k + cell * p.channels;
            tile.v[tile.n] = pooled.v + cell * p.value_channels;
            tile.bias[tile.n] = pooled.bias[cell];
            tile.earliest[tile.n] = first;
            tile.last[tile.n] = last;
            tile.masked |= first < all.start || last >= all.stop;
            tile.n++;
        }
        if (far_at == length) {
            far_run++;
            far_at = 0;
        }
    }
};
