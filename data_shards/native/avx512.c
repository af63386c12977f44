/* AVX-512 with VBMI and VNNI (Ice Lake, Zen 4 and later).
 *
 * VPDPBUSD adds four products of an unsigned and a signed byte to each 32-bit lane. A weight is
 * therefore cut into three signed bytes, weight = a * 2^16 + b * 2^8 + c, and a lane works on four
 * neighbouring taps of one output pixel. Lanes wrap around modulo 2^32; the final sum fits.
 */
#include "pixels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* Reach: from how many windows of 128 bytes a group's source comes, 1, 2 or 4; or one of these. */
enum { NEAR = 0 /* 64 bytes are enough */, FAR = 16 /* every lane for itself */ };

static int supported(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

static void digits(int32_t weight, int8_t *a, int8_t *b, int8_t *c) {
    *c = (int8_t)weight;
    weight = (weight - *c) >> 8;
    *b = (int8_t)weight;
    *a = (int8_t)((weight - *b) >> 8);
}

static void pack_quad(const int32_t taps[4], int32_t to[4]) {
    int8_t *bytes = (int8_t *)to;
    for (int t = 0; t < 4; t++) digits(taps[t], bytes + t, bytes + 4 + t, bytes + 8 + t);
    to[3] = 0;
}

/* Most source bytes between the first and the last of `lanes` neighbours. */
static int span(const Axis *axis, int lanes) {
    int widest = 0;
    for (int x = 0; x < axis->out; x++) {
        int bytes = axis->first[x] - axis->first[x - x % lanes] + 4;
        if (bytes > widest) widest = bytes;
    }
    return widest;
}

static void pack_horizontal(const Axis *axis, Horizontal *to) {
    to->reach = span(axis, 16) <= 64 ? NEAR : 1;
    while (to->reach && to->reach < FAR && span(axis, 16 / to->reach) > 128) to->reach *= 2;
    if (to->reach > 4) to->reach = FAR;
    int lanes = to->reach == NEAR || to->reach == FAR ? 16 : 16 / to->reach;
    for (int x = 0; x < axis->out; x++) {
        int g = x / 16, lane = x % 16, base = axis->first[x - lane % lanes];
        int offset = axis->first[x] - base;
        to->base[g][lane / lanes] = base;
        uint8_t *index = to->index[g] + 4 * lane;
        if (to->reach == FAR) memcpy(index, &offset, 4);
        else for (int t = 0; t < 4; t++) index[t] = (uint8_t)(offset + t);
        for (int q = 0; q < to->quads; q++) {
            int32_t parts[4];
            pack_quad(axis->taps + 4L * ((long)x * axis->quads + q), parts);
            for (int part = 0; part < 3; part++)
                to->weights[(long)g * to->quads + q][part][lane] = parts[part];
        }
    }
}

TARGET static void deinterleave(const uint8_t *rgb, long pixels, uint8_t *const planes[3]) {
    uint8_t low[3][64], high[3][64]; /* from the first 128 bytes; then from the last 64 */
    for (int p = 0; p < 3; p++)
        for (int i = 0; i < 64; i++) {
            int from = 3 * i + p;
            low[p][i] = (uint8_t)(from & 127);
            high[p][i] = (uint8_t)(from < 128 ? i : from - 64);
        }
    for (long x = 0; x < pixels; x += 64) {
        __m512i v0 = _mm512_loadu_si512(rgb + 3 * x), v1 = _mm512_loadu_si512(rgb + 3 * x + 64);
        __m512i v2 = _mm512_loadu_si512(rgb + 3 * x + 128);
        for (int p = 0; p < 3; p++) {
            __m512i v = _mm512_permutex2var_epi8(v0, _mm512_loadu_si512(low[p]), v1);
            v = _mm512_permutex2var_epi8(v, _mm512_loadu_si512(high[p]), v2);
            _mm512_storeu_si512(planes[p] + x, v);
        }
    }
}

INLINE __m512i whole(__m512i a, __m512i b, __m512i c) {
    __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(a, 16), _mm512_slli_epi32(b, 8));
    return _mm512_srai_epi32(_mm512_add_epi32(sum, c), PRECISION);
}

INLINE __m512i fetch(const uint8_t *at, const int base[4], __m512i index, int reach) {
    if (reach == NEAR) return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(at + base[0]));
    if (reach == FAR) return _mm512_i32gather_epi32(index, at + base[0], 1);
    __m512i v = _mm512_setzero_si512();
    for (int window = 0; window < reach; window++) {
        const uint8_t *from = at + base[window];
        __mmask64 lanes = ~(__mmask64)0 >> (64 - 64 / reach) << (64 / reach * window);
        v = _mm512_or_si512(v, _mm512_maskz_permutex2var_epi8(
            lanes, _mm512_loadu_si512(from), index, _mm512_loadu_si512(from + 64)));
    }
    return v;
}

