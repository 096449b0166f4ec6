// AVX-512 with VNNI.

constexpr int LANES = 16;
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));

static inline F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store_f16(uint16_t* p, F v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F sqrt(F v) { return _mm512_sqrt_ps(v); }

// 32 inputs of 16 outputs as unsigned codes, multiplied four at a time into 32-bit sums.
struct Codes {
    static constexpr int OFFSET_S8 = 128;  // what the dot product of bytes has added to them
    __m512i w[8];

    void load_u4(const uint8_t* block, int) {
        const __m512i mask = _mm512_set1_epi8(15);
        for (int j = 0; j < 4; ++j) {
            const __m512i v = _mm512_loadu_si512(block + j * 64);
            w[j] = _mm512_and_si512(v, mask);
            w[j + 4] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
        }
    }
    void load_s8(const uint8_t* block, int) {
        const __m512i flip = _mm512_set1_epi8((char)0x80);
        for (int j = 0; j < 8; ++j) w[j] = _mm512_xor_si512(_mm512_loadu_si512(block + j * 64), flip);
    }
    static __m512i four(const int8_t* a) {
        int32_t word;
        __builtin_memcpy(&word, a, 4);
        return _mm512_set1_epi32(word);
    }
    I dot_u4(const int8_t* a) const {
        // two chains, since one sum needs five cycles
        __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
        for (int j = 0; j < 8; j += 2) {
            even = _mm512_dpbusd_epi32(even, w[j], four(a + 4 * j));
            odd = _mm512_dpbusd_epi32(odd, w[j + 1], four(a + 4 * j + 4));
        }
        return (I)_mm512_add_epi32(even, odd);
    }
    I dot_s8(const int8_t* a) const { return dot_u4(a); }
};

// For many rows the unpacked codes lie in the first cache, and ROWS by VECTORS sums share each load.
template <bool IS_U4>
struct Tile {
    static constexpr int ROWS = 4, VECTORS = 4;
    __m512i w[8];

    void load(const uint8_t* block, int part) {
        Codes codes;
        if (IS_U4) codes.load_u4(block, part);
        else codes.load_s8(block, part);
        for (int j = 0; j < 8; ++j) w[j] = codes.w[j];
    }
    struct Sum {
        __m512i sum;

        void add(const Tile& tile, int j, __m512i a) {
            sum = _mm512_dpbusd_epi32(j == 0 ? _mm512_setzero_si512() : sum, tile.w[j], a);
        }
        I total() const { return (I)sum; }
    };
    static __m512i activations(const int8_t* a) { return Codes::four(a); }
};
