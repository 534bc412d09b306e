/*
 * Bursts: several requests are taken from the kernel without going back to pyfuse3's loop.
 *
 * Between two requests pyfuse3's loop takes and releases a lock, and polls for the next request.
 * That costs as much as a short request itself.  So an operation that has answered its request
 * takes the next one here, from within pyfuse3's call of fuse_session_process_buf().
 *
 * A burst ends with the first request that is passed on to pyfuse3, because pyfuse3 can keep only
 * one coroutine to run.  A burst also ends after MAX_REQUESTS, because no other task of the event
 * loop runs during a burst.
 *
 * If the kernel has no request, the burst polls for one (permit_polling()).  A program with one
 * request in flight sends the next one in less time than pyfuse3's loop and the scheduler take.
 * The scheduler permits polling only if no other task needs the event loop, so the burst may be
 * longer then (MAX_POLLED_REQUESTS).  The permission ends after a few milliseconds, because a timer
 * or a signal may make another task runnable.
 *
 * stop_blocking() makes reads of the device non-blocking.  If a process is killed, its request can
 * vanish after poll(2) has found it.  A read(2) that blocks would then stop the event loop until
 * the next request arrives.  If there is no request, a non-blocking read fails with EAGAIN, which
 * pyfuse3 takes for a failure of the mount.  So pyfuse3 gets EINTR, and reads again.
 */

#include "_extraops.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Maximum number of requests of one burst, after the one that pyfuse3's loop has taken. */
#define MAX_REQUESTS 7

/* The same while polling is permitted. */
#define MAX_POLLED_REQUESTS 63

/* Size and alignment of a huge page, into which writes are copied faster. */
#define HUGE_PAGE_BYTES ((size_t)1 << 21)

/* Maximum length of a request without the data of a write (FUSE_BUFFER_HEADER_SIZE in libfuse). */
#define HEADER_BYTES 4096

/* If writes can have more data than this, libfuse allocates the memory for requests. */
#define MAX_WRITE_BYTES ((size_t)1 << 24)

/* Number of pause instructions between two looks for a request.  Meanwhile the other hardware
 * thread of the core runs faster, and a program can take the lock of the kernel's queue. */
#define PAUSES 8
#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() __asm__ volatile("")
#endif

static struct fuse_session *session; /* NULL while there is no session */
static struct fuse_buf buffer;       /* if it has no memory, libfuse allocates some */
static int in_burst;
static int answered;        /* whether the last request was answered, queued or deferred */
static unsigned long taken; /* requests taken in bursts since the last call of take_burst_count() */

static int64_t poll_nanoseconds;   /* maximum time to poll for one request */
static int64_t polling_ends;       /* when the permission to poll ends; 0 without permission */
static PyObject *has_finished;     /* called while polling; polling ends if the result is not False */
static int64_t polled_nanoseconds; /* duration of the last poll, if no request has come since */

static int is_interposed;  /* whether pyfuse3 calls receive_request(), which hides EAGAIN */
static int is_nonblocking; /* whether reads of the session's device do not block */

/* Frees the memory for requests. */
static void free_request_memory(void)
{
    free(buffer.mem);
    buffer = (struct fuse_buf){0};
}

void begin_bursts(void *made)
{
    /* If the last session was not ended, its memory may be too short for this one. */
    free_request_memory();
    session = made;
    is_interposed = is_nonblocking = 0;
    polling_ends = polled_nanoseconds = 0;
}

void end_bursts(void)
{
    session = NULL;
    taken = 0;
    polling_ends = polled_nanoseconds = 0;
    Py_CLEAR(has_finished);
    free_request_memory();
}

void reserve_request_memory(size_t max_write)
{
    size_t size = (max_write + HEADER_BYTES + HUGE_PAGE_BYTES - 1) & ~(HUGE_PAGE_BYTES - 1);

    if (max_write > MAX_WRITE_BYTES || buffer.mem != NULL)
        return;
    buffer.mem = aligned_alloc(HUGE_PAGE_BYTES, size);
    if (buffer.mem != NULL)
        (void)madvise(buffer.mem, size, MADV_HUGEPAGE); /* a kernel without huge pages refuses */
}

/* Receives a request as libfuse's function does; returns -EAGAIN if a read would block. */
static int receive(struct fuse_session *from, struct fuse_buf *into)
{
    static int (*in_libfuse)(struct fuse_session *, struct fuse_buf *);

    if (in_libfuse == NULL)
        in_libfuse = (int (*)(struct fuse_session *, struct fuse_buf *))libfuse_function(
            "fuse_session_receive_buf");
    return in_libfuse == NULL ? -ENOSYS : in_libfuse(from, into);
}

