/*
 * The two FUSE requests that pyfuse3 does not implement: fallocate(2) and lseek(2).
 *
 * pyfuse3 passes libfuse a table of operations (struct fuse_lowlevel_ops) in which these two are
 * NULL.  This module is loaded with RTLD_GLOBAL before pyfuse3, and defines a function with the
 * name of libfuse's function that takes the table (symbol interposition).  This function copies the
 * table, sets the two operations, replaces others (_dataops.c), and calls libfuse's own function
 * with the copy.
 *
 * An operation passes a `Request` object (_request.c) to the handler that Python has set, unless the
 * extension answers an lseek itself (_seek.c).  The request may be answered before or after the
 * handler returns.
 */

#include "_extraops.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static PyObject *handler;  /* the Python function that gets the requests, or NULL */
static PyObject *may_seek; /* decides whether an lseek may be answered without the handler, or NULL */
static int in_session;     /* whether a session that this module made exists */

int intern_names(const struct interned_name *names, size_t count)
{
    for (size_t at = 0; at < count; at++) {
        *names[at].variable = PyUnicode_InternFromString(names[at].name);
        if (*names[at].variable == NULL)
            return -1;
    }
    return 0;
}

/* --- fallocate(2) and lseek(2) ------------------------------------------------------ */

/* Calls the handler; for lseek(2), `mode` is the argument whence, and `length` is 0. */
static void call_handler(fuse_req_t request, const char *operation, fuse_ino_t inode, int mode,
                      off_t start, off_t length)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *self = new_request(request, 0);
    PyObject *result = NULL;

    if (self == NULL)
        fuse_reply_err(request, ENOMEM);
    else if (handler == NULL)
        PyErr_SetString(PyExc_RuntimeError, "no handler is set");
    else
        result = PyObject_CallFunction(
            handler, "OsKiLL", self, operation, (unsigned long long)inode, mode, (long long)start,
            (long long)length);
    if (result == NULL)
        PyErr_WriteUnraisable(handler);
    Py_XDECREF(result);
    Py_XDECREF(self); /* sends EINTR if the handler has neither answered nor kept the object */
    take_more();
    PyGILState_Release(state);
}

static void on_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t start, off_t length,
                         struct fuse_file_info *info)
{
    (void)info;
    call_handler(request, "fallocate", inode, mode, start, length);
}

int is_seek_permitted(fuse_ino_t inode)
{
    PyObject *result = NULL;

    if (may_seek != NULL)
        result = PyObject_CallFunction(may_seek, "K", (unsigned long long)inode);

    PyErr_Clear(); /* the handler meets the same error, and reports it */
    Py_XDECREF(result);
    return result == Py_True;
}

static void on_lseek(fuse_req_t request, fuse_ino_t inode, off_t start, int whence,
                     struct fuse_file_info *info)
{
    PyGILState_STATE state = PyGILState_Ensure();
    int answered = answer_seek(request, inode, whence, start);

    (void)info;
    if (answered)
        take_more();
    else
        call_handler(request, "lseek", inode, whence, start, 0);
    PyGILState_Release(state);
}

/* --- interposed functions of libfuse ----------------------------------------------- */

void *libfuse_function(const char *name)
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
        /* dlsym() does not find functions that are kept only for programs built earlier. */
        found = dlvsym(library, name, "FUSE_3.0");
#endif
    dlclose(library); /* it stays loaded, because this module is linked to it */
    return found;
}

/* Returns a copy of pyfuse3's table with this module's operations; NULL if there is no memory.  The
 * copy may be larger than the original, so *size is set to its size. */
static struct fuse_lowlevel_ops *complete_table(const void *original, size_t *size)
{
    size_t min_size = sizeof(struct fuse_lowlevel_ops);
    struct fuse_lowlevel_ops *copy = calloc(1, *size > min_size ? *size : min_size);

    if (copy == NULL)
        return NULL;
    memcpy(copy, original, *size);
    if (*size < min_size)
        *size = min_size;
    /* If a later pyfuse3 implements one of the two operations, its own function stays. */
    if (copy->fallocate == NULL)
        copy->fallocate = on_fallocate;
    if (copy->lseek == NULL)
        copy->lseek = on_lseek;
    /* With write_buf, libfuse reads requests through a pipe (splice(2)).  That costs two more
     * system calls for each request and saves no copy, because pyfuse3 copies the data in any
     * case. */
    if (copy->write != NULL)
        copy->write_buf = NULL;
    replace_data_operations(copy);
    return copy;
}

/* Returns the arguments for a session with the table `copy`.  The option max_read is added only if
 * the table has the init of _dataops.c, because libfuse demands that init sets the same limit. */
static struct fuse_args *arguments_for(const struct fuse_lowlevel_ops *copy, void *given,
                                       struct fuse_args *changed)
{
    return has_own_init(copy) ? limited_arguments(given, changed) : given;
}

/* Frees the table, and records whether it has led to a session.  Returns the session, which may be
 * NULL. */
static void *session_made(void *session, struct fuse_lowlevel_ops *copy)
{
    free(copy); /* libfuse has copied the table */
    in_session = session != NULL;
    forget_requests();
    begin_bursts(session);
    return session;
}

/* The interposed functions have other names in C than in the library: libfuse's headers may define
 * fuse_session_new as a macro, and declare fuse_session_new_versioned in different ways. */
typedef void *(*make_plain)(void *, const void *, size_t, void *);
typedef void *(*make_versioned)(void *, const void *, size_t, const void *, void *);

