/*
 * Reads of one run of data whose slice is in memory and whose data is in the host's page cache,
 * answered without calling Python code of the disk.
 *
 * A ReadView refers to the objects by which FastPath.locate (disk/datapath/fastpath.py) finds a
 * range.  A read finds the range by the same objects in the same way, with the GIL held, so it
 * needs no copy of a table that could become stale.  This module handles only the usual case.
 * Every other read, and every read that fails here, goes to the Python function, which begins
 * anew.
 */

#include "_extraops.h"

#include <sys/uio.h>

/* Maximum length of a read, and length of the buffer; requests of the kernel are not longer. */
#define MAX_READ_BYTES (1 << 20)

typedef struct {
    PyObject_HEAD
    PyObject *layer;     /* QedLayer: `header.image_size` */
    PyObject *keys;      /* dict: the key of a slice in the table cache, by the slice's number */
    PyObject *get_slice; /* returns a slice by its key, or None */
    PyObject *policy;    /* ReadPolicy of the file */
    int fd;
    unsigned int cluster_bits, slice_bits;
} ReadView;

static PyTypeObject *view_type;
static PyObject *views; /* dict: the ReadView of a disk, by `handle & handle_mask` */
static uint64_t handle_mask;
static char *buffer;
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

/* Returns the size of the disk in bytes; -1 with an exception if that fails. */
static long long disk_size(ReadView *self)
{
    PyObject *header = PyObject_GetAttr(self->layer, name_header);
    long long size = header == NULL ? -1 : number_attribute(header, name_image_size);

    Py_XDECREF(header);
    return size;
}

/* Returns slice `number` if it is in memory and all its entries are valid; NULL otherwise, perhaps
 * with an exception. */
static PyObject *valid_slice(ReadView *self, uint64_t number)
{
    PyObject *index = PyLong_FromUnsignedLongLong(number);
    PyObject *key = index == NULL ? NULL : PyDict_GetItemWithError(self->keys, index);
    PyObject *slice = key == NULL ? NULL : PyObject_CallOneArg(self->get_slice, key);
    PyObject *bad;

    Py_XDECREF(index);
    if (slice == NULL || slice == Py_None) {
        Py_XDECREF(slice);
        return NULL;
    }
    bad = PyObject_GetAttr(slice, name_bad);
    Py_XDECREF(bad);
    if (bad != Py_None)
        Py_CLEAR(slice);
    return slice;
}

/* Returns the file offset of a range if it is one run of data within one slice; 0 otherwise,
 * perhaps with an exception. */
static uint64_t file_offset(ReadView *self, uint64_t start, size_t length)
{
    uint64_t first = start >> self->cluster_bits;
    uint64_t last = (start + length - 1) >> self->cluster_bits;
    uint64_t mask = ((uint64_t)1 << self->slice_bits) - 1;
    uint64_t value = 0, next, at;
    PyObject *slice, *entries;
    Py_buffer view;

    if (first >> self->slice_bits != last >> self->slice_bits)
        return 0;
    slice = valid_slice(self, first >> self->slice_bits);
    entries = slice == NULL ? NULL : PyObject_GetAttr(slice, name_entries);
    if (entries != NULL && PyObject_GetBuffer(entries, &view, PyBUF_SIMPLE) == 0) {
        if ((uint64_t)view.len > (mask & last) * sizeof value) {
            value = ((uint64_t *)view.buf)[first & mask];
            for (at = first + 1, next = value; at <= last; at++) {
                next += (uint64_t)1 << self->cluster_bits;
                if (((uint64_t *)view.buf)[at & mask] != next)
                    value = 0;
            }
        }
        PyBuffer_Release(&view);
    }
    Py_XDECREF(entries);
    Py_XDECREF(slice);
    /* 0 is an unallocated cluster, and 1 a cluster of zeros. */
    return value <= 1 ? 0 : value + (start & (((uint64_t)1 << self->cluster_bits) - 1));
}

