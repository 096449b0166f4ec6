// What the Python face is made of: checked arrays, the thread team with its level, memory for a step, a matrix.
#pragma once

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

namespace powertrain {


template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr int64_t MAX_FEATURES = 1 << 24;

inline void check(bool holds, const std::string& message) {
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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline std::vector<const Level*> levels() {
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

inline Quantized take_quantized(Arena& arena, int64_t width, int64_t rows) {
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

inline void check_ids(const int64_t* ids, int64_t count, int64_t limit, const char* what) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= limit)
            throw std::invalid_argument(std::string(what) + " " + std::to_string(ids[i]) + " is not in 0.." +
                                        std::to_string(limit - 1));
}

}  // namespace powertrain
