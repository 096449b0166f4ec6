// Matrix products x [rows, in] times the transposed stream [out, in].
//
// An output is always summed in the same order, whatever the number of rows: int8 activations block by block (an exact
// integer sum each, then one multiply-add), float ones input by input. So a row's result does not depend on its batch.

constexpr int UNIT = 4;            // panels of one piece of work: 64 outputs, or 32 gates with their ups
constexpr int WIDTH = UNIT * PANEL;
constexpr int ROW_TILE = 64;       // rows that share one unpacking of the weights; their sums stay in the first cache
constexpr int DEPTH = 64;          // inputs of a panel turned to float at a time: 4 kB
constexpr int PARTS = PANEL / LANES;

struct Input {
    const float* rows;             // [rows, width], used by float products
    int64_t width;
    const Quantized* quantized;    // used by int8 products
    int64_t num_rows;
};

INLINE F load_scale(const uint8_t* header, bool is_half, int at) {
    return is_half ? load_f16((const uint16_t*)header + at) : load((const float*)header + at);
}

// out[r][0..16) of one panel for `rows` rows from `row` on; `out` has WIDTH columns. R > 0: the sums live in registers.
template <int R, bool IS_U4, bool HAS_MINIMUM>
static void int8_panel(const Matrix& m, const uint8_t* panel, const Quantized& q, int64_t total, int64_t row, int64_t rows,
                       float* out) {
    constexpr int OFFSET = IS_U4 ? (HAS_MINIMUM ? 0 : 8) : 128;
    const int count = R > 0 ? R : static_cast<int>(rows);
    F sums[R > 0 ? R : 1][PARTS];
    for (int r = 0; r < (R > 0 ? R : 0); ++r)
        for (int part = 0; part < PARTS; ++part) sums[r][part] = F{};
    if (R == 0)
        for (int r = 0; r < count; ++r)
            for (int part = 0; part < PARTS; ++part) store(out + r * WIDTH + part * LANES, F{});
    for (int64_t block = 0; block < m.blocks;) {
        const uint8_t* header = panel;
        panel += m.header_bytes;
        for (int g = 0; g < m.group_blocks && block < m.blocks; ++g, ++block, panel += m.block_bytes) {
            const int64_t at = block * total + row;
            const int8_t* codes = q.codes + at * BLOCK;
            for (int part = 0; part < PARTS; ++part) {
                Codes weights;
                if (IS_U4) weights.load_u4(panel, part);
                else weights.load_s8(panel, part);
                const F scale = load_scale(header, m.half_scale, part * LANES);
                const F minimum = HAS_MINIMUM ? load_scale(header, m.half_scale, PANEL + part * LANES) : F{};
                for (int r = 0; r < count; ++r) {
                    I dot = IS_U4 ? weights.dot_u4(codes + r * BLOCK) : weights.dot_s8(codes + r * BLOCK);
                    if (OFFSET != 0) dot -= OFFSET * q.code_sum[at + r];
                    F sum = R > 0 ? sums[r][part] : load(out + r * WIDTH + part * LANES);
                    sum = fma(to_float(dot), scale * set1(q.scale[at + r]), sum);
                    // an 8-bit code was made unsigned by OFFSET, which the line above took out again
                    if (HAS_MINIMUM) sum = fma(minimum, set1(q.sum[at + r]), sum);
                    if (R > 0) sums[r][part] = sum;
                    else store(out + r * WIDTH + part * LANES, sum);
                }
            }
        }
    }
    for (int r = 0; r < (R > 0 ? R : 0); ++r)
        for (int part = 0; part < PARTS; ++part) store(out + r * WIDTH + part * LANES, sums[r][part]);
}

template <bool IS_U4, bool HAS_MINIMUM>
static void int8_unit(const Matrix& m, int64_t first, int64_t panels, const Input& in, int64_t row, int64_t rows,
                      float* out) {
    for (int64_t p = 0; p < panels; ++p) {
        const uint8_t* panel = m.stream + (first + p) * m.panel_bytes;
        const Quantized& q = *in.quantized;
        float* at = out + p * PANEL;
        if (rows == 1) int8_panel<1, IS_U4, HAS_MINIMUM>(m, panel, q, in.num_rows, row, rows, at);
        else if (rows == 2) int8_panel<2, IS_U4, HAS_MINIMUM>(m, panel, q, in.num_rows, row, rows, at);
        else int8_panel<0, IS_U4, HAS_MINIMUM>(m, panel, q, in.num_rows, row, rows, at);
    }
}

