/*
 * Carries out some writes without the Python code of the fast path (disk/datapath/fastpath.py):
 * those that change no table, because their range is allocated in the top image as one run.  There
 * are further conditions: the slice (part) of the table that locates the run is in memory, the
 * write is short (InlinePolicy), no thread is changing the file (InodeLock), the image needs no
 * preparation before the write (FirstWriteGuard), and no error has made the disk read-only
 * (MetadataWriteback).
 *
 * GuestChanges.try_write and InlinePolicy.can_write_inline check these conditions, too.  The range
 * is found and the conditions are checked in one step, with the GIL held.  The GIL is released
 * during the write itself.  The run stays valid meanwhile, because only this thread, which runs the
 * event loop, changes tables.
 *
 * Every other write goes to the Python function for writes (_dataops.c).  If a write fails here or
 * ends early, that function writes the whole range anew.
 */

#include "_extraops.h"

#include <unistd.h>

/* A write of at most this length always counts as short (hostio/inlinepolicy.py). */
#define ALWAYS_SHORT_WRITE_BYTES (1 << 18)

struct in_place_writes {
    int fd;               /* of the top image */
    PyObject *inode;      /* InodeLock of that file */
    PyObject *is_short;   /* returns whether a write of a number of bytes is short */
    PyObject *guard;      /* FirstWriteGuard */
    PyObject *writeback;  /* MetadataWriteback */
    PyObject *record;     /* called with the length of a write, and its duration in seconds */
};

static PyObject *name_prepared, *name_failure, *name_contention;

void free_writes(struct in_place_writes *writes)
{
    if (writes == NULL)
        return;
    Py_XDECREF(writes->inode);
    Py_XDECREF(writes->is_short);
    Py_XDECREF(writes->guard);
    Py_XDECREF(writes->writeback);
    Py_XDECREF(writes->record);
    PyMem_Free(writes);
}

struct in_place_writes *make_writes(PyObject *source)
{
    struct in_place_writes *writes = PyMem_Calloc(1, sizeof *writes);
    PyObject *inode, *is_short, *guard, *writeback, *record;

    if (writes == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    if (!PyArg_ParseTuple(source, "iOOOOO", &writes->fd, &inode, &is_short, &guard, &writeback,
                          &record)) {
        PyMem_Free(writes);
        return NULL;
    }
    writes->inode = Py_NewRef(inode);
    writes->is_short = Py_NewRef(is_short);
    writes->guard = Py_NewRef(guard);
    writes->writeback = Py_NewRef(writeback);
    writes->record = Py_NewRef(record);
    return writes;
}

/* Returns whether an attribute is the object `expected`; 0 with an exception if it is missing. */
static int attribute_is(PyObject *object, PyObject *name, PyObject *expected)
{
    PyObject *value = PyObject_GetAttr(object, name);

    Py_XDECREF(value);
    return value == expected;
}

/* Returns whether a write counts as short; 0 with an exception if that is not known. */
static int is_short(const struct in_place_writes *writes, size_t size)
{
    PyObject *result;

    if (size <= ALWAYS_SHORT_WRITE_BYTES)
        return 1;
    result = PyObject_CallFunction(writes->is_short, "n", (Py_ssize_t)size);
    Py_XDECREF(result);
    return result == Py_True;
}

/* Returns whether a write to an allocated range may be made now; if not, perhaps with an
 * exception. */
static int can_write(const struct in_place_writes *writes, size_t size)
{
    PyObject *contention;
    int is_free;

    if (!attribute_is(writes->guard, name_prepared, Py_True) ||
        !attribute_is(writes->writeback, name_failure, Py_None) || !is_short(writes, size))
        return 0;
    contention = PyObject_GetAttr(writes->inode, name_contention);
    is_free = contention != NULL && PyObject_IsTrue(contention) == 0;
    Py_XDECREF(contention);
    return is_free;
}

/* Records a write that is complete.  An exception is only reported: as a failure of the write, it
 * would make the caller write again. */
static void record(const struct in_place_writes *writes, size_t size, int64_t nanoseconds)
{
    PyObject *result = PyObject_CallFunction(writes->record, "nd", (Py_ssize_t)size,
                                             (double)nanoseconds * 1e-9);

    if (result == NULL)
        PyErr_WriteUnraisable(writes->record);
    Py_XDECREF(result);
}

int write_in_place(uint64_t handle, const char *data, size_t size, off_t start)
{
    struct write_place place;
    int64_t since;
    ssize_t count = -1;

    if (!find_allocated(handle, start, size, &place)) {
        PyErr_Clear();
        return 0;
    }
    if (can_write(place.writes, size)) {
        since = monotonic_time();
        Py_BEGIN_ALLOW_THREADS
        count = pwrite(place.writes->fd, data, size, (off_t)place.offset);
        Py_END_ALLOW_THREADS
        /* A write that failed or ended early is recorded by the function that makes it again. */
        if (count == (ssize_t)size)
            record(place.writes, size, monotonic_time() - since);
    }
    Py_DECREF(place.view);
    PyErr_Clear();
    return count == (ssize_t)size;
}

int init_in_place_writes(void)
{
    const struct interned_name names[] = {
        {&name_prepared, "prepared"},
        {&name_failure, "failure"},
        {&name_contention, "contention"},
    };

    return intern_names(names, sizeof names / sizeof *names);
}
