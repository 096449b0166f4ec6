// AVX2, FMA and F16C.

constexpr int LANES = 8;
typedef float F __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));

static inline F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store_f16(uint16_t* p, F v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static inline F round(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F sqrt(F v) { return _mm256_sqrt_ps(v); }

// 32 inputs of 8 outputs. Sums of pairs run in 16 bits, which cannot overflow for 4-bit codes: 8 sums of 2 * 15 * 127
// are 30,480. Of bytes one sum fits, 2 * 128 * 127, so each goes on in 32 bits; |w| times sign(w) * a, since one side of
// the instruction is unsigned.
struct Codes {
    static constexpr int OFFSET_S8 = 0;  // what the dot product of bytes has added to them
    __m256i w[8];

    void load_u4(const uint8_t* block, int part) {
        const __m256i mask = _mm256_set1_epi8(15);
        for (int j = 0; j < 4; ++j) {
            const __m256i v = _mm256_loadu_si256((const __m256i*)(block + j * 64 + part * 32));
            w[j] = _mm256_and_si256(v, mask);
            w[j + 4] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
        }
    }
    void load_s8(const uint8_t* block, int part) {
        for (int j = 0; j < 8; ++j) w[j] = _mm256_loadu_si256((const __m256i*)(block + j * 64 + part * 32));
    }
    static __m256i four(const int8_t* a) {
        int32_t word;
        __builtin_memcpy(&word, a, 4);
        return _mm256_set1_epi32(word);
    }
    I dot_u4(const int8_t* a) const {
        __m256i sum = _mm256_maddubs_epi16(w[0], four(a));
        for (int j = 1; j < 8; ++j) {
            asm("" : "+x"(sum));  // or the compiler makes a tree of the chain and runs out of registers
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[j], four(a + 4 * j)));
        }
        return (I)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
    }
    I dot_s8(const int8_t* a) const {
        __m256i sum = _mm256_setzero_si256();
        for (int j = 0; j < 8; ++j) {
            asm("" : "+x"(sum));
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(four(a + 4 * j), w[j]));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        return (I)sum;
    }
};

// For many rows the unpacked codes lie in the first cache, and ROWS by VECTORS sums share each load: two loads a cycle
// would otherwise be the limit. Bytes are split in two codes of 4 bits, the upper one weighted by 16 at the end: that is paid
// once for all rows, and half as many vectors fit the 16 registers.
template <bool IS_U4>
struct Tile {
    static constexpr int ROWS = 4, VECTORS = IS_U4 ? 2 : 1;
    __m256i low[8], high[IS_U4 ? 1 : 8];

    void load(const uint8_t* block, int part) {
        const __m256i mask = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x80);
        Codes codes;
        if (IS_U4) codes.load_u4(block, part);
        else codes.load_s8(block, part);
        for (int j = 0; j < 8; ++j) {
            const __m256i v = _mm256_xor_si256(codes.w[j], flip);
            low[j] = IS_U4 ? codes.w[j] : _mm256_and_si256(v, mask);
            if (!IS_U4) high[IS_U4 ? 0 : j] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
        }
    }
    struct Sum {
        __m256i low, high;

        void add(const Tile& tile, int j, __m256i a) {
            const __m256i first = _mm256_maddubs_epi16(tile.low[j], a);
            low = j == 0 ? first : _mm256_add_epi16(low, first);
            asm("" : "+x"(low));  // as above
            if (IS_U4) return;
            const __m256i second = _mm256_maddubs_epi16(tile.high[IS_U4 ? 0 : j], a);
            high = j == 0 ? second : _mm256_add_epi16(high, second);
            asm("" : "+x"(high));
        }
        I total() const {
            const __m256i sum = _mm256_madd_epi16(low, _mm256_set1_epi16(1));
            return (I)(IS_U4 ? sum : _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16))));
        }
    };
    static __m256i activations(const int8_t* a) { return Codes::four(a); }
};
