// The Python face: checks shapes and ranges, owns the memory of a step, and hands plain pointers to the chosen level.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "level.hpp"

namespace nb = nanobind;
using namespace powertrain;

namespace {

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr int64_t MAX_FEATURES = 1 << 24;

void check(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

// The product of sizes, refused where it leaves 64 bits: a wrapped one could equal the length of a small array.
template <class... Sizes>
int64_t product_of(Sizes... sizes) {
    int64_t result = 1;
    const bool overflows = (__builtin_mul_overflow(result, static_cast<int64_t>(sizes), &result) || ...);
    check(!overflows, "sizes whose product does not fit 64 bits");
    return result;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::vector<const Level*> levels() {
    std::vector<const Level*> found;
#ifdef POWERTRAIN_HAS_X86
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        found.push_back(&avx512_level());
    if (has_avx2) found.push_back(&avx2_level());
#endif
    found.push_back(&portable_level());
    return found;
}

// A thread team and the instruction set its work is done with.
struct Kernels {
    Team team;
    const Level& level;

    Kernels(int threads, const std::string& name) : team(checked(threads)), level(find(name)) {}

    static int checked(int threads) {
        check(threads >= 1 && threads <= 1024, "threads must be in 1..1024, got " + std::to_string(threads));
        return threads;
    }
    static const Level& find(const std::string& name) {
        for (const Level* level : levels())
            if (name.empty() || name == level->name) return *level;
        throw std::invalid_argument("this processor does not run the level '" + name + "'");
    }
};

// Memory that only grows, aligned for every vector.
class Arena {
public:
    template <class T>
    T* take(int64_t count) {
        used_ = (used_ + 63) / 64 * 64;
        T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += count * static_cast<int64_t>(sizeof(T));
        return at;
    }
    // Runs `carve` twice: to measure, and to hand out.
    template <class Carve>
    void layout(const Carve& carve) {
        base_ = nullptr;
        used_ = 0;
        carve();
        if (used_ + 64 > static_cast<int64_t>(memory_.size())) memory_ = std::vector<uint8_t>(used_ + 64);
        base_ = memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64;
        used_ = 0;
        carve();
    }

private:
    std::vector<uint8_t> memory_;
    uint8_t* base_ = nullptr;
    int64_t used_ = 0;
};

Quantized take_quantized(Arena& arena, int64_t width, int64_t rows) {
    const int64_t blocks = ceil_div(width, BLOCK) * rows;
    Quantized q;
    q.codes = arena.take<int8_t>(blocks * BLOCK);
    q.scale = arena.take<float>(blocks);
    q.sum = arena.take<float>(blocks);
    q.code_sum = arena.take<int32_t>(blocks);
    return q;
}

struct PyMatrix {
    Matrix m{};
    Vector<const uint8_t> stream;

    PyMatrix(Vector<const uint8_t> bytes, const std::string& kind, int64_t out_features, int64_t in_features,
             int64_t group_blocks, const std::string& scale, bool has_minimum, bool is_gate_up, bool quantizes)
        : stream(bytes) {
        check(out_features > 0 && in_features > 0 && out_features <= MAX_FEATURES && in_features <= MAX_FEATURES,
              "a matrix has 1 to 2^24 outputs and inputs");
        m.kind = kind == "u4" ? Kind::u4 : kind == "s8" ? Kind::s8 : kind == "f32" ? Kind::f32 : kind == "f16" ? Kind::f16
                 : kind == "bf16" ? Kind::bf16 : throw std::invalid_argument("unknown kind '" + kind + "'");
        check(scale == "f16" || scale == "f32", "scale must be f16 or f32, got '" + scale + "'");
        const bool is_float = m.kind != Kind::u4 && m.kind != Kind::s8;
        check(!is_float || !(has_minimum || quantizes), "float kinds have no minimum and take float activations");
        check(!is_gate_up || out_features % 2 == 0, "gate and up must be equally long");
        m.stream = stream.data();
        m.half_scale = scale == "f16";
        m.has_minimum = has_minimum;
        m.is_gate_up = is_gate_up;
        m.quantizes = quantizes;
        m.out_features = out_features;
        m.in_features = in_features;
        m.panels = is_gate_up ? 2 * ceil_div(out_features / 2, PANEL) : ceil_div(out_features, PANEL);
        if (is_float) {
            m.panel_bytes = in_features * PANEL * (m.kind == Kind::f32 ? 4 : 2);
        } else {
            m.blocks = ceil_div(in_features, BLOCK);
            check(group_blocks >= 1 && m.blocks % group_blocks == 0, "group_blocks must divide the blocks of a row");
            m.group_blocks = static_cast<int32_t>(group_blocks);
            m.header_bytes = PANEL * (m.half_scale ? 2 : 4) * (has_minimum ? 2 : 1);
            m.block_bytes = BLOCK * PANEL / (m.kind == Kind::u4 ? 2 : 1);
            m.panel_bytes = m.blocks / group_blocks * (m.header_bytes + group_blocks * m.block_bytes);
        }
        const int64_t expected = m.panels * m.panel_bytes;
        check(static_cast<int64_t>(stream.shape(0)) == expected,
              "the stream has " + std::to_string(stream.shape(0)) + " bytes, expected " + std::to_string(expected));
    }
};

// -- single ops ----------------------------------------------------------------------------------------------------

void rms_norm(Kernels& k, Table<const float> x, Vector<const float> weight, float eps, Table<float> out) {
    const int64_t rows = x.shape(0), width = x.shape(1);
    check(static_cast<int64_t>(weight.shape(0)) == width && out.shape(0) == x.shape(0) && out.shape(1) == x.shape(1),
          "rms_norm: weight and out must fit x");
    nb::gil_scoped_release release;
    k.level.rms_norm(k.team, x.data(), weight.data(), eps, rows, width, out.data());
}

void apply_rope(Kernels& k, nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu> x, Table<const float> cos,
                Table<const float> sin) {
    check(x.shape(2) % 2 == 0 && cos.shape(0) == x.shape(0) && cos.shape(1) * 2 == x.shape(2) &&
              sin.shape(0) == cos.shape(0) && sin.shape(1) == cos.shape(1),
          "apply_rope: cos and sin must be [rows, dim / 2]");
    nb::gil_scoped_release release;
    k.level.apply_rope(k.team, x.data(), cos.data(), sin.data(), x.shape(0), x.shape(1), x.shape(2));
}

void silu_mul(Kernels& k, Table<const float> gate_up, Table<float> out) {
    check(gate_up.shape(1) == 2 * out.shape(1) && gate_up.shape(0) == out.shape(0), "silu_mul: out must be half of gate_up");
    nb::gil_scoped_release release;
    k.level.silu_mul(k.team, gate_up.data(), out.shape(0), out.shape(1), out.data());
}

void matmul(Kernels& k, const PyMatrix& matrix, Table<const float> x, Table<float> out) {
    const Matrix& m = matrix.m;
    check(static_cast<int64_t>(x.shape(1)) == m.in_features && static_cast<int64_t>(out.shape(1)) == m.out_features &&
              x.shape(0) == out.shape(0),
          "matmul: x must be [rows, in] and out [rows, out]");
    if (x.shape(0) == 0) return;
    nb::gil_scoped_release release;
    Arena arena;
    Quantized scratch{};
    arena.layout([&] { if (m.quantizes) scratch = take_quantized(arena, m.in_features, x.shape(0)); });
    k.level.matmul(k.team, m, x.data(), x.shape(0), out.data(), scratch);
}

void check_ids(const int64_t* ids, int64_t count, int64_t limit, const char* what) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= limit)
            throw std::invalid_argument(std::string(what) + " " + std::to_string(ids[i]) + " is not in 0.." +
                                        std::to_string(limit - 1));
}

void gather(Kernels& k, const PyMatrix& matrix, Vector<const int64_t> ids, Table<float> out) {
    check(ids.shape(0) == out.shape(0) && static_cast<int64_t>(out.shape(1)) == matrix.m.in_features && !matrix.m.is_gate_up,
          "gather: out must be [ids, in]");
    check_ids(ids.data(), ids.shape(0), matrix.m.out_features, "row");
    nb::gil_scoped_release release;
    k.level.gather(k.team, matrix.m, ids.data(), ids.shape(0), out.data());
}

// -- steps ---------------------------------------------------------------------------------------------------------

// The paged cache of all layers; its bytes belong to the caller.
struct PyCache {
    Cache c{};
    int64_t num_layers, num_kv_heads, head_dim;
    Vector<uint8_t> data;

