/* AVX2.
 *
 * VPMADDWD adds two products of signed 16-bit numbers into each 32-bit lane. A weight is therefore
 * cut into two halves, weight = high * 2^11 + low, and a lane works on two neighbouring taps of one
 * output pixel, whose bytes are widened to 16 bits while they are put in place.
 */
#include "pixels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2")))
#define INLINE TARGET static inline __attribute__((always_inline))
#define HALF 11

/* Whether 16 bytes hold the four source bytes of each of four output pixels. */
enum { NEAR, FAR };

static int supported(void) {
    return __builtin_cpu_supports("avx2");
}

static int32_t pair(int32_t first, int32_t second) {
    return (int32_t)(((uint32_t)second << 16) | ((uint32_t)first & 0xffff));
}

static void pack_quad(const int32_t taps[4], int32_t to[4]) {
    const int32_t low = (1 << HALF) - 1;
    to[0] = pair(taps[0] >> HALF, taps[1] >> HALF);
    to[1] = pair(taps[0] & low, taps[1] & low);
    to[2] = pair(taps[2] >> HALF, taps[3] >> HALF);
    to[3] = pair(taps[2] & low, taps[3] & low);
}

static void pack_horizontal(const Axis *axis, Horizontal *to) {
    to->reach = NEAR;
    for (int x = 0; x < axis->out; x++)
        if (axis->first[x] - axis->first[x & ~3] + 4 > 16) to->reach = FAR;
    for (int x = 0; x < axis->out; x++) {
        int g = x / 8, lane = x % 8;
        int base = axis->first[to->reach == NEAR ? x & ~3 : x & ~7];
        int offset = axis->first[x] - base;
        to->base[g][lane / 4] = base;
        uint8_t *index = to->index + 64L * g;
        if (to->reach == FAR) memcpy(index + 4 * lane, &offset, 4);
        else /* taps 0 and 1, then 2 and 3, each with a zero byte above it */
            for (int t = 0; t < 4; t++) {
                index[32 * (t / 2) + 4 * lane + 2 * (t % 2)] = (uint8_t)(offset + t);
                index[32 * (t / 2) + 4 * lane + 2 * (t % 2) + 1] = 0x80;
            }
        for (int q = 0; q < to->quads; q++) {
            int32_t parts[4];
            pack_quad(axis->taps + 4L * ((long)x * axis->quads + q), parts);
            int32_t *weights = (int32_t *)(to->weights + 256L * ((long)g * to->quads + q));
            for (int part = 0; part < 4; part++) weights[8 * part + lane] = parts[part];
        }
    }
}

TARGET static void deinterleave(const uint8_t *rgb, long pixels, uint8_t *const planes[3]) {
    __m128i from[3][3]; /* plane, 16 bytes of source */
    for (int p = 0; p < 3; p++)
        for (int part = 0; part < 3; part++) {
            uint8_t index[16];
            for (int i = 0; i < 16; i++) {
                int byte = 3 * i + p - 16 * part;
                index[i] = byte >= 0 && byte < 16 ? (uint8_t)byte : 0x80;
            }
            from[p][part] = _mm_loadu_si128((const __m128i *)index);
        }
    for (long x = 0; x < pixels; x += 16) {
        const __m128i *at = (const __m128i *)(rgb + 3 * x);
        __m128i v0 = _mm_loadu_si128(at), v1 = _mm_loadu_si128(at + 1);
        __m128i v2 = _mm_loadu_si128(at + 2);
        for (int p = 0; p < 3; p++) {
            __m128i v = _mm_or_si128(
                _mm_shuffle_epi8(v0, from[p][0]), _mm_shuffle_epi8(v1, from[p][1]));
            v = _mm_or_si128(v, _mm_shuffle_epi8(v2, from[p][2]));
            _mm_storeu_si128((__m128i *)(planes[p] + x), v);
        }
    }
}

INLINE __m256i load(const void *at) {
    return _mm256_loadu_si256((const __m256i *)at);
}

INLINE __m256i whole(__m256i high, __m256i low) {
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, HALF), low), PRECISION);
}

INLINE void add(__m256i *high, __m256i *low, __m256i v, __m256i by_high, __m256i by_low) {
    *high = _mm256_add_epi32(*high, _mm256_madd_epi16(v, by_high));
    *low = _mm256_add_epi32(*low, _mm256_madd_epi16(v, by_low));
}

