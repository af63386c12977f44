/* Pillow's bicubic resize of 8-bit RGB, cut into tiles: what the files here share.
 *
 * Pillow computes every output pixel as a weighted mean of source pixels, one axis after the other,
 * with 8 bits in between. A weight is a whole number of 2^-22; so all sums are exact 32-bit
 * integers, in any order, and vector code can equal Pillow bit for bit. No instruction multiplies
 * bytes by 24-bit numbers quickly, so a weight is cut into parts that one does multiply by, and
 * the parts' sums are put together at the end.
 */
#ifndef AMALIA_PIXELS_H
#define AMALIA_PIXELS_H

#include <stdint.h>

#define PRECISION 22
#define ROUNDING (1 << (PRECISION - 1))
#define MAX_SIDE 65535  /* pixels; JPEG ends there */
/* Bytes that may be read, or written, after the end of any row: no row needs a special end. */
#define SLACK 256

/* The weights of one axis. Taps come in quads; those after `count` weigh nothing. */
typedef struct {
    int out, quads; /* output pixels; quads of the widest one */
    int *first;     /* [out] first source pixel */
    int *count;     /* [out] source pixels */
    int32_t *taps;  /* [out][4 * quads] */
} Axis;

/* The weights of the horizontal pass as one instruction set wants them, by groups of pixels. */
typedef struct {
    int groups, quads;
    int reach;        /* how the source bytes of a group are fetched; see the instruction set */
    int (*base)[4];           /* [groups] where to load from */
    uint8_t (*index)[128];    /* [groups] which of the bytes loaded go where */
    int32_t (*weights)[4][16]; /* [groups][quads], parts of weights, lanes */
} Horizontal;

typedef struct {
    const char *name;
    int (*supported)(void);
    int lanes;
    /* Fill `to`, whose arrays are allocated and zero, from an axis. */
    void (*pack_horizontal)(const Axis *axis, Horizontal *to);
    /* Four numbers for a quad of taps. */
    void (*pack_quad)(const int32_t taps[4], int32_t to[4]);
    /* RGBRGB... to three planes. */
    void (*deinterleave)(const uint8_t *rgb, long pixels, uint8_t *const planes[3]);
    /* One row of three planes. */
    void (*horizontal)(const Horizontal *, const uint8_t *const in[3], uint8_t *const out[3]);
    /* out[x] = weighted sum of rows[0][x], rows[1][x], ... (4 * quads of them). */
    void (*vertical)(
        const int32_t (*weights)[4], int quads, const uint8_t *const *rows, long n, uint8_t *out);
} Kernel;

extern const Kernel AVX512, AVX2;

#endif
