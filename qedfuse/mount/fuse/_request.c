/*
 * Request objects: requests of the kernel, which may be answered after libfuse's callback returned.
 *
 * While the session exists, each request is answered exactly once: if a Request is freed without an
 * answer, EINTR is sent.  After the end of the session no answer is sent, because libfuse frees the
 * requests with their session.
 */

#include "_extraops.h"

#include <errno.h>
#include <pthread.h>
#include <stddef.h>

#include "../../hostio/_iothreads.h"

static unsigned long generation; /* incremented when a session begins and when it ends */

/* Held for reading while a thread without the GIL answers, for writing to change `generation`. */
static pthread_rwlock_t session_lock = PTHREAD_RWLOCK_INITIALIZER;

void forget_requests(void)
{
    pthread_rwlock_wrlock(&session_lock);
    generation++;
    pthread_rwlock_unlock(&session_lock);
}

unsigned long current_session(void)
{
    return generation;
}

/*
 * Normally the event loop answers a request.  But it can let a thread without the GIL read the data
 * (hostio/_iothreads.c); the thread gets a capsule with `answer`.  If it has read all bytes, the
 * thread answers; otherwise the event loop must answer.  Both know the result of the read, so they
 * never use `request` concurrently.
 */
typedef struct {
    PyObject_HEAD
    struct answer answer; /* for the thread */
    fuse_req_t request;   /* NULL once it has been answered */
    unsigned long generation; /* of the session from which the request came */
    size_t size;          /* bytes of a read; 0 for other requests */
} Request;

static PyTypeObject *request_type;

/* Called by the thread that has read the data, without the GIL. */
static void complete_read(struct answer *answer, const void *data, long long result)
{
    Request *self = (Request *)((char *)answer - offsetof(Request, answer));

    if (result < 0 || (size_t)result != self->size)
        return;
    pthread_rwlock_rdlock(&session_lock);
    if (self->generation == generation)
        fuse_reply_buf(self->request, data, self->size);
    pthread_rwlock_unlock(&session_lock);
    self->request = NULL;
}

PyObject *new_request(fuse_req_t request, size_t size)
{
    Request *self = PyObject_New(Request, request_type);

    if (self == NULL)
        return NULL;
    self->answer.call = complete_read;
    self->request = request;
    self->generation = generation;
    self->size = size;
    return (PyObject *)self;
}

/* Returns the request, which the caller must answer; NULL if it was answered or its session has
 * ended. */
static fuse_req_t take_request(Request *self)
{
    fuse_req_t request = self->request;

    self->request = NULL;
    return self->generation == generation ? request : NULL;
}

static PyObject *request_error(PyObject *self, PyObject *number)
{
    long value = PyLong_AsLong(number);
    fuse_req_t request;

    if (value == -1 && PyErr_Occurred())
        return NULL;
    request = take_request((Request *)self);
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
    request = take_request((Request *)self);
    if (request != NULL)
        fuse_reply_lseek(request, (off_t)value);
    Py_RETURN_NONE;
}

static PyObject *request_data(PyObject *self, PyObject *object)
{
    Py_buffer data;
    fuse_req_t request;

    if (PyObject_GetBuffer(object, &data, PyBUF_SIMPLE))
        return NULL;
    request = take_request((Request *)self);
    if (request != NULL)
        fuse_reply_buf(request, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    Py_RETURN_NONE;
}

static void release_capsule(PyObject *capsule)
{
    Py_DECREF((PyObject *)PyCapsule_GetContext(capsule));
}

/* The capsule keeps the Request until the thread no longer needs it. */
static PyObject *request_capsule(PyObject *self, PyObject *unused)
{
    PyObject *capsule = PyCapsule_New(&((Request *)self)->answer, "qedfuse.answer",
                                      release_capsule);

    (void)unused;
    if (capsule != NULL && PyCapsule_SetContext(capsule, Py_NewRef(self)) != 0) {
        Py_DECREF(self);
        PyCapsule_SetDestructor(capsule, NULL);
        Py_CLEAR(capsule);
    }
    return capsule;
}

static void request_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    fuse_req_t request = take_request((Request *)self);

    if (request != NULL)
        fuse_reply_err(request, EINTR);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef request_methods[] = {
    {"error", request_error, METH_O, "Answer with an errno; 0 is success."},
    {"offset", request_offset, METH_O, "Answer lseek(2) with an offset in bytes."},
    {"data", request_data, METH_O, "Answer a read with the bytes of a buffer."},
    {"capsule", request_capsule, METH_NOARGS,
     "Return a capsule that lets a thread of IoThreads answer a read."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot request_slots[] = {
    {Py_tp_dealloc, request_free},
    {Py_tp_methods, request_methods},
    {Py_tp_doc, "A request of the kernel, which is answered once."},
    {0, NULL},
};

static PyType_Spec request_spec = {
    .name = "qedfuse.mount.fuse._extraops.Request",
    .basicsize = sizeof(Request),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = request_slots,
};

int init_requests(void)
{
    request_type = (PyTypeObject *)PyType_FromSpec(&request_spec);
    return request_type == NULL ? -1 : 0;
}
