/*
 * A pool of threads that make system calls on files without Python's global lock (the GIL).
 *
 * A thread that holds the GIL submits calls and collects the finished ones.  A thread of the pool
 * never touches a Python object: it makes the system call, appends the call to the list of
 * finished calls, and makes an eventfd readable unless a thread has done so since the last
 * collection.
 *
 * A call is a struct job.  Its fields belong to the submitter until it is queued, then to the
 * thread that makes the call, and then to the collector.  Only a read with an answer (see below)
 * has two owners at its end, the collector and the thread that answers.  When both are done with
 * it, a thread with the GIL releases it.  A thread that sleeps gets its call in a struct sleeper;
 * everything else that threads share is in struct pool.
 * The pool's mutex protects struct pool, except the atomic fields.  The eventfd is read and written
 * without the mutex.  It is closed only when the IoThreads object has been freed and no thread is
 * writing to it.
 *
 * Answers.  A read can have an answer: a function that the thread itself calls after the read,
 * without the event loop.  The argument `answer` of submit_read is a capsule named
 * "qedfuse.answer", which points to a
 *
 *     struct answer {
 *         void (*call)(struct answer *self, const void *data, long long result);
 *     };
 *
 * The owner of the capsule embeds this struct in a larger one.  The thread first puts the
 * finished read on the list, and then calls answer->call, without the GIL and with a stack of
 * 128 KiB.  So the read is on the list before anything that the answer causes can happen.  `data`
 * is the buffer of the read, and `result` the number of bytes in it, or a negative errno.  The
 * capsule and the buffer stay valid until answer->call has returned, and the read counts as
 * pending at least until then.  answer->call must not wait for the event loop, because the event
 * loop may be waiting for a queued call that only this thread can make.
 *
 * If a read is put on the list before the IoThreads object is freed, answer->call may be called
 * after the object was freed.  Before the owner of the capsule frees anything else that answer->call
 * uses, the owner must do one of two things: wait until pending() returns 0, while the IoThreads
 * object still exists; or use a lock that keeps answer->call from running (as _extraops.c does).
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "_iothreads.h"

#define STACK_BYTES (128u << 10) /* of each thread */
#define MAX_THREADS 1024         /* maximum of the argument max_threads */
#define MAX_IDLE_SECONDS 1e6     /* maximum of the argument idle_seconds */
#define MAX_PARTS 1024           /* maximum number of buffers in one system call: IOV_MAX */

#define MAX_EXPORT_READ_BYTES (32u << 20) /* longest read that an NBD server allows by default */

#define NANOSECONDS INT64_C(1000000000) /* in a second */

enum kind { READ, READ_EXPORT, WRITE, DATASYNC, TRUNCATE, FALLOCATE };

struct job {
    struct job *next; /* in the list that holds the job */
    enum kind kind;
    int fd;
    int mode;              /* of fallocate(2) */
    int64_t offset;        /* in the file or the export; of a truncate: the new size; -1 in a READ:
                            * the position of the descriptor */
    int64_t length;        /* of fallocate(2) */
    struct iovec *parts;   /* what is left to read or write; the array lies behind `buffers` */
    size_t part_count;
    PyObject *tag;         /* what the submitter has given to recognise the call */
    PyObject *capsule;     /* holds the answer; NULL without one */
    struct answer *answer; /* NULL without one */
    int64_t result;        /* the system call's result, or -errno */
    int64_t nanoseconds;   /* duration of the system call */
    int is_collected;      /* under the mutex: the collector no longer needs the job */
    int is_answered;       /* under the mutex: no answer is running or will run */
    Py_ssize_t buffer_count;
    Py_buffer buffers[];
};

struct list {
    struct job *first, *last;
    Py_ssize_t length;
};

/* A thread that waits for a job; the struct lies on the thread's stack. */
struct sleeper {
    struct sleeper *below; /* the thread that fell asleep before this one */
    struct job *job;     /* what the thread must run; NULL if it must end */
    atomic_int is_woken; /* set after `job`; the thread waits for this with futex(2) */
};

