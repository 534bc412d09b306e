/*
 * Answers reads without the Python code of the fast path (disk/datapath/fastpath.py).  A read is
 * answered here only if its range is one run of data in one file of a chain, and the slices (parts)
 * of the tables that locate the run are in memory.  Data in the host's page cache is answered with
 * immediately; for other data the read waits in a queue of the kernel (_queuedread.c).  A read that
 * is answered immediately calls only one Python function: the one that looks up a slice in the table
 * cache.
 *
 * A ReadView refers to the objects by which FastPath.locate finds a range of one disk.  This module
 * finds the range by the same objects in the same way, with the GIL held, so it needs no copy of a
 * table that could become stale.  A read that waits enters an epoch in the same step, as
 * Disk.try_start_read does.
 *
 * From a file in the cache for remote files, this module reads only units that were compared with
 * their checksums, and only from the page cache, because bytes from the disk must be compared again.
 *
 * Every other read, and every read that fails here, goes to the Python function for reads
 * (_dataops.c), which begins the read anew.  The functions that other files call are described in
 * _extraops.h.
 */

#include "_extraops.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

/* Maximum bytes of a read, and length of the buffer; requests of the kernel are not longer. */
#define MAX_READ_BYTES (1 << 20)

/* The layout of codes (disk/lookup/flattenedbacking.py). */
#define DEPTH_MASK ((uint64_t)4095)
#define DEPTH_BIAS 2

/*
 * What locates the data of one disk.  A slice of the top image has an entry for each of its
 * clusters.  For each slice FlattenedBacking (disk/lookup/flattenedbacking.py) makes an array of
 * codes, which say for each cluster where a backing file holds it.  The table cache keeps such an
 * array as it keeps a slice.  The key of the array is the pair of `codes_key` and the slice's number.
 */
typedef struct {
    PyObject_HEAD
    PyObject *layer;     /* QedLayer: the top image; `header.image_size` is the size of the disk */
    PyObject *keys;      /* dict: slice number -> the slice's key in the table cache, or None if the
                          * disk has no L2 table there */
    PyObject *get_slice; /* returns the slice with a key; None if the slice is not in memory */
    PyObject *codes_key; /* first part of the keys of codes; None without backing files */
    PyObject *epochs;    /* Epochs, which a read that waits enters */
    struct read_file *files; /* the files of the chain, by depth; the top image has depth 0 */
    Py_buffer file_reads;    /* for each file two numbers: of reads, and of bytes (FileReads) */
    uint64_t file_count;
    unsigned int cluster_bits; /* binary logarithm of the cluster size in bytes */
    unsigned int slice_bits;   /* binary logarithm of the number of entries in a slice */
    uint64_t window_start;     /* guest offset of the range that reads see as the file */
    long long window_bytes;    /* length of that range, which is within the disk; -1: the whole disk */
    struct in_place_writes *writes; /* NULL if Python must carry out all writes */
} ReadView;

static PyTypeObject *view_type;
static PyObject *views; /* dict: inode number -> the ReadView of the disk */
/* `handle & handle_mask` is the inode number, or no key of `views` if reads of the handle are not
 * answered here (FAST_LOOKUP_MASK in handles.py). */
static uint64_t handle_mask;
static char *buffer; /* for the data of one read at a time */
static PyObject *name_header, *name_image_size, *name_bad, *name_entries, *name_is_inline,
    *name_misses;

/* Returns an attribute as a number; -1 with an exception if that fails. */
static long long number_attribute(PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    long long number = value == NULL ? -1 : PyLong_AsLongLong(value);

    Py_XDECREF(value);
    return number;
}

/* Returns the size in bytes of the disk, or of the window; -1 with an exception if that fails. */
static long long view_size(ReadView *self)
{
    PyObject *header;
    long long size;

    if (self->window_bytes >= 0)
        return self->window_bytes;
    header = PyObject_GetAttr(self->layer, name_header);
    size = header == NULL ? -1 : number_attribute(header, name_image_size);
    Py_XDECREF(header);
    return size;
}

/* Returns the entries of the slice with a key of the table cache.  Returns NULL if the slice is not in
 * memory or has an invalid entry; an exception may be set then. */
static PyObject *valid_entries(ReadView *self, PyObject *key)
{
    PyObject *slice = PyObject_CallOneArg(self->get_slice, key);
    PyObject *bad, *entries = NULL;

    if (slice != NULL && slice != Py_None) {
        bad = PyObject_GetAttr(slice, name_bad);
        Py_XDECREF(bad);
        if (bad == Py_None)
            entries = PyObject_GetAttr(slice, name_entries);
    }
    Py_XDECREF(slice);
    return entries;
}

/* Returns 1 if the entries from `first` to `last`, inclusive, of an array("Q") are one run: each is
 * larger by the cluster size than the entry before it, or all are 0, or all are 1.  Then `value` is
 * the entry `first`.  Otherwise returns 0; `value` has no meaning then, and an exception may be set.
 * A single entry is always a run. */
