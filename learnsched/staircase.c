/* The expectation of a staircase under noise, and its derivatives, in one pass over memory.
 *
 * The formulas are those of staircase.py. A tensor is a table of rows x columns; each row has its own
 * scale, std and mean of the noise (in units of the levels). kernels.py compiles this file and
 * passes the arguments. Sums over a row add up blocks of fixed length in double precision and in a
 * fixed order, so that results do not depend on the number of threads.
 *
 * Compiled with -ffinite-math-only, so that limits are one instruction; NaN is told by its bits. Not
 * with -ffast-math, which would flush small numbers to 0 in the whole process.
 */

#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 512
#define NARROWEST 1e-12f

enum { UNIFORM, TRIANGULAR, NORMAL, LOGISTIC };

typedef struct {
    const float *thresholds, *gaps, *values; /* K, K and K + 1 numbers */
    long count;                              /* K */
    long whole;                              /* levels are neighbouring integers, rounded half up */
    long noise;
    float step; /* between thresholds if all steps and gaps are even, else 0 */
} Staircase;

/* A table, and one number a row (stride 1) or one for all (stride 0). There may be no scale. */
typedef struct {
    long rows, columns, threads;
    const float *scale, *std, *mean;
    long scale_stride, std_stride, mean_stride;
} Table;

/* 2^x to 2 units in the last place, for x in [-126, 127]. */
INLINE float power_of_two(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds, into the lowest bits */
    union { float f; int i; } whole, result;
    whole.f = x + magic;
    float r = x - (whole.f - magic);
    float p = 1.535336188319500e-4f;
    p = p * r + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    result.f = p * r + 1.0f;
    result.i += whole.i << 23;
    return result.f;
}

/* By its bits, as the compiler was told to forget about it: comparisons are twice as fast so. */
INLINE int not_a_number(float x) {
    union { float f; int i; } bits = {x};
    return (bits.i & 0x7fffffff) > 0x7f800000;
}

INLINE float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* erf by a rational minimax approximation on [-4, 4], where it reaches +-1: a numerator over a
 * denominator. Several are added up over their common denominator, as divisions are slow. */
INLINE void add_error_function(float x, float weight, float *numerator, float *denominator) {
    x = clamp(x, -4.0f, 4.0f);
    float s = x * x;
    float p = -2.72614225801306e-10f;
    p = p * s + 2.77068142495902e-08f;
    p = p * s + -2.10102402082508e-06f;
    p = p * s + -5.69250639462346e-05f;
    p = p * s + -7.34990630326855e-04f;
    p = p * s + -2.95459980854025e-03f;
    p = p * s + -1.60960333262415e-02f;
    float q = -1.45660718464996e-05f;
    q = q * s + -2.13374055278905e-04f;
    q = q * s + -1.68282697438203e-03f;
    q = q * s + -7.37332916720468e-03f;
    q = q * s + -1.42647390514189e-02f;
    *numerator = *numerator * q + weight * x * p * *denominator;
    *denominator *= q;
}

#define UNIFORM_WIDTH 1.7320508075688772f
#define TRIANGULAR_WIDTH 2.449489742783178f
#define LOGISTIC_RATE 1.813799364234218f /* 1 / scale at std 1 */
#define LOG2_E 1.4426950408889634f
#define ROOT_HALF 0.7071067811865476f
#define NORMAL_PEAK 0.3989422804014327f

/* Where the noise has died out, to 1e-29: beyond, z f(z) might be infinity times 0, and subnormal
 * numbers would slow everything down. */
#define REACH_NORMAL 11.5f
#define REACH_LOGISTIC 36.0f
#define REACH_BOUNDED 4.0f

INLINE float within_reach(const int noise, float z) {
    const float reach = noise == NORMAL     ? REACH_NORMAL
                        : noise == LOGISTIC ? REACH_LOGISTIC
                                            : REACH_BOUNDED;
    return clamp(z, -reach, reach);
}

