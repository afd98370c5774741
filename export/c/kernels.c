/* Kernels, the same for every model. An image lies as planes with shared borders: behind each row of pixels lie border
   cells that stand for the end of this row and the start of the next, and behind each plane border rows. A kernel entry
   is then one offset, the same for all positions, and a convolution a sum of shifted, contiguous runs of cells. */

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__)
#error "-ffast-math changes results: compile without it"
#endif
/* With VECTOR every cell is a float. Integers are centred, the zero point is subtracted, and exact: sums of products
   stay below 2^24, or are split into groups that do. Otherwise integers are bytes, and with DOT (VNNI) four of them and
   four weights make one sum. */
#define VECTOR 0
#define DOT 0
#if defined(__GNUC__) && !defined(MODEL_SCALAR)
#if MODEL_INTEGERS && defined(__AVX2__) && (defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__)))
#undef DOT
#define DOT 1
#include <immintrin.h>
#elif defined(__SSE2__) || defined(__aarch64__)
#undef VECTOR
#define VECTOR 1
#endif
#endif
#if MODEL_INTEGERS && !VECTOR
typedef uint8_t cell;
typedef int32_t sum;
typedef int8_t tap;
#define ZERO(point) (point)
#else
typedef float cell;
typedef float sum;
typedef float tap;
#define ZERO(point) 0
#endif
#if MODEL_INTEGERS
typedef int32_t exact; /* however large */
#else
typedef float exact;
#endif

typedef struct {
    int channels, height, width, pad, plane, zero, top; /* integers are 0..top */
} image;

#define ROWS(of) for (int c = 0; c < (of)->channels; c++) for (int y = 0; y < (of)->height; y++)

static cell arena[MODEL_ARENA];

static cell *row_of(cell *first, const image *of, int channel, int y) {
    return first + channel * of->plane + y * (of->width + of->pad);
}

#if DOT || (VECTOR && defined(__AVX512F__))
#define LANES 16
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#elif defined(__AVX__)
#define LANES 8
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#else
#define LANES 4
#define EVENS 0, 2, 4, 6
#define LANE_NUMBERS 0, 1, 2, 3
#endif
#if VECTOR
typedef int32_t lane;
#else
typedef int8_t lane;
#endif
#if DOT || VECTOR
#define INSIDE(table) table
typedef cell vec __attribute__((vector_size(sizeof(cell) * LANES), aligned(sizeof(cell)), may_alias));
typedef lane bits __attribute__((vector_size(sizeof(cell) * LANES), aligned(sizeof(cell)), may_alias));
#define AT(p) (*(vec *)(p))
#define READ(p) (*(const vec *)(p))
#define CHOOSE(mask, a, b) ((vec)(((bits)(a) & (mask)) | ((bits)(b) & ~(mask))))
#if defined(__clang__)
#define EVEN(a, b) __builtin_shufflevector(a, b, EVENS)
#else
#define EVEN(a, b) __builtin_shuffle(a, b, (bits){EVENS})
#endif
#else
#define INSIDE(table) 0
#endif

static inline void fill(cell *from, int count, cell value) {
#if DOT || VECTOR
    if (count >= LANES) {
        const vec values = (vec){0} + value;
        for (int i = 0; i < count - LANES; i += LANES) AT(from + i) = values;
        AT(from + count - LANES) = values;
        return;
    }
#endif
    for (int i = 0; i < count; i++) from[i] = value;
}

/* The border cells of every plane from the first on that is not settled, and those in front of all. */
static void edge(cell *out, const image *of, int settled) {
    const int lead = of->pad * (of->width + of->pad) + of->pad;
    const cell value = (cell)ZERO(of->zero);
    fill(out - lead, lead, value);
    for (int c = 0; c < of->channels; c++) fill(out + c * of->plane + settled, of->plane - settled, value);
}

