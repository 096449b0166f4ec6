// Work on single rows of activations, and how a team shares it.

// Runs body(thread) on every thread of the team.
template <class Body>
INLINE void everywhere(Team& team, const Body& body) {
    team.run([](const void* context, int thread) { (*static_cast<const Body*>(context))(thread); }, &body);
}

// Inside `everywhere`: body(i) for each i of [0, count), shared among the threads, which then meet.
template <class Body>
INLINE void for_each(Team& team, int64_t count, int64_t grain, const Body& body) {
    int64_t begin, end;
    while (team.next(count, grain, begin, end))
        for (int64_t i = begin; i < end; ++i) body(i);
    team.barrier();
}

// The same for few unequal pieces, handed out one by one.
template <class Body>
INLINE void for_each_single(Team& team, int64_t count, const Body& body) {
    for (int64_t i; (i = team.take(count)) >= 0;) body(i);
    team.barrier();
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x / sqrt(mean(x^2) + eps) * weight; the sum runs in LANES partial sums, then by halves.
static void rms_norm_row(const float* x, const float* weight, float eps, int64_t width, float* out) {
    F sum{};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const F v = load(x + i);
        sum = fma(v, v, sum);
    }
    float total = reduce_add(sum);
    for (; i < width; ++i) total += x[i] * x[i];
    const float inverse = 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + eps);
    for (i = 0; i + LANES <= width; i += LANES) store(out + i, load(x + i) * set1(inverse) * load(weight + i));
    for (; i < width; ++i) out[i] = x[i] * inverse * weight[i];
}

// Rounds to an integer of 8 bits; NaN and infinity become 0, which leaves it to the scale to say so.
INLINE I to_code(F x) {
    F v = round(x);
    v = v > set1(-128.0f) ? v : F{};
    v = v < set1(128.0f) ? v : F{};
    return __builtin_convertvector(v, I);
}

// 127 / largest; below 1e-30 it would overflow, and what rounds to zero there changes no result.
INLINE float inverse_scale(float largest) { return largest >= 1e-30f ? 127.0f / largest : 0.0f; }

// One block of 32 activations to int8, scale = max |x| / 127. Infinities and NaN give a scale that is not finite.
static inline void quantize_block(const float* x, int64_t valid, const Quantized& q, int64_t at) {
    float padded[BLOCK];
    if (valid < BLOCK) {
        for (int i = 0; i < BLOCK; ++i) padded[i] = i < valid ? x[i] : 0.0f;
        x = padded;
    }
    // compared as integers, magnitudes order like numbers with NaN above infinity, so that none is lost
    I magnitude{};
    for (int i = 0; i < BLOCK; i += LANES) magnitude = max(magnitude, (I)load(x + i) & 0x7fffffff);
    const float largest = reduce_max_magnitude(magnitude);
    const float scale = largest / 127.0f, inverse = inverse_scale(largest);
    int8_t* codes = q.codes + at * BLOCK;
    I sum{};
    for (int i = 0; i < BLOCK; i += LANES) {
        const I code = to_code(load(x + i) * set1(inverse));
        sum += code;
        int8_t narrow __attribute__((vector_size(LANES)));
        narrow = __builtin_convertvector(code, decltype(narrow));
        __builtin_memcpy(codes + i, &narrow, sizeof narrow);
    }
    int32_t total = 0;
    for (int i = 0; i < LANES; ++i) total += sum[i];
    q.scale[at] = scale;
    q.code_sum[at] = total;
    q.sum[at] = scale * static_cast<float>(total);
}

static void quantize_row(const float* x, int64_t width, const Quantized& q, int64_t row, int64_t rows) {
    for (int64_t block = 0; block * BLOCK < width; ++block)
        quantize_block(x + block * BLOCK, width - block * BLOCK, q, block * rows + row);
}

// Rotates the two halves of a head against each other, in place.
static void rope_head(float* x, const float* cos, const float* sin, int64_t dim) {
    const int64_t half = dim / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const F low = load(x + i), high = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, fma(low, c, -(high * s)));
        store(x + half + i, fma(high, c, low * s));
    }
    for (; i < half; ++i) {
        const float low = x[i], high = x[half + i];
        x[i] = low * cos[i] - high * sin[i];
        x[half + i] = high * cos[i] + low * sin[i];
    }
}

static void silu_mul_row(const float* gate, const float* up, int64_t width, float* out) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(out + i, silu(load(gate + i)) * load(up + i));
    if (i < width) {
        const int64_t rest = smaller(width - i, LANES);
        float g[LANES] = {}, u[LANES] = {};
        for (int64_t j = 0; j < rest; ++j) g[j] = gate[i + j], u[j] = up[i + j];
        store(g, silu(load(g)) * load(u));
        for (int64_t j = 0; j < rest; ++j) out[i + j] = g[j];
    }
}