/* Called by a pyfuse3 that was built for libfuse before 3.17. */
void *new_session(void *args, const void *table, size_t size, void *userdata)
    INTERPOSES("fuse_session_new");

void *new_session(void *args, const void *table, size_t size, void *userdata)
{
    make_plain make = (make_plain)libfuse_function("fuse_session_new");
    struct fuse_lowlevel_ops *copy = make == NULL ? NULL : complete_table(table, &size);
    struct fuse_args changed = FUSE_ARGS_INIT(0, NULL);
    void *session;

    if (copy == NULL)
        return NULL;
    session = make(arguments_for(copy, args, &changed), copy, size, userdata);
    fuse_opt_free_args(&changed);
    return session_made(session, copy);
}

/* Called by a pyfuse3 that was built for libfuse 3.17 or later. */
void *new_session_versioned(void *args, const void *table, size_t size, const void *version,
                            void *userdata) INTERPOSES("fuse_session_new_versioned");

void *new_session_versioned(void *args, const void *table, size_t size, const void *version,
                            void *userdata)
{
    make_versioned make = (make_versioned)libfuse_function("fuse_session_new_versioned");
    struct fuse_lowlevel_ops *copy = make == NULL ? NULL : complete_table(table, &size);
    struct fuse_args changed = FUSE_ARGS_INIT(0, NULL);
    void *session;

    if (copy == NULL)
        return NULL;
    session = make(arguments_for(copy, args, &changed), copy, size, version, userdata);
    fuse_opt_free_args(&changed);
    return session_made(session, copy);
}

/* --- the module -------------------------------------------------------------------- */

static PyObject *set_handler(PyObject *module, PyObject *args)
{
    PyObject *callable, *permits = Py_None;

    (void)module;
    if (!PyArg_ParseTuple(args, "O|O", &callable, &permits))
        return NULL;
    Py_XSETREF(handler, callable == Py_None ? NULL : Py_NewRef(callable));
    Py_XSETREF(may_seek, permits == Py_None ? NULL : Py_NewRef(permits));
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
    forget_requests();
    end_bursts();
    end_splicing();
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"set_handler", set_handler, METH_VARARGS,
     "Set the function that gets the requests, and the function that returns whether an lseek may be\n"
     "answered without it; None for none."},
    {"set_data_handlers", set_data_handlers, METH_VARARGS,
     "Set the functions that try to answer read, write and fsync; None for none."},
    {"defer_read", defer_read, METH_NOARGS,
     "Return a Request, which must answer the read that is being handled."},
    {"reply_from_file", reply_from_file, METH_VARARGS,
     "Answer the current read with cached pages of a file; return False if it was not answered."},
    {"read_view", read_view, METH_VARARGS,
     "Return a ReadView, by which the extension itself answers requests to a disk."},
    {"set_read_views", set_read_views, METH_VARARGS,
     "Set the ReadViews by inode number, and the mask that takes this number from a file handle."},
    {"set_counters", set_counters, METH_VARARGS,
     "Set the inode number of the first counted file, and the arrays of counts from this file on."},
    {"stop_blocking", stop_blocking, METH_NOARGS,
     "Make reads of the session's device non-blocking; return whether that was possible."},
    {"take_burst_count", take_burst_count, METH_NOARGS,
     "Return how many requests the extension itself has read since the last call."},
    {"permit_polling", permit_polling, METH_VARARGS,
     "Let bursts poll for requests.  The arguments are the maximum seconds for one request, the\n"
     "seconds after which the permission ends, and a function that returns whether a call on a\n"
     "host file has finished, which ends polling."},
    {"forbid_polling", forbid_polling, METH_NOARGS, "Let bursts poll no more."},
    {"take_polled_seconds", take_polled_seconds, METH_NOARGS,
     "Return how many seconds the last burst has polled in vain; 0.0 if that was returned before."},
    {"open_read_queue", open_read_queue, METH_VARARGS,
     "Make the queue of reads; return the eventfd that becomes readable when reads have ended.\n"
     "The first argument is called with each read that has failed: request, handle, offset, size.\n"
     "The second argument is a time in seconds.  If a submission takes longer, and the thread has\n"
     "slept in it, no read is queued for a second.  With 0 every submission has this effect."},
    {"close_read_queue", close_read_queue, METH_NOARGS, "Remove the queue, which must be empty."},
    {"end_queued_reads", py_end_queued_reads, METH_NOARGS,
     "Answer the queued reads that have ended."},
    {"queued_reads", queued_reads, METH_NOARGS, "Return how many reads are in the queue."},
    {"hooked", hooked, METH_NOARGS, "Return whether this module made the current session."},
    {"end", end, METH_NOARGS, "End the session: its unanswered requests get no answer any more."},
    {NULL, NULL, 0, NULL},
};

/* The same number as in extraops.py, and raised together with it (util/extensions.py). */
#define INTERFACE 2

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qedfuse.mount.fuse._extraops",
    .m_doc = "Requests that pyfuse3 lacks, or that need not pass through pyfuse3.",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__extraops(void)
{
    PyObject *module;

    if (init_requests() || init_read_views() || init_cached_reads() ||
        init_queued_reads() || init_in_place_writes())
        return NULL;
    module = PyModule_Create(&module_definition);
    if (module != NULL && PyModule_AddIntConstant(module, "INTERFACE", INTERFACE))
        Py_CLEAR(module);
    return module;
}