static void frame(cell *out, const image *of) {
    const int pitch = of->width + of->pad, rows = of->height * pitch;
    edge(out, of, rows);
    for (int c = 0; c < of->channels; c++)
        for (int x = of->width; x < pitch; x++) /* columns outside: a row has one or two such cells */
            for (int y = x; y < rows; y += pitch) out[c * of->plane + y] = (cell)ZERO(of->zero);
}

#if MODEL_INTEGERS
#if defined(__SSE4_1__) || defined(__aarch64__)
#define nearest(x) __builtin_rintf(x)
#else
static float nearest(float x) { /* half to even; volatile, so that no product is fused into the sum */
    volatile float v = x < -4e6f ? -4e6f : x > 4e6f ? 4e6f : x;
    v = v + 12582912.0f;
    return v - 12582912.0f;
}
#endif
#if defined(__GNUC__)
#define PERHAPS __attribute__((unused))
#else
#define PERHAPS
#endif
PERHAPS static inline float fused(float a, float b, float c) { /* rounded once */
#if defined(__FP_FAST_FMAF)
    return __builtin_fmaf(a, b, c);
#else
    return (float)((double)a * (double)b + (double)c);
#endif
}
static inline float between(float x, float low, float high) { /* no number becomes low: bytes hold none */
    const float least = x > low ? x : low;
    return least < high ? least : high;
}

/* x in steps of the output to a cell: rounded, from the zero point on with clip, else from 0, up to top */
static inline cell integer(float x, int zero, int top, int clip) {
    const float low = clip ? 0.0f : (float)-zero, high = (float)(top - zero);
    return (cell)(between(nearest(x), low, high) + (float)ZERO(zero));
}
#endif

//! settled
#if MODEL_INTEGERS
/* The same for x with the zero point in it, as a residual sum leaves it. */
PERHAPS static inline cell settled(float x, int zero, int top, int clip) {
    return (cell)(between(nearest(x), clip ? (float)zero : 0.0f, (float)top) - (float)(zero - ZERO(zero)));
}
#endif

//! conv
/* Filter after filter: count[] entries, or several groups of them whose sums are exact. */
typedef struct {
    const uint16_t *gap;
    const int32_t *count;
    const tap *weight;
    const exact *bias;
    const float *scale;
    int filters, groups, positions, tile, before;
    /* what is read: the planes themselves, or phases of them, images of every so-many-th row and column; ready: planes,
       or phases that a layer before has made */
    int ready, in_place, channels, channel, in_pitch, in_plane, in_zero, phases, stride_y, stride_x;
    const int16_t *phase; /* of each: first row and column, rows and columns */
    const uint8_t *read;  /* of each channel's phases: does any entry read it? */
    const lane *inside;   /* of each position: -1 for a pixel, 0 for a cell of the border */
    int pitch, plane, zero, top, relu;
    int add, own_first, other_zero, add_zero, add_top, add_relu; /* a residual sum: first * r1 + (second * r2 + offset) */
    float r1, r2, offset;
} conv_layer;

static cell scratch[MODEL_SCRATCH];
#if MODEL_INTEGERS && !DOT
static sum partial[MODEL_TILE];
#if MODEL_WIDE
static int32_t total[MODEL_TILE];
#endif
#endif

#define EACH1(M) M(0)
#define EACH2(M) EACH1(M) M(1)
#define EACH3(M) EACH2(M) M(2)
#define EACH4(M) EACH3(M) M(3)
#define EACH5(M) EACH4(M) M(4)
#define EACH6(M) EACH5(M) M(5)
#define EACH7(M) EACH6(M) M(6)
#define EACH8(M) EACH7(M) M(7)
#define EACH9(M) EACH8(M) M(8)
#define EACH10(M) EACH9(M) M(9)
#define EACH11(M) EACH10(M) M(10)
#define EACH12(M) EACH11(M) M(11)

#if DOT
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define FOURS(sums, x, w) sums = _mm256_dpbusd_epi32(sums, x, w)
#define MOST 6 /* of 32 vector registers each run of 32 positions takes four */
#else
#define FOURS(sums, x, w) sums = _mm256_dpbusd_avx_epi32(sums, x, w)
#define MOST 2
#endif
#define RUN 32
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))

