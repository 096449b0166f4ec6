// What crosses the border between the bindings and the code that is compiled once per instruction set.
// Plain data only: nothing here has code that a compiler could emit for the wrong processor.
#pragma once

#include <cstdint>

namespace powertrain {

constexpr int PANEL = 16;          // outputs that lie side by side in a weight stream
constexpr int BLOCK = 32;          // inputs that share one activation scale
constexpr int TILE = 16;           // positions that lie side by side in a cached key
constexpr int CHUNK = 256;         // positions of one softmax pass: fixed, so that no split changes a sum's order
constexpr int MAX_GROUP = 64;      // query heads that may share a key head
constexpr int MAX_HEAD_DIM = 256;

enum class Kind : int32_t { u4, s8, f32, f16, bf16 };
enum class CacheType : int32_t { f32, f16, s8 };

// A weight matrix [out, in] in panels; the layout is described in model/packed.py.
struct Matrix {
    const uint8_t* stream;
    Kind kind;
    bool half_scale;          // scales are float16, else float32
    bool has_minimum;         // w = code * scale + minimum
    bool is_gate_up;          // panels of gate and up alternate
    bool quantizes;           // activations are rounded to int8 per block
    int32_t group_blocks;     // blocks that share a scale
    int64_t out_features, in_features;
    int64_t panels, blocks;   // blocks: ceil(in / 32) for quantized kinds
    int64_t header_bytes, block_bytes, panel_bytes;
};

// Several matrices whose outputs stand side by side, and a bias over all of them (or null).
struct Linear {
    const Matrix* const* parts;
    int64_t num_parts;
    const float* bias;
};

struct Layer {
    const float *attention_norm, *query_norm, *key_norm, *mlp_norm;
    Linear qkv, output, gate_up, down;
    int64_t window;           // 0: none
};

struct Model {
    int64_t hidden, num_heads, num_kv_heads, head_dim, intermediate, vocab, max_position;
    float eps;
    const Matrix *embedding, *head;
    const float* norm;
    const float *cos, *sin;   // [max_position, head_dim / 2]
    const Layer* layers;
    int64_t num_layers;
};

// The paged cache: [layers, blocks, block_bytes]. Per key head of a block: keys [block_size / 16][head_dim][16], values
// [block_size][head_dim padded to 16], and for int8 the scales of keys and of values, float32 [block_size] each.
struct Cache {
    uint8_t* data;
    CacheType type;
    int64_t num_blocks, block_size, head_bytes, block_bytes;
};

// A share of one sequence's attention: queries [first_query, last_query) of the step's rows over a range of chunks.
struct AttentionItem {
    int32_t sequence, kv_head;
    int64_t first_row, last_row;       // rows of the step
    int64_t first_chunk, last_chunk;
    int64_t partial;                   // where its unmerged result goes, -1: it covers the whole context
};

// Split items of one sequence and head, in chunk order, to be merged.
struct MergeItem {
    int32_t kv_head;
    int64_t row, first_partial, num_partials;
};

struct Step {
    int64_t num_rows, table_width;
    const int64_t* token_ids;          // [rows]
    const int64_t* block_tables;       // [sequences, table_width]
    const int64_t* positions;          // [rows]
    const int32_t* sequence_of;        // [rows]
    const AttentionItem* items;
    int64_t num_items;
    const MergeItem* merges;
    int64_t num_merges;
};

// int8 activations: blocks outermost, so that the rows of one block lie together.
struct Quantized {
    int8_t* codes;                     // [blocks][rows][32]
    float* scale;                      // [blocks][rows]
    float* sum;                        // [blocks][rows]: scale * sum of codes
    int32_t* code_sum;                 // [blocks][rows]
};

struct Workspace {
    float *x, *normed, *qkv, *attended, *gate_up, *inner;
    Quantized quantized, inner_quantized;
    int64_t row_width;                 // of a single row, `normed` and `quantized` hold one per thread, this far apart
    float* partials;                   // [split items][rows of a group][head_dim + 2]
};

}  // namespace powertrain
