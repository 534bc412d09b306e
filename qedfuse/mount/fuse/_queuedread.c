/*
 * Reads whose data is not in memory, made through io_uring (_ring.c) and answered by the event
 * loop, without a thread and without a task.
 *
 * _cachedread.c has found where the data is, and passes the read to queue_read().  The reads of a
 * burst (several requests in one turn of the event loop, _burst.c) are submitted together at its
 * end, so that the disk gets all of them with one notification.
 * The event loop calls end_queued_reads() between two requests and while it polls, and an eventfd
 * wakes it when it sleeps.  For each read that has ended, end_queued_reads() answers the kernel.
 *
 * - Clusters.  A read enters an epoch (disk/space/epochs.py) before queue_read() returns.  Between the
 *   lookup of its cluster and this step no other request or task runs.  The read leaves the epoch after
 *   its end.  So until its end the cluster gets no other data, even if a request of the same burst
 *   frees the cluster.
 * - Order.  The kernel copies the data from the page cache at some time between queue_read() and
 *   the end, as any read(2) does.  A write that was answered before queue_read() is in the page
 *   cache by then, so the read returns what the write has written.
 * - Failures.  If the kernel reports an error or too few bytes, or does not take the read, a
 *   Python function gets the request, and begins the read anew in a task that may wait.
 * - Files that do not answer.  At most MAX_READS_OF_FILE reads of one file are queued; the caller
 *   passes further reads on.  Files whose reads the kernel itself would make in threads are left
 *   out (ReadPolicy.can_queue).  If submitting takes long, because the kernel waits for a disk
 *   meanwhile, no read is queued for a while.
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

/* Number of calls of ring_run() that are enough to complete all reads of a full ring whose data has
 * arrived: one call completes at least 20 reads (before Linux 6.13 all). */
#define IDLE_RUNS (RING_ENTRIES / 20 + 1)

/* How long no read is queued after a submission that took too long. */
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
    int was_tried; /* whether _cachedread.c has looked for the data in the page cache in vain */
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

/* Calls a method with one argument, or with no argument if `argument` is NULL.  Reports an exception of
 * the method, because no caller could handle it. */
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

/* Returns whether a read of a file may be queued now: the queue is open and not full, the file has not
 * too many queued reads, and no pause after a slow submission is running. */
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

/* Answers a read that has ended.  `result` is the number of bytes, or a negative errno, and
 * `was_cached` says whether the data was in the page cache. */
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

/* Answers all reads whose end the kernel has reported; returns their number.  `were_cached` says whether
 * their data was in the page cache. */
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

/* Passes the reads of a burst to the kernel, and ends those whose data was in the page cache and those
 * that the kernel has not taken.  If the kernel has waited too long during the submission, a pause
 * begins. */
static void submit(void)
{
    int64_t since = monotonic_time(), until;
    long waits_before = waits();
    int failed = ring_submit();
    struct queued_read *read;

    /* During a pause native threads make the reads, with more of the processor's time.  So a
     * submission causes no pause if it was slow only because other programs used the processor: if
     * the kernel has not made this thread wait.  If `slow_nanoseconds` is 0, each submission causes
     * a pause. */
    until = monotonic_time();
    if (until - since > slow_nanoseconds && (waits() > waits_before || !slow_nanoseconds))
        paused_until = until + PAUSE_NANOSECONDS;
    /* Only ring_run() completes reads for which the kernel had to wait (_ring.c).  So reads that have
     * ended by now found their data in the page cache.  Their ends have made the eventfd readable, so
     * it is emptied.  If another read is ready to be completed, it has made the eventfd readable too;
     * but it set the flag of ring_has_work() first, and the caller tests this flag next. */
    if (end_reported(1))
        ring_unnotify();
    while (failed && (read = ring_take_back()) != NULL)
        end(read, -failed, 0);
}

void end_queued_reads(void)
{
    int idle;

    if (!reads || is_ending) /* an answer can lead to another call of this function, which does nothing */
        return;
    is_ending = 1;
    if (ring_unsubmitted())
        submit();
    /* One ring_run() need not do all work (_ring.c), and the flag that ring_has_work() reads may be set
     * without any work.  So the loop ends when the flag is clear, or when IDLE_RUNS calls of ring_run()
     * in a row have had no effect.  By then all work that had come before these calls is done.  Later work
     * sets the flag first, and then makes the eventfd readable.  ring_run() returns whether it has emptied
     * the eventfd.  If so, the loop counts from 0 again, and finds the flag of the later work. */
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