/* Sums of positions 0..3 and 16..19 of a run, of those 4, 8 and 12 further: the order in which bytes interleave, and
   in which they are packed again. */
#define START(i) __m256i a##i = start, b##i = start, c##i = start, d##i = start;
#define ADD(i)                                                                                    \
    {                                                                                             \
        const __m256i x0 = LOAD(p0 + i * RUN), x1 = LOAD(p1 + i * RUN);                           \
        const __m256i x2 = LOAD(p2 + i * RUN), x3 = LOAD(p3 + i * RUN);                           \
        const __m256i low1 = _mm256_unpacklo_epi8(x0, x1), high1 = _mm256_unpackhi_epi8(x0, x1);  \
        const __m256i low2 = _mm256_unpacklo_epi8(x2, x3), high2 = _mm256_unpackhi_epi8(x2, x3);  \
        FOURS(a##i, _mm256_unpacklo_epi16(low1, low2), w);                                        \
        FOURS(b##i, _mm256_unpackhi_epi16(low1, low2), w);                                        \
        FOURS(c##i, _mm256_unpacklo_epi16(high1, high2), w);                                      \
        FOURS(d##i, _mm256_unpackhi_epi16(high1, high2), w);                                      \
    }
#define KEEP(i) store(to + i * RUN, run_of(a##i, b##i, c##i, d##i, i * RUN, e), e->cells - i * RUN);

/* How sums end: as integers, own ones, and with other as those of a residual sum. */
typedef struct {
    __m256 scale, own_zero, own_low, own_high, r1, r2, offset;
    __m256i zero, low, high, border;
    int own_first, cells;
    const cell *other;
    const lane *inside;
} ending;

static inline ending ending_of(const conv_layer *l) {
    const int zero = l->add ? l->add_zero : l->zero, top = l->add ? l->add_top : l->top;
    const int clip = l->add ? l->add_relu : l->relu;
    const ending e = {
        _mm256_setzero_ps(), _mm256_set1_ps((float)l->zero), _mm256_set1_ps(l->relu ? (float)l->zero : 0.0f),
        _mm256_set1_ps((float)l->top), _mm256_set1_ps(l->r1), _mm256_set1_ps(l->r2), _mm256_set1_ps(l->offset),
        _mm256_set1_epi16((int16_t)(l->add ? 0 : zero)), _mm256_set1_epi8((char)(clip ? zero : 0)),
        _mm256_set1_epi8((char)top), _mm256_set1_epi8((char)zero), l->own_first, 0, 0, 0};
    return e;
}

static inline __m256i rounded(__m256 x) { /* half to even; above 2^31 would wrap */
    return _mm256_cvtps_epi32(_mm256_min_ps(x, _mm256_set1_ps(32767.0f)));
}

static inline __m256i joined(__m256i sums, __m256i others, const ending *e) {
    const __m256 x = _mm256_round_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums), e->scale), 8);
    const __m256 own = _mm256_min_ps(_mm256_max_ps(_mm256_add_ps(x, e->own_zero), e->own_low), e->own_high);
    const __m256 other = _mm256_cvtepi32_ps(others);
    const __m256 first = e->own_first ? own : other, second = e->own_first ? other : own;
    return rounded(_mm256_fmadd_ps(first, e->r1, _mm256_fmadd_ps(second, e->r2, e->offset)));
}

static inline __m256i run_of(__m256i a, __m256i b, __m256i c, __m256i d, int at, const ending *e) {
    if (e->other) {
        const __m256i others = LOAD(e->other + at), none = _mm256_setzero_si256();
        const __m256i low = _mm256_unpacklo_epi8(others, none), high = _mm256_unpackhi_epi8(others, none);
        a = joined(a, _mm256_unpacklo_epi16(low, none), e);
        b = joined(b, _mm256_unpackhi_epi16(low, none), e);
        c = joined(c, _mm256_unpacklo_epi16(high, none), e);
        d = joined(d, _mm256_unpackhi_epi16(high, none), e);
    } else {
        a = rounded(_mm256_mul_ps(_mm256_cvtepi32_ps(a), e->scale));
        b = rounded(_mm256_mul_ps(_mm256_cvtepi32_ps(b), e->scale));
        c = rounded(_mm256_mul_ps(_mm256_cvtepi32_ps(c), e->scale));
        d = rounded(_mm256_mul_ps(_mm256_cvtepi32_ps(d), e->scale));
    }
    const __m256i first = _mm256_adds_epi16(_mm256_packs_epi32(a, b), e->zero);
    const __m256i second = _mm256_adds_epi16(_mm256_packs_epi32(c, d), e->zero);
    const __m256i found = _mm256_min_epu8(_mm256_max_epu8(_mm256_packus_epi16(first, second), e->low), e->high);
    return _mm256_blendv_epi8(e->border, found, LOAD(e->inside + at));
}

static inline void store(cell *to, __m256i run, int cells) { /* tiles end with a whole run or a half */
    if (cells >= RUN)
        _mm256_storeu_si256((__m256i *)to, run);
    else
        _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(run));
}

