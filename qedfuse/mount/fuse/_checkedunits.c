/*
 * The units of a file in the cache for remote files: which units may be read from the page cache,
 * and whether the result of such a read may be used.  remote/localdata.py explains the rules.
 *
 * Everything happens with the GIL held.
 */

#include "_extraops.h"

#include <unistd.h>

/* Maximum number of units ahead of a read that are looked at: half of _MAX_WINDOW_UNITS in
 * remote/fetcher.py. */
#define MAX_AHEAD_UNITS 32

/* The smallest hole that a file can have (remote/zeroblocks.py). */
#define BLOCK_BITS 12
#define BLOCK_BYTES (1 << BLOCK_BITS)

/* The value in `ready` of a settled unit (settle_unit()). */
#define SETTLED 2

/* Only one in this number of reads tries to settle a unit.  An attempt costs more than a read, and
 * fails until the kernel has written the pages. */
#define READS_PER_ATTEMPT 8

int fill_units(struct checked_units *units, PyObject *source, int fd)
{
    PyObject *forget;
    long long file_bytes;
    unsigned long long address;

    if (!PyArg_ParseTuple(source, "w*y*IKLKO", &units->ready, &units->zero_blocks,
                          &units->unit_bits, &units->content_bytes, &file_bytes, &address, &forget))
        return -1;
    units->address = (char *)(uintptr_t)address;
    units->file_bytes = (off_t)file_bytes;
    units->forget = Py_NewRef(forget);
    units->seen_bytes = lseek(fd, 0, SEEK_END);
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
    /* A read that reaches the end of its first unit is left to Python if one of the next units is
     * not ready.  Python also fetches the units that a sequential reader needs soon. */
    if ((offset + size) >> units->unit_bits == first || last + 1 >= count)
        return 1;
    ahead = count - last - 1 < MAX_AHEAD_UNITS ? count - 1 : last + MAX_AHEAD_UNITS;
    return are_ready(units, last + 1, ahead);
}

/* Returns whether a length is one of the two that the file has if it was not cut: it has one byte
 * more while several processes use its entry in the cache (remote/sharing.py). */
static int is_uncut(const struct checked_units *units, off_t length)
{
    return length == units->file_bytes || length == units->file_bytes + 1;
}

/* Compares the length of the file with its length after the previous read.  After a change, which
 * can mean that the file was cut, this read fails, and its units are compared again.
 * A file that was cut never gets a valid length again, with one exception: a process that opens the
 * entry may look at the length before the cut, and set the other valid length after the cut.  That
 * length differs from the previous one, too. */
int keeps_length(struct checked_units *units, int fd)
{
    off_t before = units->seen_bytes;

    units->seen_bytes = lseek(fd, 0, SEEK_END);
    return units->seen_bytes == before && is_uncut(units, before);
}

/* Returns whether this process alone uses the file, as far as the last look at the length shows. */
static int is_alone(const struct checked_units *units)
{
    return units->seen_bytes == units->file_bytes;
}

/* Settles a unit, if its pages are valid and not waiting to be written.  A page is invalid while
 * the kernel reads it, and after the kernel has failed to write it.  So the pages of a settled unit
 * stay valid until they leave the page cache, which cached_pages() reports, or a process writes to
 * them because it fetches the unit anew.  Before this process writes, it makes the unit not ready
 * (UnitStore).  While another process may write, is_alone() is false. */
static void settle_unit(const struct checked_units *units, int fd, uint64_t unit)
{
    uint64_t offset = unit << units->unit_bits, size = (uint64_t)1 << units->unit_bits;

    if (size > units->content_bytes - offset)
        size = units->content_bytes - offset;
    if (are_clean(fd, offset, size) && has_valid_pages(units->address, offset, size))
        ((unsigned char *)units->ready.buf)[unit] = SETTLED;
}

/* Returns whether a range may be passed on by splice(2), which would read an invalid page from the
 * disk. */
static int may_splice_units(const struct checked_units *units, int fd, uint64_t offset, size_t size)
{
    static unsigned int reads;
    const unsigned char *ready = units->ready.buf;
    uint64_t unit = offset >> units->unit_bits, last = (offset + size - 1) >> units->unit_bits;

    if (is_alone(units)) {
        while (unit <= last && ready[unit] == SETTLED)
            unit++;
        if (unit > last)
            return cached_pages(fd, offset, size) == PAGES_CACHED;
        if (++reads % READS_PER_ATTEMPT == 0)
            settle_unit(units, fd, unit);
    }
    return has_valid_pages(units->address, offset, size);
}

int may_try_units(const struct checked_units *units, int fd, uint64_t offset, size_t size)
{
    enum pages pages;

    if (may_splice(size))
        return may_splice_units(units, fd, offset, size);
    pages = cached_pages(fd, offset, size);
    return pages == PAGES_CACHED ||
           (pages == PAGES_UNKNOWN && has_valid_pages(units->address, offset, size));
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

    /* A block of zeros may be a hole that a failed write has left, unless the remote file is known
     * to have zeros there. */
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
