// Vectors of LANES floats, written with the compilers' vector extensions; what those cannot say is in the level's own
// header, included before this one. Inside the namespace of a level.

#define INLINE inline __attribute__((always_inline))

INLINE F set1(float x) { return x - F{}; }
INLINE F load(const float* p) { F v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE F load_s8(const int8_t* p) {
    int8_t raw __attribute__((vector_size(LANES)));
    __builtin_memcpy(&raw, p, sizeof raw);
    return __builtin_convertvector(raw, F);
}
INLINE F load_bf16(const uint16_t* p) {
    uint16_t raw __attribute__((vector_size(LANES * 2)));
    __builtin_memcpy(&raw, p, sizeof raw);
    return (F)(__builtin_convertvector(raw, I) << 16);
}
INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
INLINE F max(F a, F b) { return a > b ? a : b; }
INLINE I max(I a, I b) { return a > b ? a : b; }

// Sums and maxima over lanes by halves: always in the same order.
INLINE float reduce_add(F v) {
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}
INLINE float reduce_max(F v) {
    float lanes[LANES];
    store(lanes, v);
    for (int i = 1; i < LANES; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
}

INLINE float reduce_max_magnitude(I v) {
    int32_t largest = v[0];
    for (int i = 1; i < LANES; ++i) largest = v[i] > largest ? v[i] : largest;
    float value;
    __builtin_memcpy(&value, &largest, 4);
    return value;
}

// e^x within 2 units in the last place; 0 below the smallest normal result; NaN stays NaN. Reduction by powers of two
// and a polynomial of degree 6 (the coefficients of Cephes' expf).
INLINE F exp(F x) {
    F bounded = x < set1(-87.3f) ? set1(-87.3f) : x;
    bounded = bounded > set1(88.3f) ? set1(88.3f) : bounded;
    const F n = round(bounded * set1(1.44269504088896341f));
    F r = fma(n, set1(-0.693359375f), bounded);
    r = fma(n, set1(2.12194440e-4f), r);
    F p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r) + set1(1.0f);
    const I exponent = (__builtin_convertvector(n, I) + 127) << 23;
    return x < set1(-87.3f) ? F{} : p * (F)exponent;
}

INLINE F silu(F x) { return x / (set1(1.0f) + exp(-x)); }
