// A whole decoder as Python builds it, layer by layer, and runs it, a step a call.
#pragma once

#include "bindings_step.hpp"

namespace powertrain {

// Vectors and matrices of one layer, kept alive with it: a copy of a matrix holds the same bytes.
struct PyLayer {
    using Parts = std::vector<const PyMatrix*>;
    std::vector<Vector<const float>> vectors;
    std::vector<std::unique_ptr<PyMatrix>> matrices;
    std::vector<std::unique_ptr<std::vector<const Matrix*>>> parts;
    Layer layer{};

    const float* hold(const std::optional<Vector<const float>>& vector, int64_t size, const char* name) {
        if (!vector) return nullptr;
        check(static_cast<int64_t>(vector->shape(0)) == size, std::string(name) + " has the wrong length");
        vectors.push_back(*vector);
        return vector->data();
    }
    Linear linear(const Parts& given, const std::optional<Vector<const float>>& bias, int64_t out, int64_t in,
                  const char* name) {
        auto pointers = std::make_unique<std::vector<const Matrix*>>();
        int64_t outputs = 0;
        for (const PyMatrix* matrix : given) {
            check(matrix->m.in_features == in, std::string(name) + " has the wrong number of inputs");
            check(!matrix->m.is_gate_up || (std::string(name) == "gate_up" && given.size() == 1),
                  std::string(name) + " cannot be interleaved");
            outputs += matrix->m.out_features;
            matrices.push_back(std::make_unique<PyMatrix>(*matrix));
            pointers->push_back(&matrices.back()->m);
        }
        check(outputs == out, std::string(name) + " has the wrong number of outputs");
        parts.push_back(std::move(pointers));
        return {parts.back()->data(), static_cast<int64_t>(given.size()), hold(bias, out, name)};
    }
};

class PyDecoder {
public:
    PyDecoder(Kernels& kernels, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t dim, int64_t intermediate, float eps,
              const PyMatrix& embedding, const PyMatrix& head, Vector<const float> norm, Table<const float> cos,
              Table<const float> sin)
        : kernels_(kernels), embedding_(embedding), head_(head), norm_(norm), cos_(cos), sin_(sin) {
        check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= MAX_GROUP,
              "heads must be a multiple of key heads, at most 64 to one");
        check(dim >= 2 && dim % 2 == 0 && dim <= MAX_HEAD_DIM, "head_dim must be even and at most 256");
        check(embedding.m.in_features == hidden && head.m.in_features == hidden && !embedding.m.is_gate_up &&
                  !head.m.is_gate_up && embedding.m.out_features == head.m.out_features,
              "embedding and head must be [vocab, hidden]");
        check(static_cast<int64_t>(norm.shape(0)) == hidden, "norm must have one weight per hidden dimension");
        check(static_cast<int64_t>(cos.shape(1)) * 2 == dim && sin.shape(1) == cos.shape(1) && sin.shape(0) == cos.shape(0),
              "cos and sin must be [positions, head_dim / 2]");
        model_ = {hidden, heads, kv_heads, dim, intermediate, head.m.out_features, static_cast<int64_t>(cos.shape(0)), eps,
                  &embedding_.m, &head_.m, norm.data(), cos.data(), sin.data(), nullptr, 0};
    }

    PyDecoder(const PyDecoder&) = delete;

    void add_layer(Vector<const float> attention_norm, const PyLayer::Parts& qkv, std::optional<Vector<const float>> qkv_bias,
                   std::optional<Vector<const float>> query_norm, std::optional<Vector<const float>> key_norm,
                   const PyLayer::Parts& output, std::optional<Vector<const float>> output_bias,
                   Vector<const float> mlp_norm, const PyLayer::Parts& gate_up,
                   std::optional<Vector<const float>> gate_up_bias, const PyLayer::Parts& down,
                   std::optional<Vector<const float>> down_bias, int64_t window) {
        const int64_t dim = model_.head_dim, heads = model_.num_heads * dim, kv = model_.num_kv_heads * dim;
        auto held = std::make_unique<PyLayer>();
        Layer& layer = held->layer;
        layer.attention_norm = held->hold(attention_norm, model_.hidden, "attention_norm");
        layer.mlp_norm = held->hold(mlp_norm, model_.hidden, "mlp_norm");
        layer.query_norm = held->hold(query_norm, dim, "query_norm");
        layer.key_norm = held->hold(key_norm, dim, "key_norm");
        layer.qkv = held->linear(qkv, qkv_bias, heads + 2 * kv, model_.hidden, "qkv");
        layer.output = held->linear(output, output_bias, model_.hidden, heads, "output");
        layer.gate_up = held->linear(gate_up, gate_up_bias, 2 * model_.intermediate, model_.hidden, "gate_up");
        layer.down = held->linear(down, down_bias, model_.hidden, model_.intermediate, "down");
        check(window >= 0, "window must not be negative");
        layer.window = window;
        held_.push_back(std::move(held));
        layers_.push_back(layer);
        model_.layers = layers_.data();
        model_.num_layers = static_cast<int64_t>(layers_.size());
    }

