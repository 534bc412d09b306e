/*
 * Reads whose data the event loop has not found in the page cache, or not looked for there.  They
 * are made through io_uring (_ring.c), and answered by the event loop, without a thread and without
 * a task.
 *
 * The reads of a burst (_burst.c) are submitted together at its end, so that the disk gets all of
 * them with one notification.  end_queued_reads() answers those that have ended.  The event loop
 * calls it between two requests and while it polls, and an eventfd wakes the loop when it sleeps.
 *
 * - Clusters.  A read is in an epoch (disk/space/epochs.py) from queue_read() until it has ended.
 *   A cluster that is freed meanwhile gets no other data before the epoch's requests have ended.
 *   Nothing else runs between the lookup of the cluster and queue_read(), so not even a request of
 *   the same burst can free the cluster before the read is in the epoch.
 * - Order.  The kernel copies the data from the page cache at some time after queue_read().  A
 *   write that was answered before queue_read() is in the page cache by then, so the read returns
 *   what the write has written.
 * - Failures.  After an error or too few bytes, a Python function begins the read anew, in a task
 *   that may wait.
 * - Files that do not answer.  At most MAX_READS_OF_FILE reads of one file are queued.  Files whose
 *   reads the kernel would make in threads are left out (ReadPolicy.can_queue).  After a submission
 *   that took long, because the kernel waited for a disk, no read is queued for a while.
 *
 * Everything happens in the thread of the event loop, with the GIL held.
 */

#include "_extraops.h"

#include <errno.h>
#include <sys/resource.h>

/* Maximum length of a queued read.  The event loop copies the data, so for a longer read a native
 * thread on another processor is better. */
#define MAX_QUEUED_BYTES (1 << 14)

/* Maximum number of queued reads of one file. */
#define MAX_READS_OF_FILE 64

/* Number of calls of ring_run() that complete all reads of a ring that is full and has the data of
 * every read.  One call completes at least 20 (before Linux 6.13 all). */
#define IDLE_RUNS (RING_ENTRIES / 20 + 1)

/* How long no read is queued after a slow submission. */
#define PAUSE_NANOSECONDS INT64_C(1000000000)

struct queued_read {
    struct queued_read *next; /* in the list of unused ones */
    fuse_req_t request;
    unsigned long session; /* from which the request came */
    fuse_ino_t inode;
    uint64_t handle;
    int64_t begun; /* when the read was queued, for count_waited() */
    off_t start;   /* guest offset */
    size_t size;
    struct read_place place; /* this read holds a reference to its `view` */
    PyObject *epoch;
    int was_tried; /* whether the event loop has looked for the data in the page cache, in vain */
    char data[MAX_QUEUED_BYTES];
};

static struct queued_read *unused;
static unsigned int reads;       /* number of queued reads */
static int64_t slow_nanoseconds; /* a submission that waits longer is followed by a pause */
static int64_t paused_until;     /* end of a pause, by monotonic_time(); 0 if there is no pause */
static int is_ending;            /* whether end_queued_reads() is running */
static PyObject *answer_slowly;  /* gets the reads that have failed */
static PyObject *name_can_queue, *name_enter, *name_leave, *name_record_cached,
    *name_record_inline_miss;

/* Calls a method with one argument, or with none if `argument` is NULL; reports its exception. */
static void call_method(PyObject *object, PyObject *name, PyObject *argument)
{
    PyObject *result = argument == NULL ? PyObject_CallMethodNoArgs(object, name)
                                        : PyObject_CallMethodOneArg(object, name, argument);

    if (result == NULL)
        PyErr_WriteUnraisable(object);
    Py_XDECREF(result);
}

/* Returns an unused read; NULL if there is no memory. */
static struct queued_read *take(void)
{
    struct queued_read *read = unused;

    if (read == NULL)
        return malloc(sizeof *read);
    unused = read->next;
    return read;
}

static void put_back(struct queued_read *read)
{
    read->next = unused;
    unused = read;
}

/* Returns whether a read of a file may be queued now: there is room, and no pause is running. */
static int can_queue(const struct read_file *file)
{
    if (!ring_is_open() || reads >= RING_ENTRIES || file->queued >= MAX_READS_OF_FILE)
        return 0;
    if (paused_until && monotonic_time() < paused_until)
        return 0;
    paused_until = 0;
    return 1;
}

int queue_read(fuse_req_t request, fuse_ino_t inode, uint64_t handle, off_t start, size_t size,
               struct read_place place, int was_tried)
{
    struct queued_read *read;
    PyObject *allowed;

    if (size > MAX_QUEUED_BYTES || !can_queue(place.file))
        return 0;
    allowed = PyObject_GetAttr(place.file->policy, name_can_queue);
    Py_XDECREF(allowed);
    if (allowed != Py_True)
        return 0;
    read = take();
    if (read == NULL)
        return 0;
    read->epoch = PyObject_CallMethodNoArgs(place.epochs, name_enter);
    if (read->epoch == NULL) {
        put_back(read);
        return 0;
    }
    read->request = request;
    read->session = current_session();
    read->inode = inode;
    read->handle = handle;
    read->begun = monotonic_time();
    read->start = start;
    read->size = size;
    read->place = place;
    Py_INCREF(place.view);
    read->was_tried = was_tried;
    place.file->queued++;
    reads++;
    ring_add(read, place.file->fd, place.offset, read->data, size);
    if (was_tried)
        call_method(place.file->policy, name_record_inline_miss, NULL);
    return 1;
}