// Inputs [start, start + depth) of one panel as float [depth][16]; quantized kinds start at a multiple of 32.
static void unpack_panel(const Matrix& m, const uint8_t* panel, int64_t start, int64_t depth, float* out) {
    if (m.kind == Kind::f16 || m.kind == Kind::bf16) {
        const uint16_t* from = (const uint16_t*)panel + start * PANEL;
        for (int64_t i = 0; i < depth * PANEL; i += LANES)
            store(out + i, m.kind == Kind::f16 ? load_f16(from + i) : load_bf16(from + i));
        return;
    }
    if (m.kind == Kind::f32) {
        __builtin_memcpy(out, (const float*)panel + start * PANEL, depth * PANEL * 4);
        return;
    }
    const int64_t group_bytes = m.header_bytes + m.group_blocks * m.block_bytes;
    for (int64_t done = 0; done < depth; done += BLOCK) {
        const int64_t block = (start + done) / BLOCK;
        const uint8_t* header = panel + block / m.group_blocks * group_bytes;
        const uint8_t* codes = header + m.header_bytes + block % m.group_blocks * m.block_bytes;
        const int64_t inputs = smaller(BLOCK, depth - done);
        for (int part = 0; part < PARTS; ++part) {
            const F scale = load_scale(header, m.half_scale, part * LANES);
            const F minimum = m.has_minimum ? load_scale(header, m.half_scale, PANEL + part * LANES) : F{};
            for (int64_t i = 0; i < inputs; ++i) {
                // four inputs of an output share a 32-bit word
                const bool is_upper = m.kind == Kind::u4 && i >= 16;
                I words;
                __builtin_memcpy(&words, codes + ((i / 4) % (m.kind == Kind::u4 ? 4 : 8)) * 64 + part * LANES * 4, sizeof words);
                I code;
                if (m.kind == Kind::u4) {
                    code = (words >> static_cast<int>(8 * (i % 4) + (is_upper ? 4 : 0))) & 15;
                    if (!m.has_minimum) code -= 8;
                } else {
                    code = (words << static_cast<int>(24 - 8 * (i % 4))) >> 24;
                }
                const F value = to_float(code) * scale;
                store(out + (done + i) * PANEL + part * LANES, m.has_minimum ? value + minimum : value);
            }
        }
    }
}

// out[r][p * 16 ..] += sum over k of a[r][k] * panels[p][k][0..16), k ascending. R rows, P panels `stride` apart.
template <int R, int P>
INLINE void float_tile(const float* a, int64_t lda, const float* panels, int64_t stride, int64_t ldb, int64_t depth,
                       float* out, int64_t ldc) {
    F sums[R][P][PARTS];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p)
            for (int part = 0; part < PARTS; ++part) sums[r][p][part] = load(out + r * ldc + p * PANEL + part * LANES);
    for (int64_t k = 0; k < depth; ++k)
        for (int p = 0; p < P; ++p)
            for (int part = 0; part < PARTS; ++part) {
                const F b = load(panels + p * stride + k * ldb + part * LANES);
                for (int r = 0; r < R; ++r) sums[r][p][part] = fma(set1(a[r * lda + k]), b, sums[r][p][part]);
            }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p)
            for (int part = 0; part < PARTS; ++part) store(out + r * ldc + p * PANEL + part * LANES, sums[r][p][part]);
}

// Any number of rows by one panel of 16 columns.
INLINE void float_rows(const float* a, int64_t lda, const float* panel, int64_t ldb, int64_t depth, int64_t rows, float* out,
                       int64_t ldc) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) float_tile<4, 1>(a + r * lda, lda, panel, 0, ldb, depth, out + r * ldc, ldc);
    for (; r + 2 <= rows; r += 2) float_tile<2, 1>(a + r * lda, lda, panel, 0, ldb, depth, out + r * ldc, ldc);
    for (; r < rows; ++r) float_tile<1, 1>(a + r * lda, lda, panel, 0, ldb, depth, out + r * ldc, ldc);
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
    // half-size pieces where there are too few whole ones for an even share; gate and up must keep 32 pairs together
    const int64_t unit = m.is_gate_up || m.panels >= 16 * UNIT * team.size() ? UNIT : UNIT / 2;
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
