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

// 32 inputs of LANES outputs. Sums of 32 products of 8-bit integers stay below 2^24, so floats hold them exactly.
struct Codes {
    static constexpr int OFFSET_S8 = 128;  // what the dot product of bytes has added to them
    F w[BLOCK];

    void load_u4(const uint8_t* block, int part) {
        for (int j = 0; j < 4; ++j) {
            I words;  // four inputs of an output share 32 bits
            __builtin_memcpy(&words, block + j * 64 + part * LANES * 4, sizeof words);
            for (int i = 0; i < 4; ++i) {
                w[4 * j + i] = __builtin_convertvector((words >> (8 * i)) & 15, F);
                w[16 + 4 * j + i] = __builtin_convertvector((words >> (8 * i + 4)) & 15, F);
            }
        }
    }
    void load_s8(const uint8_t* block, int part) {
        for (int j = 0; j < 8; ++j) {
            I words;
            __builtin_memcpy(&words, block + j * 64 + part * LANES * 4, sizeof words);
            for (int i = 0; i < 4; ++i)
                w[4 * j + i] = __builtin_convertvector((words << (24 - 8 * i)) >> 24, F) + 128.0f;
        }
    }
    I dot_u4(const int8_t* a) const {
        F sum{};
        for (int k = 0; k < BLOCK; ++k) sum += w[k] * static_cast<float>(a[k]);
        return __builtin_convertvector(sum, I);
    }
    I dot_s8(const int8_t* a) const { return dot_u4(a); }
};

// For many rows: unpacked codes, whose loads ROWS by VECTORS sums share.
template <bool IS_U4>
struct Tile {
    static constexpr int ROWS = 4, VECTORS = 2;
    Codes codes;

    void load(const uint8_t* block, int part) {
        if (IS_U4) codes.load_u4(block, part);
        else codes.load_s8(block, part);
    }
    struct Sum {
        F sum;

        void add(const Tile& tile, int j, F a) {
            if (j == 0) sum = F{};
            for (int i = 0; i < 4; ++i) sum += tile.codes.w[4 * j + i] * a[i];
        }
        I total() const { return __builtin_convertvector(sum, I); }
    };
    static F activations(const int8_t* a) {
        return F{static_cast<float>(a[0]), static_cast<float>(a[1]), static_cast<float>(a[2]), static_cast<float>(a[3])};
    }
};
