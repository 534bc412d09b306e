/*
 * Answers reads without the Python code of the fast path (disk/datapath/fastpath.py), if the range
 * is one run of data in one file of a chain, and the slices (parts) of the tables are in memory.  If
 * the file's policy permits it, data in the host's page cache is read immediately.  Other reads are
 * made through io_uring, if its queue accepts them (_queuedread.c).
 *
 * The range is found (_readview.c) and the read is answered in one step, with the GIL held.  A read
 * that waits enters an epoch in the same step, as Disk.try_start_read does.
 *
 * From a file in the cache for remote files, only units that are ready (UnitStore.ready) are read,
 * and only from the page cache, because bytes from the disk must be compared with their checksums.
 *
 * Every other read, and every read that fails here, goes to the Python function for reads
 * (_dataops.c), which begins the read anew.
 */

#include "_readview.h"

#include <errno.h>
#include <sys/uio.h>

/* Maximum bytes of a read; requests of the kernel are not longer. */
#define MAX_READ_BYTES (1 << 20)

static char buffer[MAX_READ_BYTES]; /* for the data of one read at a time */
static PyObject *name_is_inline, *name_misses;

/* Sets the number of misses in a row of a ReadPolicy to 0.  An exception may be set afterwards. */
static void reset_misses(PyObject *policy)
{
    PyObject *zero;

    if (number_attribute(policy, name_misses) <= 0)
        return;
    zero = PyLong_FromLong(0);
    if (zero != NULL)
        PyObject_SetAttr(policy, name_misses, zero);
    Py_XDECREF(zero);
}

/* Answers by way of the buffer, if the page cache has all of the data.  If the file has checked
 * units, the range must have no hole, and the file must still have its length. */
static enum attempt answer_from_buffer(struct read_file *file, fuse_req_t request, uint64_t offset,
                                       size_t size)
{
    struct checked_units *units = &file->units;
    struct iovec vector = {buffer, size};
    ssize_t count = preadv2(file->fd, &vector, 1, (off_t)offset, file->flags);

    if (count < 0 && errno != EAGAIN)
        return FAILED;
    /* keeps_length() must come after the read. */
    if (has_units(units) && !keeps_length(units, file->fd))
        return FAILED;
    if (count != (ssize_t)size) /* a page is not in the page cache, or the file ends there */
        return NOT_CACHED;
    if (has_units(units) && may_have_holes(units, buffer, offset, size))
        return NOT_CACHED;
    if (!has_units(units) && may_splice(size))
        note_valid_pages(file->fd, offset, size);
    fuse_reply_buf(request, buffer, size);
    return ANSWERED;
}

/* Answers a read if the policy allows an attempt and all of the data is in the page cache.  An
 * exception may be set afterwards. */
static enum attempt answer_from_file(struct read_file *file, fuse_req_t request, uint64_t offset,
                                     size_t size)
{
    PyObject *is_inline = PyObject_GetAttr(file->policy, name_is_inline);
    struct checked_units *units = &file->units;
    enum attempt attempt = NOT_ALLOWED;

    Py_XDECREF(is_inline);
    if (is_inline != Py_True)
        return is_inline == NULL ? FAILED : NOT_ALLOWED;
    if (!has_units(units))
        attempt = splice_reply(request, file->fd, file->flags, (off_t)offset, size) ? ANSWERED
                                                                                    : NOT_ALLOWED;
    else if (!may_try_units(units, file->fd, offset, size))
        return NOT_CACHED;
    else
        attempt = splice_units(request, units, file->fd, (off_t)offset, size);
    if (attempt == NOT_ALLOWED)
        attempt = answer_from_buffer(file, request, offset, size);
    if (attempt == ANSWERED)
        reset_misses(file->policy);
    return attempt;
}

void count_file_read(const struct read_place *place, size_t size)
{
    place->counts[0]++;
    place->counts[1] += size;
}

/* Answers or queues a read at `place`, or passes it on.  An exception may be set afterwards. */
static enum cached_read serve(struct read_place place, fuse_req_t request, fuse_ino_t inode,
                              uint64_t handle, off_t start, size_t size)
{
    const struct checked_units *units;
    enum attempt attempt;

    place.file = storing_file(place.file, &place.offset, size);
    if (place.file == NULL || place.file->policy == NULL)
        return PASSED_ON;
    units = &place.file->units;
    if (has_units(units) && !may_read_units(units, place.offset, size))
        return PASSED_ON;
    attempt = answer_from_file(place.file, request, place.offset, size);
    if (attempt != ANSWERED && attempt != NOT_ALLOWED && has_units(units) && !PyErr_Occurred())
        forget_units(units, place.offset, size);
    if (attempt == ANSWERED) {
        count_file_read(&place, size);
        return REPLIED;
    }
    /* From a file with units a queued read could return bytes that were not compared. */
    if (attempt == FAILED || has_units(units))
        return PASSED_ON;
    return queue_read(request, inode, handle, start, size, place, attempt == NOT_CACHED) ? QUEUED
                                                                                         : PASSED_ON;
}

enum cached_read answer_cached_read(fuse_req_t request, fuse_ino_t inode, uint64_t handle, off_t start,
                                    size_t size)
{
    ReadView *view = size > MAX_READ_BYTES ? NULL : view_with(handle, start, size);
    uint64_t offset, depth;
    enum cached_read result = PASSED_ON;

    if (view != NULL) {
        if (find_range(view, view->window_start + (uint64_t)start, size, &offset, &depth) &&
            depth < view->file_count)
            result = serve((struct read_place){(PyObject *)view, view->files + depth, view->epochs,
                                               offset,
                                               (uint64_t *)view->file_reads.buf + 2 * depth},
                           request, inode, handle, start, size);
        Py_DECREF(view);
    }
    PyErr_Clear();
    return result;
}

int init_cached_reads(void)
{
    const struct interned_name names[] = {
        {&name_is_inline, "is_inline"},
        {&name_misses, "misses"},
    };

    return intern_names(names, sizeof names / sizeof *names);
}
