// Paged grouped-query attention. A query's context is walked in chunks of 256 positions: each gives its largest score,
// the sum of exponentials and the weighted values, and the chunks are merged in order (Dao et al. 2022, arXiv
// 2205.14135; split over threads as in flash decoding). A chunk's result does not depend on who computes it, nor on the
// queries beside it, so neither threads nor batches change a bit.

constexpr int FEW_ROWS = 4;        // up to here halves become floats on their way into the product, else once before it
constexpr int MAX_ROWS = 64;       // queries times heads of one piece of work

struct CacheHead {                 // one key head of one block
    const uint8_t *keys, *values;
    const float *key_scale, *value_scale;
};

INLINE int64_t element_bytes(CacheType type) { return type == CacheType::f32 ? 4 : type == CacheType::f16 ? 2 : 1; }
INLINE int64_t padded(int64_t dim) { return (dim + PANEL - 1) / PANEL * PANEL; }

INLINE CacheHead cache_head(const Cache& cache, int64_t block, int64_t head, int64_t dim) {
    const uint8_t* base = cache.data + block * cache.block_bytes + head * cache.head_bytes;
    const int64_t bytes = element_bytes(cache.type);
    const uint8_t* values = base + cache.block_size * dim * bytes;
    const float* scales = (const float*)(values + cache.block_size * padded(dim) * bytes);
    return {base, values, scales, scales + cache.block_size};
}