static inline __m256i four(const tap *weight) {
    int32_t word;
    __builtin_memcpy(&word, weight, 4);
    return _mm256_set1_epi32(word);
}

static inline __m256i fewer(const tap *weight, int count) {
    uint32_t word = 0;
    for (int i = 0; i < count; i++) word |= (uint32_t)(uint8_t)weight[i] << 8 * i;
    return _mm256_set1_epi32((int32_t)word);
}

#define DEFINE(n)                                                                                                 \
    static void taps##n(const cell *from, const uint16_t *gap, const tap *weight, const int32_t *count, int groups, \
                        int32_t bias, const ending *e, cell *to) {                                                \
        const __m256i start = _mm256_set1_epi32(bias);                                                            \
        EACH##n(START) for (; groups > 0; groups--) {                                                             \
            const cell *p3 = from;                                                                                \
            int k = 0;                                                                                            \
            for (; k + 4 <= *count; k += 4, gap += 4, weight += 4) {                                              \
                const cell *const p0 = p3 + gap[0], *const p1 = p0 + gap[1], *const p2 = p1 + gap[2];             \
                const __m256i w = four(weight);                                                                   \
                p3 = p2 + gap[3];                                                                                 \
                EACH##n(ADD)                                                                                      \
            }                                                                                                     \
            const int rest = *count++ - k;                                                                        \
            if (rest) {                                                                                           \
                const cell *const p0 = p3 + gap[0], *const p1 = rest > 1 ? p0 + gap[1] : p0;                      \
                const cell *const p2 = rest > 2 ? p1 + gap[2] : p1;                                               \
                const __m256i w = fewer(weight, rest);                                                            \
                p3 = p2;                                                                                          \
                EACH##n(ADD)                                                                                      \
            }                                                                                                     \
            gap += rest;                                                                                          \
            weight += rest;                                                                                       \
        }                                                                                                         \
        EACH##n(KEEP)                                                                                             \
    }
DEFINE(1) DEFINE(2)
#if MOST > 2
DEFINE(3) DEFINE(4) DEFINE(5) DEFINE(6)
#endif

/* One filter over one tile: bias and the products of its entries, ended. */
static void taps(int tile, const cell *from, const uint16_t *gap, const tap *weight, const int32_t *count, int groups,
                 int32_t bias, ending *e, cell *to) {
    static void (*const kernels[MOST])(const cell *, const uint16_t *, const tap *, const int32_t *, int, int32_t,
                                       const ending *, cell *) = {
        taps1, taps2,
#if MOST > 2
        taps3, taps4, taps5, taps6,
#endif
    };
    const int runs = (tile + RUN - 1) / RUN, parts = (runs + MOST - 1) / MOST;
    for (int done = 0, part = 1; part <= parts; part++) {
        const int next = runs * part / parts, at = done * RUN;
        e->cells = tile - at;
        kernels[next - done - 1](from + at, gap, weight, count, groups, bias, e, to + at);
        if (e->other) e->other += (next - done) * RUN;
        e->inside += (next - done) * RUN;
        done = next;
    }
}
#elif VECTOR
#if defined(__aarch64__)
#define ROUNDED(v) __asm__("" : "+w"(v)) /* a product ends here: it is not fused into the sum that follows */
#else
#define ROUNDED(v) __asm__("" : "+v"(v))
#endif