INLINE void row(const Horizontal *h, const uint8_t *const in[3], uint8_t *const out[3], int reach) {
    const __m256i zero = _mm256_setzero_si256(), rounding = _mm256_set1_epi32(ROUNDING);
    const __m256i byte01 = _mm256_set1_epi32((int)0x80018000), spread = _mm256_setr_epi32(
        0, 0x00040004, 0x00080008, 0x000c000c, 0, 0x00040004, 0x00080008, 0x000c000c);
    const uint8_t *weights = h->weights;
    for (int g = 0; g < h->groups; g++) {
        __m256i offsets = load(h->index + 64L * g), index01 = offsets;
        __m256i index23 = load(h->index + 64L * g + 32);
        if (reach == FAR) {
            index01 = _mm256_add_epi8(byte01, spread);
            index23 = _mm256_add_epi8(index01, _mm256_set1_epi32(0x00020002));
        }
        __m256i high[3] = {zero, zero, zero}, low[3] = {rounding, rounding, rounding};
        long at = h->base[g][0], at4 = h->base[g][1];
        for (int q = 0; q < h->quads; q++, at += 4, at4 += 4, weights += 256) {
            __m256i high01 = load(weights), low01 = load(weights + 32);
            __m256i high23 = load(weights + 64), low23 = load(weights + 96);
            for (int p = 0; p < 3; p++) {
                __m256i v;
                if (reach == NEAR)
                    v = _mm256_inserti128_si256(
                        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(in[p] + at))),
                        _mm_loadu_si128((const __m128i *)(in[p] + at4)), 1);
                else v = _mm256_i32gather_epi32((const int *)(in[p] + at), offsets, 1);
                add(&high[p], &low[p], _mm256_shuffle_epi8(v, index01), high01, low01);
                add(&high[p], &low[p], _mm256_shuffle_epi8(v, index23), high23, low23);
            }
        }
        for (int p = 0; p < 3; p++) {
            __m256i sum = _mm256_packs_epi32(whole(high[p], low[p]), zero);
            sum = _mm256_permute4x64_epi64(_mm256_packus_epi16(sum, zero), 0x08);
            __m128i bytes = _mm256_castsi256_si128(sum);
            _mm_storel_epi64(
                (__m128i *)(out[p] + 8L * g), _mm_shuffle_epi32(bytes, _MM_SHUFFLE(3, 3, 2, 0)));
        }
    }
}

TARGET static void horizontal(
    const Horizontal *h, const uint8_t *const in[3], uint8_t *const out[3]) {
    if (h->reach == NEAR) row(h, in, out, NEAR);
    else row(h, in, out, FAR);
}

TARGET static void vertical(
    const int32_t (*weights)[4], int quads, const uint8_t *const *rows, long n, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256();
    for (long x = 0; x < n; x += 32) {
        __m256i high[4] = {zero, zero, zero, zero}, low[4];
        for (int i = 0; i < 4; i++) low[i] = _mm256_set1_epi32(ROUNDING);
        for (int r = 0; r < 4 * quads; r += 2) {
            /* Bytes of two rows side by side, widened. The unpacking works within 128 bits, and so
             * does the packing below, which puts the columns back in order. */
            __m256i r0 = load(rows[r] + x), r1 = load(rows[r + 1] + x);
            __m256i left = _mm256_unpacklo_epi8(r0, r1), right = _mm256_unpackhi_epi8(r0, r1);
            __m256i v[4] = {
                _mm256_unpacklo_epi8(left, zero), _mm256_unpackhi_epi8(left, zero),
                _mm256_unpacklo_epi8(right, zero), _mm256_unpackhi_epi8(right, zero)};
            __m256i by_high = _mm256_set1_epi32(weights[r / 4][r % 4]);
            __m256i by_low = _mm256_set1_epi32(weights[r / 4][r % 4 + 1]);
            for (int i = 0; i < 4; i++) add(&high[i], &low[i], v[i], by_high, by_low);
        }
        for (int i = 0; i < 4; i++) high[i] = whole(high[i], low[i]);
        __m256i left = _mm256_packs_epi32(high[0], high[1]);
        __m256i right = _mm256_packs_epi32(high[2], high[3]);
        _mm256_storeu_si256((__m256i *)(out + x), _mm256_packus_epi16(left, right));
    }
}

const Kernel AVX2 = {
    "avx2", supported, 8, pack_horizontal, pack_quad, deinterleave, horizontal, vertical};
#endif
