/* The arithmetic of a choice and of a score, for :mod:`chainwax.router.learning.kernel`, which says what each
 * function does and has the same in numpy. Arrays come as buffers of doubles or of intp, row by row; sizes are
 * checked here, and nothing is kept.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#define MOST 80      /* Numbers in a context, at most. */
#define WORDS 2048   /* Different words in a prompt, at most. */
#define SLOTS 4096   /* Places of the table that finds them again; a power of two. */

static uint32_t crc_table[256];
static unsigned char is_word[256];
static signed char digit_of[256];

static PyObject *refuse(const char *why)
{
    PyErr_SetString(PyExc_ValueError, why);
    return NULL;
}

/* Let go of buffers; whether their sizes fitted. */
static int let_go(int fits, const char *name, int count, ...)
{
    va_list buffers;
    va_start(buffers, count);
    while (count--)
        PyBuffer_Release(va_arg(buffers, Py_buffer *));
    va_end(buffers);
    if (!fits)
        PyErr_Format(PyExc_ValueError, "%s: sizes do not fit", name);
    return fits;
}

/* read(raw, most, mask) -> (numbers, digits, lines, symbols, spaces) */
static PyObject *kernel_read(PyObject *self, PyObject *args)
{
    const unsigned char *raw;
    Py_ssize_t size;
    int most, mask;
    struct { Py_ssize_t at, size; uint32_t crc; } words[WORDS];
    int16_t slots[SLOTS];
    int digits = 0, lines = 0, symbols = 0, spaces = 0, count = 0;

    if (!PyArg_ParseTuple(args, "y#ii", &raw, &size, &most, &mask))
        return NULL;
    if (size > 2 * WORDS - 1 || most < 2 || most > MOST)
        return refuse("read: too much");
    memset(slots, -1, sizeof slots);
    for (Py_ssize_t at = 0; at < size;) {
        unsigned char c = raw[at];
        if (!is_word[c]) {
            lines += c == '\n';
            spaces += c == ' ';
            symbols += c != 0 && strchr("=+*^/(){}$<>", c) != NULL;
            at++;
            continue;
        }
        Py_ssize_t begin = at;
        uint32_t crc = 0xFFFFFFFFu;
        for (; at < size && is_word[raw[at]]; at++) {
            digits += raw[at] >= '0' && raw[at] <= '9';
            crc = crc_table[(crc ^ raw[at]) & 0xFF] ^ (crc >> 8);
        }
        crc ^= 0xFFFFFFFFu;
        unsigned slot = crc & (SLOTS - 1);
        while (slots[slot] >= 0) {
            int known = slots[slot];
            if (words[known].crc == crc && words[known].size == at - begin
                && memcmp(raw + words[known].at, raw + begin, (size_t)(at - begin)) == 0)
                break;
            slot = (slot + 1) & (SLOTS - 1);
        }
        if (slots[slot] < 0) {
            slots[slot] = (int16_t)count;
            words[count].at = begin;
            words[count].size = at - begin;
            words[count++].crc = crc;
        }
    }
    unsigned char numbers[2 * MOST];
    int kept = count < most ? count : most;
    for (int n = 0; n < kept; n++) {
        /* Of more words than count, the first half and the last. */
        int of = n < most / 2 || count <= most ? n : count - most + n;
        uint32_t number = words[of].crc & (uint32_t)mask;
        numbers[2 * n] = (unsigned char)(number & 0xFF);
        numbers[2 * n + 1] = (unsigned char)(number >> 8);
    }
    return Py_BuildValue("y#iiii", numbers, (Py_ssize_t)(2 * kept), digits, lines, symbols, spaces);
}

