// Any architecture: four lanes of plain C++, which compilers map to whatever vectors there are.

constexpr int LANES = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ffu;
    union { uint32_t bits; float value; } out;
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        out.value = magnitude;
        out.bits |= sign;
    } else if (exponent == 31) {
        out.bits = sign | 0x7f800000u | (mantissa << 13);
    } else {
        out.bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    }
    return out.value;
}

// Rounds to nearest, ties to even, as the processors' own conversion does.
static inline uint16_t float_to_half(float value) {
    union { float value; uint32_t bits; } in{value};
    const uint32_t sign = (in.bits >> 16) & 0x8000u, magnitude = in.bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u);
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
    if (magnitude < 0x38800000u) {  // below the smallest normal half: count units of 2^-24
        union { uint32_t bits; float value; } small{magnitude};
        const float scaled = small.value * 16777216.0f;
        uint32_t units = static_cast<uint32_t>(scaled);
        const float rest = scaled - static_cast<float>(units);
        units += rest > 0.5f || (rest == 0.5f && (units & 1));
        return sign | units;
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
    return sign | ((rounded - 0x38000000u) >> 13);
}

static inline F load_f16(const uint16_t* p) {
    return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
static inline void store_f16(uint16_t* p, F v) {
    for (int i = 0; i < LANES; ++i) p[i] = float_to_half(v[i]);
}
static inline F fma(F a, F b, F c) { return a * b + c; }
static inline F round(F v) {
    F out;
    for (int i = 0; i < LANES; ++i) out[i] = __builtin_rintf(v[i]);
    return out;
}
static inline F sqrt(F v) {
    F out;
    for (int i = 0; i < LANES; ++i) out[i] = __builtin_sqrtf(v[i]);
    return out;
}

// 32 inputs of LANES outputs as unsigned codes: dot gives the sum of code * activation per output, exact.
struct Codes {
    uint8_t w[8][LANES * 4];

    void load_u4(const uint8_t* block, int part) {
        for (int j = 0; j < 4; ++j)
            for (int i = 0; i < LANES * 4; ++i) {
                const uint8_t byte = block[j * 64 + part * LANES * 4 + i];
                w[j][i] = byte & 15;
                w[j + 4][i] = byte >> 4;
            }
    }
    void load_s8(const uint8_t* block, int part) {
        for (int j = 0; j < 8; ++j)
            for (int i = 0; i < LANES * 4; ++i) w[j][i] = block[j * 64 + part * LANES * 4 + i] ^ 0x80;
    }
    I dot_u4(const int8_t* a) const {
        I sum{};
        for (int j = 0; j < 8; ++j)
            for (int c = 0; c < LANES; ++c)
                for (int i = 0; i < 4; ++i) sum[c] += w[j][c * 4 + i] * a[j * 4 + i];
        return sum;
    }
    I dot_s8(const int8_t* a) const { return dot_u4(a); }
};