/* Passes a read to the Python function `answer_slowly`, which answers it. */
static void pass_on(const struct queued_read *read)
{
    PyObject *pending = new_request(read->request, read->size), *result = NULL;

    if (pending == NULL)
        fuse_reply_err(read->request, ENOMEM);
    else
        result = PyObject_CallFunction(answer_slowly, "OKLn", pending,
                                       (unsigned long long)read->handle, (long long)read->start,
                                       (Py_ssize_t)read->size);
    if (result == NULL)
        PyErr_WriteUnraisable(answer_slowly);
    Py_XDECREF(result);
    Py_XDECREF(pending); /* without an exception, the function has kept a reference */
}

/* Answers a read that has ended; `result` is the number of bytes, or a negative errno. */
static void end(struct queued_read *read, int result, int was_cached)
{
    struct read_place place = read->place;
    int is_whole = result >= 0 && (size_t)result == read->size;
    int can_answer = read->session == current_session(); /* if not, libfuse has freed the request */

    if (is_whole && can_answer) {
        fuse_reply_buf(read->request, read->data, read->size);
        count_waited(read->inode, COUNT_READ, read->size, read->begun);
        count_file_read(&place, read->size);
    }
    place.file->queued--;
    reads--;
    call_method(place.epochs, name_leave, read->epoch);
    if (is_whole && !read->was_tried)
        call_method(place.file->policy, name_record_cached, was_cached ? Py_True : Py_False);
    if (!is_whole && can_answer)
        pass_on(read);
    Py_DECREF(read->epoch);
    put_back(read);
    Py_DECREF(place.view);
}

/* Answers all reads whose end the kernel has reported; returns their number. */
static int end_reported(int were_cached)
{
    struct queued_read *read;
    int result, count = 0;

    while ((read = ring_next(&result)) != NULL) {
        end(read, result, were_cached);
        count++;
    }
    return count;
}

/* Returns how often this thread has waited for something other than a processor. */
static long waits(void)
{
    struct rusage usage;

    return getrusage(RUSAGE_THREAD, &usage) ? 0 : usage.ru_nvcsw;
}

/* Passes the reads of a burst to the kernel.  Ends those whose data was cached, and those that the
 * kernel has not taken.  Begins a pause if the kernel has waited too long. */
static void submit(void)
{
    int64_t since = monotonic_time(), until;
    long waits_before = waits();
    int failed = ring_submit();
    struct queued_read *read;

    /* During a pause native threads make the reads, which takes more processor time.  So there is
     * no pause if the submission was slow only because other programs used the processor: this
     * thread has not waited then.  If `slow_nanoseconds` is 0, each submission causes a pause. */
    until = monotonic_time();
    if (until - since > slow_nanoseconds && (waits() > waits_before || !slow_nanoseconds))
        paused_until = until + PAUSE_NANOSECONDS;
    /* Only ring_run() completes reads for which the kernel had to wait (_ring.c).  So reads that
     * have ended by now found their data in the page cache.  Their ends have made the eventfd
     * readable, so it is emptied.  A read whose data has arrived from the disk may have made it
     * readable too.  But that read has set the flag of ring_has_work() first, and the caller tests
     * this flag next. */
    if (end_reported(1))
        ring_unnotify();
    while (failed && (read = ring_take_back()) != NULL)
        end(read, -failed, 0);
}

void end_queued_reads(void)
{
    int idle;

    if (!reads || is_ending) /* an answer can lead to another call of this function */
        return;
    is_ending = 1;
    if (ring_unsubmitted())
        submit();
    /* One ring_run() need not do all work (_ring.c), and the flag of ring_has_work() may be set
     * without any work.  So the loop ends when the flag is clear, or after IDLE_RUNS calls in a row
     * without effect, which would have done all work that was there before the first of them.
     * Later work sets the flag, and then makes the eventfd readable, which wakes the event loop.  If
     * ring_run() has emptied the eventfd, this wake-up may be lost.  So the loop counts from 0
     * again, and finds the flag of the later work. */
    for (idle = 0; idle < IDLE_RUNS && ring_has_work(); idle++) {
        int notified = ring_run();
        if (end_reported(0) || notified)
            idle = -1;
    }
    is_ending = 0;
}

/* --- functions of the module ----------------------------------------------------------- */

int init_queued_reads(void)
{
    const struct interned_name names[] = {
        {&name_can_queue, "can_queue"},
        {&name_enter, "enter"},
        {&name_leave, "leave"},
        {&name_record_cached, "record_cached"},
        {&name_record_inline_miss, "record_inline_miss"},
    };

    return intern_names(names, sizeof names / sizeof *names);
}

PyObject *open_read_queue(PyObject *module, PyObject *args)
{
    PyObject *callable;
    double slow_seconds;
    int fd;

    (void)module;
    if (!PyArg_ParseTuple(args, "Od", &callable, &slow_seconds))
        return NULL;
    fd = ring_open();
    if (fd < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    slow_nanoseconds = (int64_t)(slow_seconds * 1e9);
    Py_XSETREF(answer_slowly, Py_NewRef(callable));
    paused_until = 0;
    return PyLong_FromLong(fd);
}

PyObject *close_read_queue(PyObject *module, PyObject *unused_argument)
{
    struct queued_read *read;

    (void)module;
    (void)unused_argument;
    /* The kernel may still write to the memory of a read that has not ended. */
    if (reads) {
        PyErr_SetString(PyExc_RuntimeError, "reads are queued");
        return NULL;
    }
    ring_close();
    Py_CLEAR(answer_slowly);
    while ((read = unused) != NULL) {
        unused = read->next;
        free(read);
    }
    Py_RETURN_NONE;
}

PyObject *py_end_queued_reads(PyObject *module, PyObject *unused_argument)
{
    (void)module;
    (void)unused_argument;
    end_queued_reads();
    Py_RETURN_NONE;
}

PyObject *queued_reads(PyObject *module, PyObject *unused_argument)
{
    (void)module;
    (void)unused_argument;
    return PyLong_FromUnsignedLong(reads);
}
