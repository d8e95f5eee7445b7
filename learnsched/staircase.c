/* The expectation of a staircase under noise, and its derivatives, in one pass over memory.
 *
 * The formulas are those of staircase.py. A tensor is a table of rows x columns; each row has its own
 * scale, std and mean of the noise (in units of the levels). native.py compiles this file, native_call.py
 * passes the arguments. Sums over a row add up blocks of fixed length in double precision and in a
 * fixed order, so that results do not depend on the number of threads.
 *
 * Compiled with -ffinite-math-only, so that limits are one instruction; NaN is told by its bits. Not
 * with -ffast-math, which would flush small numbers to 0 in the whole process.
 */

#include <math.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 512
#define NARROWEST 1e-12f
#define EXACT 4194304 /* whole numbers and their quarters have floats */

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

/* Beyond, in units of the std, less than the last digit is left, of values and of derivatives. */
static const float reach[2][4] = {{UNIFORM_WIDTH, TRIANGULAR_WIDTH, 5.4f, 9.2f},
                                  {UNIFORM_WIDTH, TRIANGULAR_WIDTH, 6.2f, 11.0f}};

/* What is summed over thresholds: F - 1/2; f, and if all f' and z f'; z f, and if all f + z f' and
 * z (2 f + z f'). */
enum { VALUES, SLOPES, STD_SLOPES };

/* ---- n <= 3 thresholds at a time, n and noise known to the compiler ----
 * restrict: without it, sums in three arrays are not vectorised. */