    void forward(Vector<const int64_t> ids, Vector<const int32_t> query_lens, Vector<const int32_t> context_lens,
                 Table<const int64_t> block_tables, PyCache& cache, Table<float> out) {
        check(cache.num_layers == model_.num_layers && cache.num_kv_heads == model_.num_kv_heads &&
                  cache.head_dim == model_.head_dim,
              "this cache belongs to another model");
        nb::gil_scoped_release release;
        std::lock_guard lock(caller_);
        check_ids(ids.data(), ids.shape(0), model_.vocab, "token");
        plan_.build(query_lens, context_lens, block_tables, cache.c, model_.num_heads, model_.num_kv_heads,
                    kernels_.team.size());
        check(static_cast<int64_t>(ids.shape(0)) == plan_.step.num_rows &&
                  static_cast<int64_t>(out.shape(0)) == plan_.step.num_rows &&
                  static_cast<int64_t>(out.shape(1)) == model_.hidden,
              "ids must have one token per row and out must be [tokens, hidden]");
        for (int64_t context : plan_.context_lens)
            check(context <= model_.max_position, "a sequence is longer than the rotary tables");
        plan_.step.token_ids = ids.data();
        kernels_.level.forward(kernels_.team, model_, plan_.step, cache.c, workspace(plan_.step.num_rows), out.data());
    }

    void logits(Table<const float> hidden, Table<float> out) {
        check(static_cast<int64_t>(hidden.shape(1)) == model_.hidden && hidden.shape(0) == out.shape(0) &&
                  static_cast<int64_t>(out.shape(1)) == model_.vocab,
              "hidden must be [rows, hidden] and out [rows, vocab]");
        if (hidden.shape(0) == 0) return;
        nb::gil_scoped_release release;
        std::lock_guard lock(caller_);
        kernels_.level.logits(kernels_.team, model_, hidden.data(), hidden.shape(0), workspace(hidden.shape(0)), out.data());
    }

    void top(Table<const float> hidden, Table<float> values, Table<int64_t> ids, Vector<bool> is_finite) {
        const int64_t rows = hidden.shape(0), k = values.shape(1), threads = kernels_.team.size();
        check(static_cast<int64_t>(hidden.shape(1)) == model_.hidden && static_cast<int64_t>(values.shape(0)) == rows &&
                  ids.shape(0) == values.shape(0) && ids.shape(1) == values.shape(1) &&
                  static_cast<int64_t>(is_finite.shape(0)) == rows && k >= 1 && k <= model_.vocab,
              "values and ids must be [rows, k] and is_finite [rows]");
        if (rows == 0) return;
        nb::gil_scoped_release release;
        std::lock_guard lock(caller_);
        std::vector<float> best(threads * rows * k);
        std::vector<int64_t> best_ids(threads * rows * k);
        const auto finite = std::make_unique<bool[]>(threads * rows);
        kernels_.level.top(kernels_.team, model_, hidden.data(), rows, workspace(rows), k, best.data(), best_ids.data(),
                           finite.get());
        std::vector<int64_t> at(threads);
        for (int64_t row = 0; row < rows; ++row) {
            std::fill(at.begin(), at.end(), 0);
            is_finite.data()[row] = true;
            for (int64_t t = 0; t < threads; ++t) is_finite.data()[row] &= finite[t * rows + row];
            for (int64_t i = 0; i < k; ++i) {
                int64_t chosen = 0;
                auto place = [&](int64_t t) { return (t * rows + row) * k + at[t]; };
                for (int64_t t = 1; t < threads; ++t) {
                    if (at[t] == k) continue;
                    const bool is_first = at[chosen] == k || best[place(t)] > best[place(chosen)] ||
                                          (best[place(t)] == best[place(chosen)] && best_ids[place(t)] < best_ids[place(chosen)]);
                    if (is_first) chosen = t;
                }
                values.data()[row * k + i] = best[place(chosen)];
                ids.data()[row * k + i] = best_ids[place(chosen)];
                ++at[chosen];
            }
        }
    }

private:
    Workspace workspace(int64_t rows) {
        const Model& m = model_;
        const int64_t heads = m.num_heads * m.head_dim, kv = m.num_kv_heads * m.head_dim;
        bool separate = false;
        for (const Layer& layer : layers_) separate |= !layer.gate_up.parts[0]->is_gate_up;
        Workspace w{};
        // a multiple of 64 blocks: what two threads write never shares a cache line
        w.row_width = ceil_div(std::max(m.hidden, heads), 64 * BLOCK) * 64 * BLOCK;
        const int64_t copies = rows == 1 ? kernels_.team.size() : rows;
        arena_.layout([&] {
            w.x = arena_.take<float>(rows * m.hidden);
            w.normed = arena_.take<float>(copies * w.row_width);
            w.qkv = arena_.take<float>(rows * (heads + 2 * kv));
            w.attended = arena_.take<float>(rows * heads);
            w.gate_up = arena_.take<float>(separate ? rows * 2 * m.intermediate : 0);
            w.inner = arena_.take<float>(rows * m.intermediate);
            w.quantized = take_quantized(arena_, w.row_width, copies);
            w.inner_quantized = take_quantized(arena_, m.intermediate, rows);
            w.partials = arena_.take<float>(plan_.num_partials * (m.num_heads / m.num_kv_heads) *
                                            (ceil_div(m.head_dim, PANEL) * PANEL + 2));
        });
        return w;
    }

    Kernels& kernels_;
    const PyMatrix embedding_, head_;
    Vector<const float> norm_;
    Table<const float> cos_, sin_;
    Model model_{};
    std::vector<std::unique_ptr<PyLayer>> held_;
    std::vector<Layer> layers_;
    std::mutex caller_;  // plan and arena serve one call at a time; taken without Python's lock, so that neither waits for both
    StepPlan plan_;
    Arena arena_;
};

}  // namespace powertrain