/* How sums end: floats take other and are clipped; integers are scaled, held between low and high, and rounded. */
typedef struct {
    const float *other;
    const lane *inside;
    int clip, raw;
    float scale, low, high;
} ending;

#define START(i) vec a##i = start;
#define ADD(i) a##i += READ(from + i * LANES) * w;
#define KEEP(i) AT(to + i * LANES) = (vec)((bits)a##i & *(const bits *)(e->inside + at + i * LANES));
#if MODEL_INTEGERS
#define STEPS(i)                               \
    a##i *= e->scale;                          \
    ROUNDED(a##i);                             \
    a##i = CHOOSE(a##i < low, low, a##i);      \
    a##i = CHOOSE(a##i > high, high, a##i);    \
    a##i = (a##i + 12582912.0f) - 12582912.0f;
#define END(n)                                                        \
    if (!e->raw) {                                                    \
        const vec low = (vec){0} + e->low, high = (vec){0} + e->high; \
        EACH##n(STEPS)                                                \
    }
#else
#define OTHER(i) a##i += READ(e->other + at + i * LANES);
#define CLIP(i) a##i = (vec)((bits)a##i & ~(a##i < 0.0f));
#define END(n)                       \
    if (e->other) { EACH##n(OTHER) } \
    if (e->clip) { EACH##n(CLIP) }
#endif
#define DEFINE(n)                                                                                                \
    static void taps##n(const float *from, const uint16_t *gap, const float *weight, int count, float bias,     \
                        const ending *e, int at, float *to) {                                                   \
        const vec start = (vec){0} + bias;                                                                      \
        EACH##n(START) for (int k = 0; k < count; k++) {                                                        \
            const float w = weight[k];                                                                          \
            from += gap[k];                                                                                     \
            EACH##n(ADD)                                                                                        \
        }                                                                                                       \
        END(n)                                                                                                  \
        EACH##n(KEEP)                                                                                           \
    }
DEFINE(1) DEFINE(2) DEFINE(3) DEFINE(4) DEFINE(5) DEFINE(6)
DEFINE(7) DEFINE(8) DEFINE(9) DEFINE(10) DEFINE(11) DEFINE(12)
#define MOST 12

/* One filter over one tile: bias and the products of its entries, ended. */
static void taps(int tile, const float *from, const uint16_t *gap, const float *weight, int count, float bias,
                 const ending *e, float *to) {
    static void (*const kernels[MOST])(const float *, const uint16_t *, const float *, int, float, const ending *, int,
                                       float *) = {taps1, taps2, taps3, taps4,  taps5,  taps6,
                                                   taps7, taps8, taps9, taps10, taps11, taps12};
    const int vectors = tile / LANES, parts = (vectors + MOST - 1) / MOST;
    for (int done = 0, part = 1; part <= parts; part++) {
        const int next = vectors * part / parts, at = done * LANES;
        kernels[next - done - 1](from + at, gap, weight, count, bias, e, at, to + at);
        done = next;
    }
}
#else
static void taps(const conv_layer *l, const cell *from, const uint16_t *gap, const tap *weight, int count, sum bias,
                 sum *to) {
    const sum zero = (sum)ZERO(l->in_zero);
    for (int i = 0; i < l->tile; i++) to[i] = bias;
    for (int k = 0; k < count; k++) {
        const sum w = (sum)weight[k];
        from += gap[k];
        for (int i = 0; i < l->tile; i++) to[i] += w * ((sum)from[i] - zero);
    }
}
#endif

/* The phases of an input that some entry reads, each with the border cells before its first row and behind its last. */
static void split(const conv_layer *l, const cell *in) {
    const cell border = (cell)ZERO(l->in_zero);
    const uint8_t *read = l->read;
    cell *to = scratch;
    for (int c = 0; c < l->channels; c++, in += l->in_plane) {
        for (int p = 0; p < l->phases; p++, to += l->channel) {
            const int rows = l->phase[4 * p + 2], columns = l->phase[4 * p + 3];
            const cell *from = in + l->phase[4 * p] * l->in_pitch + l->phase[4 * p + 1];
            cell *const end = to + l->channel, *row = to + l->before;
            if (!*read++) continue;
#if DOT || VECTOR
            if (l->stride_x == 2) { /* whole vectors, over the end of what they fill, where the next ones follow */
                const vec borders = (vec){0} + border;
                const bits kept = (bits){LANE_NUMBERS} < (lane)((columns - 1) % LANES + 1);
                const int whole = columns - 1 - (columns - 1) % LANES;
                for (cell *at = to; at < row; at += LANES) AT(at) = borders;
                for (int y = 0; y < rows; y++, from += l->stride_y * l->in_pitch, row += l->pitch) {
                    const cell *const last = from + 2 * whole;
                    for (int x = 0; x < whole; x += LANES)
                        AT(row + x) = EVEN(READ(from + 2 * x), READ(from + 2 * x + LANES));
                    AT(row + whole) = CHOOSE(kept, EVEN(READ(last), READ(last + LANES)), borders);
                }
                for (int x = whole + LANES; x < l->pitch; x++)
                    for (cell *at = to + l->before + x; at < row; at += l->pitch) *at = border;
                for (; row < end; row += LANES) AT(row) = borders;
                continue;
            }
#endif
            for (cell *at = to; at < row; at++) *at = border;
            for (int y = 0; y < rows; y++, from += l->stride_y * l->in_pitch, row += l->pitch) {
                for (int x = 0; x < columns; x++) row[x] = from[x * l->stride_x];
                for (int x = columns; x < l->pitch; x++) row[x] = border;
            }
            for (; row < end; row++) *row = border;
        }
    }
}

#if MODEL_INTEGERS && !DOT
/* A filter's integers over one tile, into a residual sum. */
static void join(const conv_layer *l, int begin, cell *restrict to, const cell *restrict other) {
    const int zero = l->add_zero, top = l->add_top, clip = l->add_relu;
    const float r1 = l->r1, r2 = l->r2, offset = l->offset;
    const float own_zero = (float)(l->zero - ZERO(l->zero)), other_zero = (float)(l->other_zero - ZERO(l->other_zero));
    if (l->own_first)
        for (int i = 0; i < l->tile; i++)
            to[i] = settled(fused((float)to[i] + own_zero, r1, fused((float)other[i] + other_zero, r2, offset)), zero,
                            top, clip);
    else
        for (int i = 0; i < l->tile; i++)
            to[i] = settled(fused((float)other[i] + other_zero, r1, fused((float)to[i] + own_zero, r2, offset)), zero,
                            top, clip);
#if VECTOR
    for (int i = 0; i < l->tile; i++) to[i] = l->inside[begin + i] ? to[i] : 0.0f;
#else
    (void)begin;
#endif
}
#endif

static void conv(const conv_layer *l, const cell *in, const image *to, cell *out, const cell *other) {
    const cell *from = l->in_place ? in - l->before : scratch;
#if DOT
    ending e = ending_of(l);
#endif
    if (!l->ready) split(l, in);
    for (int begin = 0; begin < l->positions; begin += l->tile) {
        const uint16_t *gap = l->gap;
        const int32_t *count = l->count;
        const tap *weight = l->weight;
        for (int filter = 0; filter < l->filters; filter++) {
            const int place = filter * l->plane + begin;
            const cell *added = l->add ? other + place : 0;
#if !MODEL_INTEGERS && VECTOR
            const ending e = {added, l->inside + begin, l->relu, 0, 0, 0, 0};
            taps(l->tile, from + begin, gap, weight, *count, l->bias[filter], &e, out + place);
            gap += *count;
            weight += *count++;
#elif !MODEL_INTEGERS
            taps(l, from + begin, gap, weight, *count, l->bias[filter], out + place);
            gap += *count;
            weight += *count++;
            for (int i = 0; i < l->tile; i++) {
                const float found = out[place + i] + (added ? added[i] : 0.0f);
                out[place + i] = l->relu && found < 0.0f ? 0.0f : found;
            }
#else
#if DOT
            int entries = 0;
            int32_t bias = l->bias[filter];
            for (int group = 0; group < l->groups; group++) entries += count[group];
            if (l->in_zero)
                for (int k = 0; k < entries; k++) bias -= l->in_zero * weight[k];
            e.scale = _mm256_set1_ps(l->scale[filter]);
            e.other = added;
            e.inside = l->inside + begin;
            taps(l->tile, from + begin, gap, weight, count, l->groups, bias, &e, out + place);
            count += l->groups;
            gap += entries;
            weight += entries;
#else
            const int raw = !VECTOR || l->groups > 1;
            for (int group = 0; group < l->groups; group++) {
                const sum bias = group ? 0 : (sum)l->bias[filter];
#if VECTOR
                const float low = l->relu ? 0 : (float)-l->zero;
                const ending e = {0, l->inside + begin, 0, raw, l->scale[filter], low, (float)(l->top - l->zero)};
                taps(l->tile, from + begin, gap, weight, *count, bias, &e, raw ? partial : out + place);
#else
                taps(l, from + begin, gap, weight, *count, bias, partial);
#endif
                gap += *count;
                weight += *count++;
#if MODEL_WIDE
                if (l->groups > 1) /* each group's sum is exact in float, the sum of them need not be */
                    for (int i = 0; i < l->tile; i++) total[i] = (int32_t)partial[i] + (group ? total[i] : 0);
                if (group && group + 1 == l->groups)
                    for (int i = 0; i < l->tile; i++) partial[i] = (sum)total[i];
#endif
            }
            if (raw)
                for (int i = 0; i < l->tile; i++)
                    out[place + i] = integer((float)partial[i] * l->scale[filter], l->zero, l->top, l->relu);
            if (added) join(l, begin, out + place, added);
#endif
#endif
        }
    }
#if DOT || VECTOR
    edge(out, to, (l->positions + l->tile - 1) / l->tile * l->tile);
#else
    frame(out, to);
#endif
}

//! linear
/* A layer of one position; entries by gaps from the first input. */
typedef struct {
    const uint16_t *gap;
    const int32_t *count;
    const tap *weight;
    const exact *bias;
    const float *scale;
    int filters, in_zero, relu;
} linear_layer;

static exact product(const linear_layer *l, const cell *in, const uint16_t **gap, const tap **weight, int filter) {
    exact found = l->bias[filter];
    for (int k = 0; k < l->count[filter]; k++) {
        in += *(*gap)++;
        found += (exact)*(*weight)++ * ((exact)*in - (exact)ZERO(l->in_zero));
    }
    return found;
}

//! hidden
static void linear(const linear_layer *l, const cell *in, cell *out, const image *to) {
    const uint16_t *gap = l->gap;
    const tap *weight = l->weight;
    for (int filter = 0; filter < l->filters; filter++) {
        const exact found = product(l, in, &gap, &weight, filter);
#if MODEL_INTEGERS
        out[filter * to->plane] = integer((float)found * l->scale[filter], to->zero, to->top, l->relu);
#else
        out[filter * to->plane] = l->relu && found < 0.0f ? 0.0f : found;
#endif
    }
    frame(out, to);
}

//! logits
static void linear_logits(const linear_layer *l, const cell *in, float *out) {
    const uint16_t *gap = l->gap;
    const tap *weight = l->weight;
    for (int filter = 0; filter < l->filters; filter++)
        out[filter] = (float)product(l, in, &gap, &weight, filter) * l->scale[filter];
}

//! flatten
static void flatten(cell *in, const image *from, cell *out) {
    ROWS(from) {
        const cell *row = row_of(in, from, c, y);
        for (int x = 0; x < from->width; x++) *out++ = row[x];
    }
}

//! relu
static void relu(cell *in, const image *from, cell *out, const image *to) {
    ROWS(to) {
        const cell *row = row_of(in, from, c, y), low = (cell)ZERO(to->zero);
        cell *made = row_of(out, to, c, y);
        for (int x = 0; x < to->width; x++) made[x] = row[x] < low ? low : row[x];
    }
    frame(out, to);
}

//! add
typedef struct {
    float r1, r2, offset;
    int zero1, zero2, clip;
} addition;

static void add(cell *a, const image *from, cell *b, cell *out, const image *to, const addition *by) {
    ROWS(to) {
        const cell *first = row_of(a, from, c, y), *second = row_of(b, from, c, y);
        cell *made = row_of(out, to, c, y);
        for (int x = 0; x < to->width; x++) {
#if MODEL_INTEGERS
            const float one = (float)(first[x] - ZERO(by->zero1)) + (float)by->zero1;
            const float two = (float)(second[x] - ZERO(by->zero2)) + (float)by->zero2;
            made[x] = settled(fused(one, by->r1, fused(two, by->r2, by->offset)), to->zero, to->top, by->clip);
#else
            const float found = first[x] + second[x];
            made[x] = by->clip && found < 0.0f ? 0.0f : found;
#endif
        }
    }
    frame(out, to);
}

//! affine
typedef struct {
    const float *scale, *shift;
    float given, made;
    int clip;
} scaling;

static void affine(cell *in, const image *from, cell *out, const image *to, const scaling *by) {
    ROWS(to) {
        const cell *row = row_of(in, from, c, y);
        cell *made = row_of(out, to, c, y);
        for (int x = 0; x < to->width; x++) {
#if MODEL_INTEGERS
            volatile float real = (float)(row[x] - ZERO(from->zero)) * by->given; /* volatile: no product is fused */
            real = real * by->scale[c];
            real = real + by->shift[c];
            made[x] = integer(real / by->made, to->zero, to->top, by->clip);
#else
            const float found = row[x] * by->scale[c] + by->shift[c];
            made[x] = by->clip && found < 0.0f ? 0.0f : found;
#endif
        }
    }
    frame(out, to);
}

//! window
typedef struct {
    int height, width, stride_y, stride_x, pad_y, pad_x;
    float scale;
} window;

//! max
static void max_pool(cell *in, const image *from, cell *out, const image *to, const window *w) {
    const int pitch = from->width + from->pad;
    ROWS(to) {
        const cell *given = row_of(in, from, c, 0);
        cell *made = row_of(out, to, c, y);
        const int top = y * w->stride_y - w->pad_y;
        for (int x = 0; x < to->width; x++) {
            const int left = x * w->stride_x - w->pad_x;
            int any = 0;
            cell best = 0;
            for (int i = top < 0 ? 0 : top; i < top + w->height && i < from->height; i++)
                for (int j = left < 0 ? 0 : left; j < left + w->width && j < from->width; j++, any = 1)
                    if (!any || given[i * pitch + j] > best) best = given[i * pitch + j];
            made[x] = best;
        }
    }
    frame(out, to);
}

//! average
static void average_pool(cell *in, const image *from, cell *out, const image *to, const window *w) {
    const int pitch = from->width + from->pad;
    ROWS(to) {
        cell *made = row_of(out, to, c, y);
        for (int x = 0; x < to->width; x++) {
            const cell *given = row_of(in, from, c, y * w->stride_y) + x * w->stride_x;
            exact found = 0;
            for (int i = 0; i < w->height; i++)
                for (int j = 0; j < w->width; j++) found += (exact)given[i * pitch + j];
#if MODEL_INTEGERS
            found -= w->height * w->width * ZERO(from->zero);
            made[x] = integer((float)found * w->scale, to->zero, to->top, 0);
#else
            made[x] = found * w->scale;
#endif
        }
    }
    frame(out, to);
}

//! end
