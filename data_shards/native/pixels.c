/* The module amalia_pixels: resize one image and cut it into tiles. See pixels.h. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "pixels.h"

#define INTERFACE 1 /* what data_shards/resize.py must know; changes with the arguments */

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

/* One picture, the size it gets, and where that lies on a canvas of tiles. */
typedef struct {
    const uint8_t *rgb; /* [height][width][3] and SLACK bytes more */
    int height, width, new_height, new_width, top, left, rows, columns, side;
    uint8_t *tiles; /* [rows * columns][3][side][side] */
} Job;

/* Everything allocated for one job; all or nothing is there, and free() takes NULL. */
typedef struct {
    Axis x, y;
    Horizontal h;
    int32_t (*v)[4];       /* [new_height][y.quads] */
    const uint8_t **taken; /* the rows that one output row is made of */
    uint8_t *planes, *packed, *ring, *line;
    long plane, ring_plane, line_plane; /* bytes from one plane to the next */
} Work;

static int prepare(Work *w, const Job *job, const Kernel *kernel, int across, int down) {
    if (across) {
        if (!make_axis(&w->x, job->width, job->new_width)) return 0;
        size_t groups = (size_t)((job->new_width + kernel->lanes - 1) / kernel->lanes);
        w->h.groups = (int)groups;
        w->h.quads = w->x.quads;
        w->h.base = calloc(groups, sizeof *w->h.base);
        w->h.index = calloc(groups, 64);
        w->h.weights = calloc(groups * (size_t)w->x.quads, 256);
        if (!w->h.base || !w->h.index || !w->h.weights) return 0;
        kernel->pack_horizontal(&w->x, &w->h);
    }
    w->ring_plane = job->new_width + SLACK;
    if (down) {
        if (!make_axis(&w->y, job->height, job->new_height)) return 0;
        size_t quads = (size_t)job->new_height * (size_t)w->y.quads;
        w->v = malloc(quads * sizeof *w->v);
        w->taken = malloc(sizeof *w->taken * 4 * (size_t)w->y.quads);
        w->ring = malloc(3 * (size_t)w->ring_plane * 4 * (size_t)w->y.quads);
        w->packed = malloc(3 * (size_t)job->width + 2 * SLACK);
        if (!w->v || !w->taken || !w->ring || !w->packed) return 0;
        for (size_t q = 0; q < quads; q++) kernel->pack_quad(w->y.taps + 4 * q, w->v[q]);
    }
    w->plane = job->width + 4L * w->x.quads + SLACK;
    w->line_plane = (long)job->columns * job->side + SLACK;
    w->planes = malloc(3 * (size_t)w->plane);
    w->line = calloc(3, (size_t)w->line_plane);
    return w->planes && w->line;
}

static void release(Work *w) {
    free_axis(&w->x);
    free_axis(&w->y);
    free(w->h.base);
    free(w->h.index);
    free(w->h.weights);
    free(w->v);
    free(w->taken);
    free(w->planes);
    free(w->packed);
    free(w->ring);
    free(w->line);
}

/* A canvas row, w->line, to the tiles that it crosses. */
static void put(const Job *job, const Work *w, int row) {
    long side = job->side;
    for (int column = 0; column < job->columns; column++)
        for (int p = 0; p < 3; p++) {
            long plane = ((long)(row / side) * job->columns + column) * 3 + p;
            memcpy(job->tiles + (plane * side + row % side) * side,
                   w->line + p * w->line_plane + column * side, (size_t)side);
        }
}