    static int64_t head_bytes(CacheType type, int64_t block_size, int64_t dim) {
        const int64_t element = type == CacheType::f32 ? 4 : type == CacheType::f16 ? 2 : 1;
        const int64_t elements = block_size * (dim + ceil_div(dim, PANEL) * PANEL);
        return ceil_div(elements * element + (type == CacheType::s8 ? 8 * block_size : 0), 64) * 64;
    }
    static CacheType type_of(const std::string& name) {
        return name == "float32" ? CacheType::f32 : name == "float16" ? CacheType::f16 : name == "int8" ? CacheType::s8
               : throw std::invalid_argument("unknown cache type '" + name + "': float32, float16 or int8");
    }

    PyCache(Vector<uint8_t> bytes, const std::string& type, int64_t layers, int64_t num_blocks, int64_t block_size,
            int64_t kv_heads, int64_t dim)
        : num_layers(layers), num_kv_heads(kv_heads), head_dim(dim), data(bytes) {
        check(block_size > 0 && block_size % TILE == 0 && block_size <= MAX_FEATURES, "block_size must be a multiple of 16");
        check(dim >= 2 && dim % 2 == 0 && dim <= MAX_HEAD_DIM, "head_dim must be even and at most 256");
        c.data = data.data();
        c.type = type_of(type);
        c.num_blocks = num_blocks;
        c.block_size = block_size;
        c.head_bytes = head_bytes(c.type, block_size, dim);
        check(layers > 0 && num_blocks > 0 && kv_heads > 0, "a cache needs layers, blocks and key heads");
        c.block_bytes = product_of(kv_heads, c.head_bytes);
        const int64_t expected = product_of(layers, num_blocks, c.block_bytes);
        check(static_cast<int64_t>(data.shape(0)) == expected,
              "the cache has " + std::to_string(data.shape(0)) + " bytes, expected " + std::to_string(expected));
    }
};

// A step's metadata as the kernels want it, built from lengths and tables.
struct StepPlan {
    Step step{};
    std::vector<int64_t> positions, context_lens;
    std::vector<int32_t> sequence_of;
    std::vector<AttentionItem> items;
    std::vector<MergeItem> merges;
    int64_t num_partials = 0;