/* F(z) - 1/2, which has no error near 0; not the normal one */
INLINE float centred_cdf(const int noise, float z) {
    if (noise == UNIFORM) return clamp(z * (0.5f / UNIFORM_WIDTH), -0.5f, 0.5f);
    if (noise == TRIANGULAR) {
        float u = clamp(z * (1 / TRIANGULAR_WIDTH), -1.0f, 1.0f);
        float a = u < 0 ? -u : u;
        return u - 0.5f * u * a;
    }
    z = within_reach(noise, z);
    return 1.0f / (1.0f + power_of_two(z * (-LOGISTIC_RATE * LOG2_E))) - 0.5f;
}

/* the density and its derivative; z within reach */
INLINE void derivatives(const int noise, float z, float *f, float *df) {
    float a = z < 0 ? -z : z;
    if (noise == UNIFORM) {
        *f = a <= UNIFORM_WIDTH ? 0.5f / UNIFORM_WIDTH : 0.0f;
        *df = 0.0f;
    } else if (noise == TRIANGULAR) {
        float rest = 1.0f - a * (1 / TRIANGULAR_WIDTH);
        const float slope = 1 / (TRIANGULAR_WIDTH * TRIANGULAR_WIDTH);
        *f = rest > 0 ? rest * (1 / TRIANGULAR_WIDTH) : 0.0f;
        float s = z > 0 ? -slope : slope;
        s = z == 0 ? 0.0f : s;
        *df = a < TRIANGULAR_WIDTH ? s : 0.0f;
    } else if (noise == NORMAL) {
        *f = NORMAL_PEAK * power_of_two(z * z * (-0.5f * LOG2_E));
        *df = -z * *f;
    } else {
        float p = 1.0f / (1.0f + power_of_two(z * (-LOGISTIC_RATE * LOG2_E)));
        *f = p * (1.0f - p) * LOGISTIC_RATE;
        *df = *f * (1.0f - 2.0f * p) * LOGISTIC_RATE;
    }
}

/* ---- n <= 3 thresholds at a time, n and noise known to the compiler ---- */

INLINE void add_values(const int noise, const int n, const float *t, const float *g, float inverse,
                       const float *u, float *out, long length) {
    for (long i = 0; i < length; i++) {
        float sum = out[i];
        if (noise == NORMAL) {
            float numerator = 0, denominator = 1;
            for (int k = 0; k < n; k++)
                add_error_function((u[i] - t[k]) * inverse, 0.5f * g[k], &numerator, &denominator);
            sum += numerator / denominator;
        } else {
            for (int k = 0; k < n; k++) sum += g[k] * centred_cdf(noise, (u[i] - t[k]) * inverse);
        }
        out[i] = sum;
    }
}

/* sums of f, f' and z f' */
INLINE void add_slopes(const int noise, const int n, const int all, const float *t, const float *g,
                       float inverse, const float *u, float *f, float *df, float *zdf, long length) {
    for (long i = 0; i < length; i++) {
        float a = f[i], b = all ? df[i] : 0, c = all ? zdf[i] : 0;
        for (int k = 0; k < n; k++) {
            float z = within_reach(noise, (u[i] - t[k]) * inverse), density, slope;
            derivatives(noise, z, &density, &slope);
            a += g[k] * density;
            b += g[k] * slope;
            c += g[k] * (z * slope);
        }
        f[i] = a;
        if (all) df[i] = b, zdf[i] = c;
    }
}

/* sums of z f, and if all of f + z f' and z (2 f + z f') */
INLINE void add_std_slopes(const int noise, const int n, const int all, const float *t, const float *g,
                           float inverse, const float *u, float *zf, float *in_x, float *in_std,
                           long length) {
    for (long i = 0; i < length; i++) {
        float a = zf[i], b = all ? in_x[i] : 0, c = all ? in_std[i] : 0;
        for (int k = 0; k < n; k++) {
            float z = within_reach(noise, (u[i] - t[k]) * inverse), density, slope;
            derivatives(noise, z, &density, &slope);
            float mixed = density + z * slope;
            a += g[k] * (z * density);
            b += g[k] * mixed;
            c += g[k] * (z * (density + mixed));
        }
        zf[i] = a;
        if (all) in_x[i] = b, in_std[i] = c;
    }
}

