/* Formats the extents that a slice (a range of entries) of an L2 table describes, as qemu-img map
 * does.
 *
 * The last extent of a slice may continue in the next slice.  So it is kept in `pending`, and gets
 * its line when a later call finds its end.  If an entry may be invalid, `lines` returns None and
 * leaves `pending` unchanged.  Then the caller uses other code for the rest of the disk, from the
 * beginning of `pending` on.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define COLUMN_CHARS 16     /* minimum width of a column of the text table */
#define MAX_DIGITS 20       /* maximum length of a number: 20 decimal, or 0x and 16 hexadecimal */
#define MAX_JSON_CHARS 192  /* maximum length of a line of JSON */

/* A range of the disk, in bytes, whose clusters are of one kind and, for data, contiguous in the
 * file.  `value` is its first table entry: 0 if unallocated, 1 for zeros, else the file offset.  A
 * length of 0 means that no extent has begun. */
struct extent {
    uint64_t start, length, value;
};

struct style {
    int json;
    const char *name; /* last column of the text table, and a newline */
    size_t name_length;
};

/* Append a string at `at`; return the end of the output. */
static char *put(char *at, const char *text)
{
    size_t length = strlen(text);

    memcpy(at, text, length);
    return at + length;
}

/* Append a decimal number; return the end of the output. */
static char *decimal(char *at, uint64_t number)
{
    char digits[MAX_DIGITS], *first = digits + MAX_DIGITS;

    do {
        *--first = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    size_t length = (size_t)(digits + MAX_DIGITS - first);
    memcpy(at, first, length);
    return at + length;
}

/* Append a number as printf does with "%#-16x"; return the end of the output. */
static char *column(char *at, uint64_t number)
{
    int digits = 1;
    char *end = at;

    if (number)
        end = put(at, "0x");
    while (digits < 16 && number >> 4 * digits)
        digits++;
    for (int digit = digits - 1; digit >= 0; digit--)
        *end++ = "0123456789abcdef"[number >> 4 * digit & 15];
    while (end < at + COLUMN_CHARS)
        *end++ = ' ';
    return end;
}

/* Append the line of an extent; return the end of the output.  A line of JSON begins with a comma
 * and a newline.  A line of the text table ends with a newline; only extents of data have one. */
static char *write_extent(char *at, const struct extent *extent, const struct style *style)
{
    if (style->json) {
        at = put(at, ",\n{ \"start\": ");
        at = decimal(at, extent->start);
        at = put(at, ", \"length\": ");
        at = decimal(at, extent->length);
        if (extent->value > 1) {
            at = put(at, ", \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, "
                         "\"compressed\": false, \"offset\": ");
            at = decimal(at, extent->value);
        } else if (extent->value)
            at = put(at, ", \"depth\": 0, \"present\": true, \"zero\": true, \"data\": false, "
                         "\"compressed\": false");
        else
            at = put(at, ", \"depth\": 0, \"present\": false, \"zero\": true, \"data\": false, "
                         "\"compressed\": false");
        return put(at, "}");
    }
    if (extent->value <= 1)
        return at;
    at = column(at, extent->start);
    at = column(at, extent->length);
    at = column(at, extent->value);
    memcpy(at, style->name, style->name_length);
    return at + style->name_length;
}

/* Return whether an extent of data overlaps one of the L2 tables, whose file offsets ascend. */
static int overlaps_table(const struct extent *data, const uint64_t *tables, size_t count,
                          uint64_t table_bytes)
{
    size_t first = 0, last = count;

    if (!count || data->value >= tables[count - 1] + table_bytes)
        return 0;
    while (first < last) { /* find the first table that begins at or past the end of the data */
        size_t middle = first + (last - first) / 2;
        if (tables[middle] < data->value + data->length)
            first = middle + 1;
        else
            last = middle;
    }
    return first && tables[first - 1] + table_bytes > data->value;
}

/* See `methods` for the arguments and the result. */
static PyObject *lines(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer entries, tables, pending, name;
    unsigned long long cluster_size, low, high, table_bytes;
    struct style style = {0};
    PyObject *text = NULL;

    if (!PyArg_ParseTuple(args, "y*KKKy*Kw*py*", &entries, &cluster_size, &low, &high,
                          &tables, &table_bytes, &pending, &style.json, &name))
        return NULL;
    if (pending.len != sizeof(struct extent)) {
        PyErr_SetString(PyExc_ValueError, "pending: expected three numbers");
        goto end;
    }
    const uint64_t *values = entries.buf;
    size_t count = (size_t)entries.len / 8;
    struct extent current;
    memcpy(&current, pending.buf, sizeof current);
    style.name = name.buf;
    style.name_length = (size_t)name.len;
    size_t max_chars = style.json ? MAX_JSON_CHARS : 3 * MAX_DIGITS + style.name_length;
    text = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * max_chars));
    if (!text)
        goto end;
    char *at = PyBytes_AS_STRING(text);
    int valid = 1;
    for (size_t index = 0; valid && index < count;) {
        uint64_t value = values[index], step = current.value > 1 ? cluster_size : 0;
        /* the entry that would continue the current extent */
        uint64_t expected = current.value > 1 ? current.value + current.length : current.value;
        size_t first = index;
        while (current.length && index < count && values[index] == expected) {
            expected += step;
            index++;
        }
        if (index > first) { /* entries were added to the current extent */
            /* The offsets ascend, so if any offset is too high, the last one is. */
            current.length += (index - first) * cluster_size;
            valid = current.value <= 1 || values[index - 1] <= high;
        } else if (value > 1 && (value & (cluster_size - 1) || value < low || value > high)) {
            valid = 0;
        } else {
            uint64_t start = current.start + current.length;
            if (current.length) {
                valid = current.value <= 1 ||
                        !overlaps_table(&current, tables.buf, (size_t)tables.len / 8, table_bytes);
                at = write_extent(at, &current, &style);
            }
            current = (struct extent){start, cluster_size, value};
            index++;
        }
    }
    /* The pending extent gets no line yet, but its entries must be valid, too. */
    if (valid && current.value > 1)
        valid = !overlaps_table(&current, tables.buf, (size_t)tables.len / 8, table_bytes);
    if (valid) {
        memcpy(pending.buf, &current, sizeof current);
        _PyBytes_Resize(&text, at - PyBytes_AS_STRING(text));
    } else {
        Py_SETREF(text, Py_NewRef(Py_None));
    }