    void build(const Vector<const int32_t>& query_lens, const Vector<const int32_t>& contexts,
               const Table<const int64_t>& tables, const Cache& cache, int64_t heads, int64_t kv_heads, int threads) {
        const int64_t num_sequences = query_lens.shape(0), group = heads / kv_heads;
        check(contexts.shape(0) == query_lens.shape(0) && tables.shape(0) == query_lens.shape(0),
              "query_lens, context_lens and block_tables must have one entry per sequence");
        positions.clear(), context_lens.clear(), sequence_of.clear(), items.clear(), merges.clear();
        num_partials = 0;
        for (int64_t s = 0; s < num_sequences; ++s) {
            const int64_t count = query_lens.data()[s], context = contexts.data()[s], width = tables.shape(1);
            check(count >= 1 && context >= count && ceil_div(context, cache.block_size) <= width,
                  "sequence " + std::to_string(s) + ": " + std::to_string(count) + " of " + std::to_string(context) +
                      " tokens do not fit a table of " + std::to_string(width) + " blocks");
            check_ids(tables.data() + s * width, ceil_div(context, cache.block_size), cache.num_blocks, "block");
            context_lens.push_back(context);
            for (int64_t i = 0; i < count; ++i) {
                positions.push_back(context - count + i);
                sequence_of.push_back(static_cast<int32_t>(s));
            }
        }
        step.num_rows = static_cast<int64_t>(positions.size());
        int64_t row = 0;
        const int64_t tile = std::max<int64_t>(1, 48 / group);
        // enough pieces for everybody; only single tokens are split along their context
        const bool splits = num_sequences * kv_heads < 8 * threads;
        for (int64_t s = 0; s < num_sequences; ++s) {
            const int64_t count = query_lens.data()[s], chunks = ceil_div(context_lens[s], CHUNK);
            for (int32_t head = 0; head < kv_heads; ++head) {
                const int32_t sequence = static_cast<int32_t>(s);
                if (count == 1 && chunks > 1 && splits) {
                    merges.push_back({head, row, num_partials, chunks});
                    for (int64_t chunk = 0; chunk < chunks; ++chunk)
                        items.push_back({sequence, head, row, row + 1, chunk, chunk + 1, num_partials++});
                    continue;
                }
                for (int64_t first = 0; first < count; first += tile) {
                    const int64_t last = std::min(first + tile, count);
                    const int64_t end = ceil_div(positions[row + last - 1] + 1, CHUNK);
                    items.push_back({sequence, head, row + first, row + last, 0, end, -1});
                }
            }
            row += count;
        }
        step.num_sequences = num_sequences;
        step.table_width = static_cast<int64_t>(tables.shape(1));
        step.block_tables = tables.data();
        step.positions = positions.data();
        step.sequence_of = sequence_of.data();
        step.context_lens = context_lens.data();
        step.items = items.data();
        step.num_items = static_cast<int64_t>(items.size());
        step.merges = merges.data();
        step.num_merges = static_cast<int64_t>(merges.size());
    }
};

void write_kv(Kernels& k, Table<const float> key_value, PyCache& cache, int64_t layer, Vector<const int32_t> query_lens,
              Vector<const int32_t> context_lens, Table<const int64_t> block_tables) {
    StepPlan plan;
    plan.build(query_lens, context_lens, block_tables, cache.c, cache.num_kv_heads, cache.num_kv_heads, k.team.size());
    check(layer >= 0 && layer < cache.num_layers, "there is no such layer in the cache");
    check(static_cast<int64_t>(key_value.shape(0)) == plan.step.num_rows &&
              static_cast<int64_t>(key_value.shape(1)) == 2 * cache.num_kv_heads * cache.head_dim,
          "key_value must be [tokens, 2 * kv_heads * head_dim]");
    Cache at = cache.c;
    at.data += layer * at.num_blocks * at.block_bytes;
    nb::gil_scoped_release release;
    k.level.write_kv(k.team, key_value.data(), at, plan.step, cache.num_kv_heads, cache.head_dim);
}

void paged_attention(Kernels& k, Table<const float> query, PyCache& cache, int64_t layer, Vector<const int32_t> query_lens,
                     Vector<const int32_t> context_lens, Table<const int64_t> block_tables, int64_t window,
                     Table<float> out) {
    const int64_t dim = cache.head_dim, heads = static_cast<int64_t>(query.shape(1)) / dim, kv_heads = cache.num_kv_heads;
    check(heads * dim == static_cast<int64_t>(query.shape(1)) && heads > 0 && heads % kv_heads == 0 &&
              heads / kv_heads <= MAX_GROUP,
          "query must be [tokens, heads * head_dim], with at most 64 heads per key head");
    check(layer >= 0 && layer < cache.num_layers, "there is no such layer in the cache");
    StepPlan plan;
    plan.build(query_lens, context_lens, block_tables, cache.c, heads, kv_heads, k.team.size());
    check(static_cast<int64_t>(query.shape(0)) == plan.step.num_rows && out.shape(0) == query.shape(0) &&
              out.shape(1) == query.shape(1) && window >= 0,
          "query and out must have a row per token");
    Cache at = cache.c;
    at.data += layer * at.num_blocks * at.block_bytes;
    nb::gil_scoped_release release;
    Arena arena;
    float* partials = nullptr;
    arena.layout([&] { partials = arena.take<float>(plan.num_partials * (heads / kv_heads) * (ceil_div(dim, PANEL) * PANEL + 2)); });
    k.level.attention(k.team, query.data(), at, plan.step, heads, kv_heads, dim, window, out.data(), partials);
}

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
        arena_.layout([&] {
            w.x = arena_.take<float>(rows * m.hidden);
            w.normed = arena_.take<float>(rows * m.hidden);
            w.qkv = arena_.take<float>(rows * (heads + 2 * kv));
            w.attended = arena_.take<float>(rows * heads);
            w.gate_up = arena_.take<float>(separate ? rows * 2 * m.intermediate : 0);
            w.inner = arena_.take<float>(rows * m.intermediate);
            w.quantized = take_quantized(arena_, std::max(m.hidden, heads), rows);
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

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const Level* level : levels()) names.emplace_back(level->name);
    return names;
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Kernels for CPUs. Arrays are C-contiguous and float32 unless named otherwise.";
    module.def("levels", &level_names, "Instruction sets this processor runs, best first.");

    nb::class_<Kernels>(module, "Team")
        .def(nb::init<int, const std::string&>(), nb::arg("threads"), nb::arg("level") = "")
        .def_prop_ro("threads", [](const Kernels& k) { return k.team.size(); })
        .def_prop_ro("level", [](const Kernels& k) { return std::string(k.level.name); });

    nb::class_<PyMatrix>(module, "Matrix")
        .def(nb::init<Vector<const uint8_t>, const std::string&, int64_t, int64_t, int64_t, const std::string&, bool, bool,
                      bool>(),
             nb::arg("stream").noconvert(), nb::arg("kind"), nb::arg("out_features"), nb::arg("in_features"), nb::kw_only(),
             nb::arg("group_blocks") = 0, nb::arg("scale") = "f16", nb::arg("has_minimum") = false,
             nb::arg("is_gate_up") = false, nb::arg("quantizes_activations") = false);

    nb::class_<PyCache>(module, "Cache")
        .def(nb::init<Vector<uint8_t>, const std::string&, int64_t, int64_t, int64_t, int64_t, int64_t>(),
             nb::arg("data").noconvert(),
             nb::arg("type"), nb::arg("num_layers"), nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("num_kv_heads"),
             nb::arg("head_dim"))
        .def_static("bytes_per_block", [](const std::string& type, int64_t block_size, int64_t kv_heads, int64_t dim) {
            check(block_size > 0 && block_size <= MAX_FEATURES && dim > 0 && dim <= MAX_HEAD_DIM, "impossible sizes of a block");
            return product_of(kv_heads, PyCache::head_bytes(PyCache::type_of(type), block_size, dim));
        });

    // outputs, and what is changed in place, must be the caller's own memory and never a converted copy
    module.def("rms_norm", &rms_norm, nb::arg("team"), nb::arg("x"), nb::arg("weight"), nb::arg("eps"),
               nb::arg("out").noconvert());
    module.def("apply_rope", &apply_rope, nb::arg("team"), nb::arg("x").noconvert(), nb::arg("cos"), nb::arg("sin"));
    module.def("silu_mul", &silu_mul, nb::arg("team"), nb::arg("gate_up"), nb::arg("out").noconvert());
    module.def("matmul", &matmul, nb::arg("team"), nb::arg("matrix"), nb::arg("x"), nb::arg("out").noconvert());
    module.def("gather", &gather, nb::arg("team"), nb::arg("matrix"), nb::arg("ids"), nb::arg("out").noconvert());
    module.def("write_kv", &write_kv, nb::arg("team"), nb::arg("key_value"), nb::arg("cache"), nb::arg("layer"),
               nb::arg("query_lens"), nb::arg("context_lens"), nb::arg("block_tables"));
    module.def("paged_attention", &paged_attention, nb::arg("team"), nb::arg("query"), nb::arg("cache"), nb::arg("layer"),
               nb::arg("query_lens"), nb::arg("context_lens"), nb::arg("block_tables"), nb::arg("window"),
               nb::arg("out").noconvert());

    nb::class_<PyDecoder>(module, "Decoder")
        .def(nb::init<Kernels&, int64_t, int64_t, int64_t, int64_t, int64_t, float, const PyMatrix&, const PyMatrix&,
                      Vector<const float>, Table<const float>, Table<const float>>(),
             nb::arg("team"), nb::arg("hidden_size"), nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"),
             nb::arg("intermediate_size"), nb::arg("eps"), nb::arg("embedding"), nb::arg("head"), nb::arg("norm"),
             nb::arg("cos"), nb::arg("sin"), nb::keep_alive<1, 2>())
        .def("add_layer", &PyDecoder::add_layer, nb::arg("attention_norm"), nb::arg("qkv"), nb::arg("qkv_bias").none(),
             nb::arg("query_norm").none(), nb::arg("key_norm").none(), nb::arg("output"), nb::arg("output_bias").none(),
             nb::arg("mlp_norm"), nb::arg("gate_up"), nb::arg("gate_up_bias").none(), nb::arg("down"),
             nb::arg("down_bias").none(), nb::arg("window"))
        .def("forward", &PyDecoder::forward, nb::arg("ids"), nb::arg("query_lens"), nb::arg("context_lens"),
             nb::arg("block_tables"), nb::arg("cache"), nb::arg("out").noconvert())
        .def("logits", &PyDecoder::logits, nb::arg("hidden"), nb::arg("out").noconvert())
        .def("top", &PyDecoder::top, nb::arg("hidden"), nb::arg("values").noconvert(), nb::arg("ids").noconvert(),
             nb::arg("is_finite").noconvert());
}
