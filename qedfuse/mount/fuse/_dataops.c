/*
 * Answers reads, writes and fsyncs that need not wait, without a coroutine of pyfuse3.
 *
 * For each request pyfuse3 makes a coroutine and, for a write, a copy of the data.  Most requests
 * need neither.  So this module replaces three operations in the copy of pyfuse3's table that
 * libfuse gets (_extraops.c), and init, in order to set up the connection.  Each of the three calls
 * a Python function that tries to answer the request.  If the function has not answered when it
 * returns or raises, pyfuse3's own operation gets the request.
 * A read whose tables and data are in memory is answered without the Python function
 * (_cachedread.c), and so is a write to allocated clusters (_inplacewrite.c).
 *
 * The function for reads can return the data, or call reply_from_file(): then the kernel takes the
 * data from the pages of the host's file (splice(2)), and copies the data once instead of twice.
 * Or it can call defer_read(), which returns a Request through which the read is answered later.  A
 * thread of the pool in hostio/_iothreads.c can use this Request without the GIL.
 *
 * libfuse calls the operations from within pyfuse3's event loop, with the GIL held.  So their calls
 * of PyGILState_Ensure() never wait.
 *
 * The functions that other files call are described in _extraops.h.
 */

#include "_extraops.h"

#include <errno.h>
#include <sys/uio.h>

typedef void (*read_operation)(fuse_req_t, fuse_ino_t, size_t, off_t, struct fuse_file_info *);
typedef void (*write_operation)(fuse_req_t, fuse_ino_t, const char *, size_t, off_t,
                                struct fuse_file_info *);
typedef void (*fsync_operation)(fuse_req_t, fuse_ino_t, int, struct fuse_file_info *);

typedef void (*init_operation)(void *, struct fuse_conn_info *);

/* HANDLE_DIRECT and HANDLE_WRITER (handles.py). */
#define CLEARED_IN_CACHED_WRITES (UINT64_C(1) << 62 | UINT64_C(1) << 61)

/* pyfuse3's own operations, which the table had before. */
static init_operation pyfuse3_init;
static read_operation pyfuse3_read;
static write_operation pyfuse3_write;
static fsync_operation pyfuse3_fsync;

/* The Python functions that try to answer; NULL while none is set. */
static PyObject *try_read;
static PyObject *try_write;
static PyObject *try_fsync;

/* The read for which try_read is being called; NULL if there is none, or if it is answered or
 * deferred. */
static fuse_req_t read_request;
static size_t read_size; /* in bytes */
static int was_deferred; /* whether defer_read() was called; Python then counts the read */

/* --- deferred reads ------------------------------------------------------------------ */

PyObject *defer_read(PyObject *module, PyObject *unused)
{
    PyObject *made;

    (void)module;
    (void)unused;
    if (read_request == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "no read is being handled");
        return NULL;
    }
    made = new_request(read_request, read_size);
    if (made != NULL) {
        read_request = NULL;
        was_deferred = 1;
    }
    return made;
}

/* --- replies from a file ------------------------------------------------------------- */

PyObject *reply_from_file(PyObject *module, PyObject *args)
{
    long long offset;
    int fd;

    (void)module;
    if (!PyArg_ParseTuple(args, "iL", &fd, &offset))
        return NULL;
    if (read_request == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "no read is being handled");
        return NULL;
    }
    if (!splice_reply(read_request, fd, RWF_NOWAIT, (off_t)offset, read_size))
        Py_RETURN_FALSE;
    read_request = NULL;
    Py_RETURN_TRUE;
}

/* Called by libfuse at the start of a session. */
static void on_init(void *data, struct fuse_conn_info *connection)
{
    pyfuse3_init(data, connection);
    limit_reads(connection);
    reserve_request_memory(connection->max_write);
    if (connection->capable & FUSE_CAP_SPLICE_WRITE) {
        connection->want |= FUSE_CAP_SPLICE_WRITE;
        begin_splicing();
    }
}

/* --- the operations ------------------------------------------------------------------ */

/* Calls function(handle, offset, size_or_data).  Returns the result; NULL, with no exception set,
 * if the function raises or cannot be called. */
