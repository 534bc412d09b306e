/*
 * The two FUSE requests that pyfuse3 does not know: fallocate(2) and lseek(2).
 *
 * pyfuse3 hands libfuse a table of operations in which these two are empty.  This module
 * is loaded with RTLD_GLOBAL before pyfuse3 is, and defines the function by which that
 * table is handed over.  So the call comes here first: the table is copied, the two empty
 * places are filled, and libfuse's own function is called with the copy.  Only libfuse's
 * public interface is used, nothing of pyfuse3's.
 *
 * libfuse calls the two operations from within pyfuse3's event loop, with the GIL held.
 * They make a `Request` of the call, hand it to the handler that Python has set, and
 * return; the request is answered later.  A request is answered exactly once: one that is
 * let go without an answer answers itself, so that the kernel never waits in vain.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 312
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdlib.h>
#include <string.h>

static PyObject *handler;        /* what Python has set, or NULL */
static int in_session;           /* whether there is a session, made by way of us */
static unsigned long generation; /* of the session; requests of an old one are void */

/* --- one request ------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    fuse_req_t request; /* NULL once it has been answered */
    unsigned long generation;
} Request;

static fuse_req_t take(Request *self)
{
    fuse_req_t request = self->request;

    self->request = NULL;
    /* The end of a session frees its requests. */
    return self->generation == generation ? request : NULL;
}

static PyObject *request_error(PyObject *self, PyObject *number)
{
    long value = PyLong_AsLong(number);
    fuse_req_t request;

    if (value == -1 && PyErr_Occurred())
        return NULL;
    request = take((Request *)self);
    if (request != NULL)
        fuse_reply_err(request, (int)value);
    Py_RETURN_NONE;
}

static PyObject *request_offset(PyObject *self, PyObject *offset)
{
    long long value = PyLong_AsLongLong(offset);
    fuse_req_t request;

    if (value == -1 && PyErr_Occurred())
        return NULL;
    request = take((Request *)self);
    if (request != NULL)
        fuse_reply_lseek(request, (off_t)value);
    Py_RETURN_NONE;
}

