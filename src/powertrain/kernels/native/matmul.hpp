// Matrix products x [rows, in] times the transposed stream [out, in].
//
// An output is always summed in the same order, whatever the number of rows: int8 activations block by block (an exact
// integer sum each, then one multiply-add), float ones input by input. So a row's result does not depend on its batch.

constexpr int UNIT = 4;            // panels of one piece of work: 64 outputs, or 32 gates with their ups
constexpr int WIDTH = UNIT * PANEL;
constexpr int ROW_TILE = 64;       // rows that share one unpacking of the weights; their sums stay in the first cache
constexpr int DEPTH = 64;          // inputs of a panel turned to float at a time: 4 kB
constexpr int PARTS = PANEL / LANES;
constexpr int64_t AHEAD = 2048;    // bytes of a stream asked for early: the processor's own guess starts anew at each page

struct Input {
    const float* rows;             // [rows, width], used by float products
    int64_t width;
    const Quantized* quantized;    // used by int8 products
    int64_t num_rows;
};

// What one block of 32 inputs takes in a panel that meets int8 activations: codes, and scales of two bytes or more.
constexpr int64_t int8_block_bytes(bool is_u4, bool has_minimum) {
    return PANEL * BLOCK / (is_u4 ? 2 : 1) + 2 * PANEL * (has_minimum ? 2 : 1);
}

INLINE F load_scale(const uint8_t* header, bool is_half, int at) {
    return is_half ? load_f16((const uint16_t*)header + at) : load((const float*)header + at);
}

INLINE const uint8_t* group_of(const Matrix& m, const uint8_t* panel, int64_t block) {
    return panel + block / m.group_blocks * (m.header_bytes + m.group_blocks * m.block_bytes);
}