INLINE void add_values(const int noise, const int n, const float *restrict t, const float *restrict g,
                       float inverse, const float *restrict u, float *restrict out, long length) {
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
INLINE void add_slopes(const int noise, const int n, const int all, const float *restrict t,
                       const float *restrict g, float inverse, const float *restrict u,
                       float *restrict f, float *restrict df, float *restrict zdf, long length) {
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
INLINE void add_std_slopes(const int noise, const int n, const int all, const float *restrict t,
                           const float *restrict g, float inverse, const float *restrict u,
                           float *restrict zf, float *restrict in_x, float *restrict in_std,
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
static long reached(const Staircase *s, int kind, float inverse) {
    if (!s->step) return s->count;
    float most = 2 * reach[kind != VALUES][s->noise] / (inverse * s->step) + 1;
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

/* The sums over the first count thresholds, in one array or, if all are asked for, three. */
static void sum(const Staircase *s, int kind, int all, long count, float inverse, const float *u,
                float *const *out, long length) {
    float *a = out[0], *b = out[1], *c = out[2];
    for (long i = 0; i < length; i++) a[i] = 0;
    if (all) for (long i = 0; i < length; i++) b[i] = c[i] = 0;
    if (kind == VALUES && s->noise == NORMAL) inverse *= ROOT_HALF;
#define CALL(n) add_values(noise, n, s->thresholds + k, s->gaps + k, inverse, u, a, length)
#define NOISE(name) { const int noise = name; BY_THREES(CALL); }
    if (kind == VALUES) BY_NOISE(NOISE)
#undef CALL
#undef NOISE
#define NOISE(name)                                                                                 \
    {                                                                                               \
        const int noise = name;                                                                     \
        if (all) { const int several = 1; BY_TWOS(CALL); }                                         \
        else { const int several = 0; BY_TWOS(CALL); }                                             \
    }
#define CALL(n)                                                                                     \
    add_slopes(noise, n, several, s->thresholds + k, s->gaps + k, inverse, u, a, b, c, length)
    if (kind == SLOPES) BY_NOISE(NOISE)
#undef CALL
#define CALL(n)                                                                                     \
    add_std_slopes(noise, n, several, s->thresholds + k, s->gaps + k, inverse, u, a, b, c, length)
    if (kind == STD_SLOPES) BY_NOISE(NOISE)
#undef CALL
#undef NOISE
}

/* ---- many thresholds: the sums as piecewise cubics, whatever their number ---- */

/* Cells as wide as a power of two, so that a place within its cell is found without rounding. */
typedef struct {
    long cells;      /* 0: there is no curve */
    long kinds;      /* sums a cell holds, one or three */
    float first;     /* where the cells begin, in cells from 0 */
    float per_unit;  /* cells */
    float *cubics;   /* four coefficients a sum and cell, from the constant on */
} Curve;

/* A cell is at most 1/12 std wide: the error of a sum is that of rounding. */
#define CELLS_PER_STD 12
#define MOST_CELLS 2048
#define FEW_THRESHOLDS 3

/* The curve of the sums over the first count thresholds, where it pays for so many elements. */
static Curve curve(const Staircase *s, int kind, int all, float inverse, long elements) {
    Curve c = {0};
    long count = reached(s, kind, inverse);
    if (s->noise < NORMAL || count <= FEW_THRESHOLDS || not_a_number(inverse)) return c;
    double per_unit = 1, wanted = CELLS_PER_STD * (double)inverse;
    while (per_unit < wanted) per_unit *= 2;
    while (per_unit >= 2 * wanted) per_unit *= 0.5;
    double far = (double)reach[kind != VALUES][s->noise] / inverse;
    double first = (s->thresholds[0] - far) * per_unit, last = (s->thresholds[count - 1] + far) * per_unit;
    if (first < -EXACT || last > EXACT || last - first > MOST_CELLS) return c;
    long begin = (long)first - 1, cells = (long)last + 1 - begin, nodes = 3 * cells + 1;
    long kinds = all ? 3 : 1;
    if (elements < 4 * cells) return c;
    float *place = malloc(sizeof(float) * (size_t)nodes * (size_t)(1 + kinds));
    c.cubics = malloc(sizeof(float) * 4 * (size_t)kinds * (size_t)(cells + 1));
    if (!place || !c.cubics) {
        free(place);
        free(c.cubics);
        return c;
    }
    static const double inside[] = {0, 0.25, 0.75};
    for (long i = 0; i < nodes; i++)
        place[i] = (float)(((double)(begin + i / 3) + inside[i % 3]) / per_unit);
    /* Out there nothing changes any more. */
    place[0] -= (float)(100 * far);
    place[nodes - 1] += (float)(100 * far);
    for (long i = 0; i < nodes; i += BLOCK) {
        float *out[3];
        for (long k = 0; k < 3; k++) out[k] = place + (1 + (k < kinds ? k : 0)) * nodes + i;
        sum(s, kind, all, count, inverse, place + i, out, nodes - i < BLOCK ? nodes - i : BLOCK);
    }
    for (long cell = 0; cell <= cells; cell++) {
        for (long k = 0; k < kinds; k++) {
            const float *y = place + (1 + k) * nodes + 3 * cell;
            float *p = c.cubics + 4 * (cell * kinds + k);
            p[0] = y[0];
            p[1] = p[2] = p[3] = 0;
            if (cell == cells) continue;
            double d1 = (double)y[1] - y[0], d2 = (double)y[2] - y[0], d3 = (double)y[3] - y[0];
            double linear = 8 * d1 + d3 - 8 * d2 / 3, square = (64 * d1 - d3 - 15 * linear) / 3;
            p[1] = (float)linear;
            p[2] = (float)square;
            p[3] = (float)(d3 - linear - square);
        }
    }
    free(place);
    c.cells = cells;
    c.kinds = kinds;
    c.first = (float)begin;
    c.per_unit = (float)per_unit;
    return c;
}

INLINE void follow_kinds(const Curve *c, const long kinds, const int *cell, const float *t,
                         float *const *out, long length) {
    for (long k = 0; k < kinds; k++) {
        const float *cubics = c->cubics + 4 * k;
        float *y = out[k];
        for (long i = 0; i < length; i++) {
            const float *p = cubics + 4 * kinds * cell[i];
            y[i] = ((p[3] * t[i] + p[2]) * t[i] + p[1]) * t[i] + p[0];
        }
    }
}

static void follow(const Curve *c, const float *u, float *const *out, long length) {
    int cell[BLOCK];
    float t[BLOCK], first = c->first, per_unit = c->per_unit, last = first + (float)c->cells;
    for (long i = 0; i < length; i++) {
        float place = clamp(not_a_number(u[i]) ? first : u[i] * per_unit, first, last);
        float floor = (float)(int)place;
        floor = floor > place ? floor - 1 : floor;
        cell[i] = (int)(floor - first);
        t[i] = place - floor;
    }
    if (c->kinds == 1) follow_kinds(c, 1, cell, t, out, length);
    else follow_kinds(c, 3, cell, t, out, length);
}

/* The sums over all thresholds. */
static void sums(const Staircase *s, const Curve *c, int kind, int all, float inverse, float *u,
                 float *const *out, long length) {
    long count = reached(s, kind, inverse);
    float steps[BLOCK];
    int folded = count < s->count;
    if (folded) fold(s, count, u, steps, length);
    if (c->cells) follow(c, u, out, length);
    else sum(s, kind, all, count, inverse, u, out, length);
    if (kind != VALUES) return;
    /* The sum was that of F - 1/2. */
    float *y = out[0], start = s->values[0], low = s->values[0], high = s->values[s->count];
    for (long k = 0; k < count; k++) start += 0.5f * s->gaps[k];
    if (folded) for (long i = 0; i < length; i++) y[i] += start + s->gaps[0] * steps[i];
    else for (long i = 0; i < length; i++) y[i] += start;
    for (long i = 0; i < length; i++) y[i] = not_a_number(u[i]) ? u[i] : clamp(y[i], low, high);
}

/* ---- the hard staircase, to the bit ---- */

INLINE void harden(const Staircase *s, float *restrict u, float *restrict out, long length) {
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

static const Curve no_curve;

INLINE const Curve *curve_of(const Table *t, const Span *b, const Curve *curves) {
    return curves ? curves + b->row * t->std_stride : &no_curve;
}

INLINE void load(const Table *t, const Span *b, const float *x, float *u) {
    x += b->start;
    if (t->scale) for (long i = 0; i < b->length; i++) u[i] = x[i] / b->scale;
    else for (long i = 0; i < b->length; i++) u[i] = x[i];
    if (b->mean != 0) for (long i = 0; i < b->length; i++) u[i] += b->mean;
}

/* One curve for each std of the table; free_curves frees them. */
static Curve *new_curves(const Staircase *s, const Table *t, int kind, int all) {
    long count = t->std_stride ? t->rows : 1;
    long elements = t->columns * (t->std_stride ? 1 : t->rows);
    Curve *curves = calloc((size_t)count, sizeof(Curve));
    _Pragma("omp parallel for num_threads(t->threads) schedule(static) if (t->threads > 1)")
    for (long i = 0; i < count; i++) {
        float std = t->std[i];
        if (curves && std > NARROWEST) curves[i] = curve(s, kind, all, 1.0f / std, elements);
    }
    return curves;
}

static void free_curves(const Table *t, Curve *curves) {
    for (long i = 0; curves && i < (t->std_stride ? t->rows : 1); i++) free(curves[i].cubics);
    free(curves);
}

static long blocks_per_row(const Table *t) { return (t->columns + BLOCK - 1) / BLOCK; }

static double *new_totals(const Table *t) {
    return malloc((size_t)(t->rows * blocks_per_row(t) + 1) * sizeof(double));
}

/* The sums of blocks, in their order, to one number a std; frees them. NaN if there was no memory. */
static void add_up(const Table *t, double *totals, float *out) {
    long per_row = blocks_per_row(t);
    double sum = 0;
    if (!totals) {
        for (long i = 0; i < (t->std_stride ? t->rows : 1); i++) out[i] = NAN;
        return;
    }
    for (long row = 0; row < t->rows; row++) {
        for (long block = 0; block < per_row; block++) sum += totals[row * per_row + block];
        if (t->std_stride) {
            out[row] = (float)sum;
            sum = 0;
        }
    }
    if (!t->std_stride) out[0] = (float)sum;
    free(totals);
}

#define FOR_BLOCKS                                                                                  \
    long per_row = blocks_per_row(t), blocks = t->rows * per_row;                                   \
    _Pragma("omp parallel for num_threads(t->threads) schedule(static) if (t->threads > 1)")        \
    for (long block = 0; block < blocks; block++)

/* y = scale E(x / scale) */
void learnsched_value(const Staircase *s, const Table *t, const float *x, float *y) {
    Curve *curves = new_curves(s, t, VALUES, 0);
    FOR_BLOCKS {
        float u[BLOCK];
        Span b = span(t, block, per_row);
        float *out = y + b.start, *sum_of[3] = {out};
        load(t, &b, x, u);
        if (b.soft) sums(s, curve_of(t, &b, curves), VALUES, 0, b.inverse, u, sum_of, b.length);
        else harden(s, u, out, b.length);
        if (t->scale) for (long i = 0; i < b.length; i++) out[i] *= b.scale;
    }
    free_curves(t, curves);
}

/* out = g E' */
void learnsched_slope(const Staircase *s, const Table *t, const float *x, const float *g,
                      float *out) {
    Curve *curves = new_curves(s, t, SLOPES, 0);
    FOR_BLOCKS {
        float u[BLOCK], f[BLOCK], *sum_of[3] = {f};
        Span b = span(t, block, per_row);
        if (!b.soft) {
            for (long i = 0; i < b.length; i++) out[b.start + i] = 0;
            continue;
        }
        load(t, &b, x, u);
        sums(s, curve_of(t, &b, curves), SLOPES, 0, b.inverse, u, sum_of, b.length);
        for (long i = 0; i < b.length; i++)
            out[b.start + i] = f[i] * b.inverse * g[b.start + i];
    }
    free_curves(t, curves);
}

/* of_std = sum of g scale dE/dstd over what shares a std */
void learnsched_std_slope(const Staircase *s, const Table *t, const float *x, const float *g,
                          float *of_std) {
    double *totals = new_totals(t);
    Curve *curves = new_curves(s, t, STD_SLOPES, 0);
    FOR_BLOCKS {
        float u[BLOCK], zf[BLOCK], *sum_of[3] = {zf};
        Span b = span(t, block, per_row);
        double sum = 0;
        if (b.soft) {
            load(t, &b, x, u);
            sums(s, curve_of(t, &b, curves), STD_SLOPES, 0, b.inverse, u, sum_of, b.length);
            for (long i = 0; i < b.length; i++) zf[i] *= g[b.start + i];
            sum = total(zf, b.length) * -(double)b.inverse * b.scale;
        }
        if (totals) totals[block] = sum;
    }
    add_up(t, totals, of_std);
    free_curves(t, curves);
}

/* From the adjoint of g E' those of g, x and std. */
void learnsched_slope_adjoint(const Staircase *s, const Table *t, const float *x, const float *g,
                              const float *adjoint, float *of_g, float *of_x, float *of_std) {
    double *totals = new_totals(t);
    Curve *curves = new_curves(s, t, SLOPES, 1);
    FOR_BLOCKS {
        float u[BLOCK], f[BLOCK], df[BLOCK], zdf[BLOCK], *sum_of[3] = {f, df, zdf};
        Span b = span(t, block, per_row);
        long at = b.start;
        double sum = 0;
        if (b.soft) {
            load(t, &b, x, u);
            sums(s, curve_of(t, &b, curves), SLOPES, 1, b.inverse, u, sum_of, b.length);
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
        if (totals) totals[block] = sum;
    }
    add_up(t, totals, of_std);
    free_curves(t, curves);
}

/* From the adjoint of learnsched_std_slope's result, one a std, those of g, x and std. */
void learnsched_std_slope_adjoint(const Staircase *s, const Table *t, const float *x, const float *g,
                                  const float *adjoint, float *of_g, float *of_x, float *of_std) {
    double *totals = new_totals(t);
    Curve *curves = new_curves(s, t, STD_SLOPES, 1);
    FOR_BLOCKS {
        float u[BLOCK], zf[BLOCK], mixed[BLOCK], in_std[BLOCK], *sum_of[3] = {zf, mixed, in_std};
        Span b = span(t, block, per_row);
        long at = b.start;
        double sum = 0;
        if (b.soft) {
            load(t, &b, x, u);
            sums(s, curve_of(t, &b, curves), STD_SLOPES, 1, b.inverse, u, sum_of, b.length);
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
        if (totals) totals[block] = sum;
    }
    add_up(t, totals, of_std);
    free_curves(t, curves);
}
