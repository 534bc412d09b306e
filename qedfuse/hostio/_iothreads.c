/*
 * A pool of threads that make system calls on files without Python's global lock (the GIL).
 *
 * This file is the Python class IoThreads.  _iopool.c has the threads, and _iocalls.c the system
 * calls.
 *
 * Answers.  A read can have an answer: a function that the thread itself calls after the read.  The
 * argument `answer` of submit_read is a capsule named "qedfuse.answer", which points to a
 *
 *     struct answer {
 *         void (*call)(struct answer *self, const void *data, long long result);
 *     };
 *
 * The owner of the capsule embeds this struct in a larger one.  The thread first puts the read on
 * the list of finished calls, and then calls answer->call, without the GIL and with a stack of
 * 128 KiB.  So the read is on the list before anything that the answer causes can happen.  `data`
 * is the buffer of the read.  `result` is the number of bytes in it, or a negative errno.  Until
 * answer->call has returned, the capsule and the buffer stay valid, and the read counts as pending.
 * answer->call must not wait for the event loop.  A task of the event loop may be waiting for a queued
 * call, and if no other thread is left or can be created, only this thread can make that call.
 *
 * answer->call may run even after the IoThreads object was freed.  If it uses memory besides the
 * capsule and the buffer, that memory may be freed only after pending() has returned 0, or under a
 * lock that keeps answer->call from running (as in _request.c).
 */

#include "_iopool.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>

#include "_iothreads.h"

#define MAX_THREADS 1024     /* maximum of the argument max_threads */
#define MAX_IDLE_SECONDS 1e6 /* maximum of the argument idle_seconds */

/* How many forks lie between the process that loaded this module and this process. */
static unsigned long forks;

static void count_fork(void)
{
    forks++;
}

typedef struct {
    PyObject_HEAD
    struct pool *pool;
    unsigned long forks; /* value of the global variable `forks` when the object was made */
} IoThreads;

/* Release what a job holds, and free it.  This may run any Python code. */
static void release(struct job *job)
{
    for (Py_ssize_t index = 0; index < job->buffer_count; index++)
        PyBuffer_Release(&job->buffers[index]);
    Py_XDECREF(job->capsule);
    Py_XDECREF(job->tag);
    PyMem_RawFree(job);
}

static void release_all(struct list jobs)
{
    struct job *job;

    while ((job = take_first(&jobs)) != NULL)
        release(job);
}

/* Return the pool of an object; NULL with an exception after a fork, which copies no threads. */
static struct pool *pool_of(PyObject *self)
{
    IoThreads *object = (IoThreads *)self;

    if (object->forks == forks)
        return object->pool;
    PyErr_SetString(PyExc_RuntimeError, "the threads belong to the process before the fork");
    return NULL;
}

/* Make a job with space for `buffer_count` buffers; NULL with an exception on failure. */
static struct job *new_job(enum kind kind, Py_ssize_t buffer_count, PyObject *tag)
{
    size_t each = sizeof(Py_buffer) + sizeof(struct iovec);
    struct job *job = PyMem_RawCalloc(1, sizeof *job + (size_t)buffer_count * each);