// One or two rows by one panel: the weights pass through registers once, the sums stay there. `out` has WIDTH columns.
template <int ROWS, bool IS_U4, bool HAS_MINIMUM, bool IS_HALF>
static void int8_panel(const Matrix& m, const uint8_t* panel, Quantized q, int64_t total, int64_t row, float* out) {
    constexpr int OFFSET = IS_U4 ? (HAS_MINIMUM ? 0 : 8) : Codes::OFFSET_S8;
    constexpr int64_t BLOCK_BYTES = int8_block_bytes(IS_U4, HAS_MINIMUM);
    F sums[ROWS][PARTS] = {};
    for (int64_t block = 0; block < m.blocks;) {
        const uint8_t* header = panel;
        panel += m.header_bytes;
        for (int g = 0; g < m.group_blocks; ++g, ++block, panel += m.block_bytes) {
            const int64_t at = block * total + row;
            for (int64_t line = 0; line < BLOCK_BYTES; line += 64) __builtin_prefetch(panel + AHEAD + line);
            for (int part = 0; part < PARTS; ++part) {
                Codes weights;
                if (IS_U4) weights.load_u4(panel, part);
                else weights.load_s8(panel, part);
                const F scale = load_scale(header, IS_HALF, part * LANES);
                const F minimum = HAS_MINIMUM ? load_scale(header, IS_HALF, PANEL + part * LANES) : F{};
                for (int r = 0; r < ROWS; ++r) {
                    const int8_t* codes = q.codes + (at + r) * BLOCK;
                    I dot = IS_U4 ? weights.dot_u4(codes) : weights.dot_s8(codes);
                    if (OFFSET != 0) dot -= OFFSET * q.code_sum[at + r];
                    sums[r][part] = fma(to_float(dot), scale * set1(q.scale[at + r]), sums[r][part]);
                    if (HAS_MINIMUM) sums[r][part] = fma(minimum, set1(q.sum[at + r]), sums[r][part]);
                }
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int part = 0; part < PARTS; ++part) store(out + r * WIDTH + part * LANES, sums[r][part]);
}

// ROWS rows by VECTORS vectors of one unpacked block: added to the sums in `out`. Here and below `q` is a copy, so that
// the compiler knows its pointers to outlive the stores.
template <int ROWS, int VECTORS, bool IS_U4, bool HAS_MINIMUM>
INLINE void int8_block(const Tile<IS_U4>* tiles, const F* scales, const F* minima, Quantized q, int64_t at, float* out) {
    constexpr int OFFSET = IS_U4 ? (HAS_MINIMUM ? 0 : 8) : 128;  // what makes the codes unsigned
    const int8_t* codes = q.codes + at * BLOCK;
    typename Tile<IS_U4>::Sum sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
        for (int r = 0; r < ROWS; ++r) {
            const auto a = Tile<IS_U4>::activations(codes + r * BLOCK + 4 * j);
            for (int v = 0; v < VECTORS; ++v) sums[r][v].add(tiles[v], j, a);
        }
    for (int r = 0; r < ROWS; ++r) {
        const F scale = set1(q.scale[at + r]), sum = set1(q.sum[at + r]);
        const I offset = I{} + OFFSET * q.code_sum[at + r];
        for (int v = 0; v < VECTORS; ++v) {
            float* to = out + r * WIDTH + v * LANES;
            const I dot = sums[r][v].total();
            F value = fma(to_float(OFFSET ? dot - offset : dot), scales[v] * scale, load(to));
            if (HAS_MINIMUM) value = fma(minima[v], sum, value);
            store(to, value);
        }
    }
}

// Many rows by COUNT panels: each block is unpacked once for all rows, the sums lie in the first cache. The integers and
// the order of the multiply-adds are those of `int8_panel`, so the results are the same bits.
template <int COUNT, bool IS_U4, bool HAS_MINIMUM>
static void int8_tile(const Matrix& m, const uint8_t* panels, Quantized q, int64_t total, int64_t row, int64_t rows,
                      float* out) {
    constexpr int64_t BLOCK_BYTES = int8_block_bytes(IS_U4, HAS_MINIMUM);
    constexpr int VECTORS = COUNT * PARTS, ROWS = Tile<IS_U4>::ROWS;
    constexpr int STEP = VECTORS < Tile<IS_U4>::VECTORS ? VECTORS : Tile<IS_U4>::VECTORS;
    Tile<IS_U4> tiles[VECTORS];
    F scales[VECTORS], minima[VECTORS];
    for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) store(out + r * WIDTH + v * LANES, F{});
    for (int64_t block = 0; block < m.blocks; ++block) {
        for (int v = 0; v < VECTORS; ++v) {
            const uint8_t* header = group_of(m, panels + v / PARTS * m.panel_bytes, block);
            if (v % PARTS == 0) {
                const uint8_t* ahead = header + AHEAD / 2;
                // past its end a panel is followed by those beside it; what comes next here are the next COUNT
                if (ahead >= panels + (v / PARTS + 1) * m.panel_bytes) ahead += (COUNT - 1) * m.panel_bytes;
                for (int64_t line = 0; line < BLOCK_BYTES; line += 64) __builtin_prefetch(ahead + line);
            }
            tiles[v].load(header + m.header_bytes + block % m.group_blocks * m.block_bytes, v % PARTS);
            scales[v] = load_scale(header, m.half_scale, v % PARTS * LANES);
            if (HAS_MINIMUM) minima[v] = load_scale(header, m.half_scale, PANEL + v % PARTS * LANES);
        }
        const int64_t at = block * total + row;
        int64_t r = 0;
        for (; r + ROWS <= rows; r += ROWS)
            for (int v = 0; v < VECTORS; v += STEP)
                int8_block<ROWS, STEP, IS_U4, HAS_MINIMUM>(tiles + v, scales + v, minima + v, q, at + r,
                                                           out + r * WIDTH + v * LANES);
        for (; r < rows; ++r)
            for (int v = 0; v < VECTORS; v += STEP)
                int8_block<1, STEP, IS_U4, HAS_MINIMUM>(tiles + v, scales + v, minima + v, q, at + r,
                                                        out + r * WIDTH + v * LANES);
    }
}

template <bool IS_U4, bool HAS_MINIMUM, bool IS_HALF>
static void int8_unit(const Matrix& m, int64_t first, int64_t panels, const Input& in, int64_t row, int64_t rows,
                      float* out) {
    const Quantized& q = *in.quantized;
    const uint8_t* at = m.stream + first * m.panel_bytes;
    if (rows > 2 && panels == UNIT) return int8_tile<UNIT, IS_U4, HAS_MINIMUM>(m, at, q, in.num_rows, row, rows, out);
    for (int64_t p = 0; p < panels; ++p, at += m.panel_bytes, out += PANEL) {
        if (rows == 1) int8_panel<1, IS_U4, HAS_MINIMUM, IS_HALF>(m, at, q, in.num_rows, row, out);
        else if (rows == 2) int8_panel<2, IS_U4, HAS_MINIMUM, IS_HALF>(m, at, q, in.num_rows, row, out);
        else int8_tile<1, IS_U4, HAS_MINIMUM>(m, at, q, in.num_rows, row, rows, out);
    }
}

template <bool IS_U4, bool HAS_MINIMUM>
static void int8_unit(const Matrix& m, int64_t first, int64_t panels, const Input& in, int64_t row, int64_t rows,
                      float* out) {
    if (m.half_scale) int8_unit<IS_U4, HAS_MINIMUM, true>(m, first, panels, in, row, rows, out);
    else int8_unit<IS_U4, HAS_MINIMUM, false>(m, first, panels, in, row, rows, out);
}

// One block of 32 inputs of a quantized panel as float [32][16].
template <bool IS_U4>
static void unpack_block(const Matrix& m, const uint8_t* header, const uint8_t* codes, float* out) {
    for (int part = 0; part < PARTS; ++part) {
        const F scale = load_scale(header, m.half_scale, part * LANES);
        const F minimum = m.has_minimum ? load_scale(header, m.half_scale, PANEL + part * LANES) : F{};
        const I offset = I{} + (IS_U4 && !m.has_minimum ? 8 : 0);
        for (int j = 0; j < (IS_U4 ? 4 : 8); ++j) {
            I words;  // four inputs of an output share 32 bits
            __builtin_memcpy(&words, codes + j * 64 + part * LANES * 4, sizeof words);
            float* to = out + 4 * j * PANEL + part * LANES;
            for (int i = 0; i < 4; ++i) {
                const I code = IS_U4 ? ((words >> (8 * i)) & 15) - offset : (words << (24 - 8 * i)) >> 24;
                // with no minimum this adds a zero, which changes nothing
                store(to + i * PANEL, to_float(code) * scale + minimum);
                if (IS_U4) {
                    const I upper = ((words >> (8 * i + 4)) & 15) - offset;
                    store(to + (16 + i) * PANEL, to_float(upper) * scale + minimum);
                }
            }
        }
    }
}

// Inputs [start, start + depth) of one panel as float [depth][16]; quantized kinds start at a multiple of 32, and the
// buffer has room for whole blocks.
static void unpack_panel(const Matrix& m, const uint8_t* panel, int64_t start, int64_t depth, float* out) {
    if (m.kind == Kind::f32) {
        __builtin_memcpy(out, (const float*)panel + start * PANEL, depth * PANEL * 4);
    } else if (m.kind == Kind::f16) {
        const uint16_t* from = (const uint16_t*)panel + start * PANEL;
        for (int64_t i = 0; i < depth * PANEL; i += LANES) store(out + i, load_f16(from + i));
    } else if (m.kind == Kind::bf16) {
        const uint16_t* from = (const uint16_t*)panel + start * PANEL;
        for (int64_t i = 0; i < depth * PANEL; i += LANES) store(out + i, load_bf16(from + i));
    } else {
        for (int64_t done = 0; done < depth; done += BLOCK) {
            const int64_t block = (start + done) / BLOCK;
            const uint8_t* header = group_of(m, panel, block);
            const uint8_t* codes = header + m.header_bytes + block % m.group_blocks * m.block_bytes;
            if (m.kind == Kind::u4) unpack_block<true>(m, header, codes, out + done * PANEL);
            else unpack_block<false>(m, header, codes, out + done * PANEL);
        }
    }
}

INLINE F load_number(const float* p) { return load(p); }
INLINE F load_number(const uint16_t* p) { return load_f16(p); }

// out[r][p * 16 ..] += sum over k of a[r][k] * panels[p][k][0..16), k ascending. R rows, P panels `stride` apart, of
// floats or halves.
template <int R, int P, class T>
INLINE void float_tile(const float* a, int64_t lda, const T* panels, int64_t stride, int64_t ldb, int64_t depth, float* out,
                       int64_t ldc) {
    F sums[R][P][PARTS];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p)
            for (int part = 0; part < PARTS; ++part) sums[r][p][part] = load(out + r * ldc + p * PANEL + part * LANES);
    for (int64_t k = 0; k < depth; ++k)
        for (int p = 0; p < P; ++p)
            for (int part = 0; part < PARTS; ++part) {
                const F b = load_number(panels + p * stride + k * ldb + part * LANES);
                for (int r = 0; r < R; ++r) sums[r][p][part] = fma(set1(a[r * lda + k]), b, sums[r][p][part]);
            }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p)
            for (int part = 0; part < PARTS; ++part) store(out + r * ldc + p * PANEL + part * LANES, sums[r][p][part]);
}