static int read_run(PyObject *entries, uint64_t first, uint64_t last, unsigned int cluster_bits,
                    uint64_t *value)
{
    uint64_t expected, step, at;
    Py_buffer view;
    int is_run;

    if (PyObject_GetBuffer(entries, &view, PyBUF_SIMPLE))
        return 0;
    is_run = (uint64_t)view.len > last * sizeof expected;
    if (is_run) {
        *value = expected = ((uint64_t *)view.buf)[first];
        step = expected <= 1 ? 0 : (uint64_t)1 << cluster_bits;
        for (at = first + 1; at <= last; at++) {
            expected += step;
            is_run &= ((uint64_t *)view.buf)[at] == expected;
        }
    }
    PyBuffer_Release(&view);
    return is_run;
}

/* Returns the code of clusters that the top image has not allocated.  `first` and `last` are indices
 * in their slice, inclusive.  The codes 0 and 1 locate no data.  Every other code is the sum of three
 * numbers: the offset in a backing file at which the first cluster lies, a multiple of 4096; the depth of
 * that file; and DEPTH_BIAS.  Returns 0 if the clusters are not one run in one backing file, or if the
 * codes of the slice (see ReadView) are not in memory; an exception may be set then. */
static uint64_t backing_code(ReadView *self, PyObject *slice_number, uint64_t first, uint64_t last)
{
    PyObject *key = PyTuple_Pack(2, self->codes_key, slice_number);
    PyObject *codes = key == NULL ? NULL : valid_entries(self, key);
    uint64_t code = 0;

    /* The codes of contiguous clusters of one file differ by the cluster size, as entries of a table do. */
    if (codes != NULL && !read_run(codes, first, last, self->cluster_bits, &code))
        code = 0;
    Py_XDECREF(key);
    Py_XDECREF(codes);
    return code;
}

/* Finds a range of the disk that is one run of data in one file, within one slice of the top image.
 * Returns 1 and sets `offset` to the file offset of the range, and `depth` to the depth of the file.
 * Returns 0 for every other range, and if a slice or codes that are needed are not in memory; an
 * exception may be set then. */
static int find_range(ReadView *self, uint64_t start, size_t length, uint64_t *offset,
                      uint64_t *depth)
{
    uint64_t first = start >> self->cluster_bits;
    uint64_t last = (start + length - 1) >> self->cluster_bits;
    uint64_t mask = ((uint64_t)1 << self->slice_bits) - 1;
    uint64_t value = 0, code;
    PyObject *slice_number, *key, *entries;
    int is_found = 0;

    if (first >> self->slice_bits != last >> self->slice_bits)
        return 0;
    slice_number = PyLong_FromUnsignedLongLong(first >> self->slice_bits);
    key = slice_number == NULL ? NULL : PyDict_GetItemWithError(self->keys, slice_number);
    entries = key == NULL || key == Py_None ? NULL : valid_entries(self, key);
    /* The entry of an unallocated cluster is 0, and that of a zero cluster is 1. */
    if (key == Py_None || (entries != NULL && read_run(entries, first & mask, last & mask,
                                                       self->cluster_bits, &value))) {
        is_found = value > 1;
        *depth = 0;
        if (value == 0 && self->codes_key != Py_None) {
            code = backing_code(self, slice_number, first & mask, last & mask);
            is_found = code > 1;
            *depth = (code & DEPTH_MASK) - DEPTH_BIAS;
            value = code & ~DEPTH_MASK;
        }
    }
    Py_XDECREF(slice_number);
    Py_XDECREF(entries);
    *offset = value + (start & (((uint64_t)1 << self->cluster_bits) - 1));
    return is_found;
}

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

/* Reads from the page cache into the buffer, and answers with the buffer if the page cache had all of
 * the data.  If the file has checked units, also demands that the range cannot have a hole, and that
 * the file still has its length. */
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
    if (count != (ssize_t)size) /* perhaps fewer because the file ends there */
        return NOT_CACHED;
    if (has_units(units) && may_have_holes(units, buffer, offset, size))
        return NOT_CACHED;
    fuse_reply_buf(request, buffer, size);
    return ANSWERED;
}

/* Answers a read, if the file's policy allows an attempt and all of the data is in the page cache.
 * Otherwise does not answer.  In both cases an exception may be set afterwards. */
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
        attempt = splice_reply(request, file->fd, (off_t)offset, size) ? ANSWERED : NOT_ALLOWED;
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

/* Answers or queues a read whose bytes are at `place`, or passes it on.  An exception may be set
 * afterwards. */
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
    /* From a file with units a queued read could return bytes of the disk that were not compared with
     * a checksum. */
    if (attempt == FAILED || has_units(units))
        return PASSED_ON;
    return queue_read(request, inode, handle, start, size, place, attempt == NOT_CACHED) ? QUEUED
                                                                                         : PASSED_ON;
}

/* Returns a new reference to the view of the disk of a handle, if a range lies within the disk, or within
 * the window.  Otherwise returns NULL; an exception may be set then. */