static PyObject *call(PyObject *function, uint64_t handle, off_t offset, PyObject *size_or_data)
{
    PyObject *arguments[4] = {NULL, PyLong_FromUnsignedLongLong(handle),
                              PyLong_FromLongLong(offset), size_or_data};
    PyObject *result = NULL;

    if (arguments[1] != NULL && arguments[2] != NULL && size_or_data != NULL)
        result = PyObject_Vectorcall(function, arguments + 1,
                                     3 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    if (result == NULL)
        PyErr_Clear(); /* the traceback may refer to a view of the data, which must not be kept */
    Py_XDECREF(arguments[1]);
    Py_XDECREF(arguments[2]);
    return result;
}

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset,
                    struct fuse_file_info *info)
{
    PyGILState_STATE state = PyGILState_Ensure();
    int64_t start = sampled_start(inode, COUNT_READ);
    enum cached_read cached = answer_cached_read(request, inode, info->fh, offset, size);
    int answered = cached != PASSED_ON;
    int is_fast = cached == REPLIED;
    PyObject *size_object = answered || try_read == NULL ? NULL : PyLong_FromSize_t(size);
    PyObject *result = NULL;
    Py_buffer data;

    if (size_object != NULL) {
        read_request = request;
        read_size = size;
        was_deferred = 0;
        result = call(try_read, info->fh, offset, size_object);
        /* A deferred read counts as answered, even after an exception, because the Request will
         * answer it. */
        answered = read_request == NULL;
        is_fast = answered && !was_deferred;
        read_request = NULL;
    }
    if (!answered && result != NULL && result != Py_None) {
        if (PyObject_GetBuffer(result, &data, PyBUF_SIMPLE) == 0) {
            fuse_reply_buf(request, data.buf, (size_t)data.len);
            PyBuffer_Release(&data);
            answered = is_fast = 1;
        } else {
            PyErr_Clear();
        }
    }
    Py_XDECREF(size_object);
    Py_XDECREF(result);
    if (is_fast)
        count_fast(inode, COUNT_READ, size, start);
    else
        forget_valid_pages();
    if (answered)
        take_more();
    else
        pyfuse3_read(request, inode, size, offset, info);
    PyGILState_Release(state);
}

static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size,
                     off_t offset, struct fuse_file_info *info)
{
    PyGILState_STATE state = PyGILState_Ensure();
    int64_t start = sampled_start(inode, COUNT_WRITE);
    PyObject *view = NULL, *result = NULL;
    int answered = write_in_place(info->fh, data, size, offset);

    /* The function must not keep the view, because libfuse reuses the memory. */
    if (!answered && try_write != NULL)
        view = PyMemoryView_FromMemory((char *)data, (Py_ssize_t)size, PyBUF_READ);
    if (view != NULL)
        result = call(try_write, info->fh, offset, view);
    answered |= result == Py_True;
    Py_XDECREF(result);
    Py_XDECREF(view);
    if (answered) {
        fuse_reply_write(request, size);
        count_fast(inode, COUNT_WRITE, size, start);
        take_more();
    } else {
        /* libfuse sets `writepage` for a write from the kernel's cache (FUSE_WRITE_CACHE); see
         * handles.py. */
        forget_valid_pages();
        if (info->writepage)
            info->fh &= ~CLEARED_IN_CACHED_WRITES;
        pyfuse3_write(request, inode, data, size, offset, info);
    }
    PyGILState_Release(state);
}

static void on_fsync(fuse_req_t request, fuse_ino_t inode, int datasync,
                     struct fuse_file_info *info)
{
    PyGILState_STATE state = PyGILState_Ensure();
    int64_t start = sampled_start(inode, COUNT_FLUSH);
    PyObject *handle = try_fsync == NULL ? NULL : PyLong_FromUnsignedLongLong(info->fh);
    PyObject *result = handle == NULL ? NULL : PyObject_CallOneArg(try_fsync, handle);
    int answered = result == Py_True;

    if (result == NULL)
        PyErr_Clear();
    Py_XDECREF(handle);
    Py_XDECREF(result);
    if (answered) {
        fuse_reply_err(request, 0);
        count_fast(inode, COUNT_FLUSH, 0, start);
        take_more();
    } else {
        pyfuse3_fsync(request, inode, datasync, info);
    }
    PyGILState_Release(state);
}

void replace_data_operations(struct fuse_lowlevel_ops *table)
{
    if (table->read == NULL || table->write == NULL || table->fsync == NULL)
        return;
    /* From 3.17 on, libfuse's fuse_session_new calls fuse_session_new_versioned.  _extraops.c
     * replaces both, so the table may come a second time, with this module's operations. */
    if (table->read == on_read)
        return;
    end_splicing();
    if (table->init != NULL) {
        pyfuse3_init = table->init;
        table->init = on_init;
    }
    pyfuse3_read = table->read;
    pyfuse3_write = table->write;
    pyfuse3_fsync = table->fsync;
    table->read = on_read;
    table->write = on_write;
    table->fsync = on_fsync;
}

int has_own_init(const struct fuse_lowlevel_ops *table)
{
    return table->init == on_init;
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