/* Three at a time share a division; of the heavier sums, two at a time fit the registers. */
#define BY_THREES(call)                                                                             \
    do {                                                                                            \
        long k = 0;                                                                                 \
        for (; k + 3 <= count; k += 3) call(3);                                                     \
        if (k + 2 == count) call(2);                                                                \
        if (k + 1 == count) call(1);                                                                \
    } while (0)

#define BY_TWOS(call)                                                                               \
    do {                                                                                            \
        long k = 0;                                                                                 \
        for (; k + 2 <= count; k += 2) call(2);                                                     \
        if (k < count) call(1);                                                                     \
    } while (0)

#define BY_NOISE(macro)                                                                             \
    switch (s->noise) {                                                                             \
    case UNIFORM: macro(UNIFORM); break;                                                            \
    case TRIANGULAR: macro(TRIANGULAR); break;                                                      \
    case NORMAL: macro(NORMAL); break;                                                              \
    default: macro(LOGISTIC);                                                                       \
    }

/* How many thresholds noise can reach from one place; all of them if they are not evenly spaced. */
static long reached(const Staircase *s, float inverse) {
    if (!s->step) return s->count;
    /* Beyond, less than the last digit is left. */
    static const float reach[] = {UNIFORM_WIDTH, TRIANGULAR_WIDTH, 5.4f, 9.2f};
    float most = 2 * reach[s->noise] / (inverse * s->step) + 2;
    return most < (float)s->count ? (long)most : s->count;
}

/* Moves u by whole steps to where the first thresholds do for the nearest, and tells the steps. */
static void fold(const Staircase *s, long count, float *u, float *steps, long length) {
    float first = s->thresholds[0], step = s->step, per_step = 1 / step;
    float lead = 0.5f * (float)count, last = (float)(s->count - count);
    for (long i = 0; i < length; i++) {
        float below = clamp((u[i] - first) * per_step + 1 - lead, 0, last);
        below = (float)(int)below;
        u[i] = u[i] - below * step;
        steps[i] = below;
    }
}

static void sum_values(const Staircase *s, float inverse, float *u, float *out, long length) {
    long count = reached(s, inverse);
    float start = s->values[0], folded[BLOCK];
    for (long k = 0; k < count; k++) start += 0.5f * s->gaps[k];
    for (long i = 0; i < length; i++) out[i] = not_a_number(u[i]) ? u[i] : start;
    if (count < s->count) {
        fold(s, count, u, folded, length);
        for (long i = 0; i < length; i++) out[i] += s->gaps[0] * folded[i];
    }
    if (s->noise == NORMAL) inverse *= ROOT_HALF;
#define CALL(n) add_values(noise, n, s->thresholds + k, s->gaps + k, inverse, u, out, length)
#define NOISE(name) { const int noise = name; BY_THREES(CALL); }
    BY_NOISE(NOISE)
#undef CALL
#undef NOISE
    float low = s->values[0], high = s->values[s->count];
    for (long i = 0; i < length; i++) {
        float y = out[i];
        out[i] = not_a_number(y) ? y : clamp(y, low, high);
    }
}

static void sum_slopes(const Staircase *s, int all, float inverse, float *u, float *f, float *df,
                       float *zdf, long length) {
    long count = reached(s, inverse);
    if (count < s->count) fold(s, count, u, f, length);
    for (long i = 0; i < length; i++) f[i] = 0;
    if (all) for (long i = 0; i < length; i++) df[i] = zdf[i] = 0;
#define CALL(n)                                                                                     \
    add_slopes(noise, n, several, s->thresholds + k, s->gaps + k, inverse, u, f, df, zdf, length)
#define NOISE(name)                                                                                 \
    {                                                                                               \
        const int noise = name;                                                                     \
        if (all) { const int several = 1; BY_TWOS(CALL); }                                         \
        else { const int several = 0; BY_TWOS(CALL); }                                             \
    }
    BY_NOISE(NOISE)
#undef CALL
}

