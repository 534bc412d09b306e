/*
 * Bursts: requests that the kernel already has are taken without going back to pyfuse3's loop.
 *
 * Between two requests pyfuse3's loop takes and releases a lock, and polls for the next request.
 * That costs as much as a short request itself.  So an operation that has answered its request
 * takes the next one here, from within pyfuse3's call of fuse_session_process_buf().
 *
 * A burst ends with the first request that is passed on to pyfuse3, because pyfuse3 then has a
 * coroutine to run, and can keep only one.  A burst also ends after MAX_REQUESTS, because no other
 * task of the event loop runs during a burst.  To let other tasks run in time, the scheduler adds the
 * number of requests of the bursts to its own count of requests (take_burst_count()).
 *
 * stop_blocking() makes reads of the device non-blocking.  A request may vanish after poll(2) has
 * found it, because its process was killed; a read(2) that blocks would then stop the event loop
 * until the next request arrives.  If no request is there, pyfuse3 gets EINTR in place of EAGAIN,
 * because pyfuse3 takes EAGAIN for a failure of the mount, and reads again after EINTR.
 */

#include "_extraops.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>

/* Maximum number of requests of one burst, after the one that pyfuse3's loop has taken. */
#define MAX_REQUESTS 7

static struct fuse_session *session; /* NULL while there is no session */
static struct fuse_buf buffer;       /* libfuse allocates its memory with the first request */
static int in_burst;
static int answered;        /* whether the last request of the burst was answered or deferred */
static unsigned long taken; /* requests taken in bursts since the last call of take_burst_count() */

static int is_interposed;  /* whether pyfuse3 calls receive_request(), which hides EAGAIN */
static int is_nonblocking; /* whether reads of the session's device do not block */

void begin_bursts(void *made)
{
    session = made;
    is_interposed = is_nonblocking = 0;
}

void end_bursts(void)
{
    session = NULL;
    taken = 0;
    free(buffer.mem);
    buffer = (struct fuse_buf){0};
}

/* Receives a request as libfuse's function does; returns -EAGAIN if none is there and reads of the
 * device do not block. */
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

void take_more(void)
{
    struct pollfd device = {.events = POLLIN};
    int count;

    if (in_burst) { /* called for the request that the loop below has taken */
        answered = 1;
        return;
    }
    if (session == NULL)
        return;
    device.fd = fuse_session_fd(session);
    in_burst = 1;
    for (count = 0; count < MAX_REQUESTS; count++) {
        /* If an error prevents taking a request, pyfuse3's loop meets the same error, and handles it. */
        if (!is_nonblocking && (poll(&device, 1, 0) != 1 || device.revents != POLLIN))
            break;
        if (receive(session, &buffer) <= 0)
            break;
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