/* numbers(context, most, mask) -> bytes of intp */
static PyObject *kernel_numbers(PyObject *self, PyObject *args)
{
    const char *text;
    Py_ssize_t size;
    int most, mask;
    if (!PyArg_ParseTuple(args, "s#ii", &text, &size, &most, &mask))
        return NULL;
    unsigned char raw[2 * MOST + 4];
    Py_ssize_t length = 0, padding = 0;
    if (most < 1 || most > MOST || size == 0 || size % 4 || size / 4 * 3 > 2 * most + 2)
        return refuse("numbers: no context");
    for (Py_ssize_t at = 0; at < size; at += 4) {
        uint32_t bits = 0;
        for (int n = 0; n < 4; n++) {
            int value = digit_of[(unsigned char)text[at + n]];
            if (text[at + n] == '=' && at + 4 == size && n > 1) {
                padding++;
                value = 0;
            } else if (value < 0 || padding)
                return refuse("numbers: no context");
            bits = bits << 6 | (uint32_t)value;
        }
        raw[length++] = (unsigned char)(bits >> 16);
        raw[length++] = (unsigned char)(bits >> 8);
        raw[length++] = (unsigned char)bits;
    }
    length -= padding;
    if (length % 2 || length / 2 > most)
        return refuse("numbers: no context");
    PyObject *out = PyBytes_FromStringAndSize(NULL, length / 2 * (Py_ssize_t)sizeof(Py_ssize_t));
    if (out != NULL) {
        Py_ssize_t *number = (Py_ssize_t *)PyBytes_AS_STRING(out);
        for (Py_ssize_t n = 0; n < length / 2; n++)
            number[n] = (raw[2 * n] | raw[2 * n + 1] << 8) & mask;
    }
    return out;
}

/* Whether so many numbers are all below the rows of a table; its row is 2 * width doubles. */
static int all_there(const Py_buffer *words, const Py_buffer *table, Py_ssize_t width)
{
    Py_ssize_t count = words->len / (Py_ssize_t)sizeof(Py_ssize_t);
    Py_ssize_t rows = width > 0 ? table->len / (Py_ssize_t)(2 * width * sizeof(double)) : 0;
    const Py_ssize_t *number = words->buf;
    if (count > MOST)
        return 0;
    for (Py_ssize_t n = 0; n < count; n++)
        if (number[n] < 0 || number[n] >= rows)
            return 0;
    return 1;
}

/* expect(out, words, table, mean, own, keeps, level, mean, own, keeps, level) */
static PyObject *kernel_expect(PyObject *self, PyObject *args)
{
    Py_buffer out, words, table, rows[6];
    double level[2];
    if (!PyArg_ParseTuple(args, "w*y*y*y*y*y*dy*y*y*d", &out, &words, &table, &rows[0], &rows[1], &rows[2],
                          &level[0], &rows[3], &rows[4], &rows[5], &level[1]))
        return NULL;
    Py_ssize_t width = out.len / (Py_ssize_t)(2 * sizeof(double));
    int fits = width > 0 && all_there(&words, &table, width);
    for (int n = 0; n < 6; n++)
        fits = fits && rows[n].len == width * (Py_ssize_t)sizeof(double);
    if (fits) {
        double *score = out.buf, *doubt = score + width;
        const double *mean[2] = {rows[0].buf, rows[3].buf}, *own[2] = {rows[1].buf, rows[4].buf};
        const double *keeps[2] = {rows[2].buf, rows[5].buf};
        const Py_ssize_t *number = words.buf;
        Py_ssize_t count = words.len / (Py_ssize_t)sizeof(Py_ssize_t);
        double scale = count ? 1.0 / sqrt((double)count) : 0.0, share = count ? 1.0 / (double)count : 0.0;
        double common = 0.0, ease = 0.0;
        memset(out.buf, 0, (size_t)out.len);
        for (Py_ssize_t n = 0; n < count; n++) {
            const double *row = (const double *)table.buf + number[n] * 2 * width;
            for (Py_ssize_t k = 0; k < width; k++) {
                score[k] += row[k];
                doubt[k] += row[width + k];
            }
        }
        for (Py_ssize_t k = 0; k < width; k++) {
            double odds = mean[0][k] + mean[1][k] + score[k] * scale;
            double said = doubt[k] * share, unsure = own[0][k] + own[1][k];
            double var = level[0] * keeps[0][k] * keeps[0][k] + level[1] * keeps[1][k] * keeps[1][k] + unsure + said;
            if (k == 0) {
                common = said;
                ease = odds;
            }
            odds = (odds + ease) / sqrt(1.0 + (M_PI / 8.0) * (var + common));
            score[k] = 1.0 / (1.0 + exp(-odds));
            doubt[k] = unsure + said;
        }
    }
    if (!let_go(fits, "expect", 9, &out, &words, &table, &rows[0], &rows[1], &rows[2], &rows[3], &rows[4], &rows[5]))
        return NULL;
    Py_RETURN_NONE;
}