static void sum_std_slopes(const Staircase *s, int all, float inverse, float *u, float *f,
                           float *df, float *zdf, long length) {
    long count = reached(s, inverse);
    if (count < s->count) fold(s, count, u, f, length);
    for (long i = 0; i < length; i++) f[i] = 0;
    if (all) for (long i = 0; i < length; i++) df[i] = zdf[i] = 0;
#define CALL(n)                                                                                     \
    add_std_slopes(noise, n, several, s->thresholds + k, s->gaps + k, inverse, u, f, df, zdf, length)
    BY_NOISE(NOISE)
#undef CALL
#undef NOISE
}

/* ---- the hard staircase, to the bit ---- */

static void harden(const Staircase *s, float *u, float *out, long length) {
    float low = s->values[0], high = s->values[s->count];
    for (long i = 0; i < length; i++) u[i] = not_a_number(u[i]) ? low : u[i];
    if (s->whole && s->count > 4) {
        for (long i = 0; i < length; i++) {
            float v = clamp(u[i], low, high);
            float below = (float)(int)v;
            below = below > v ? below - 1 : below;
            out[i] = v - below >= 0.5f ? below + 1 : below;
        }
        return;
    }
    for (long i = 0; i < length; i++) out[i] = low;
    for (long k = 0; k < s->count; k++) {
        float t = s->thresholds[k], value = s->values[k + 1];
        for (long i = 0; i < length; i++) out[i] = u[i] >= t ? value : out[i];
    }
}

/* ---- rows and blocks ---- */