/* Row by row, so that what is in between stays in the cache. Returns 0 without memory. */
static int run(const Job *job, const Kernel *kernel) {
    int across = job->width != job->new_width, down = job->height != job->new_height;
    /* Which pass comes first changes the rounding in between: Pillow 13's rule. With one pass
     * only there is no difference, and interleaved rows are as good to the vertical one. */
    int shrink = job->height - job->new_height;
    int down_first = down
        && (!across || (shrink > 0 && shrink > 2L * (job->width - job->new_width)));
    Work work = {0}, *w = &work;
    int done = prepare(w, job, kernel, across, down);

    for (int row = 0; done && row < job->top; row++) put(job, w, row);
    for (int y = 0, next = 0; done && y < job->new_height; y++) {
        uint8_t *line[3], *planes[3];
        for (int p = 0; p < 3; p++) {
            line[p] = w->line + p * w->line_plane + job->left;
            planes[p] = across ? w->planes + p * w->plane : line[p];
        }
        const uint8_t *const in[3] = {planes[0], planes[1], planes[2]};
        long stride = 3L * job->width;
        if (down && !down_first) {
            int first = w->y.first[y], count = w->y.count[y], slots = 4 * w->y.quads;
            for (next = next < first ? first : next; next < first + count; next++) {
                uint8_t *slot[3];
                for (int p = 0; p < 3; p++)
                    slot[p] = w->ring + (3L * (next % slots) + p) * w->ring_plane;
                kernel->deinterleave(job->rgb + next * stride, job->width, planes);
                kernel->horizontal(&w->h, in, slot);
            }
            for (int p = 0; p < 3; p++) {
                for (int i = 0; i < slots; i++) {
                    long slot = (first + (i < count ? i : 0)) % slots;
                    w->taken[i] = w->ring + (3 * slot + p) * w->ring_plane;
                }
                kernel->vertical(
                    w->v + (long)y * w->y.quads, w->y.quads, w->taken, job->new_width, line[p]);
            }
        } else {
            const uint8_t *rgb = job->rgb + y * stride;
            if (down) {
                int first = w->y.first[y], count = w->y.count[y];
                for (int i = 0; i < 4 * w->y.quads; i++)
                    w->taken[i] = job->rgb + (first + (i < count ? i : 0)) * stride;
                kernel->vertical(
                    w->v + (long)y * w->y.quads, w->y.quads, w->taken, stride, w->packed);
                rgb = w->packed;
            }
            kernel->deinterleave(rgb, job->width, planes);
            if (across) kernel->horizontal(&w->h, in, line);
        }
        /* What was written beyond the row's end is margin. */
        for (int p = 0; p < 3; p++) memset(line[p] + job->new_width, 0, 64);
        put(job, w, job->top + y);
    }
    if (done) memset(w->line, 0, 3 * (size_t)w->line_plane);
    for (int row = job->top + job->new_height; done && row < job->rows * job->side; row++)
        put(job, w, row);
    release(w);
    return done;
}

static PyObject *write_tiles(PyObject *self, PyObject *args) {
    (void)self;
    Job job;
    const char *name;
    PyObject *source, *target, *result = NULL;
    if (!PyArg_ParseTuple(args, "sO(ii)(ii)(ii)(ii)iO", &name, &source, &job.height, &job.width,
            &job.new_height, &job.new_width, &job.top, &job.left, &job.rows, &job.columns,
            &job.side, &target))
        return NULL;
    const Kernel *kernel = NULL;
    for (int i = 0; KERNELS[i]; i++)
        if (!strcmp(KERNELS[i]->name, name) && KERNELS[i]->supported()) kernel = KERNELS[i];
    if (!kernel) return PyErr_Format(PyExc_ValueError, "no instruction set %s here", name);
    const int sizes[] = {job.height, job.width, job.new_height, job.new_width, job.side, job.rows,
                         job.columns};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i] < 1 || sizes[i] > MAX_SIDE)
            return PyErr_Format(PyExc_ValueError, "a size of %d is not in 1..65535", sizes[i]);
    if (job.top < 0 || job.left < 0
        || (long)job.top + job.new_height > (long)job.rows * job.side
        || (long)job.left + job.new_width > (long)job.columns * job.side
        || (long)job.rows * job.side > MAX_SIDE || (long)job.columns * job.side > MAX_SIDE)
        return PyErr_Format(PyExc_ValueError, "the resized image does not fit the canvas");

    Py_buffer from, to;
    if (PyObject_GetBuffer(source, &from, PyBUF_SIMPLE)) return NULL;
    if (PyObject_GetBuffer(target, &to, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS)) goto source_only;
    if (from.len < 3LL * job.height * job.width + SLACK
        || to.len != 3LL * job.rows * job.columns * job.side * job.side) {
        PyErr_Format(PyExc_ValueError, "buffers of %zd and %zd bytes do not fit the sizes",
                     from.len, to.len);
    } else {
        int done;
        job.rgb = from.buf;
        job.tiles = to.buf;
        Py_BEGIN_ALLOW_THREADS
        done = run(&job, kernel);
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
     "            (rows, columns), side, tiles)"},
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
