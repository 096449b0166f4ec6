// The Python face: single ops, and the names under which Python finds everything.

#include "bindings_decoder.hpp"

using namespace powertrain;

namespace {

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

void gather(Kernels& k, const PyMatrix& matrix, Vector<const int64_t> ids, Table<float> out) {
    check(ids.shape(0) == out.shape(0) && static_cast<int64_t>(out.shape(1)) == matrix.m.in_features && !matrix.m.is_gate_up,
          "gather: out must be [ids, in]");
    check_ids(ids.data(), ids.shape(0), matrix.m.out_features, "row");
    nb::gil_scoped_release release;
    k.level.gather(k.team, matrix.m, ids.data(), ids.shape(0), out.data());
}

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