    if (job == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    job->kind = kind;
    job->parts = (struct iovec *)&job->buffers[buffer_count];
    job->tag = Py_NewRef(tag);
    job->is_answered = 1;
    return job;
}

/* Let a job hold one more buffer; return 0, or -1 with an exception. */
static int hold_buffer(struct job *job, PyObject *object, int flags)
{
    Py_buffer *buffer = &job->buffers[job->buffer_count];

    if (PyObject_GetBuffer(object, buffer, flags))
        return -1;
    job->buffer_count++;
    job->parts[job->part_count].iov_base = buffer->buf;
    job->parts[job->part_count].iov_len = (size_t)buffer->len;
    job->part_count++;
    return 0;
}

/* Queue a job and return None.  On failure release the job, and return NULL with an exception. */
static PyObject *submit(struct pool *pool, struct job *job)
{
    struct list garbage;
    int failed = pool_queue(pool, job, &garbage);

    release_all(garbage);
    if (!failed)
        Py_RETURN_NONE;
    release(job);
    errno = failed;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* Convert an argument to an int64_t; return 0, or -1 with an exception. */
static int as_int64(PyObject *argument, int64_t *value)
{
    *value = PyLong_AsLongLong(argument);
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

/* Convert an argument to an int; return 0, or -1 with an exception. */
static int as_int(PyObject *argument, int *value)
{
    int64_t number;

    if (as_int64(argument, &number))
        return -1;
    if (number < INT_MIN || number > INT_MAX) {
        PyErr_SetString(PyExc_OverflowError, "the number does not fit into a C int");
        return -1;
    }
    *value = (int)number;
    return 0;
}

/* Check the number of positional arguments; return 0, or -1 with an exception. */
static int check_count(const char *name, Py_ssize_t found, Py_ssize_t expected)
{
    if (found == expected)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, found %zd", name, expected, found);
    return -1;
}

/* Queue a job of kind READ or READ_EXPORT; both kinds have the same arguments. */
static PyObject *submit_read_of(enum kind kind, const char *name, PyObject *self,
                                PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    struct pool *pool = pool_of(self);
    Py_ssize_t named = names == NULL ? 0 : PyTuple_GET_SIZE(names);
    PyObject *capsule = Py_None;
    int64_t offset;
    struct job *job;
    int fd;

    if (pool == NULL)
        return NULL;
    if (count + named == 5) {
        capsule = args[4];
        if (named > 1 ||
            (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "answer"))) {
            PyErr_Format(PyExc_TypeError, "%s: only answer can be passed by name", name);
            return NULL;
        }
    } else if (check_count(name, count + named, 4)) {
        return NULL;
    } else if (named) {
        PyErr_Format(PyExc_TypeError, "%s: fd, offset, view and tag cannot be passed by name",
                     name);
        return NULL;
    }
    if (as_int(args[0], &fd) || as_int64(args[1], &offset))
        return NULL;
    job = new_job(kind, 1, args[3]);
    if (job == NULL)
        return NULL;
    job->fd = fd;
    job->offset = offset;
    if (hold_buffer(job, args[2], PyBUF_WRITABLE)) {
        release(job);
        return NULL;
    }
    if (capsule != Py_None) {
        job->answer = PyCapsule_GetPointer(capsule, "qedfuse.answer");
        if (job->answer == NULL) {
            release(job);
            return NULL;
        }
        job->capsule = Py_NewRef(capsule);
        job->is_answered = 0;
    }
    return submit(pool, job);
}

static PyObject *submit_read(PyObject *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *names)
{
    return submit_read_of(READ, "submit_read", self, args, count, names);
}

static PyObject *submit_export_read(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                    PyObject *names)
{
    return submit_read_of(READ_EXPORT, "submit_export_read", self, args, count, names);
}

static PyObject *submit_write(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct pool *pool = pool_of(self);
    Py_ssize_t part_count;
    int64_t offset;
    struct job *job;
    int fd;

    if (pool == NULL || check_count("submit_write", count, 4) || as_int(args[0], &fd) ||
        as_int64(args[1], &offset))
        return NULL;
    if (!PyTuple_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "submit_write: expected a tuple of buffers");
        return NULL;
    }
    part_count = PyTuple_GET_SIZE(args[2]);
    job = new_job(WRITE, part_count, args[3]);
    if (job == NULL)
        return NULL;
    job->fd = fd;
    job->offset = offset;
    for (Py_ssize_t index = 0; index < part_count; index++) {
        if (hold_buffer(job, PyTuple_GET_ITEM(args[2], index), PyBUF_SIMPLE)) {
            release(job);
            return NULL;
        }
    }
    return submit(pool, job);
}

static PyObject *submit_datasync(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct pool *pool = pool_of(self);
    struct job *job;
    int fd;

    if (pool == NULL || check_count("submit_datasync", count, 2) || as_int(args[0], &fd))
        return NULL;
    job = new_job(DATASYNC, 0, args[1]);
    if (job == NULL)
        return NULL;
    job->fd = fd;
    return submit(pool, job);
}

static PyObject *submit_truncate(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct pool *pool = pool_of(self);
    struct job *job;
    int64_t size;
    int fd;

    if (pool == NULL || check_count("submit_truncate", count, 3) || as_int(args[0], &fd) ||
        as_int64(args[1], &size))
        return NULL;
    job = new_job(TRUNCATE, 0, args[2]);
    if (job == NULL)
        return NULL;
    job->fd = fd;
    job->offset = size;
    return submit(pool, job);
}

static PyObject *submit_fallocate(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct pool *pool = pool_of(self);
    int64_t offset, length;
    struct job *job;
    int fd, mode;

    if (pool == NULL || check_count("submit_fallocate", count, 5) || as_int(args[0], &fd) ||
        as_int(args[1], &mode) || as_int64(args[2], &offset) || as_int64(args[3], &length))
        return NULL;
    job = new_job(FALLOCATE, 0, args[4]);
    if (job == NULL)
        return NULL;
    job->fd = fd;
    job->mode = mode;
    job->offset = offset;
    job->length = length;
    return submit(pool, job);
}

static PyObject *get_fileno(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(pool_eventfd(((IoThreads *)self)->pool));
}

static PyObject *get_pending(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(pool_pending(((IoThreads *)self)->pool));
}

static PyObject *has_finished(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(pool_has_finished(((IoThreads *)self)->pool));
}

static PyObject *get_threads(PyObject *self, PyObject *unused)
{
    struct pool *pool = pool_of(self);

    (void)unused;
    return pool == NULL ? NULL : PyLong_FromLong(pool_threads(pool));
}

/* Return a list with (tag, result, nanoseconds) for each job; NULL with an exception. */
static PyObject *reports(struct list jobs)
{
    PyObject *list = PyList_New(jobs.length);
    Py_ssize_t index = 0;

    if (list == NULL)
        return NULL;
    for (struct job *job = jobs.first; job != NULL; job = job->next) {
        PyObject *report = Py_BuildValue("OLL", job->tag, (long long)job->result,
                                         (long long)job->nanoseconds);
        if (report == NULL) {
            Py_DECREF(list);
            return NULL;
        }
        PyList_SET_ITEM(list, index++, report);
    }
    return list;
}

static PyObject *collect_finished(PyObject *self, PyObject *unused)
{
    struct pool *pool = pool_of(self);
    struct list jobs, garbage;
    PyObject *list;

    (void)unused;
    if (pool == NULL)
        return NULL;
    jobs = pool_take_finished(pool, &garbage);
    release_all(garbage);
    list = reports(jobs);
    if (list == NULL)
        pool_put_back(pool, jobs);
    else
        release_all(pool_set_collected(pool, jobs));
    return list;
}

static PyObject *new_object(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"max_threads", "idle_seconds", NULL};
    double idle_seconds = 5;
    struct pool *pool;
    IoThreads *self;
    int max_threads;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "i|d", names, &max_threads, &idle_seconds))
        return NULL;
    if (max_threads < 1 || max_threads > MAX_THREADS) {
        PyErr_Format(PyExc_ValueError, "max_threads: expected 1 to %d, found %d", MAX_THREADS,
                     max_threads);
        return NULL;
    }
    if (!(idle_seconds >= 0 && idle_seconds <= MAX_IDLE_SECONDS)) {
        PyErr_SetString(PyExc_ValueError, "idle_seconds: expected 0 to 1000000");
        return NULL;
    }
    pool = pool_new(max_threads, idle_seconds);
    if (pool == NULL)
        return errno == ENOMEM ? PyErr_NoMemory() : PyErr_SetFromErrno(PyExc_OSError);
    self = (IoThreads *)type->tp_alloc(type, 0);
    if (self == NULL) {
        pool_close(pool);
        return NULL;
    }
    self->pool = pool;
    self->forks = forks;
    return (PyObject *)self;
}