/* spread(out, mean, doubt, cost, width) */
static PyObject *kernel_spread(PyObject *self, PyObject *args)
{
    Py_buffer out, mean, doubt, cost;
    double width;
    if (!PyArg_ParseTuple(args, "w*y*y*y*d", &out, &mean, &doubt, &cost, &width))
        return NULL;
    Py_ssize_t arms = out.len / (Py_ssize_t)sizeof(double);
    int fits = mean.len == out.len && doubt.len == out.len && cost.len == out.len;
    if (fits) {
        double *s = out.buf;
        const double *m = mean.buf, *d = doubt.buf, *c = cost.buf;
        for (Py_ssize_t k = 0; k < arms; k++)
            s[k] = k && c[k] >= c[0] ? 0.0 : width * m[k] * (1.0 - m[k]) * sqrt(d[k]);
    }
    if (!let_go(fits, "spread", 4, &out, &mean, &doubt, &cost))
        return NULL;
    Py_RETURN_NONE;
}

/* worth(drawn, mean, cost, rows, width, price) -> (score, dollars) */
static PyObject *kernel_worth(PyObject *self, PyObject *args)
{
    Py_buffer drawn, mean, cost;
    Py_ssize_t rows, width;
    double price, score = 0.0, dollars = 0.0;
    if (!PyArg_ParseTuple(args, "y*y*y*nnd", &drawn, &mean, &cost, &rows, &width, &price))
        return NULL;
    int fits = rows > 0 && width > 0 && rows <= drawn.len / (Py_ssize_t)sizeof(double) / width
               && mean.len == drawn.len && cost.len == drawn.len;
    if (fits) {
        const double *d = drawn.buf, *m = mean.buf, *c = cost.buf;
        for (Py_ssize_t row = 0; row < rows; row++, d += width, m += width, c += width) {
            Py_ssize_t best = 0;
            double most = d[0] - c[0] / price;
            for (Py_ssize_t k = 1; k < width; k++) {
                double worth = d[k] - c[k] / price;
                if (worth > most) {
                    most = worth;
                    best = k;
                }
            }
            score += m[best];
            dollars += c[best];
        }
    }
    if (!let_go(fits, "worth", 3, &drawn, &mean, &cost))
        return NULL;
    return Py_BuildValue("dd", score / (double)rows, dollars / (double)rows);
}

/* note(drawn, mean, cost, row, width, places, drawn, mean, cost) */
static PyObject *kernel_note(PyObject *self, PyObject *args)
{
    Py_buffer kept[3], places, said[3];
    Py_ssize_t row, width;
    if (!PyArg_ParseTuple(args, "w*w*w*nny*y*y*y*", &kept[0], &kept[1], &kept[2], &row, &width, &places, &said[0],
                          &said[1], &said[2]))
        return NULL;
    Py_ssize_t arms = places.len / (Py_ssize_t)sizeof(Py_ssize_t);
    const Py_ssize_t *place = places.buf;
    int fits = width > 0 && row >= 0 && row < kept[0].len / (Py_ssize_t)sizeof(double) / width;
    for (int n = 0; n < 3; n++)
        fits = fits && kept[n].len == kept[0].len && said[n].len == arms * (Py_ssize_t)sizeof(double);
    for (Py_ssize_t k = 0; fits && k < arms; k++)
        fits = place[k] >= 0 && place[k] < width;
    if (fits) {
        double *drawn = (double *)kept[0].buf + row * width;
        for (Py_ssize_t k = 0; k < width; k++)
            drawn[k] = -INFINITY;
        for (int n = 0; n < 3; n++)
            for (Py_ssize_t k = 0; k < arms; k++)
                ((double *)kept[n].buf + row * width)[place[k]] = ((const double *)said[n].buf)[k];
    }
    if (!let_go(fits, "note", 7, &places, &kept[0], &kept[1], &kept[2], &said[0], &said[1], &said[2]))
        return NULL;
    Py_RETURN_NONE;
}