struct pool {
    pthread_mutex_t mutex;
    int references;            /* the Python object, and each thread */
    int is_closed;             /* the Python object has been freed, or is being freed */
    int eventfd;               /* -1 once it is closed */
    int notifiers;             /* threads that are writing to the eventfd */
    int is_notified;           /* a write to the eventfd has begun since the last collection */
    int max_threads, threads;
    int coming;                /* threads that will look at the queue without being woken */
    int64_t idle_nanoseconds;  /* how long a thread waits for a job before it ends */
    struct sleeper *sleepers;  /* the thread that fell asleep last is on top */
    struct list queue;         /* submitted and not begun, in the order of submission */
    struct list done;          /* finished and not collected */
    struct list garbage;       /* collected, and answered after that; to be released with the GIL */
    atomic_long done_count;    /* length of `done`, for has_finished */
    atomic_long pending;       /* jobs that are not collected, or not answered */
    atomic_int stop;           /* is_closed, for threads that do not hold the mutex */
};

/* How many forks lie between the process that loaded this module and this process. */
static unsigned long forks;

static void count_fork(void)
{
    forks++;
}

/* --- lists --------------------------------------------------------------------------- */

static void append(struct list *list, struct job *job)
{
    job->next = NULL;
    if (list->last == NULL)
        list->first = job;
    else
        list->last->next = job;
    list->last = job;
    list->length++;
}

/* Remove and return the first job of a list; NULL if the list is empty. */
static struct job *take_first(struct list *list)
{
    struct job *job = list->first;

    if (job == NULL)
        return NULL;
    list->first = job->next;
    if (list->first == NULL)
        list->last = NULL;
    list->length--;
    return job;
}

/* Remove and return all jobs of a list. */
static struct list take_all(struct list *list)
{
    struct list all = *list;

    *list = (struct list){0};
    return all;
}

/* --- system calls -------------------------------------------------------------------- */

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * NANOSECONDS + time.tv_nsec;
}

/* Leave out the first `count` bytes of the parts of a job. */
static void skip(struct job *job, size_t count)
{
    while (job->part_count && count >= job->parts->iov_len) {
        count -= job->parts->iov_len;
        job->parts++;
        job->part_count--;
    }
    if (job->part_count) {
        job->parts->iov_base = (char *)job->parts->iov_base + count;
        job->parts->iov_len -= count;
    }
}

/* Read or write all parts of a job; return the number of bytes, or -errno.  A read ends early at
 * the end of the file.  After the pool is closed, the descriptor may belong to another file.  So if
 * the pool is closed during a system call that leaves bytes to read or write, no further system
 * call is made, and the result is -ECANCELED. */
static int64_t transfer(struct pool *pool, struct job *job)
{
    int64_t total = 0;

    skip(job, 0); /* leaves out empty parts at the beginning */
    while (job->part_count) {
        int count = job->part_count < MAX_PARTS ? (int)job->part_count : MAX_PARTS;
        off_t offset = (off_t)(job->offset + total);
        ssize_t moved;

        if (job->kind == WRITE)
            moved = pwritev(job->fd, job->parts, count, offset);
        else /* the offset -1 stands for the position of the descriptor; a pipe needs this */
            moved = preadv2(job->fd, job->parts, count, job->offset == -1 ? -1 : offset, 0);
        if (moved < 0 && errno != EINTR)
            return -errno;
        if (moved == 0) {
            if (job->kind == READ)
                break;
            return -EIO; /* the kernel has accepted nothing, and has reported no error */
        }
        if (moved > 0) {
            total += moved;
            skip(job, (size_t)moved);
        }
        if (job->part_count && atomic_load(&pool->stop))
            return -ECANCELED;
    }
    return total;
}

/* Receive exactly `length` bytes from a socket; return 0, or -errno. */
static int receive(int fd, void *buffer, size_t length)
{
    while (length) {
        ssize_t received = recv(fd, buffer, length, MSG_WAITALL);

        if (received < 0 && errno != EINTR)
            return -errno;
        if (received == 0)
            return -ECONNRESET;
        if (received > 0) {
            buffer = (char *)buffer + received;
            length -= (size_t)received;
        }
    }
    return 0;
}