static void free_object(PyObject *object)
{
    IoThreads *self = (IoThreads *)object;
    PyTypeObject *type = Py_TYPE(object);

    /* Leave the pool alone in a forked process, because a thread that does not exist in this
     * process may have locked the mutex at the fork. */
    if (self->forks == forks)
        release_all(pool_close(self->pool));
    type->tp_free(object);
    Py_DECREF(type);
}

#define FAST(function) (PyCFunction)(void (*)(void))function

static PyMethodDef methods[] = {
    {"fileno", get_fileno, METH_NOARGS,
     "Return the eventfd, which becomes readable when finished calls can be collected."},
    {"submit_read", FAST(submit_read), METH_FASTCALL | METH_KEYWORDS,
     "submit_read(fd, offset, view, tag, /, answer=None)\n"
     "Fill a buffer from a file offset, or from the position of the descriptor if the offset is\n"
     "-1.  The result is the number of bytes.  It is less than the length of the buffer only at\n"
     "the end of the file."},
    {"submit_export_read", FAST(submit_export_read), METH_FASTCALL | METH_KEYWORDS,
     "submit_export_read(fd, offset, view, tag, /, answer=None)\n"
     "Fill a buffer from an offset of an NBD export, by one request on a connection with simple\n"
     "replies that no other thread uses.  The result is the length of the buffer."},
    {"submit_write", FAST(submit_write), METH_FASTCALL,
     "submit_write(fd, offset, parts, tag, /)\n"
     "Write a tuple of buffers from a file offset on; the result is the number of bytes."},
    {"submit_datasync", FAST(submit_datasync), METH_FASTCALL,
     "submit_datasync(fd, tag, /)\nCall fdatasync(2); the result is 0."},
    {"submit_truncate", FAST(submit_truncate), METH_FASTCALL,
     "submit_truncate(fd, size, tag, /)\nCall ftruncate(2); the result is 0."},
    {"submit_fallocate", FAST(submit_fallocate), METH_FASTCALL,
     "submit_fallocate(fd, mode, offset, length, tag, /)\nCall fallocate(2); the result is 0."},
    {"pending", get_pending, METH_NOARGS,
     "Return how many calls have not been collected, or are still being answered."},
    {"has_finished", has_finished, METH_NOARGS,
     "Return whether there are finished calls that have not been collected."},
    {"collect_finished", collect_finished, METH_NOARGS,
     "Collect the finished calls; return a list of (tag, result or -errno, nanoseconds)."},
    {"threads", get_threads, METH_NOARGS, "Return how many threads the pool has now."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, new_object},
    {Py_tp_dealloc, free_object},
    {Py_tp_methods, methods},
    {Py_tp_doc, "IoThreads(max_threads, idle_seconds=5.0)\n--\n\n"
                "Threads that make system calls on files without the GIL."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "qedfuse.hostio._iothreads.IoThreads",
    .basicsize = sizeof(IoThreads),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

/* The same number as in nativecalls.py, and raised together with it (util/extensions.py). */
#define INTERFACE 1

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qedfuse.hostio._iothreads",
    .m_doc = "Threads that make system calls on files without the GIL.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__iothreads(void)
{
    static int counts_forks;
    PyObject *type, *module;

    if (!counts_forks) {
        int failed = pthread_atfork(NULL, NULL, count_fork);
        if (failed) {
            errno = failed;
            return PyErr_SetFromErrno(PyExc_OSError);
        }
        counts_forks = 1;
    }
    module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    type = PyType_FromSpec(&spec);
    if (type == NULL || PyModule_AddObjectRef(module, "IoThreads", type) ||
        PyModule_AddIntConstant(module, "INTERFACE", INTERFACE)) {
        Py_XDECREF(type);
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(type);
    return module;
}