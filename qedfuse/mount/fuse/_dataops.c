/*
 * Reads, writes and fsyncs that need not wait, answered without a coroutine of pyfuse3.
 *
 * For each request pyfuse3 makes a coroutine and, for a write, a copy of the data.  Most
 * requests need neither.  So this module replaces the three operations in the copy of pyfuse3's
 * table (_extraops.c): it calls a Python function that tries to answer, and passes the request
 * to pyfuse3's own operation if the function does not answer it.
 *
 * libfuse calls the operations from within pyfuse3's event loop, with the GIL held.  A function
 * that raises has not answered: pyfuse3's operation gets the request, and its handler meets the
 * same error and reports it.
 */

#include "_extraops.h"

typedef void (*read_operation)(fuse_req_t, fuse_ino_t, size_t, off_t, struct fuse_file_info *);
typedef void (*write_operation)(fuse_req_t, fuse_ino_t, const char *, size_t, off_t,
                                struct fuse_file_info *);
typedef void (*fsync_operation)(fuse_req_t, fuse_ino_t, int, struct fuse_file_info *);

/* pyfuse3's own operations. */
static read_operation pyfuse3_read;
static write_operation pyfuse3_write;
static fsync_operation pyfuse3_fsync;

/* The Python functions that try to answer, or NULL. */
static PyObject *try_read;
static PyObject *try_write;
static PyObject *try_fsync;

/* Calls function(handle, offset, last).  Returns NULL, with no exception set, if it raises. */
static PyObject *call(PyObject *function, uint64_t handle, off_t offset, PyObject *last)
{
    PyObject *arguments[4] = {NULL, PyLong_FromUnsignedLongLong(handle),
                              PyLong_FromLongLong(offset), last};
    PyObject *result = NULL;

    if (arguments[1] != NULL && arguments[2] != NULL && last != NULL)
        result = PyObject_Vectorcall(function, arguments + 1,
                                     3 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    if (result == NULL)
        PyErr_Clear();
    Py_XDECREF(arguments[1]);
    Py_XDECREF(arguments[2]);
    return result;
}

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset,
                    struct fuse_file_info *info)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *last = try_read == NULL ? NULL : PyLong_FromSize_t(size);
    PyObject *result = last == NULL ? NULL : call(try_read, info->fh, offset, last);
    Py_buffer data;
    int answered = 0;

    if (result != NULL && result != Py_None) {
        if (PyObject_GetBuffer(result, &data, PyBUF_SIMPLE) == 0) {
            fuse_reply_buf(request, data.buf, (size_t)data.len);
            PyBuffer_Release(&data);
            answered = 1;
        } else {
            PyErr_Clear();
        }
    }
    Py_XDECREF(last);
    Py_XDECREF(result);
    if (!answered)
        pyfuse3_read(request, inode, size, offset, info);
    PyGILState_Release(state);
}

static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size,
                     off_t offset, struct fuse_file_info *info)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *view = NULL, *result = NULL;
    int answered;

    /* The function must not keep the view, because libfuse reuses the memory. */
    if (try_write != NULL)
        view = PyMemoryView_FromMemory((char *)data, (Py_ssize_t)size, PyBUF_READ);
    if (view != NULL)
        result = call(try_write, info->fh, offset, view);
    answered = result == Py_True;
    Py_XDECREF(result);
    Py_XDECREF(view);
    if (answered)
        fuse_reply_write(request, size);
    else
        pyfuse3_write(request, inode, data, size, offset, info);
    PyGILState_Release(state);
}

static void on_fsync(fuse_req_t request, fuse_ino_t inode, int datasync,
                     struct fuse_file_info *info)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *handle = try_fsync == NULL ? NULL : PyLong_FromUnsignedLongLong(info->fh);
    PyObject *result = handle == NULL ? NULL : PyObject_CallOneArg(try_fsync, handle);
    int answered = result == Py_True;

    if (result == NULL)
        PyErr_Clear();
    Py_XDECREF(handle);
    Py_XDECREF(result);
    if (answered)
        fuse_reply_err(request, 0);
    else
        pyfuse3_fsync(request, inode, datasync, info);
    PyGILState_Release(state);
}

void replace_data_operations(struct fuse_lowlevel_ops *table)
{
    if (table->read == NULL || table->write == NULL || table->fsync == NULL)
        return;
    pyfuse3_read = table->read;
    pyfuse3_write = table->write;
    pyfuse3_fsync = table->fsync;
    table->read = on_read;
    table->write = on_write;
    table->fsync = on_fsync;
}

PyObject *set_data_handlers(PyObject *module, PyObject *args)
{
    PyObject *read, *write, *fsync;

    (void)module;
    if (!PyArg_ParseTuple(args, "OOO", &read, &write, &fsync))
        return NULL;
    Py_XSETREF(try_read, read == Py_None ? NULL : Py_NewRef(read));
    Py_XSETREF(try_write, write == Py_None ? NULL : Py_NewRef(write));
    Py_XSETREF(try_fsync, fsync == Py_None ? NULL : Py_NewRef(fsync));
    Py_RETURN_NONE;
}