/* Fill the only part of a job from an export of an NBD server; return the number of bytes, or
 * -errno.  The descriptor of the job is a connection that no other thread uses, and on which the
 * server sends simple replies.  After an error the connection must not be used again. */
static int64_t read_export(struct job *job)
{
    size_t length = job->parts->iov_len;
    struct __attribute__((packed)) {
        uint32_t magic;
        uint16_t flags, command;
        uint64_t cookie, offset;
        uint32_t length;
    } request = {
        .magic = htobe32(0x25609513),
        .cookie = htobe64((uint64_t)job->offset),
        .offset = htobe64((uint64_t)job->offset),
        .length = htobe32((uint32_t)length),
    };
    struct __attribute__((packed)) {
        uint32_t magic, error;
        uint64_t cookie;
    } reply;
    ssize_t sent;
    int failed;

    if (length == 0 || length > MAX_EXPORT_READ_BYTES)
        return -EINVAL;
    do
        sent = send(job->fd, &request, sizeof request, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent != (ssize_t)sizeof request)
        return sent < 0 ? -errno : -EIO;
    failed = receive(job->fd, &reply, sizeof reply);
    if (failed)
        return failed;
    if (reply.magic != htobe32(0x67446698) || reply.cookie != request.cookie || reply.error)
        return -EIO;
    failed = receive(job->fd, job->parts->iov_base, length);
    return failed ? failed : (int64_t)length;
}

/* Make the system calls of a job; return -errno, or the number of bytes read or written, which is 0 for
 * jobs of other kinds. */
static int64_t make_call(struct pool *pool, struct job *job)
{
    int failed;

    if (job->kind == READ || job->kind == WRITE)
        return transfer(pool, job);
    if (job->kind == READ_EXPORT)
        return read_export(job);
    do {
        if (job->kind == DATASYNC)
            failed = fdatasync(job->fd);
        else if (job->kind == TRUNCATE)
            failed = ftruncate(job->fd, (off_t)job->offset);
        else
            failed = fallocate(job->fd, job->mode, (off_t)job->offset, (off_t)job->length);
    } while (failed && errno == EINTR && !atomic_load(&pool->stop));
    return failed ? -errno : 0;
}

/* --- threads ------------------------------------------------------------------------- */

/* Drop one reference to the pool, and free the pool with the last one.  The caller must hold the
 * mutex, which is unlocked here, and freed with the pool. */
static void drop_pool(struct pool *pool)
{
    int references = --pool->references;

    pthread_mutex_unlock(&pool->mutex);
    if (references)
        return;
    pthread_mutex_destroy(&pool->mutex);
    PyMem_RawFree(pool);
}

/* Make the eventfd readable, if finished calls are on the list and no thread has made it readable
 * since the last collection.  Do nothing if the pool is closed.  The caller must hold the mutex,
 * which is unlocked during the system call. */
static void notify(struct pool *pool)
{
    uint64_t one = 1;
    ssize_t written;

    if (pool->is_notified || !pool->done.length || pool->is_closed)
        return;
    pool->is_notified = 1;
    pool->notifiers++;
    pthread_mutex_unlock(&pool->mutex);
    written = write(pool->eventfd, &one, sizeof one);
    (void)written; /* fails only if the counter is full; the eventfd is readable then */
    pthread_mutex_lock(&pool->mutex);
    pool->notifiers--;
    if (pool->is_closed && !pool->notifiers) {
        close(pool->eventfd);
        pool->eventfd = -1;
    }
}

/* Mark a finished job as answered.  If the collector is done with the job, the job becomes garbage.
 * If the pool is closed, no collector is left, and the memory of the job is lost.  The caller must
 * hold the mutex. */
static void set_answered(struct pool *pool, struct job *job)
{
    job->is_answered = 1;
    if (job->is_collected && !pool->is_closed) {
        append(&pool->garbage, job);
        atomic_fetch_sub(&pool->pending, 1);
    }
}

