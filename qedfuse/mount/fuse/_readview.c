/*
 * Finds data by the tables of an image that are in memory, without the Python code of the fast path
 * (disk/datapath/fastpath.py).
 *
 * A ReadView refers to the objects by which FastPath.locate finds a range of one disk.  This module
 * uses the same objects, with the GIL held, so it needs no copy of a table that could become stale.
 */

#include "_readview.h"

/* The layout of the codes that locate data in backing files (disk/lookup/flattenedbacking.py). */
#define DEPTH_MASK ((uint64_t)4095)
#define DEPTH_BIAS 2

static PyTypeObject *view_type;
static PyObject *views; /* dict: inode number -> the ReadView of the disk */
/* `handle & handle_mask` is the inode number, or for a handle whose writes must each be durable, a
 * number that `views` lacks, so Python code handles the request (FAST_LOOKUP_MASK in handles.py). */
static uint64_t handle_mask;
static PyObject *name_header, *name_image_size, *name_l1_table_offset, *name_bad, *name_entries;

long long number_attribute(PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    long long number = value == NULL ? -1 : PyLong_AsLongLong(value);

    Py_XDECREF(value);
    return number;
}

/* Returns an attribute of the top image's header as a number; -1 with an exception if that fails. */
static long long header_attribute(ReadView *self, PyObject *name)
{
    PyObject *header = PyObject_GetAttr(self->layer, name_header);
    long long value = header == NULL ? -1 : number_attribute(header, name);

    Py_XDECREF(header);
    return value;
}

long long view_size(ReadView *self)
{
    return self->window_bytes >= 0 ? self->window_bytes : header_attribute(self, name_image_size);
}

long long l1_table_offset(ReadView *self)
{
    return header_attribute(self, name_l1_table_offset);
}

PyObject *valid_entries(ReadView *self, PyObject *key)
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

/* Returns 1, and the entry `first` in `value`, if the entries `first` to `last` of an array("Q")
 * are one run: all are 0, or all are 1, or each is larger by the cluster size than the one before
 * it.  After 0 an exception may be set. */
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

/* Returns the code of clusters that the top image has not allocated; `first` and `last` are indices
 * in their slice, inclusive.  A code above 1 is the file offset of the first cluster (a multiple of
 * 4096), plus the depth of the file, plus DEPTH_BIAS.  Returns 1 if all clusters read as zeros.
 * Returns 0 if the clusters are not one run in one file, or if the codes of the slice are not in
 * memory; an exception may be set then. */
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

int find_range(ReadView *self, uint64_t start, size_t length, uint64_t *offset, uint64_t *depth)
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

ReadView *view_with(uint64_t handle, off_t start, size_t size)
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
    Py_XDECREF(self->cache_key);
    free_files(self->files, self->file_count);
    free_writes(self->writes);
    if (self->file_reads.obj != NULL)
        PyBuffer_Release(&self->file_reads);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyType_Slot view_slots[] = {
    {Py_tp_dealloc, view_free},
    {Py_tp_doc, "Finds the data of one disk; made by read_view()."},
    {0, NULL},
};

static PyType_Spec view_spec = {
    .name = "qedfuse.mount.fuse._extraops.ReadView",
    .basicsize = sizeof(ReadView),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = view_slots,
};

int init_read_views(void)
{
    const struct interned_name names[] = {
        {&name_header, "header"},
        {&name_image_size, "image_size"},
        {&name_l1_table_offset, "l1_table_offset"},
        {&name_bad, "bad"},
        {&name_entries, "entries"},
    };

    view_type = (PyTypeObject *)PyType_FromSpec(&view_spec);
    return view_type == NULL || intern_names(names, sizeof names / sizeof *names) ? -1 : 0;
}

PyObject *read_view(PyObject *module, PyObject *args)
{
    PyObject *layer, *keys, *get_slice, *codes_key, *files, *epochs, *file_reads;
    PyObject *writes = Py_None, *seeks = Py_None, *cache_key = NULL;
    unsigned int cluster_bits, slice_bits, table_bits = 0;
    unsigned long long window_start = 0;
    long long window_bytes = -1;
    ReadView *self;

    (void)module;
    if (!PyArg_ParseTuple(args, "OO!OOO!IIOO|KLOO", &layer, &PyDict_Type, &keys, &get_slice, &codes_key,
                          &PyTuple_Type, &files, &cluster_bits, &slice_bits, &epochs, &file_reads,
                          &window_start, &window_bytes, &writes, &seeks))
        return NULL;
    if (seeks != Py_None && !PyArg_ParseTuple(seeks, "OI", &cache_key, &table_bits))
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
    self->cache_key = Py_XNewRef(cache_key);
    self->table_bits = table_bits;
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
    handle_mask = mask;
    Py_XSETREF(views, PyDict_Copy(given));
    if (views == NULL)
        return NULL;
    Py_RETURN_NONE;
}