INLINE void row(const Horizontal *h, const uint8_t *const in[3], uint8_t *const out[3], int reach) {
    const __m512i zero = _mm512_setzero_si512(), rounding = _mm512_set1_epi32(ROUNDING);
    int32_t(*weights)[4][16] = h->weights;
    for (int g = 0; g < h->groups; g++) {
        __m512i index = _mm512_loadu_si512(h->index[g]);
        __m512i a[3] = {zero, zero, zero}, b[3] = {zero, zero, zero};
        __m512i c[3] = {rounding, rounding, rounding};
        for (int q = 0; q < h->quads; q++, weights++) {
            __m512i wa = _mm512_loadu_si512((*weights)[0]);
            __m512i wb = _mm512_loadu_si512((*weights)[1]);
            __m512i wc = _mm512_loadu_si512((*weights)[2]);
            for (int p = 0; p < 3; p++) {
                __m512i v = fetch(in[p] + 4 * q, h->base[g], index, reach);
                a[p] = _mm512_dpbusd_epi32(a[p], v, wa);
                b[p] = _mm512_dpbusd_epi32(b[p], v, wb);
                c[p] = _mm512_dpbusd_epi32(c[p], v, wc);
            }
        }
        for (int p = 0; p < 3; p++) {
            __m512i sum = _mm512_max_epi32(whole(a[p], b[p], c[p]), zero);
            _mm_storeu_si128((__m128i *)(out[p] + 16L * g), _mm512_cvtusepi32_epi8(sum));
        }
    }
}

TARGET static void horizontal(
    const Horizontal *h, const uint8_t *const in[3], uint8_t *const out[3]) {
    if (h->reach == NEAR) row(h, in, out, NEAR);
    else if (h->reach == 1) row(h, in, out, 1);
    else if (h->reach == 2) row(h, in, out, 2);
    else if (h->reach == 4) row(h, in, out, 4);
    else row(h, in, out, FAR);
}

TARGET static void vertical(
    const int32_t (*weights)[4], int quads, const uint8_t *const *rows, long n, uint8_t *out) {
    for (long x = 0; x < n; x += 64) {
        __m512i a[4], b[4], c[4];
        for (int i = 0; i < 4; i++) {
            a[i] = b[i] = _mm512_setzero_si512();
            c[i] = _mm512_set1_epi32(ROUNDING);
        }
        for (int q = 0; q < quads; q++) {
            /* Bytes of four rows side by side in each lane. The unpacking works within 128 bits,
             * and so does the packing below, which puts the columns back in order. */
            __m512i r0 = _mm512_loadu_si512(rows[4 * q] + x);
            __m512i r1 = _mm512_loadu_si512(rows[4 * q + 1] + x);
            __m512i r2 = _mm512_loadu_si512(rows[4 * q + 2] + x);
            __m512i r3 = _mm512_loadu_si512(rows[4 * q + 3] + x);
            __m512i low01 = _mm512_unpacklo_epi8(r0, r1), high01 = _mm512_unpackhi_epi8(r0, r1);
            __m512i low23 = _mm512_unpacklo_epi8(r2, r3), high23 = _mm512_unpackhi_epi8(r2, r3);
            __m512i v[4] = {
                _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
            __m512i wa = _mm512_set1_epi32(weights[q][0]), wb = _mm512_set1_epi32(weights[q][1]);
            __m512i wc = _mm512_set1_epi32(weights[q][2]);
            for (int i = 0; i < 4; i++) {
                a[i] = _mm512_dpbusd_epi32(a[i], v[i], wa);
                b[i] = _mm512_dpbusd_epi32(b[i], v[i], wb);
                c[i] = _mm512_dpbusd_epi32(c[i], v[i], wc);
            }
        }
        for (int i = 0; i < 4; i++) a[i] = whole(a[i], b[i], c[i]);
        __m512i low = _mm512_packs_epi32(a[0], a[1]), high = _mm512_packs_epi32(a[2], a[3]);
        _mm512_storeu_si512(out + x, _mm512_packus_epi16(low, high));
    }
}

const Kernel AVX512 = {
    "avx512", supported, 16, pack_horizontal, pack_quad, deinterleave, horizontal, vertical};
#endif