/* Make the system call of a job, put the job on the list of finished calls, call its answer if it
 * has one, and notify the collector.  If the pool has been closed before the system call begins, the
 * call is not made.  If it has been closed before the call returns, the job is neither put on the
 * list nor answered.  The caller must not hold the mutex; run() returns with the mutex locked. */
static void run(struct pool *pool, struct job *job)
{
    struct answer *answer = job->answer;
    const void *data = job->buffer_count ? job->buffers[0].buf : NULL;
    int64_t since, result;

    since = now();
    result = atomic_load(&pool->stop) ? -ECANCELED : make_call(pool, job);
    job->result = result;
    job->nanoseconds = now() - since;
    pthread_mutex_lock(&pool->mutex);
    if (pool->is_closed)
        return; /* No thread with the GIL will release the job, so its memory is lost. */
    append(&pool->done, job);
    atomic_fetch_add(&pool->done_count, 1);
    if (answer != NULL) {
        /* Answer before writing to the eventfd, because the kernel waits for the answer.  If the
         * event loop collects all finished calls during the answer, notify() writes nothing. */
        pthread_mutex_unlock(&pool->mutex);
        answer->call(answer, data, (long long)result);
        pthread_mutex_lock(&pool->mutex);
        set_answered(pool, job);
    }
    /* During notify() the event loop may already submit its next call.  This thread takes that
     * call afterwards.  So this thread counts as coming, and no other thread is woken. */
    pool->coming++;
    notify(pool);
    pool->coming--;
}

/* Wait until hand_over() gives this thread a job, and return the job, with the mutex unlocked.
 * Return NULL, with the mutex locked, if the thread must end, because the pool is closed or because
 * the thread has got no job during the idle time.  The caller must hold the mutex. */
static struct job *sleep_idle(struct pool *pool)
{
    struct sleeper self = {.below = pool->sleepers};
    int64_t end = now() + pool->idle_nanoseconds, left = pool->idle_nanoseconds;

    if (!left)
        return NULL;
    pool->sleepers = &self;
    pthread_mutex_unlock(&pool->mutex);
    while (!atomic_load(&self.is_woken) && left > 0) {
        struct timespec time = {.tv_sec = left / NANOSECONDS, .tv_nsec = left % NANOSECONDS};
        syscall(SYS_futex, &self.is_woken, FUTEX_WAIT_PRIVATE, 0, &time, NULL, 0);
        left = end - now();
    }
    if (atomic_load(&self.is_woken) && self.job != NULL)
        return self.job;
    pthread_mutex_lock(&pool->mutex);
    if (!atomic_load(&self.is_woken)) {
        struct sleeper **link = &pool->sleepers;
        while (*link != &self)
            link = &(*link)->below;
        *link = self.below;
    } else if (self.job != NULL) { /* handed over after the idle time */
        pthread_mutex_unlock(&pool->mutex);
    }
    return self.job;
}

/* Give a job to the thread that fell asleep last; NULL in place of a job makes it end.  The thread
 * that fell asleep last has the warmest caches, and threads that are not needed sleep on until their
 * idle time has passed.  The caller must hold the mutex, and a thread must be asleep.  Return the
 * address that the caller must pass to wake(). */
static atomic_int *hand_over(struct pool *pool, struct job *job)
{
    struct sleeper *top = pool->sleepers;

    pool->sleepers = top->below;
    top->job = job;
    atomic_store(&top->is_woken, 1);
    return &top->is_woken;
}

/* Wake the thread that waits at an address.  That thread may have seen `is_woken` without this
 * call, and have returned from sleep_idle().  If so, another sleeper may lie at the address by
 * now, and the thread of that sleeper wakes without a reason, and goes on waiting. */
