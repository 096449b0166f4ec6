// The paged cache as Python holds it, and the metadata of a step built from lengths and block tables.
#pragma once

#include "bindings.hpp"

namespace powertrain {

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
        step.table_width = static_cast<int64_t>(tables.shape(1));
        step.block_tables = tables.data();
        step.positions = positions.data();
        step.sequence_of = sequence_of.data();
        step.items = items.data();
        step.num_items = static_cast<int64_t>(items.size());
        step.merges = merges.data();
        step.num_merges = static_cast<int64_t>(merges.size());
    }
};

}  // namespace powertrain
