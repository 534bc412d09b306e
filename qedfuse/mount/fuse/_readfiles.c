/*
 * The files from which _cachedread.c reads, and the runs by which a file refers to other files.
 *
 * A disk that qemu-nbd serves has no descriptor of its own.  A run says in which of QEMU's files,
 * and where, bytes of the disk are stored unchanged (RunMap in foreign/runmap.py).  A Python thread
 * may have added a run only in part when a search begins; the search does not find this run.
 *
 * The functions that other files call are described in _extraops.h.
 */

#include "_extraops.h"

/* The layout of the cells (RunMap). */
enum { COUNT, END, FIRST_START };

/* The target of a run says where its bytes are (RunMap).  The targets 0 and 1 mean that they are in
 * no file.  In another target, the lowest FILE_BITS bits are the number of the file plus FILE_BIAS,
 * and the other bits are the offset in the file. */
#define FILE_BITS 8
#define FILE_BIAS 2

static void clear_file(struct read_file *file)
{
    Py_CLEAR(file->policy);
    clear_units(&file->units);
    free_files(file->runs.files, file->runs.file_count);
    if (file->runs.cells.obj != NULL)
        PyBuffer_Release(&file->runs.cells);
}

void free_files(struct read_file *files, uint64_t count)
{
    uint64_t at;

    if (files == NULL)
        return;
    for (at = 0; at < count; at++)
        clear_file(&files[at]);
    PyMem_Free(files);
}

/* Fills a zeroed struct from a StoredRuns.  Returns 0, or -1 with an exception. */
static int fill_runs(struct stored_runs *runs, PyObject *source)
{
    PyObject *files;

    if (!PyArg_ParseTuple(source, "y*KO!", &runs->cells, &runs->capacity, &PyTuple_Type, &files))
        return -1;
    if ((uint64_t)runs->cells.len / sizeof(uint64_t) < FIRST_START + 2 * runs->capacity) {
        PyErr_SetString(PyExc_ValueError, "there are fewer cells than the runs need");
        return -1;
    }
    runs->files = make_files(files);
    if (runs->files == NULL)
        return -1;
    runs->file_count = (uint64_t)PyTuple_GET_SIZE(files);
    return 0;
}

/* Fills a zeroed struct from a PageSource; leaves it unchanged for None.  Returns 0, or -1 with an
 * exception. */
static int fill_file(struct read_file *file, PyObject *source)
{
    PyObject *policy, *units, *runs;

    if (source == Py_None)
        return 0;
    if (!PyArg_ParseTuple(source, "OiOOi", &policy, &file->fd, &units, &runs, &file->flags))
        return -1;
    if (units != Py_None && fill_units(&file->units, units, file->fd))
        return -1;
    if (runs != Py_None && fill_runs(&file->runs, runs))
        return -1;
    file->policy = Py_NewRef(policy);
    return 0;
}

struct read_file *make_files(PyObject *sources)
{
    size_t count = (size_t)PyTuple_GET_SIZE(sources), at;
    struct read_file *files = PyMem_Calloc(count ? count : 1, sizeof *files);

    forget_valid_pages(); /* a new file may have the descriptor of one that was closed */
    if (files == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (at = 0; at < count; at++)
        if (fill_file(&files[at], PyTuple_GET_ITEM(sources, (Py_ssize_t)at))) {
            free_files(files, count);
            return NULL;
        }
    return files;
}

/* Returns the index of the last run that begins at or before an offset.  There must be one. */
static uint64_t run_at(const uint64_t *starts, uint64_t count, uint64_t offset)
{
    uint64_t low = 0, middle;

    while (count - low > 1) {
        middle = low + (count - low) / 2;
        if (starts[middle] <= offset)
            low = middle;
        else
            count = middle;
    }
    return low;
}

struct read_file *storing_file(struct read_file *file, uint64_t *offset, size_t size)
{
    const struct stored_runs *runs = &file->runs;
    const uint64_t *cells = runs->cells.buf, *starts;
    uint64_t count, index, end, target, number;

    if (runs->cells.obj == NULL)
        return file;
    starts = cells + FIRST_START;
    count = cells[COUNT];
    if (count == 0 || count > runs->capacity || *offset + size > cells[END])
        return NULL;
    index = run_at(starts, count, *offset);
    end = index + 1 < count ? starts[index + 1] : cells[END];
    target = starts[runs->capacity + index];
    number = (target & ((1 << FILE_BITS) - 1)) - FILE_BIAS;
    /* The targets 0 and 1, which have no file, have wrapped to a number that is too large. */
    if (*offset + size > end || number >= runs->file_count)
        return NULL;
    *offset = (target >> FILE_BITS) + *offset - starts[index];
    return &runs->files[number];
}
