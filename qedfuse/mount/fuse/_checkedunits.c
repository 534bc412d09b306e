/*
 * The units of a file in the cache for remote files: which units may be read from the page cache, and
 * whether the result of such a read may be used.  LocalData (remote/localdata.py) reads the file by the
 * same rules, and says why.
 *
 * Everything happens with the GIL held.  The functions that other files call are described in
 * _extraops.h.
 */

#include "_extraops.h"

#include <sys/mman.h>
#include <unistd.h>

/* Maximum number of units that are read ahead of a sequential reader (_MAX_WINDOW_UNITS in
 * remote/fetcher.py). */
#define MAX_AHEAD_UNITS 32

/* The smallest hole that a file can have (remote/zeroblocks.py). */
#define BLOCK_BITS 12
#define BLOCK_BYTES (1 << BLOCK_BITS)

/* The smallest page size, and the maximum number of such pages in a read, which can begin within one. */
#define PAGE_BYTES 4096
#define MAX_PAGES ((1 << 20) / PAGE_BYTES + 1)

int fill_units(struct checked_units *units, PyObject *source)
{
    PyObject *forget;
    long long file_bytes;
    unsigned long long address;

    if (!PyArg_ParseTuple(source, "y*y*IKLKO", &units->ready, &units->zero_blocks,
                          &units->unit_bits, &units->content_bytes, &file_bytes, &address, &forget))
        return -1;
    units->address = (char *)(uintptr_t)address;
    units->file_bytes = (off_t)file_bytes;
    units->forget = Py_NewRef(forget);
    return 0;
}

void clear_units(struct checked_units *units)
{
    Py_CLEAR(units->forget);
    PyBuffer_Release(&units->ready);
    PyBuffer_Release(&units->zero_blocks);
}

int has_units(const struct checked_units *units)
{
    return units->ready.obj != NULL;
}

/* Returns whether all units from `first` to `last`, inclusive, may be read. */
static int are_ready(const struct checked_units *units, uint64_t first, uint64_t last)
{
    return last < (uint64_t)units->ready.len &&
           memchr((char *)units->ready.buf + first, 0, last - first + 1) == NULL;
}

int may_read_units(const struct checked_units *units, uint64_t offset, size_t size)
{
    uint64_t first = offset >> units->unit_bits, last = (offset + size - 1) >> units->unit_bits;
    uint64_t count = (uint64_t)units->ready.len, ahead;

    if (offset + size > units->content_bytes || !are_ready(units, first, last))
        return 0;
    /* A read that reaches the end of a unit goes to the Python function if a sequential reader soon
     * needs a unit that is missing, because that function fetches the unit. */
    if ((offset + size) >> units->unit_bits == first || last + 1 >= count)
        return 1;
    ahead = count - last - 1 < MAX_AHEAD_UNITS ? count - 1 : last + MAX_AHEAD_UNITS;
    return are_ready(units, last + 1, ahead);
}

off_t length_of_units(const struct checked_units *units, int fd)
{
    off_t length = lseek(fd, 0, SEEK_END);

    /* One byte more while several processes use the file (remote/sharing.py). */
    return length == units->file_bytes || length == units->file_bytes + 1 ? length : ANY_LENGTH;
}

int may_try_units(const struct checked_units *units, uint64_t offset, size_t size)
{
    static unsigned char found[MAX_PAGES];
    uint64_t start = offset & ~(uint64_t)(PAGE_BYTES - 1);
    size_t bytes = (size_t)(offset - start) + size, at;

    /* A kernel with larger pages refuses most of these calls, and reports fewer pages. */
    memset(found, 1, sizeof found);
    if (units->address == NULL || bytes > sizeof found * PAGE_BYTES ||
        mincore(units->address + start, bytes, found))
        return 0;
    for (at = 0; at * PAGE_BYTES < bytes; at++)
        if ((found[at] & 1) == 0)
            return 0;
    return 1;
}

/* Returns whether the block at an offset is known to be all zeros. */
static int is_zero_block(const struct checked_units *units, uint64_t offset)
{
    uint64_t unit = offset >> units->unit_bits;
    uint64_t number = (offset & (((uint64_t)1 << units->unit_bits) - 1)) >> BLOCK_BITS;

    return unit < (uint64_t)units->zero_blocks.len / sizeof(uint64_t) &&
           ((uint64_t *)units->zero_blocks.buf)[unit] >> number & 1;
}

int may_have_holes(const struct checked_units *units, const char *data, uint64_t offset, size_t size)
{
    size_t at = 0, length;

    /* The kernel answers from a hole without reading from the disk. */
    for (; at < size; at += length) {
        length = BLOCK_BYTES - (size_t)((offset + at) % BLOCK_BYTES);
        if (length > size - at)
            length = size - at;
        if (data[at] == 0 && memcmp(data + at, data + at + 1, length - 1) == 0 &&
            !is_zero_block(units, offset + at))
            return 1;
    }
    return 0;
}

void forget_units(const struct checked_units *units, uint64_t offset, size_t size)
{
    uint64_t first = offset >> units->unit_bits, last = (offset + size - 1) >> units->unit_bits;

    Py_XDECREF(PyObject_CallFunction(units->forget, "KK", (unsigned long long)first,
                                     (unsigned long long)last));
}