static void wake(atomic_int *address)
{
    syscall(SYS_futex, address, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void *work(void *argument)
{
    struct pool *pool = argument;

    pthread_setname_np(pthread_self(), "qedfuse-io");
    pthread_mutex_lock(&pool->mutex);
    pool->coming--;
    while (!pool->is_closed) {
        struct job *job = take_first(&pool->queue);
        if (job != NULL)
            pthread_mutex_unlock(&pool->mutex);
        else
            job = sleep_idle(pool);
        if (job == NULL)
            break;
        run(pool, job);
    }
    pool->threads--;
    drop_pool(pool);
    return NULL;
}

/* Create a thread that blocks nearly all signals; return 0, or an errno. */
static int create_thread(struct pool *pool)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    int failed = pthread_attr_init(&attributes);

    if (failed)
        return failed;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    sigdelset(&all, SIGRTMAX - 5); /* qedfuse.mount.sandbox sends it to all threads */
    pthread_sigmask(SIG_BLOCK, &all, &before); /* the thread inherits the mask */
    failed = pthread_create(&thread, &attributes, work, pool);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return failed;
}

/* Remove a job from the queue, because no thread exists and none could be created.  Return whether
 * the job was in the queue.  If it was not, a thread took the job, made its call, and has ended
 * since; the job belongs to the collector.  The caller must hold the mutex. */
static int withdraw(struct pool *pool, struct job *job)
{
    struct list all = take_all(&pool->queue);
    struct job *other;
    int is_found = 0;

    while ((other = take_first(&all)) != NULL) {
        if (other == job)
            is_found = 1;
        else
            append(&pool->queue, other);
    }
    if (is_found)
        atomic_fetch_sub(&pool->pending, 1);
    return is_found;
}

/* Queue a job.  Wake or create a thread, unless a coming thread will take the job or max_threads
 * threads are busy.  Return 0; the job then belongs to the pool.  If there is no thread to take the
 * job and none can be created, do not queue the job, and return an errno.  In both cases the caller
 * must release the jobs in *garbage. */
static int queue(struct pool *pool, struct job *job, struct list *garbage)
{
    int failed, needs_thread = 0;
    atomic_int *woken = NULL;

    atomic_fetch_add(&pool->pending, 1);
    pthread_mutex_lock(&pool->mutex);
    *garbage = take_all(&pool->garbage);
    append(&pool->queue, job);
    if (pool->queue.length > pool->coming) {
        if (pool->sleepers != NULL) {
            woken = hand_over(pool, take_first(&pool->queue));
        } else if (pool->threads < pool->max_threads) {
            needs_thread = 1;
            pool->threads++;
            pool->references++;
            pool->coming++;
        }
    }
    pthread_mutex_unlock(&pool->mutex);
    if (woken != NULL)
        wake(woken);
    if (!needs_thread)
        return 0;
    failed = create_thread(pool);
    if (!failed)
        return 0;
    pthread_mutex_lock(&pool->mutex);
    pool->threads--;
    pool->references--;
    pool->coming--;
    /* If another thread runs, it takes the job when it is done with its own.  Or it has taken the
     * job already, and may even have ended. */
    if (pool->threads || !withdraw(pool, job))
        failed = 0;
    pthread_mutex_unlock(&pool->mutex);
    return failed;
}

/* --- the Python class ---------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    struct pool *pool;
    unsigned long forks; /* when the object was made */
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

/* Return the pool of an object; NULL with an exception in a process that was forked after the
 * object was made, because the threads exist only in the other process. */
static struct pool *pool_of(PyObject *self)
{
    IoThreads *object = (IoThreads *)self;

    if (object->forks == forks)
        return object->pool;
    PyErr_SetString(PyExc_RuntimeError, "the threads belong to the process before the fork");
    return NULL;
}

/* Make a job with space for `buffer_count` buffers, of which it holds none yet; NULL with an
 * exception if there is no memory. */
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
    int failed = queue(pool, job, &garbage);

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
    return PyLong_FromLong(((IoThreads *)self)->pool->eventfd);
}

static PyObject *get_pending(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(atomic_load(&((IoThreads *)self)->pool->pending));
}

static PyObject *has_finished(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(atomic_load(&((IoThreads *)self)->pool->done_count) > 0);
}

static PyObject *get_threads(PyObject *self, PyObject *unused)
{
    struct pool *pool = pool_of(self);
    int threads;

    (void)unused;
    if (pool == NULL)
        return NULL;
    pthread_mutex_lock(&pool->mutex);
    threads = pool->threads;
    pthread_mutex_unlock(&pool->mutex);
    return PyLong_FromLong(threads);
}