// Any number of rows by one panel of 16 columns.
template <class T>
INLINE void float_rows(const float* a, int64_t lda, const T* panel, int64_t ldb, int64_t depth, int64_t rows, float* out,
                       int64_t ldc) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) float_tile<4, 1>(a + r * lda, lda, panel, 0, ldb, depth, out + r * ldc, ldc);
    if (rows - r == 3) float_tile<3, 1>(a + r * lda, lda, panel, 0, ldb, depth, out + r * ldc, ldc);
    if (rows - r == 2) float_tile<2, 1>(a + r * lda, lda, panel, 0, ldb, depth, out + r * ldc, ldc);
    if (rows - r == 1) float_tile<1, 1>(a + r * lda, lda, panel, 0, ldb, depth, out + r * ldc, ldc);
}

static void float_unit(const Matrix& m, int64_t first, int64_t panels, const Input& in, int64_t row, int64_t rows,
                       float* out) {
    alignas(64) float buffer[UNIT * DEPTH * PANEL];
    for (int64_t r = 0; r < rows; ++r)
        for (int i = 0; i < WIDTH; i += LANES) store(out + r * WIDTH + i, F{});
    for (int64_t start = 0; start < m.in_features; start += DEPTH) {
        const int64_t depth = smaller(DEPTH, m.in_features - start);
        const float* values = buffer;
        int64_t stride = DEPTH * PANEL;
        if (m.kind == Kind::f32) {
            values = (const float*)(m.stream + first * m.panel_bytes) + start * PANEL;
            stride = m.panel_bytes / 4;
        } else {
            for (int64_t p = 0; p < panels; ++p)
                unpack_panel(m, m.stream + (first + p) * m.panel_bytes, start, depth, buffer + p * DEPTH * PANEL);
        }
        const float* a = in.rows + row * in.width + start;
        // few rows: several panels at once keep enough sums in flight to hide the multiply-add's latency
        if (rows == 1 && panels == UNIT) {
            float_tile<1, UNIT>(a, in.width, values, stride, PANEL, depth, out, WIDTH);
        } else if (rows == 1 && panels == UNIT / 2) {
            float_tile<1, UNIT / 2>(a, in.width, values, stride, PANEL, depth, out, WIDTH);
        } else {
            for (int64_t p = 0; p < panels; ++p)
                float_rows(a, in.width, values + p * stride, PANEL, depth, rows, out + p * PANEL, WIDTH);
        }
    }
}