/* Called by pyfuse3 in place of libfuse's function. */
int receive_request(struct fuse_session *from, struct fuse_buf *into)
    INTERPOSES("fuse_session_receive_buf");

int receive_request(struct fuse_session *from, struct fuse_buf *into)
{
    int result = receive(from, into);

    is_interposed = 1;
    if (result > 0)
        polled_nanoseconds = 0; /* the request for which the last poll has waited has come */
    return result == -EAGAIN ? -EINTR : result;
}

PyObject *stop_blocking(PyObject *module, PyObject *unused)
{
    int fd = session == NULL ? -1 : fuse_session_fd(session);
    int flags = fd < 0 || !is_interposed ? -1 : fcntl(fd, F_GETFL);

    (void)module;
    (void)unused;
    is_nonblocking = flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
    return PyBool_FromLong(is_nonblocking);
}

/* Returns whether polling must stop, because a call on a host file has finished and its task needs
 * the event loop, or because has_finished() has failed. */
static int must_stop_polling(void)
{
    PyObject *result = PyObject_CallNoArgs(has_finished);

    if (result == NULL)
        PyErr_WriteUnraisable(has_finished);
    Py_XDECREF(result);
    return result != Py_False;
}

/* Polls for the next request, and receives it.  Returns -EAGAIN if none has come in the permitted
 * time, or if the event loop is needed. */
static int poll_and_receive(void)
{
    int64_t since = monotonic_time(), now = since, end;
    int result = -EAGAIN, pause;

    end = since + poll_nanoseconds < polling_ends ? since + poll_nanoseconds : polling_ends;
    while (result == -EAGAIN && now < end) {
        end_queued_reads(); /* submits the reads of this burst, and answers those that have ended */
        if (must_stop_polling()) {
            polling_ends = 0;
            break;
        }
        for (pause = 0; pause < PAUSES; pause++)
            PAUSE();
        result = receive(session, &buffer);
        now = monotonic_time();
    }
    if (result == -EAGAIN)
        polled_nanoseconds = now - since;
    return result;
}

/* Returns whether polling is permitted now. */
static int may_poll(void)
{
    return polling_ends != 0 && monotonic_time() < polling_ends;
}

/* Receives the next request of a burst in which `count` requests have been taken.  The burst must
 * end if the result is not positive. */
static int receive_next(int count)
{
    struct pollfd device = {.fd = fuse_session_fd(session), .events = POLLIN};
    int result;

    if (count >= MAX_REQUESTS && (count >= MAX_POLLED_REQUESTS || !may_poll()))
        return 0;
    if (!is_nonblocking && (poll(&device, 1, 0) != 1 || device.revents != POLLIN))
        return 0;
    result = receive(session, &buffer);
    return result == -EAGAIN && is_nonblocking && may_poll() ? poll_and_receive() : result;
}

void take_more(void)
{
    int count;

    if (in_burst) { /* called for the request that the loop below has taken */
        answered = 1;
        return;
    }
    if (session == NULL)
        return;
    in_burst = 1;
    /* If an error prevents taking a request, pyfuse3's loop meets and handles the same error. */
    for (count = 0; receive_next(count) > 0; count++) {
        answered = 0;
        taken++;
        fuse_session_process_buf(session, &buffer);
        if (!answered)
            break;
    }
    in_burst = 0;
    end_queued_reads(); /* submits the reads of this burst */
}

PyObject *take_burst_count(PyObject *module, PyObject *unused)
{
    unsigned long count = taken;

    (void)module;
    (void)unused;
    taken = 0;
    return PyLong_FromUnsignedLong(count);
}

PyObject *permit_polling(PyObject *module, PyObject *args)
{
    double each, all;
    PyObject *function;

    (void)module;
    if (!PyArg_ParseTuple(args, "ddO", &each, &all, &function))
        return NULL;
    poll_nanoseconds = (int64_t)(each * 1e9);
    polling_ends = monotonic_time() + (int64_t)(all * 1e9);
    Py_XSETREF(has_finished, Py_NewRef(function));
    Py_RETURN_NONE;
}

PyObject *forbid_polling(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    polling_ends = 0;
    Py_RETURN_NONE;
}

PyObject *take_polled_seconds(PyObject *module, PyObject *unused)
{
    double seconds = (double)polled_nanoseconds * 1e-9;

    (void)module;
    (void)unused;
    polled_nanoseconds = 0;
    return PyFloat_FromDouble(seconds);
}
