/* The module amalia_pixels: resize one image and cut it into tiles. See pixels.h. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "pixels.h"

#define INTERFACE 2 /* what data_shards/resize.py must know; changes with the arguments */

#if defined(__x86_64__) && defined(__GNUC__)
static const Kernel *const KERNELS[] = {&AVX512, &AVX2, NULL}; /* the fastest first */
#else
static const Kernel *const KERNELS[] = {NULL};
#endif

/* Keys' cubic convolution with a = -1/2. The order of operations is Pillow's: the same doubles. */
static double bicubic(double x) {
    x = fabs(x);
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0.0;
}

static void free_axis(Axis *axis) {
    free(axis->first);
    free(axis->count);
    free(axis->taps);
}

/* Pillow's weights: the kernel is stretched when shrinking, cut at the edges, scaled to a sum of
 * one, and rounded half away from zero. Returns 0 without memory. */
static int make_axis(Axis *axis, int in, int out) {
    double scale = (double)in / out, stretch = scale < 1.0 ? 1.0 : scale;
    double support = 2.0 * stretch, inverse = 1.0 / stretch;
    int widest = 1;
    axis->out = out;
    axis->taps = NULL;
    axis->first = malloc(sizeof(int) * (size_t)out);
    axis->count = malloc(sizeof(int) * (size_t)out);
    if (!axis->first || !axis->count) return 0;
    for (int x = 0; x < out; x++) {
        double center = (x + 0.5) * scale;
        int first = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
        axis->first[x] = first < 0 ? 0 : first;
        axis->count[x] = (end > in ? in : end) - axis->first[x];
        if (axis->count[x] > widest) widest = axis->count[x];
    }
    axis->quads = (widest + 3) / 4;
    axis->taps = calloc((size_t)out * (size_t)axis->quads, 4 * sizeof(int32_t));
    double *weights = malloc(sizeof(double) * (size_t)widest);
    if (!axis->taps || !weights) {
        free(weights);
        return 0;
    }
    for (int x = 0; x < out; x++) {
        double center = (x + 0.5) * scale, sum = 0.0;
        int32_t *taps = axis->taps + 4L * axis->quads * x;
        for (int i = 0; i < axis->count[x]; i++) {
            weights[i] = bicubic((i + axis->first[x] - center + 0.5) * inverse);
            sum += weights[i];
        }
        for (int i = 0; i < axis->count[x]; i++) {
            double weight = (sum != 0.0 ? weights[i] / sum : weights[i]) * (1 << PRECISION);
            taps[i] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
    }
    free(weights);
    return 1;
}

/* One resize: the size wanted, and where that lies on a canvas of tiles. */
typedef struct {
    int new_height, new_width, top, left, rows, columns, side;
    uint8_t *tiles; /* [rows * columns][3][side][side] */
    int across, down, down_first;
    Axis x, y;
    Horizontal h;
    int32_t (*v)[4];          /* [new_height][y.quads] */
    uint8_t *ring, *line;     /* the latest rows after the horizontal pass; one canvas row */
    const uint8_t **rows_of;  /* [4 * y.quads] the rows that an output row is made of */
    long ring_plane, line_plane; /* bytes from one plane to the next */
    int next;                 /* output row */
} Target;

static void *allocate(size_t bytes) {
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static int prepare(Target *t, const Kernel *kernel, int height, int width) {
    /* Which pass comes first changes the rounding in between: Pillow 13's rule. If there is only
     * one, the order is free, and the vertical pass takes the image's rows as they are. */
    int shrink = height - t->new_height;
    t->across = width != t->new_width;
    t->down = shrink != 0;
    t->down_first =
        t->down && (!t->across || (shrink > 0 && shrink > 2 * (width - t->new_width)));
    if (t->across) {
        if (!make_axis(&t->x, width, t->new_width)) return 0;
        size_t groups = (size_t)((t->new_width + kernel->lanes - 1) / kernel->lanes);
        t->h.groups = (int)groups;
        t->h.quads = t->x.quads;
        t->h.base = calloc(groups, sizeof *t->h.base);
        t->h.index = calloc(groups, sizeof *t->h.index);
        t->h.weights = allocate(groups * (size_t)t->x.quads * sizeof *t->h.weights);
        if (!t->h.base || !t->h.index || !t->h.weights) return 0;
        memset(t->h.weights, 0, groups * (size_t)t->x.quads * sizeof *t->h.weights);
        kernel->pack_horizontal(&t->x, &t->h);
    }
    t->ring_plane = (t->new_width + 63L) / 64 * 64 + SLACK;
    if (t->down) {
        if (!make_axis(&t->y, height, t->new_height)) return 0;
        size_t rows = 4 * (size_t)t->y.quads, quads = (size_t)t->new_height * (size_t)t->y.quads;
        t->v = malloc(quads * sizeof *t->v);
        t->rows_of = malloc(rows * sizeof *t->rows_of);
        if (!t->v || !t->rows_of) return 0;
        for (size_t q = 0; q < quads; q++) kernel->pack_quad(t->y.taps + 4 * q, t->v[q]);
        if (!t->down_first && !(t->ring = allocate(3 * rows * (size_t)t->ring_plane))) return 0;
    }
    t->line_plane = (long)t->columns * t->side + SLACK;
    t->line = calloc(3, (size_t)t->line_plane);
    return t->line != NULL;
}

static void release(Target *t) {
    free_axis(&t->x);
    free_axis(&t->y);
    free(t->h.base);
    free(t->h.index);
    free(t->h.weights);
    free(t->v);
    free(t->ring);
    free(t->line);
    free(t->rows_of);
}

/* A canvas row to the tiles that it crosses. */
static void put(const Target *t, int row) {
    long side = t->side;
    for (int column = 0; column < t->columns; column++)
        for (int p = 0; p < 3; p++) {
            long plane = ((long)(row / side) * t->columns + column) * 3 + p;
            memcpy(t->tiles + (plane * side + row % side) * side,
                   t->line + p * t->line_plane + column * side, (size_t)side);
        }
}

/* The next row of the resized image lies in the line: put it, and what is above or below. */
static void finish_row(Target *t) {
    /* What was written beyond the row's end is margin. */
    for (int p = 0; p < 3; p++)
        memset(t->line + p * t->line_plane + t->left + t->new_width, 0, 64);
    put(t, t->top + t->next++);
}

static void margins(Target *t) {
    memset(t->line, 0, 3 * (size_t)t->line_plane);
    for (int row = 0; row < t->rows * t->side; row++)
        if (row < t->top || row >= t->top + t->new_height) put(t, row);
}

static void make_row(
    const Target *t, const Kernel *kernel, const uint8_t *rows, long stride, long n, int slots,
    uint8_t *out) {
    int first = t->y.first[t->next], count = t->y.count[t->next];
    for (int i = 0; i < 4 * t->y.quads; i++)
        t->rows_of[i] = rows + (first + (i < count ? i : 0)) % slots * stride;
    kernel->vertical(t->v + (long)t->next * t->y.quads, t->y.quads, t->rows_of, n, out);
}

/* Take one more row of the image. */
static void push(Target *t, const Kernel *kernel, uint8_t *const planes[3], int row, int width) {
    const uint8_t *const in[3] = {planes[0], planes[1], planes[2]};
    uint8_t *line[3];
    for (int p = 0; p < 3; p++) line[p] = t->line + p * t->line_plane + t->left;
    if (!t->down) {
        if (t->across) kernel->horizontal(&t->h, in, line);
        else for (int p = 0; p < 3; p++) memcpy(line[p], planes[p], (size_t)width);
        finish_row(t);
        return;
    }
    int slots = 4 * t->y.quads;
    uint8_t *slot[3];
    for (int p = 0; p < 3; p++) slot[p] = t->ring + (3L * (row % slots) + p) * t->ring_plane;
    kernel->horizontal(&t->h, in, slot);
    while (t->next < t->new_height && t->y.first[t->next] + t->y.count[t->next] <= row + 1) {
        for (int p = 0; p < 3; p++)
            make_row(t, kernel, t->ring + p * t->ring_plane, 3 * t->ring_plane, t->new_width,
                     slots, line[p]);
        finish_row(t);
    }
}

/* Row by row, so that what is in between stays in the cache. Returns 0 without memory. */
static int run(Target *targets, const Kernel *kernel, const uint8_t *rgb, int height, int width) {
    long stride = 3L * width, quads = 0, pushed = 0;
    int done = 1;
    for (Target *t = targets; t < targets + 2; t++) {
        done = done && prepare(t, kernel, height, width);
        if (t->x.quads > quads) quads = t->x.quads;
        if (!t->down_first) pushed = 1;
    }
    long plane = (width + 4 * quads + SLACK + 63) / 64 * 64;
    uint8_t *scratch = done ? allocate(3 * (size_t)plane) : NULL;
    uint8_t *packed = done ? allocate((size_t)stride + 2 * SLACK) : NULL;
    done = scratch && packed;
    uint8_t *planes[3];
    for (int p = 0; done && p < 3; p++) planes[p] = scratch + p * plane;
    const uint8_t *const in[3] = {planes[0], planes[1], planes[2]};

    for (int row = 0; done && pushed && row < height; row++) {
        kernel->deinterleave(rgb + row * stride, width, planes);
        for (Target *t = targets; t < targets + 2; t++)
            if (!t->down_first) push(t, kernel, planes, row, width);
    }
    for (Target *t = targets; done && t < targets + 2; t++) {
        uint8_t *line[3];
        for (int p = 0; p < 3; p++) line[p] = t->line + p * t->line_plane + t->left;
        while (t->next < t->new_height) {
            make_row(t, kernel, rgb, stride, stride, height, packed);
            kernel->deinterleave(packed, width, t->across ? planes : line);
            if (t->across) kernel->horizontal(&t->h, in, line);
            finish_row(t);
        }
        margins(t);
    }
    free(scratch);
    free(packed);
    for (Target *t = targets; t < targets + 2; t++) release(t);
    return done;
}

static PyObject *write_tiles(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    PyObject *source, *target, *result = NULL;
    int height, width;
    Target base = {0}, canvas = {0};
    if (!PyArg_ParseTuple(args, "sO(ii)(ii)(ii)(ii)iO", &name, &source, &height, &width,
            &canvas.new_height, &canvas.new_width, &canvas.top, &canvas.left, &canvas.rows,
            &canvas.columns, &canvas.side, &target))
        return NULL;
    const Kernel *kernel = NULL;
    for (int i = 0; KERNELS[i]; i++)
        if (!strcmp(KERNELS[i]->name, name) && KERNELS[i]->supported()) kernel = KERNELS[i];
    if (!kernel) return PyErr_Format(PyExc_ValueError, "no instruction set %s here", name);
    long high = (long)canvas.rows * canvas.side, wide = (long)canvas.columns * canvas.side;
    const long sizes[] = {height, width, canvas.new_height, canvas.new_width, canvas.side,
                          canvas.rows, canvas.columns, high, wide};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i] < 1 || sizes[i] > MAX_SIDE)
            return PyErr_Format(PyExc_ValueError, "a size of %ld is not in 1..65535", sizes[i]);
    if (canvas.top < 0 || canvas.top > high - canvas.new_height || canvas.left < 0
        || canvas.left > wide - canvas.new_width)
        return PyErr_Format(PyExc_ValueError, "the resized image does not fit the canvas");
    base.rows = base.columns = 1;
    base.new_height = base.new_width = base.side = canvas.side;

    Py_buffer from, to;
    if (PyObject_GetBuffer(source, &from, PyBUF_SIMPLE)) return NULL;
    if (PyObject_GetBuffer(target, &to, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS)) goto source_only;
    long long tile = 3LL * canvas.side * canvas.side;
    if (from.len < 3LL * height * width + SLACK
        || to.len != tile * (1 + (long long)canvas.rows * canvas.columns)) {
        PyErr_Format(PyExc_ValueError, "buffers of %zd and %zd bytes do not fit the sizes",
                     from.len, to.len);
    } else {
        int done;
        Target targets[2] = {base, canvas};
        targets[0].tiles = to.buf;
        targets[1].tiles = targets[0].tiles + tile;
        Py_BEGIN_ALLOW_THREADS
        done = run(targets, kernel, from.buf, height, width);
        Py_END_ALLOW_THREADS
        result = done ? Py_NewRef(Py_None) : PyErr_NoMemory();
    }
    PyBuffer_Release(&to);
source_only:
    PyBuffer_Release(&from);
    return result;
}

static PyObject *instruction_sets(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    PyObject *names = PyList_New(0);
    for (int i = 0; names && KERNELS[i]; i++) {
        if (!KERNELS[i]->supported()) continue;
        PyObject *name = PyUnicode_FromString(KERNELS[i]->name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyMethodDef METHODS[] = {
    {"write_tiles", write_tiles, METH_VARARGS,
     "write_tiles(instructions, rgb, (height, width), (new_height, new_width), (top, left),\n"
     "            (rows, columns), side, tiles): the base tile, then those of the canvas."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Those that this processor has."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "amalia_pixels", "Pillow's bicubic resize, cut into tiles.", -1, METHODS,
    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_amalia_pixels(void) {
    PyObject *module = PyModule_Create(&MODULE);
    if (!module) return NULL;
    if (PyModule_AddIntConstant(module, "INTERFACE", INTERFACE)
        || PyModule_AddIntConstant(module, "SLACK", SLACK))
        Py_CLEAR(module);
    return module;
}
