/*
 * Counts the requests that this extension answers, in arrays that belong to Python
 * (RequestCounters in requestcounters.py, which describes the cells).
 *
 * Reading the clock twice costs almost a percent of a short request.  So of the requests that do
 * not wait, only one in SAMPLING is timed.  Its time also counts for each request up to the next
 * timed one.  A request that waits for the host's disk is always timed.
 *
 * Everything happens in the thread of the event loop, with the GIL held.
 */

#include "_extraops.h"

#include <time.h>

/* The cells of one operation; requestcounters.py has the same numbers. */
enum { REQUESTS, BYTES, ERRORS, FAST, NANOSECONDS, HISTOGRAM };
#define OPERATIONS 4 /* the three of enum operation, and one that only Python code answers */
#define BUCKETS 27
#define CELLS (HISTOGRAM + BUCKETS)

#define SAMPLING 16

struct disk_counters {
    Py_buffer cells;
    struct {
        uint64_t nanoseconds;
        unsigned int bucket;
    } last[OPERATIONS]; /* the time of the last request that was timed */
};

static struct disk_counters *disks; /* by inode number, from `first_inode` on */
static fuse_ino_t first_inode;
static Py_ssize_t disk_count;

int64_t monotonic_time(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static struct disk_counters *counters_of(fuse_ino_t inode)
{
    fuse_ino_t index = inode - first_inode; /* wraps to a large number if inode < first_inode */

    return index < (fuse_ino_t)disk_count ? &disks[index] : NULL;
}

static uint64_t *cells_of(struct disk_counters *disk, enum operation operation)
{
    return (uint64_t *)disk->cells.buf + operation * CELLS;
}

/* Counts a request of `size` bytes in the cells of its operation, and in the bucket of its time. */
static void add(uint64_t *cells, size_t size, uint64_t nanoseconds, unsigned int bucket)
{
    cells[REQUESTS]++;
    cells[BYTES] += size;
    cells[NANOSECONDS] += nanoseconds;
    cells[HISTOGRAM + bucket]++;
}

/* Returns the bucket of a time: 0 below 1 microsecond, n from 2**(n-1) to below 2**n microseconds,
 * and the last one also for all longer times. */
static unsigned int bucket_of(uint64_t nanoseconds)
{
    uint64_t microseconds = nanoseconds / 1000;
    unsigned int bucket = microseconds ? 64 - (unsigned int)__builtin_clzll(microseconds) : 0;

    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

int64_t sampled_start(fuse_ino_t inode, enum operation operation)
{
    struct disk_counters *disk = counters_of(inode);

    return disk != NULL && cells_of(disk, operation)[FAST] % SAMPLING == 0 ? monotonic_time() : 0;
}

void count_fast(fuse_ino_t inode, enum operation operation, size_t size, int64_t start)
{
    struct disk_counters *disk = counters_of(inode);

    if (disk == NULL)
        return;
    if (start) {
        disk->last[operation].nanoseconds = (uint64_t)(monotonic_time() - start);
        disk->last[operation].bucket = bucket_of(disk->last[operation].nanoseconds);
    }
    cells_of(disk, operation)[FAST]++;
    add(cells_of(disk, operation), size, disk->last[operation].nanoseconds,
        disk->last[operation].bucket);
}

void count_waited(fuse_ino_t inode, enum operation operation, size_t size, int64_t start)
{
    struct disk_counters *disk = counters_of(inode);
    uint64_t nanoseconds = (uint64_t)(monotonic_time() - start);

    if (disk != NULL)
        add(cells_of(disk, operation), size, nanoseconds, bucket_of(nanoseconds));
}

static void release_all(void)
{
    while (disk_count > 0)
        PyBuffer_Release(&disks[--disk_count].cells);
    PyMem_RawFree(disks);
    disks = NULL;
}

PyObject *set_counters(PyObject *module, PyObject *args)
{
    unsigned long long inode;
    PyObject *given;
    Py_ssize_t at;

    (void)module;
    if (!PyArg_ParseTuple(args, "KO!", &inode, &PyTuple_Type, &given))
        return NULL;
    release_all();
    disks = PyMem_RawCalloc((size_t)PyTuple_GET_SIZE(given) + 1, sizeof *disks);
    if (disks == NULL)
        return PyErr_NoMemory();
    first_inode = (fuse_ino_t)inode;
    for (at = 0; at < PyTuple_GET_SIZE(given); at++) {
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(given, at), &disks[at].cells, PyBUF_WRITABLE)) {
            release_all();
            return NULL;
        }
        disk_count = at + 1;
        if (disks[at].cells.len != OPERATIONS * CELLS * (Py_ssize_t)sizeof(uint64_t)) {
            release_all();
            PyErr_SetString(PyExc_ValueError, "the array has another number of cells");
            return NULL;
        }
    }
    Py_RETURN_NONE;
}