static void request_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    fuse_req_t request = take((Request *)self);

    if (request != NULL)
        fuse_reply_err(request, EINTR);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef request_methods[] = {
    {"error", request_error, METH_O, "Answer with an error number; 0 is success."},
    {"offset", request_offset, METH_O, "Answer lseek(2) with an offset."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot request_slots[] = {
    {Py_tp_dealloc, request_free},
    {Py_tp_methods, request_methods},
    {Py_tp_doc, "A request of the kernel, to be answered once."},
    {0, NULL},
};

static PyType_Spec request_spec = {
    .name = "qedfuse.mount.fuse._extraops.Request",
    .basicsize = sizeof(Request),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = request_slots,
};

static PyTypeObject *request_type;

/* Hands a request to Python: handler(request, operation, uid, inode, mode, start, length). */
static void hand_over(fuse_req_t request, const char *operation, fuse_ino_t inode, int mode,
                      off_t start, off_t length)
{
    PyGILState_STATE state = PyGILState_Ensure();
    Request *self = PyObject_New(Request, request_type);
    PyObject *answer = NULL;

    if (self == NULL) {
        fuse_reply_err(request, ENOMEM);
    } else {
        self->request = request;
        self->generation = generation;
        if (handler == NULL)
            PyErr_SetString(PyExc_RuntimeError, "no handler is set");
        else
            answer = PyObject_CallFunction(
                handler, "OsIKiLL", self, operation, (unsigned int)fuse_req_ctx(request)->uid,
                (unsigned long long)inode, mode, (long long)start, (long long)length);
    }
    if (answer == NULL)
        PyErr_WriteUnraisable(handler);
    Py_XDECREF(answer);
    Py_XDECREF(self); /* if the handler has not kept it, it answers itself now */
    PyGILState_Release(state);
}

static void on_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t start, off_t length,
                         struct fuse_file_info *info)
{
    (void)info;
    hand_over(request, "fallocate", inode, mode, start, length);
}

static void on_lseek(fuse_req_t request, fuse_ino_t inode, off_t start, int whence,
                     struct fuse_file_info *info)
{
    (void)info;
    hand_over(request, "lseek", inode, whence, start, 0);
}

/* --- the way in -------------------------------------------------------------------- */

/* Finds a function of libfuse itself, where our own of the same name would be found first. */
static void *in_libfuse(const char *name)
{
    Dl_info info;
    void *library, *found;

    if (!dladdr((void *)fuse_reply_err, &info))
        return NULL;
    library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    if (library == NULL)
        return NULL;
    found = dlsym(library, name);
#ifdef __GLIBC__
    if (found == NULL)
        found = dlvsym(library, name, "FUSE_3.0"); /* kept for old programs only */
#endif
    dlclose(library); /* it stays loaded: we are linked to it */
    return found;
}

/*
 * Copies the table that pyfuse3 made, and fills in what is empty.  Either side may have been
 * built for a newer libfuse, and know more operations than the other.
 */
static struct fuse_lowlevel_ops *fill_in(const void *theirs, size_t *size)
{
    size_t least = sizeof(struct fuse_lowlevel_ops);
    struct fuse_lowlevel_ops *ours = calloc(1, *size > least ? *size : least);

    if (ours == NULL)
        return NULL;
    memcpy(ours, theirs, *size);
    if (*size < least)
        *size = least;
    /* Should pyfuse3 learn them one day, its own handlers count. */
    if (ours->fallocate == NULL)
        ours->fallocate = on_fallocate;
    if (ours->lseek == NULL)
        ours->lseek = on_lseek;
    /*
     * With this one libfuse takes requests from the kernel by way of a pipe, which costs two
     * more system calls for each, and saves no copy: pyfuse3 makes bytes of the data anyway.
     */
    if (ours->write != NULL)
        ours->write_buf = NULL;
    return ours;
}

static void *begin(void *session, struct fuse_lowlevel_ops *ours)
{
    free(ours); /* libfuse has made a copy */
    in_session = session != NULL;
    generation++;
    return session;
}

/*
 * The two functions that we stand in for have names of their own here, because libfuse's
 * headers declare the second one in more than one way, and the first may be a macro.
 */
#define STANDS_IN_FOR(name) __asm__(name) __attribute__((visibility("default")))

typedef void *(*make_plain)(void *, const void *, size_t, void *);
typedef void *(*make_versioned)(void *, const void *, size_t, const void *, void *);

/* What a pyfuse3 calls that was built for libfuse before 3.17. */
void *new_session(void *args, const void *table, size_t size, void *userdata)
    STANDS_IN_FOR("fuse_session_new");

void *new_session(void *args, const void *table, size_t size, void *userdata)
{
    make_plain make = (make_plain)in_libfuse("fuse_session_new");
    struct fuse_lowlevel_ops *ours = make == NULL ? NULL : fill_in(table, &size);

    return ours == NULL ? NULL : begin(make(args, ours, size, userdata), ours);
}

/* The same since libfuse 3.17. */
void *new_session_versioned(void *args, const void *table, size_t size, const void *version,
                            void *userdata) STANDS_IN_FOR("fuse_session_new_versioned");

void *new_session_versioned(void *args, const void *table, size_t size, const void *version,
                            void *userdata)
{
    make_versioned make = (make_versioned)in_libfuse("fuse_session_new_versioned");
    struct fuse_lowlevel_ops *ours = make == NULL ? NULL : fill_in(table, &size);

    return ours == NULL ? NULL : begin(make(args, ours, size, version, userdata), ours);
}

/* --- the module -------------------------------------------------------------------- */

static PyObject *set_handler(PyObject *module, PyObject *callable)
{
    (void)module;
    Py_XSETREF(handler, callable == Py_None ? NULL : Py_NewRef(callable));
    Py_RETURN_NONE;
}

static PyObject *hooked(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyBool_FromLong(in_session);
}

static PyObject *end(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    in_session = 0;
    generation++;
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"set_handler", set_handler, METH_O, "Set who gets the requests, or None."},
    {"hooked", hooked, METH_NOARGS, "Tell whether libfuse's session was made by way of us."},
    {"end", end, METH_NOARGS, "Forget the session: requests that are left are void."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qedfuse.mount.fuse._extraops",
    .m_doc = "fallocate(2) and lseek(2) for a file system on pyfuse3.",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__extraops(void)
{
    request_type = (PyTypeObject *)PyType_FromSpec(&request_spec);
    if (request_type == NULL)
        return NULL;
    return PyModule_Create(&module_definition);
}
