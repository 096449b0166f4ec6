// One step of the whole decoder: every thread runs `forward_step`, sharing each loop and meeting after it.

// body(row) for every row. A single row is done by each thread for itself, in memory of its own: cheaper than meeting.
template <class Body>
INLINE void each_row(Team& team, int64_t rows, const Body& body) {
    if (rows == 1) body(0);
    else for_each(team, rows, 1, body);
}

// The view of a workspace that one thread has: its own place for what `each_row` makes of a single row.
INLINE Workspace view_of(const Workspace& w, int64_t rows, int thread) {
    if (rows > 1) return w;
    Workspace own = w;
    own.normed += thread * w.row_width;
    own.quantized.codes += thread * w.row_width;
    own.quantized.scale += thread * (w.row_width / BLOCK);
    own.quantized.sum += thread * (w.row_width / BLOCK);
    own.quantized.code_sum += thread * (w.row_width / BLOCK);
    return own;
}

INLINE void norm_rows(Team& team, const float* x, const float* weight, float eps, int64_t rows, int64_t width,
                      const Workspace& w, bool quantizes) {
    each_row(team, rows, [&](int64_t row) {
        float* out = w.normed + row * width;
        rms_norm_row(x + row * width, weight, eps, width, out);
        if (quantizes) quantize_row(out, width, w.quantized, row, rows);
    });
}

INLINE bool any_quantizes(const Linear& linear) {
    for (int64_t i = 0; i < linear.num_parts; ++i)
        if (linear.parts[i]->quantizes) return true;
    return false;
}

// out[row * width + column] = (or +=) product + bias, all parts of a linear side by side.
template <bool ADDS>
INLINE void linear_rows(Team& team, const Linear& linear, const Input& in, float* out, int64_t width) {
    int64_t offset = 0;
    for (int64_t i = 0; i < linear.num_parts; ++i) {
        const Matrix& m = *linear.parts[i];
        const float* bias = linear.bias ? linear.bias + offset : nullptr;
        product(team, m, in, [&](int64_t first, int64_t panels, int64_t row, int64_t rows, const float* sums) {
            const int64_t columns = smaller(panels * PANEL, m.out_features - first * PANEL);
            for (int64_t r = 0; r < rows; ++r) {
                float* to = out + (row + r) * width + offset + first * PANEL;
                for (int64_t c = 0; c < columns; ++c) {
                    const float value = sums[r * WIDTH + c] + (bias ? bias[first * PANEL + c] : 0.0f);
                    to[c] = ADDS ? to[c] + value : value;
                }
            }
        });
        offset += m.out_features;
    }
}

// Panels of gate and up in turns, with bias [2 * width] = gate's | up's added from `column` on.
static void add_gate_up_bias(const float* sums, const float* bias, int64_t width, int64_t column, int64_t panels, float* out) {
    for (int64_t p = 0; p < panels; ++p)
        for (int64_t c = 0; c < PANEL; ++c) {
            const int64_t at = column + p / 2 * PANEL + c;
            out[p * PANEL + c] = sums[p * PANEL + c] + (at < width ? bias[p % 2 * width + at] : 0.0f);
        }
}

// inner = silu(gate) * up, quantized for the next product where that one wants it.
INLINE void gate_up_rows(Team& team, const Model& model, const Layer& layer, const Input& in, const Workspace& w) {
    const int64_t width = model.intermediate;
    const bool quantizes = any_quantizes(layer.down);
    if (!layer.gate_up.parts[0]->is_gate_up) {
        linear_rows<false>(team, layer.gate_up, in, w.gate_up, 2 * width);
        for_each(team, in.num_rows, 1, [&](int64_t row) {
            const float* gate = w.gate_up + row * 2 * width;
            silu_mul_row(gate, gate + width, width, w.inner + row * width);
            if (quantizes) quantize_row(w.inner + row * width, width, w.inner_quantized, row, in.num_rows);
        });
        return;
    }
    const float* bias = layer.gate_up.bias;
    product(team, *layer.gate_up.parts[0], in,
            [&](int64_t first, int64_t panels, int64_t row, int64_t rows, const float* sums) {
        const int64_t column = first / 2 * PANEL, columns = smaller(panels / 2 * PANEL, width - column);
        for (int64_t r = 0; r < rows; ++r) {
            alignas(64) float inner[UNIT / 2 * PANEL], biased[UNIT * PANEL];
            const float* pairs = sums + r * WIDTH;
            if (bias) {
                add_gate_up_bias(pairs, bias, width, column, panels, biased);
                pairs = biased;
            }
            for (int64_t p = 0; p < panels; p += 2)
                silu_mul_row(pairs + p * PANEL, pairs + (p + 1) * PANEL, PANEL, inner + p / 2 * PANEL);
            if (quantizes) quantize_block(inner, columns, w.inner_quantized, column / BLOCK * in.num_rows + row + r);
            __builtin_memcpy(w.inner + (row + r) * width + column, inner, columns * 4);
        }
    });
}

INLINE void rotate_and_write(Team& team, const Model& model, const Layer& layer, const Step& step, const Cache& cache,
                             float* qkv) {
    const int64_t dim = model.head_dim, heads = model.num_heads, kv_heads = model.num_kv_heads;
    const int64_t width = (heads + 2 * kv_heads) * dim;
    for_each(team, step.num_rows, 1, [&](int64_t row) {
        float* x = qkv + row * width;
        const int64_t position = step.positions[row];
        for (int64_t head = 0; head < heads + kv_heads; ++head) {
            const float* norm = head < heads ? layer.query_norm : layer.key_norm;
            if (norm) rms_norm_row(x + head * dim, norm, model.eps, dim, x + head * dim);
            rope_head(x + head * dim, model.cos + position * (dim / 2), model.sin + position * (dim / 2), dim);
        }
        write_row(cache, step, row, x + heads * dim, kv_heads, dim);
    });
}