/* best(mean, spread, toll, normals) -> (chosen, wins) */
static PyObject *kernel_best(PyObject *self, PyObject *args)
{
    Py_buffer mean, spread, toll, normals;
    if (!PyArg_ParseTuple(args, "y*y*y*y*", &mean, &spread, &toll, &normals))
        return NULL;
    Py_ssize_t arms = mean.len / (Py_ssize_t)sizeof(double), rows = arms ? normals.len / mean.len : 0;
    int fits = rows > 0 && spread.len == mean.len && toll.len == mean.len && normals.len == rows * mean.len;
    Py_ssize_t chosen = 0, wins = 0;
    if (fits) {
        const double *m = mean.buf, *s = spread.buf, *t = toll.buf, *z = normals.buf;
        for (Py_ssize_t row = 0; row < rows; row++, z += arms) {
            Py_ssize_t best = 0;
            double most = m[0] + s[0] * z[0] - t[0];
            for (Py_ssize_t k = 1; k < arms; k++) {
                double worth = m[k] + s[k] * z[k] - t[k];
                if (worth > most) {
                    most = worth;
                    best = k;
                }
            }
            if (row == 0)
                chosen = best;
            wins += best == chosen;
        }
    }
    if (!let_go(fits, "best", 4, &mean, &spread, &toll, &normals))
        return NULL;
    return Py_BuildValue("nn", chosen, wins);
}

/* said(table, words, width, place) -> (weights, variances) */
static PyObject *kernel_said(PyObject *self, PyObject *args)
{
    Py_buffer table, words;
    Py_ssize_t width, place;
    if (!PyArg_ParseTuple(args, "y*y*nn", &table, &words, &width, &place))
        return NULL;
    double weights = 0.0, variances = 0.0;
    int fits = place >= 0 && place < width && all_there(&words, &table, width);
    if (fits) {
        const Py_ssize_t *number = words.buf, count = words.len / (Py_ssize_t)sizeof(Py_ssize_t);
        for (Py_ssize_t n = 0; n < count; n++) {
            const double *row = (const double *)table.buf + number[n] * 2 * width;
            weights += row[0] + row[place];
            variances += row[width] + row[width + place];
        }
    }
    if (!let_go(fits, "said", 2, &table, &words))
        return NULL;
    return Py_BuildValue("dd", weights, variances);
}

/* move(table, words, width, place, by, shrink) */
static PyObject *kernel_move(PyObject *self, PyObject *args)
{
    Py_buffer table, words;
    Py_ssize_t width, place;
    double by, shrink;
    if (!PyArg_ParseTuple(args, "w*y*nndd", &table, &words, &width, &place, &by, &shrink))
        return NULL;
    int fits = place > 0 && place < width && all_there(&words, &table, width);
    if (fits) {
        const Py_ssize_t *number = words.buf, count = words.len / (Py_ssize_t)sizeof(Py_ssize_t);
        double moved[MOST][4];
        /* All from what was there before: a number may stand there twice, and counts once. */
        for (Py_ssize_t n = 0; n < count; n++) {
            const double *row = (const double *)table.buf + number[n] * 2 * width;
            for (int k = 0; k < 2; k++) {
                double weight = row[k * place], var = row[width + k * place];
                moved[n][2 * k] = weight + var * by;
                moved[n][2 * k + 1] = var * (1.0 - var * shrink);
            }
        }
        for (Py_ssize_t n = 0; n < count; n++) {
            double *row = (double *)table.buf + number[n] * 2 * width;
            for (int k = 0; k < 2; k++) {
                row[k * place] = moved[n][2 * k];
                row[width + k * place] = moved[n][2 * k + 1];
            }
        }
    }
    if (!let_go(fits, "move", 2, &table, &words))
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"read", kernel_read, METH_VARARGS, NULL},   {"expect", kernel_expect, METH_VARARGS, NULL},
    {"numbers", kernel_numbers, METH_VARARGS, NULL}, {"note", kernel_note, METH_VARARGS, NULL},
    {"spread", kernel_spread, METH_VARARGS, NULL}, {"worth", kernel_worth, METH_VARARGS, NULL},
    {"best", kernel_best, METH_VARARGS, NULL},   {"said", kernel_said, METH_VARARGS, NULL},
    {"move", kernel_move, METH_VARARGS, NULL},   {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernel", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void)
{
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t crc = n;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? 0xEDB88320u ^ (crc >> 1) : crc >> 1;
        crc_table[n] = crc;
        is_word[n] = (n >= '0' && n <= '9') || (n >= 'a' && n <= 'z') || (n >= 'A' && n <= 'Z') || n == '_';
    }
    memset(digit_of, -1, sizeof digit_of);
    const char *digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int n = 0; n < 64; n++)
        digit_of[(unsigned char)digits[n]] = (signed char)n;
    return PyModule_Create(&module);
}