/* Insert jobs at the beginning of the list of finished calls again, after reports() has failed. */
static void put_back(struct pool *pool, struct list jobs)
{
    struct job *job;

    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->done_count, jobs.length);
    while ((job = take_first(&pool->done)) != NULL)
        append(&jobs, job);
    pool->done = jobs;
    notify(pool);
    pthread_mutex_unlock(&pool->mutex);
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
    struct list jobs, garbage, answered = {0};
    struct job *job;
    uint64_t count;
    ssize_t length;
    PyObject *list;

    (void)unused;
    if (pool == NULL)
        return NULL;
    /* Read the eventfd before taking the list.  If a thread writes to the eventfd in between, the
     * event loop wakes once more, and finds no job.  In the other order, the read could consume
     * the notification of a job that was put on the list after the list was taken. */
    length = read(pool->eventfd, &count, sizeof count);
    (void)length; /* fails if nothing has been written */
    pthread_mutex_lock(&pool->mutex);
    jobs = take_all(&pool->done);
    garbage = take_all(&pool->garbage);
    pool->is_notified = 0;
    atomic_fetch_sub(&pool->done_count, jobs.length);
    pthread_mutex_unlock(&pool->mutex);
    release_all(garbage);
    list = reports(jobs);
    if (list == NULL) {
        put_back(pool, jobs);
        return NULL;
    }
    pthread_mutex_lock(&pool->mutex);
    while ((job = take_first(&jobs)) != NULL) {
        job->is_collected = 1;
        if (job->is_answered) /* otherwise the thread that answers puts the job on `garbage` */
            append(&answered, job);
    }
    pthread_mutex_unlock(&pool->mutex);
    atomic_fetch_sub(&pool->pending, answered.length);
    release_all(answered);
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
    pool = PyMem_RawCalloc(1, sizeof *pool);
    if (pool == NULL)
        return PyErr_NoMemory();
    pool->eventfd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (pool->eventfd < 0) {
        PyMem_RawFree(pool);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    self = (IoThreads *)type->tp_alloc(type, 0);
    if (self == NULL) {
        close(pool->eventfd);
        PyMem_RawFree(pool);
        return NULL;
    }
    pthread_mutex_init(&pool->mutex, NULL);
    pool->references = 1;
    pool->max_threads = max_threads;
    pool->idle_nanoseconds = (int64_t)(idle_seconds * (double)NANOSECONDS);
    self->pool = pool;
    self->forks = forks;
    return (PyObject *)self;
}

/* Leave the pool to its threads, the last of which frees it, or free it if there are none.  Calls
 * that no thread has begun are never made.  Calls and answers in progress end some time later, and
 * what their jobs hold is never released, because no thread of the pool may touch Python's objects. */
static void free_object(PyObject *object)
{
    IoThreads *self = (IoThreads *)object;
    PyTypeObject *type = Py_TYPE(object);
    struct pool *pool = self->pool;
    struct list queued, done, garbage;
    struct job *job;

    /* Leave the pool alone in a forked process, because a thread that does not exist in this
     * process may have locked the mutex at the fork. */
    if (self->forks == forks) {
        pthread_mutex_lock(&pool->mutex);
        pool->is_closed = 1;
        atomic_store(&pool->stop, 1);
        queued = take_all(&pool->queue);
        garbage = take_all(&pool->garbage);
        done = (struct list){0};
        while ((job = take_first(&pool->done)) != NULL)
            if (job->is_answered) /* otherwise the answer still needs the job's buffer */
                append(&done, job);
        while (pool->sleepers != NULL)
            wake(hand_over(pool, NULL));
        if (!pool->notifiers) {
            close(pool->eventfd);
            pool->eventfd = -1;
        }
        drop_pool(pool);
        release_all(queued);
        release_all(done);
        release_all(garbage);
    }
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
    if (type == NULL || PyModule_AddObjectRef(module, "IoThreads", type)) {
        Py_XDECREF(type);
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(type);
    return module;
}