/* In eight lanes, whatever the compiler may do, and in double precision. */
static double total(const float *v, long length) {
    double lanes[8] = {0};
    long i = 0;
    for (; i + 8 <= length; i += 8)
        for (int j = 0; j < 8; j++) lanes[j] += v[i + j];
    for (; i < length; i++) lanes[0] += v[i];
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
           ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

typedef struct {
    long row, start, length; /* start counts from the first entry of the tensor */
    float scale, mean, inverse;
    int soft;
} Span;

INLINE Span span(const Table *t, long block, long per_row) {
    long columns = t->columns;
    Span b;
    b.row = block / per_row;
    long column = (block % per_row) * BLOCK;
    b.start = b.row * columns + column;
    b.length = columns - column < BLOCK ? columns - column : BLOCK;
    b.scale = t->scale ? t->scale[b.row * t->scale_stride] : 1.0f;
    b.mean = t->mean[b.row * t->mean_stride];
    float std = t->std[b.row * t->std_stride];
    b.soft = !(std <= NARROWEST);
    b.inverse = b.soft ? 1.0f / std : 0.0f;
    return b;
}

INLINE void load(const Table *t, const Span *b, const float *x, float *u) {
    x += b->start;
    if (t->scale) for (long i = 0; i < b->length; i++) u[i] = x[i] / b->scale;
    else for (long i = 0; i < b->length; i++) u[i] = x[i];
    if (b->mean != 0) for (long i = 0; i < b->length; i++) u[i] += b->mean;
}

static long blocks_per_row(const Table *t) { return (t->columns + BLOCK - 1) / BLOCK; }

static double *new_sums(const Table *t) {
    return malloc((size_t)(t->rows * blocks_per_row(t) + 1) * sizeof(double));
}

/* The sums of blocks, in their order, to one number a std; frees them. */
static void add_up(const Table *t, double *sums, float *out) {
    long per_row = blocks_per_row(t);
    double sum = 0;
    for (long row = 0; row < t->rows; row++) {
        for (long block = 0; block < per_row; block++) sum += sums[row * per_row + block];
        if (t->std_stride) {
            out[row] = (float)sum;
            sum = 0;
        }
    }
    if (!t->std_stride) out[0] = (float)sum;
    free(sums);
}

#define FOR_BLOCKS                                                                                  \
    long per_row = blocks_per_row(t), blocks = t->rows * per_row;                                   \
    _Pragma("omp parallel for num_threads(t->threads) schedule(static) if (t->threads > 1)")        \
    for (long block = 0; block < blocks; block++)

/* y = scale E(x / scale) */
void learnsched_value(const Staircase *s, const Table *t, const float *x, float *y) {
    FOR_BLOCKS {
        float u[BLOCK];
        Span b = span(t, block, per_row);
        float *out = y + b.start;
        load(t, &b, x, u);
        if (b.soft) sum_values(s, b.inverse, u, out, b.length);
        else harden(s, u, out, b.length);
        if (t->scale) for (long i = 0; i < b.length; i++) out[i] *= b.scale;
    }
}

/* out = g E' */
void learnsched_slope(const Staircase *s, const Table *t, const float *x, const float *g,
                      float *out) {
    FOR_BLOCKS {
        float u[BLOCK], f[BLOCK];
        Span b = span(t, block, per_row);
        if (!b.soft) {
            for (long i = 0; i < b.length; i++) out[b.start + i] = 0;
            continue;
        }
        load(t, &b, x, u);
        sum_slopes(s, 0, b.inverse, u, f, 0, 0, b.length);
        for (long i = 0; i < b.length; i++)
            out[b.start + i] = f[i] * b.inverse * g[b.start + i];
    }
}

/* of_std = sum of g scale dE/dstd over what shares a std */
void learnsched_std_slope(const Staircase *s, const Table *t, const float *x, const float *g,
                          float *of_std) {
    double *sums = new_sums(t);
    FOR_BLOCKS {
        float u[BLOCK], zf[BLOCK];
        Span b = span(t, block, per_row);
        double sum = 0;
        if (b.soft) {
            load(t, &b, x, u);
            sum_std_slopes(s, 0, b.inverse, u, zf, 0, 0, b.length);
            for (long i = 0; i < b.length; i++) zf[i] *= g[b.start + i];
            sum = total(zf, b.length) * -(double)b.inverse * b.scale;
        }
        sums[block] = sum;
    }
    add_up(t, sums, of_std);
}

/* From the adjoint of g E' those of g, x and std. */
void learnsched_slope_adjoint(const Staircase *s, const Table *t, const float *x, const float *g,
                              const float *adjoint, float *of_g, float *of_x, float *of_std) {
    double *sums = new_sums(t);
    FOR_BLOCKS {
        float u[BLOCK], f[BLOCK], df[BLOCK], zdf[BLOCK];
        Span b = span(t, block, per_row);
        long at = b.start;
        double sum = 0;
        if (b.soft) {
            load(t, &b, x, u);
            sum_slopes(s, 1, b.inverse, u, f, df, zdf, b.length);
            float square = b.inverse * b.inverse, in_x = square / b.scale;
            for (long i = 0; i < b.length; i++) {
                float o = adjoint[at + i], both = o * g[at + i];
                zdf[i] = both * (f[i] + zdf[i]);
                of_g[at + i] = o * f[i] * b.inverse;
                of_x[at + i] = both * df[i] * in_x;
            }
            sum = total(zdf, b.length) * -(double)square;
        } else {
            for (long i = 0; i < b.length; i++) of_g[at + i] = of_x[at + i] = 0;
        }
        sums[block] = sum;
    }
    add_up(t, sums, of_std);
}

/* From the adjoint of learnsched_std_slope's result, one a std, those of g, x and std. */
void learnsched_std_slope_adjoint(const Staircase *s, const Table *t, const float *x, const float *g,
                                  const float *adjoint, float *of_g, float *of_x, float *of_std) {
    double *sums = new_sums(t);
    FOR_BLOCKS {
        float u[BLOCK], zf[BLOCK], mixed[BLOCK], in_std[BLOCK];
        Span b = span(t, block, per_row);
        long at = b.start;
        double sum = 0;
        if (b.soft) {
            load(t, &b, x, u);
            sum_std_slopes(s, 1, b.inverse, u, zf, mixed, in_std, b.length);
            float o = adjoint[b.row * t->std_stride], square = b.inverse * b.inverse;
            float by_g = -o * b.inverse * b.scale, by_x = -o * square;
            for (long i = 0; i < b.length; i++) {
                in_std[i] *= g[at + i];
                of_g[at + i] = by_g * zf[i];
                of_x[at + i] = by_x * g[at + i] * mixed[i];
            }
            sum = total(in_std, b.length) * (double)o * square * b.scale;
        } else {
            for (long i = 0; i < b.length; i++) of_g[at + i] = of_x[at + i] = 0;
        }
        sums[block] = sum;
    }
    add_up(t, sums, of_std);
}