/* Answers a read and returns 1, if the policy allows an attempt and all of the data is in the page
 * cache.  Otherwise returns 0, perhaps with an exception. */
static int answer(ReadView *self, fuse_req_t request, uint64_t offset, size_t size)
{
    struct iovec vector = {buffer, size};
    PyObject *is_inline, *zero;
    long long misses;

    is_inline = PyObject_GetAttr(self->policy, name_is_inline);
    Py_XDECREF(is_inline);
    if (is_inline != Py_True)
        return 0;
    if (splice_reply(request, self->fd, (off_t)offset, size))
        return 1;
    if (preadv2(self->fd, &vector, 1, (off_t)offset, RWF_NOWAIT) != (ssize_t)size)
        return 0;
    misses = number_attribute(self->policy, name_misses);
    if (misses != 0) {
        zero = misses < 0 ? NULL : PyLong_FromLong(0);
        if (zero == NULL || PyObject_SetAttr(self->policy, name_misses, zero)) {
            Py_XDECREF(zero);
            return 0;
        }
        Py_DECREF(zero);
    }
    fuse_reply_buf(request, buffer, size);
    return 1;
}

int answer_cached_read(fuse_req_t request, uint64_t handle, off_t start, size_t size)
{
    PyObject *key, *found;
    ReadView *view;
    uint64_t offset;
    long long end;
    int answered = 0;

    if (views == NULL || size == 0 || size > MAX_READ_BYTES || start < 0)
        return 0;
    key = PyLong_FromUnsignedLongLong(handle & handle_mask);
    found = key == NULL ? NULL : PyDict_GetItemWithError(views, key);
    Py_XDECREF(key);
    if (found != NULL) {
        view = (ReadView *)Py_NewRef(found);
        end = disk_size(view);
        if (end >= 0 && (uint64_t)start + size <= (uint64_t)end) {
            offset = file_offset(view, (uint64_t)start, size);
            answered = offset != 0 && answer(view, request, offset, size);
        }
        Py_DECREF(view);
    }
    PyErr_Clear();
    return answered;
}

/* --- the type and the functions of the module ------------------------------------------ */

static void view_free(PyObject *object)
{
    ReadView *self = (ReadView *)object;
    PyTypeObject *type = Py_TYPE(object);

    Py_XDECREF(self->layer);
    Py_XDECREF(self->keys);
    Py_XDECREF(self->get_slice);
    Py_XDECREF(self->policy);
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
    name_header = PyUnicode_InternFromString("header");
    name_image_size = PyUnicode_InternFromString("image_size");
    name_bad = PyUnicode_InternFromString("bad");
    name_entries = PyUnicode_InternFromString("entries");
    name_is_inline = PyUnicode_InternFromString("is_inline");
    name_misses = PyUnicode_InternFromString("misses");
    view_type = (PyTypeObject *)PyType_FromSpec(&view_spec);
    if (name_header == NULL || name_image_size == NULL || name_bad == NULL ||
        name_entries == NULL || name_is_inline == NULL || name_misses == NULL ||
        view_type == NULL)
        return -1;
    return 0;
}

PyObject *read_view(PyObject *module, PyObject *args)
{
    PyObject *layer, *keys, *get_slice, *policy;
    unsigned int cluster_bits, slice_bits;
    ReadView *self;
    int fd;

    (void)module;
    if (!PyArg_ParseTuple(args, "OO!OOiII", &layer, &PyDict_Type, &keys, &get_slice, &policy, &fd,
                          &cluster_bits, &slice_bits))
        return NULL;
    self = PyObject_New(ReadView, view_type);
    if (self == NULL)
        return NULL;
    self->layer = Py_NewRef(layer);
    self->keys = Py_NewRef(keys);
    self->get_slice = Py_NewRef(get_slice);
    self->policy = Py_NewRef(policy);
    self->fd = fd;
    self->cluster_bits = cluster_bits;
    self->slice_bits = slice_bits;
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