INLINE void attend(Team& team, const Attention& attention) {
    for_each_single(team, attention.step.num_items, [&](int64_t i) { attention.run(attention.step.items[i]); });
    if (attention.step.num_merges)
        for_each(team, attention.step.num_merges, 1, [&](int64_t i) { attention.run(attention.step.merges[i]); });
}

INLINE void layer_step(Team& team, const Model& model, const Layer& layer, const Step& step, const Cache& cache,
                       const Workspace& w) {
    const int64_t rows = step.num_rows, hidden = model.hidden, heads_width = model.num_heads * model.head_dim;
    const int64_t qkv_width = heads_width + 2 * model.num_kv_heads * model.head_dim;
    norm_rows(team, w.x, layer.attention_norm, model.eps, rows, hidden, w, any_quantizes(layer.qkv));
    linear_rows<false>(team, layer.qkv, {w.normed, hidden, &w.quantized, rows}, w.qkv, qkv_width);
    rotate_and_write(team, model, layer, step, cache, w.qkv);
    attend(team, {w.qkv, qkv_width, model.num_heads, model.num_kv_heads, model.head_dim, layer.window, cache, step,
                  w.attended, w.partials});
    if (any_quantizes(layer.output))
        each_row(team, rows, [&](int64_t row) {
            quantize_row(w.attended + row * heads_width, heads_width, w.quantized, row, rows);
        });
    linear_rows<true>(team, layer.output, {w.attended, heads_width, &w.quantized, rows}, w.x, hidden);
    norm_rows(team, w.x, layer.mlp_norm, model.eps, rows, hidden, w, any_quantizes(layer.gate_up));
    gate_up_rows(team, model, layer, {w.normed, hidden, &w.quantized, rows}, w);
    linear_rows<true>(team, layer.down, {w.inner, model.intermediate, &w.inner_quantized, rows}, w.x, hidden);
}

static void forward_step(Team& team, const Model& model, const Step& step, const Cache& cache, const Workspace& shared,
                         float* hidden) {
    everywhere(team, [&](int thread) {
        const Workspace w = view_of(shared, step.num_rows, thread);
        for_each(team, step.num_rows, 1,
                 [&](int64_t row) { gather_row(*model.embedding, step.token_ids[row], w.x + row * model.hidden); });
        Cache layer_cache = cache;
        for (int64_t i = 0; i < model.num_layers; ++i) {
            layer_step(team, model, model.layers[i], step, layer_cache, w);
            layer_cache.data += cache.num_blocks * cache.block_bytes;
        }
        for_each(team, step.num_rows, 1, [&](int64_t row) {
            __builtin_memcpy(hidden + row * model.hidden, w.x + row * model.hidden, model.hidden * 4);
        });
    });
}

static void logits_of(Team& team, const Model& model, const float* hidden, int64_t rows, const Workspace& shared, float* out) {
    const Matrix* head = model.head;
    everywhere(team, [&](int thread) {
        const Workspace w = view_of(shared, rows, thread);
        norm_rows(team, hidden, model.norm, model.eps, rows, model.hidden, w, head->quantizes);
        linear_rows<false>(team, {&head, 1, nullptr}, {w.normed, model.hidden, &w.quantized, rows}, out, model.vocab);
    });
}

// Keeps the k largest of a row in (value descending, id ascending) order.
INLINE void keep_best(float value, int64_t id, int64_t k, float* values, int64_t* ids) {
    int64_t at = k;
    while (at > 0 && (value > values[at - 1] || (value == values[at - 1] && id < ids[at - 1]))) --at;
    if (at == k) return;
    for (int64_t i = k - 1; i > at; --i) values[i] = values[i - 1], ids[i] = ids[i - 1];
    values[at] = value;
    ids[at] = id;
}

static void top_of(Team& team, const Model& model, const float* hidden, int64_t rows, const Workspace& shared, int64_t k,
                   float* values, int64_t* ids, bool* is_finite) {
    const Matrix& head = *model.head;
    everywhere(team, [&](int thread) {
        const Workspace w = view_of(shared, rows, thread);
        float* own_values = values + thread * rows * k;
        int64_t* own_ids = ids + thread * rows * k;
        bool* own_finite = is_finite + thread * rows;
        for (int64_t i = 0; i < rows * k; ++i) own_values[i] = -__builtin_inff(), own_ids[i] = model.vocab;
        for (int64_t i = 0; i < rows; ++i) own_finite[i] = true;
        norm_rows(team, hidden, model.norm, model.eps, rows, model.hidden, w, head.quantizes);
        product(team, head, {w.normed, model.hidden, &w.quantized, rows},
                [&](int64_t first, int64_t panels, int64_t row, int64_t count, const float* sums) {
            const int64_t columns = smaller(panels * PANEL, head.out_features - first * PANEL);
            for (int64_t r = row; r < row + count; ++r) {
                const float* from = sums + (r - row) * WIDTH;
                float* best = own_values + r * k;
                bool is_candidate = false, bad = false;
                for (int64_t c = 0; c < columns; ++c) {
                    is_candidate |= from[c] >= best[k - 1];
                    bad |= !(from[c] - from[c] == 0.0f);
                }
                if (bad) own_finite[r] = false;
                if (is_candidate)
                    for (int64_t c = 0; c < columns; ++c) keep_best(from[c], first * PANEL + c, k, best, own_ids + r * k);
            }
        });
    });
}
