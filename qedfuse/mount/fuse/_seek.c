/*
 * Answers lseek(2) with SEEK_DATA and SEEK_HOLE from the tables that are in memory.
 *
 * An image without a base has data exactly where an L2 entry is neither 0 nor that of a zero
 * cluster.  Where an L1 entry is 0, there is no L2 table, and the whole range of the entry is a
 * hole.
 *
 * The search is left to Python (fallocate.py) if the disk has a base, if a slice (part) of a table
 * is not in memory or has an invalid entry, or after MAX_STEPS steps.  Python also answers if
 * is_seek_permitted() returns 0.
 */

#include "_readview.h"

#include <errno.h>

/* Maximum number of steps of one search, during which other requests wait.  A step looks at one
 * slice of an L2 table, or at entries of the L1 table. */
#define MAX_STEPS 64

/* Number of entries that are compared together, without a branch for each. */
#define GROUP 16

/* The largest entry that does not locate data: that of a zero cluster. */
#define ZERO_ENTRY 1

/* Sets `slice` to the entries of the slice at a file offset, and releases its old entries.  Returns
 * 0 if the slice is not in memory or has an invalid entry; an exception may be set then.  The
 * caller must release `slice` in both cases. */
static int get_slice_at(ReadView *view, uint64_t offset, Py_buffer *slice)
{
    PyObject *key = Py_BuildValue("(OK)", view->cache_key, (unsigned long long)offset);
    PyObject *entries = key == NULL ? NULL : valid_entries(view, key);
    int is_there;

    PyBuffer_Release(slice); /* does nothing if there are none */
    is_there = entries != NULL && PyObject_GetBuffer(entries, slice, PyBUF_SIMPLE) == 0 &&
               (uint64_t)slice->len == sizeof(uint64_t) << view->slice_bits;
    Py_XDECREF(key);
    Py_XDECREF(entries);
    return is_there;
}

/* Returns the index of the first entry that locates data; if `for_data` is 0, of the first that
 * locates none.  Entries from `first` to before `end` count; returns `end` if none matches. */
static uint64_t first_entry(const uint64_t *entries, uint64_t first, uint64_t end, int for_data)
{
    uint64_t at = first, count;
    unsigned int found;

    for (; at + GROUP <= end; at += GROUP) {
        for (found = 0, count = 0; count < GROUP; count++)
            found |= (entries[at + count] > ZERO_ENTRY) == for_data;
        if (found)
            break;
    }
    while (at < end && (entries[at] > ZERO_ENTRY) != for_data)
        at++;
    return at;
}

/* Finds the first data, or the first hole if `for_data` is 0, from a guest offset on and below
 * `limit`.  Returns 1 and sets `found` to its guest offset, or to `limit` if there is none.
 * Returns 0 if Python must search; an exception may be set then. */
static int search(ReadView *view, uint64_t start, uint64_t limit, int for_data, uint64_t *found)
{
    const uint64_t slice_mask = ((uint64_t)1 << view->slice_bits) - 1;
    const uint64_t table_mask = ((uint64_t)1 << view->table_bits) - 1;
    const uint64_t clusters = ((limit - 1) >> view->cluster_bits) + 1;
    const long long l1_offset = l1_table_offset(view);
    uint64_t cluster = start >> view->cluster_bits, l1_index, table, at;
    uint64_t l1_slice = UINT64_MAX; /* number of the slice that `l1` is */
    Py_buffer l1 = {0}, l2 = {0};
    int count, is_found = 0;

    for (count = 0; count < MAX_STEPS && l1_offset >= 0 && cluster < clusters; count++) {
        l1_index = cluster >> view->table_bits;
        if (l1_slice != l1_index >> view->slice_bits) {
            l1_slice = l1_index >> view->slice_bits;
            at = (uint64_t)l1_offset + (l1_slice << view->slice_bits) * sizeof(uint64_t);
            if (!get_slice_at(view, at, &l1))
                break;
        }
        table = ((uint64_t *)l1.buf)[l1_index & slice_mask];
        if (table == 0 && !for_data) {
            is_found = 1;
            break;
        }
        if (table == 0) {
            /* Skips to the next L1 entry that is not 0; such an entry is the offset of a table. */
            at = first_entry(l1.buf, l1_index & slice_mask, slice_mask + 1, 1);
            cluster = ((l1_index & ~slice_mask) + at) << view->table_bits;
            continue;
        }
        at = table + (cluster & table_mask & ~slice_mask) * sizeof(uint64_t);
        if (!get_slice_at(view, at, &l2))
            break;
        at = first_entry(l2.buf, cluster & slice_mask, slice_mask + 1, for_data);
        cluster = (cluster & ~slice_mask) + at;
        if (at <= slice_mask) {
            is_found = 1;
            break;
        }
    }
    PyBuffer_Release(&l1);
    PyBuffer_Release(&l2);
    *found = cluster << view->cluster_bits;
    if (*found < start)
        *found = start;
    if (cluster >= clusters) /* entries past the end of the disk do not count */
        *found = limit;
    return (is_found || cluster >= clusters) && !PyErr_Occurred();
}

int answer_seek(fuse_req_t request, fuse_ino_t inode, int whence, off_t start)
{
    ReadView *view = whence == SEEK_DATA || whence == SEEK_HOLE ? view_with(inode, start, 1) : NULL;
    uint64_t limit, found;
    int is_found = 0;

    if (view != NULL && view->cache_key != NULL && is_seek_permitted(inode)) {
        limit = view->window_start + (uint64_t)view_size(view);
        is_found = search(view, view->window_start + (uint64_t)start, limit, whence == SEEK_DATA, &found);
        if (is_found && whence == SEEK_DATA && found == limit)
            fuse_reply_err(request, ENXIO);
        else if (is_found)
            fuse_reply_lseek(request, (off_t)(found - view->window_start));
    }
    Py_XDECREF(view);
    PyErr_Clear();
    return is_found;
}
