// The kernels of one instruction set, as a table the bindings choose from at run time.
#pragma once

#include "pool.hpp"
#include "types.hpp"

namespace powertrain {

// Every function spreads its work over the team and returns when it is done. Rows are float32, outermost first.
struct Level {
    const char* name;
    void (*rms_norm)(Team&, const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* out);
    void (*apply_rope)(Team&, float* x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t dim);
    void (*silu_mul)(Team&, const float* gate_up, int64_t rows, int64_t width, float* out);
    void (*matmul)(Team&, const Matrix&, const float* x, int64_t rows, float* out, const Quantized& scratch);
    void (*gather)(Team&, const Matrix&, const int64_t* ids, int64_t count, float* out);
    void (*write_kv)(Team&, const float* key_value, const Cache&, const Step&, int64_t kv_heads, int64_t dim);
    void (*attention)(Team&, const float* query, const Cache&, const Step&, int64_t heads, int64_t kv_heads, int64_t dim,
                      int64_t window, float* out, float* partials);
    void (*forward)(Team&, const Model&, const Step&, const Cache&, const Workspace&, float* hidden);
    void (*logits)(Team&, const Model&, const float* hidden, int64_t rows, const Workspace&, float* out);
    // best: [threads][rows][k] of value and id; is_finite: [threads][rows]; the caller merges.
    void (*top)(Team&, const Model&, const float* hidden, int64_t rows, const Workspace&, int64_t k, float* values,
                int64_t* ids, bool* is_finite);
};

const Level& portable_level();
#ifdef POWERTRAIN_HAS_X86
const Level& avx2_level();
const Level& avx512_level();
#endif

}  // namespace powertrain