static ReadView *view_with(uint64_t handle, off_t start, size_t size)
{
    PyObject *key, *found;
    long long end;

    if (views == NULL || size == 0 || start < 0)
        return NULL;
    key = PyLong_FromUnsignedLongLong(handle & handle_mask);
    found = key == NULL ? NULL : PyDict_GetItemWithError(views, key);
    Py_XDECREF(key);
    if (found == NULL)
        return NULL;
    Py_INCREF(found);
    end = view_size((ReadView *)found);
    if (end < 0 || (uint64_t)start + size > (uint64_t)end)
        Py_CLEAR(found);
    return (ReadView *)found;
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

int find_allocated(uint64_t handle, off_t start, size_t size, struct write_place *place)
{
    ReadView *view = view_with(handle, start, size);
    uint64_t depth;

    if (view == NULL)
        return 0;
    if (view->writes != NULL &&
        find_range(view, view->window_start + (uint64_t)start, size, &place->offset, &depth) &&
        depth == 0) {
        place->view = (PyObject *)view;
        place->writes = view->writes;
        return 1;
    }
    Py_DECREF(view);
    return 0;
}

/* --- the type and the functions of the module ------------------------------------------ */

static void view_free(PyObject *object)
{
    ReadView *self = (ReadView *)object;
    PyTypeObject *type = Py_TYPE(object);

    Py_XDECREF(self->layer);
    Py_XDECREF(self->keys);
    Py_XDECREF(self->get_slice);
    Py_XDECREF(self->codes_key);
    Py_XDECREF(self->epochs);
    free_files(self->files, self->file_count);
    free_writes(self->writes);
    if (self->file_reads.obj != NULL)
        PyBuffer_Release(&self->file_reads);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyType_Slot view_slots[] = {
    {Py_tp_dealloc, view_free},
    {Py_tp_doc, "Answers reads of one disk; made by read_view()."},
    {0, NULL},
};

static PyType_Spec view_spec = {
    .name = "qedfuse.mount.fuse._extraops.ReadView",
    .basicsize = sizeof(ReadView),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = view_slots,
};

int init_cached_reads(void)
{
    const struct interned_name names[] = {
        {&name_header, "header"}, {&name_image_size, "image_size"}, {&name_bad, "bad"},
        {&name_entries, "entries"}, {&name_is_inline, "is_inline"}, {&name_misses, "misses"},
    };

    view_type = (PyTypeObject *)PyType_FromSpec(&view_spec);
    return view_type == NULL || intern_names(names, sizeof names / sizeof *names) ? -1 : 0;
}

PyObject *read_view(PyObject *module, PyObject *args)
{
    PyObject *layer, *keys, *get_slice, *codes_key, *files, *epochs, *file_reads, *writes = Py_None;
    unsigned int cluster_bits, slice_bits;
    unsigned long long window_start = 0;
    long long window_bytes = -1;
    ReadView *self;

    (void)module;
    if (!PyArg_ParseTuple(args, "OO!OOO!IIOO|KLO", &layer, &PyDict_Type, &keys, &get_slice, &codes_key,
                          &PyTuple_Type, &files, &cluster_bits, &slice_bits, &epochs, &file_reads,
                          &window_start, &window_bytes, &writes))
        return NULL;
    self = PyObject_New(ReadView, view_type);
    if (self == NULL)
        return NULL;
    self->layer = Py_NewRef(layer);
    self->keys = Py_NewRef(keys);
    self->get_slice = Py_NewRef(get_slice);
    self->codes_key = Py_NewRef(codes_key);
    self->epochs = Py_NewRef(epochs);
    self->files = make_files(files);
    self->file_count = (uint64_t)PyTuple_GET_SIZE(files);
    self->cluster_bits = cluster_bits;
    self->slice_bits = slice_bits;
    self->window_start = window_start;
    self->window_bytes = window_bytes;
    memset(&self->file_reads, 0, sizeof self->file_reads);
    self->writes = writes == Py_None || self->files == NULL ? NULL : make_writes(writes);
    if (self->files == NULL || (writes != Py_None && self->writes == NULL) ||
        PyObject_GetBuffer(file_reads, &self->file_reads, PyBUF_WRITABLE)) {
        Py_CLEAR(self);
    } else if (self->file_reads.len < PyTuple_GET_SIZE(files) * 2 * (Py_ssize_t)sizeof(uint64_t)) {
        PyErr_SetString(PyExc_ValueError, "the counts are fewer than two for each file");
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

PyObject *set_read_views(PyObject *module, PyObject *args)
{
    PyObject *given, *key, *value;
    unsigned long long mask;
    Py_ssize_t position = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "O!K", &PyDict_Type, &given, &mask))
        return NULL;
    while (PyDict_Next(given, &position, &key, &value))
        if (Py_TYPE(value) != view_type) {
            PyErr_SetString(PyExc_TypeError, "a value is no ReadView");
            return NULL;
        }
    if (buffer == NULL && (buffer = PyMem_RawMalloc(MAX_READ_BYTES)) == NULL)
        return PyErr_NoMemory();
    handle_mask = mask;
    Py_XSETREF(views, PyDict_Copy(given));
    if (views == NULL)
        return NULL;
    Py_RETURN_NONE;
}