end:
    PyBuffer_Release(&entries);
    PyBuffer_Release(&tables);
    PyBuffer_Release(&pending);
    PyBuffer_Release(&name);
    return text;
}

static PyMethodDef methods[] = {
    {"lines", lines, METH_VARARGS,
     "lines(entries, cluster_size, low, high, tables, table_bytes, pending, json, name)\n"
     "Return the text of the extents that end within the entries, as bytes, or None if an\n"
     "entry may be invalid.  entries (of a table) are in the byte order of the host.\n"
     "cluster_size and table_bytes are the bytes in a cluster and in a table.\n"
     "pending (start, length, value) is the extent that the entries may continue.  It is\n"
     "replaced by the last extent of the entries, but stays unchanged if None is returned.\n"
     "tables are the file offsets of the L2 tables, ascending.  An offset may be invalid if it\n"
     "is not a multiple of cluster_size, is below low or above high, or if its cluster overlaps\n"
     "one of the tables.  json selects the format: JSON if true, else the text table.  name is\n"
     "the last column of the text table, with a newline."},
    {NULL, NULL, 0, NULL},
};

/* The same number as in fastmap.py, and raised together with it (util/extensions.py). */
#define INTERFACE 1

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_maplines", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__maplines(void)
{
    PyObject *module;

    module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "INTERFACE", INTERFACE))
        Py_CLEAR(module);
    return module;
}