// `count` numbers to the cache's type at `to`, one after the other; for int8 divided by their scale, which is stored.
static void convert(CacheType type, const float* x, int64_t count, uint8_t* to, float* scale) {
    float inverse = 0.0f;
    if (type == CacheType::s8) {
        int32_t largest = 0;  // compared as in quantize_block
        for (int64_t i = 0; i < count; ++i) {
            int32_t bits;
            __builtin_memcpy(&bits, x + i, 4);
            bits &= 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        float magnitude;
        __builtin_memcpy(&magnitude, &largest, 4);
        *scale = magnitude / 127.0f;
        inverse = inverse_scale(magnitude);
    }
    for (int64_t i = 0; i < count; i += LANES) {
        float lanes[LANES] = {};
        const int64_t rest = smaller(LANES, count - i);
        __builtin_memcpy(lanes, x + i, rest * 4);
        if (type == CacheType::f32) {
            __builtin_memcpy(to + i * 4, lanes, rest * 4);
        } else if (type == CacheType::f16) {
            uint16_t half[LANES];
            store_f16(half, load(lanes));
            __builtin_memcpy(to + i * 2, half, rest * 2);
        } else {
            const I codes = to_code(load(lanes) * set1(inverse));
            for (int64_t j = 0; j < rest; ++j) ((int8_t*)to)[i + j] = static_cast<int8_t>(codes[j]);
        }
    }
}

// Key and value of one token and head to their place in the cache.
static void write_head(const Cache& cache, const float* key, const float* value, int64_t block, int64_t offset,
                       int64_t head, int64_t dim) {
    const CacheHead to = cache_head(cache, block, head, dim);
    const int64_t bytes = element_bytes(cache.type);
    alignas(64) uint8_t converted[MAX_HEAD_DIM * 4];
    convert(cache.type, key, dim, converted, (float*)to.key_scale + offset);
    uint8_t* column = (uint8_t*)to.keys + (offset / TILE * dim * TILE + offset % TILE) * bytes;
    for (int64_t i = 0; i < dim; ++i) {
        uint8_t* place = column + i * TILE * bytes;
        if (bytes == 4) ((float*)place)[0] = ((const float*)converted)[i];
        else if (bytes == 2) ((uint16_t*)place)[0] = ((const uint16_t*)converted)[i];
        else place[0] = converted[i];
    }
    convert(cache.type, value, dim, (uint8_t*)to.values + offset * padded(dim) * bytes, (float*)to.value_scale + offset);
}

// A row of the step to its place: keys [kv_heads, dim], then values [kv_heads, dim].
static void write_row(const Cache& cache, const Step& step, int64_t row, const float* keys, int64_t kv_heads, int64_t dim) {
    const int64_t position = step.positions[row];
    const int64_t block = step.block_tables[step.sequence_of[row] * step.table_width + position / cache.block_size];
    for (int64_t head = 0; head < kv_heads; ++head)
        write_head(cache, keys + head * dim, keys + (kv_heads + head) * dim, block, position % cache.block_size, head, dim);
}

// 16 positions as float: keys [dim][16] or values [16][padded dim]; the cache itself where it holds floats.
static const float* tile_keys(const Cache& cache, const CacheHead& head, int64_t tile, int64_t dim, float* buffer) {
    const int64_t at = tile * dim * TILE;
    if (cache.type == CacheType::f32) return (const float*)head.keys + at;
    for (int part = 0; part < PARTS; ++part) {
        const F scale = cache.type == CacheType::s8 ? load(head.key_scale + tile * TILE + part * LANES) : F{};
        for (int64_t i = 0; i < dim; ++i) {
            const int64_t from = at + i * TILE + part * LANES;
            store(buffer + i * TILE + part * LANES, cache.type == CacheType::f16
                                                        ? load_f16((const uint16_t*)head.keys + from)
                                                        : load_s8((const int8_t*)head.keys + from) * scale);
        }
    }
    return buffer;
}

static const float* tile_values(const Cache& cache, const CacheHead& head, int64_t tile, int64_t valid, int64_t width,
                                float* buffer) {
    const int64_t at = tile * TILE * width;
    if (cache.type == CacheType::f32) return (const float*)head.values + at;
    for (int64_t position = 0; position < valid; ++position) {
        const F scale = cache.type == CacheType::s8 ? set1(head.value_scale[tile * TILE + position]) : F{};
        for (int64_t i = position * width; i < (position + 1) * width; i += LANES)
            store(buffer + i, cache.type == CacheType::f16 ? load_f16((const uint16_t*)head.values + at + i)
                                                           : load_s8((const int8_t*)head.values + at + i) * scale);
    }
    return buffer;
}

// What a row knows after some chunks: largest score, sum of exponentials, weighted values.
struct Partial {
    float largest, sum;
    float* values;
};

// Fold a later chunk into an earlier state.
static void merge(Partial& into, const Partial& chunk, int64_t width) {
    const float top = into.largest > chunk.largest ? into.largest : chunk.largest;
    const float keep = exp(set1(into.largest - top))[0], add = exp(set1(chunk.largest - top))[0];
    into.largest = top;
    into.sum = into.sum * keep + chunk.sum * add;
    for (int64_t i = 0; i < width; i += LANES)
        store(into.values + i, load(into.values + i) * set1(keep) + load(chunk.values + i) * set1(add));
}

// Scores [CHUNK] of one row to exponentials; positions outside [first, last) of the chunk become exactly 0.
static void softmax_chunk(float* scores, int64_t first, int64_t last, int64_t width, float& largest, float& sum) {
    F top = set1(-__builtin_inff());
    for (int64_t i = 0; i < width; ++i)
        if (i < first || i >= last) scores[i] = -__builtin_inff();
    for (int64_t i = 0; i < width; i += LANES) top = max(load(scores + i), top);
    largest = reduce_max(top);
    F total{};
    for (int64_t i = 0; i < width; i += LANES) {
        const F p = exp(load(scores + i) - set1(largest));
        total += p;
        store(scores + i, p);
    }
    sum = reduce_add(total);
}

// Rows [first_row, last_row) of the step times the heads of one key head, over some chunks of their context.
struct Attention {
    const float* query;            // [rows, query_stride], already rotated
    int64_t query_stride, num_heads, num_kv_heads, dim, window;
    const Cache& cache;
    const Step& step;
    float* out;                    // [rows, heads * dim]
    float* partials;

    void run(const AttentionItem& item) const {
        const int64_t group = num_heads / num_kv_heads, width = padded(dim);
        const int64_t rows = (item.last_row - item.first_row) * group;
        alignas(64) float queries[MAX_ROWS * MAX_HEAD_DIM], state_values[MAX_ROWS * MAX_HEAD_DIM];
        alignas(64) float chunk_values[MAX_ROWS * MAX_HEAD_DIM], scores[MAX_ROWS * CHUNK];
        float largest[MAX_ROWS], sums[MAX_ROWS];
        bool has_state[MAX_ROWS] = {};
        const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
        for (int64_t r = 0; r < rows; ++r) {
            const float* q = query + (item.first_row + r / group) * query_stride + (item.kv_head * group + r % group) * dim;
            for (int64_t i = 0; i < dim; ++i) queries[r * dim + i] = q[i] * scale;
        }
        for (int64_t chunk = item.first_chunk; chunk < item.last_chunk; ++chunk) {
            const int64_t begin = chunk * CHUNK;
            const int64_t end = smaller(begin + CHUNK, step.positions[item.last_row - 1] + 1);
            const int64_t start = window ? larger(begin, step.positions[item.first_row] + 1 - window) : begin;
            if (start >= end) continue;
            score(item, begin, (start - begin) / TILE, end, queries, rows, scores);
            bool used[MAX_ROWS];
            float chunk_largest[MAX_ROWS], chunk_sum[MAX_ROWS];
            const int64_t columns = ceil_div(end - begin, TILE) * TILE, first_column = (start - begin) / TILE * TILE;
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t position = step.positions[item.first_row + r / group];
                const int64_t last = smaller(position + 1 - begin, CHUNK);
                const int64_t first = window ? larger(position + 1 - window - begin, 0) : 0;
                used[r] = first < last;
                if (used[r]) {
                    for (int64_t i = 0; i < first_column; ++i) scores[r * CHUNK + i] = 0.0f;
                    softmax_chunk(scores + r * CHUNK, first, last, columns, chunk_largest[r], chunk_sum[r]);
                } else {
                    for (int64_t i = 0; i < columns; ++i) scores[r * CHUNK + i] = 0.0f;
                }
            }
            weigh(item, begin, first_column / TILE, end, scores, rows, chunk_values);
            for (int64_t r = 0; r < rows; ++r) {
                if (!used[r]) continue;
                Partial later{chunk_largest[r], chunk_sum[r], chunk_values + r * width};
                if (has_state[r]) {
                    Partial state{largest[r], sums[r], state_values + r * width};
                    merge(state, later, width);
                    largest[r] = state.largest;
                    sums[r] = state.sum;
                } else {
                    has_state[r] = true;
                    largest[r] = later.largest;
                    sums[r] = later.sum;
                    __builtin_memcpy(state_values + r * width, later.values, width * 4);
                }
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            const float* values = state_values + r * width;
            if (item.partial < 0) {
                finish(item.first_row + r / group, item.kv_head * group + r % group, values, sums[r]);
            } else {
                float* to = partials + (item.partial * group + r) * (width + 2);
                to[0] = has_state[r] ? largest[r] : 0.0f;
                to[1] = has_state[r] ? sums[r] : -1.0f;  // no position of this range was visible
                if (has_state[r]) __builtin_memcpy(to + 2, values, width * 4);
            }
        }
    }

    // The parts of one decode, in chunk order.
    void run(const MergeItem& item) const {
        const int64_t group = num_heads / num_kv_heads, width = padded(dim);
        for (int64_t r = 0; r < group; ++r) {
            Partial state{0.0f, -1.0f, nullptr};
            for (int64_t i = 0; i < item.num_partials; ++i) {
                float* part = partials + ((item.first_partial + i) * group + r) * (width + 2);
                if (part[1] == -1.0f) continue;
                Partial later{part[0], part[1], part + 2};
                if (state.values) merge(state, later, width);
                else state = later;
            }
            finish(item.row, item.kv_head * group + r, state.values, state.sum);
        }
    }

    void finish(int64_t row, int64_t head, const float* values, float sum) const {
        float* to = out + (row * num_heads + head) * dim;
        for (int64_t i = 0; i < dim; ++i) to[i] = values[i] / sum;
    }

    CacheHead head_at(const AttentionItem& item, int64_t position) const {
        const int64_t* table = step.block_tables + item.sequence * step.table_width;
        return cache_head(cache, table[position / cache.block_size], item.kv_head, dim);
    }

    void score(const AttentionItem& item, int64_t begin, int64_t first_tile, int64_t end, const float* queries,
               int64_t rows, float* scores) const {
        alignas(64) float buffer[MAX_HEAD_DIM * TILE];
        for (int64_t tile = first_tile; begin + tile * TILE < end; ++tile) {
            const int64_t position = begin + tile * TILE;
            const CacheHead head = head_at(item, position);
            const int64_t at = position % cache.block_size / TILE;
            for (int64_t r = 0; r < rows; ++r)
                for (int part = 0; part < PARTS; ++part) store(scores + r * CHUNK + tile * TILE + part * LANES, F{});
            if (cache.type == CacheType::f16 && rows <= FEW_ROWS)
                float_rows(queries, dim, (const uint16_t*)head.keys + at * dim * TILE, TILE, dim, rows, scores + tile * TILE, CHUNK);
            else
                float_rows(queries, dim, tile_keys(cache, head, at, dim, buffer), TILE, dim, rows, scores + tile * TILE, CHUNK);
        }
    }

    void weigh(const AttentionItem& item, int64_t begin, int64_t first_tile, int64_t end, const float* weights,
               int64_t rows, float* values) const {
        const int64_t width = padded(dim);
        alignas(64) float buffer[TILE * MAX_HEAD_DIM];
        __builtin_memset(values, 0, rows * width * 4);
        for (int64_t tile = first_tile; begin + tile * TILE < end; ++tile) {
            const int64_t position = begin + tile * TILE, valid = smaller(TILE, end - position);
            const CacheHead head = head_at(item, position);
            const int64_t at = position % cache.block_size / TILE;
            if (cache.type == CacheType::f16 && rows <= FEW_ROWS) {
                const uint16_t* from = (const uint16_t*)head.values + at * TILE * width;
                for (int64_t slice = 0; slice < width; slice += PANEL)
                    float_rows(weights + tile * TILE, CHUNK, from + slice, width, valid, rows, values + slice, width);
            } else {
                const float* from = tile_values(cache, head, at, valid, width, buffer);
                for (int64_t slice = 0; slice < width; slice += PANEL)
                    float_rows(weights + tile * TILE, CHUNK, from + slice, width, valid, rows, values + slice, width);
            }
        }
    }
};