// out [rows][WIDTH]: the products of rows [row, row + rows) with `panels` panels from `first` on.
static void product_unit(const Matrix& m, int64_t first, int64_t panels, const Input& in, int64_t row, int64_t rows,
                         float* out) {
    if (!m.quantizes) float_unit(m, first, panels, in, row, rows, out);
    else if (m.kind == Kind::u4 && m.has_minimum) int8_unit<true, true>(m, first, panels, in, row, rows, out);
    else if (m.kind == Kind::u4) int8_unit<true, false>(m, first, panels, in, row, rows, out);
    else if (m.has_minimum) int8_unit<false, true>(m, first, panels, in, row, rows, out);
    else int8_unit<false, false>(m, first, panels, in, row, rows, out);
}

// Inside `everywhere`: all of x times m; finish(first panel, panels, row, rows, sums [rows][WIDTH]) for each piece.
template <class Finish>
INLINE void product(Team& team, const Matrix& m, const Input& in, const Finish& finish) {
    // one row: half-size pieces where there are too few whole ones for an even share; gate and up keep 32 pairs together
    const bool is_small = in.num_rows == 1 && !m.is_gate_up && m.panels < 16 * UNIT * team.size();
    const int64_t unit = is_small ? UNIT / 2 : UNIT;
    const int64_t tiles = ceil_div(in.num_rows, ROW_TILE), tile_rows = ceil_div(in.num_rows, tiles);
    const int64_t units = ceil_div(m.panels, unit);
    for_each(team, tiles * units, 1, [&](int64_t i) {
        alignas(64) float sums[ROW_TILE * WIDTH];
        const int64_t first = i % units * unit, row = i / units * tile_rows;
        const int64_t panels = smaller(unit, m.panels - first), rows = smaller(tile_rows, in.num_rows - row);
        if (rows <= 0) return;
        product_unit(m, first, panels, in, row, rows, sums);
        finish(first, panels, row, rows, sums);
    });
}

// The rows of the embedding's stream: out [count][in].
static void gather_row(const Matrix& m, int64_t id, float* out) {
    const uint8_t* panel = m.stream + id / PANEL * m.panel_bytes;
    alignas(64) float buffer[DEPTH * PANEL];
    for (int64_t start = 0; start < m.in_features; start += DEPTH) {
        const int64_t depth = smaller(DEPTH, m.in_features - start);
        unpack_panel(m, panel, start, depth, buffer);
        for (int64_t k = 0; k < depth; ++k) out[start + k] = buffer[k * PANEL + id % PANEL];
    }
}
