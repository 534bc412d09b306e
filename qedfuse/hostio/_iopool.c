/*
 * The threads that make system calls, and what they share with the threads that hold the GIL.
 *
 * A thread of the pool never touches a Python object.  It makes the system call, appends the call
 * to the list of finished calls, and makes an eventfd readable, unless another thread has done so.
 * The event loop (the collector) then takes all calls from the list.
 *
 * The fields of a struct job belong to the submitter until it is queued, then to the thread that
 * makes the call, and then to the collector.  At its end a read with an answer (_iothreads.c)
 * belongs both to the collector and to the thread that answers.  When both are done with it, a
 * thread with the GIL releases it.
 * The pool's mutex protects struct pool, except the atomic fields.  The eventfd is read and written
 * without the mutex, and is closed when the pool is closed and no thread is writing to it.
 */

#include "_iopool.h"

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "_iothreads.h"

#define STACK_BYTES (128u << 10) /* of each thread */

#define NANOSECONDS INT64_C(1000000000) /* in a second */

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

/* --- threads ------------------------------------------------------------------------- */

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * NANOSECONDS + time.tv_nsec;
}

/* Drop a reference to the pool, and free the pool with the last one.  The caller must hold the
 * mutex, which is unlocked here. */
static void drop_pool(struct pool *pool)
{
    int references = --pool->references;

    pthread_mutex_unlock(&pool->mutex);
    if (references)
        return;
    pthread_mutex_destroy(&pool->mutex);
    PyMem_RawFree(pool);
}

/* Make the eventfd readable if calls have finished, unless that was done since the last collection.
 * The caller must hold the mutex, which is unlocked during the system call. */
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

/* Mark a finished job as answered.  If it is collected, it becomes garbage; but if the pool is
 * closed, its memory is lost.  The caller must hold the mutex. */
static void set_answered(struct pool *pool, struct job *job)
{
    job->is_answered = 1;
    if (job->is_collected && !pool->is_closed) {
        append(&pool->garbage, job);
        atomic_fetch_sub(&pool->pending, 1);
    }
}

/* Make the system call of a job, put the job on the list of finished calls, answer it if it has an
 * answer, and notify the collector.  If the pool is closed before the call, do nothing; if it is
 * closed during the call, do nothing more.  The caller must not hold the mutex; run() returns with
 * the mutex locked. */
static void run(struct pool *pool, struct job *job)
{
    struct answer *answer = job->answer;
    const void *data = job->buffer_count ? job->buffers[0].buf : NULL;
    int64_t since, result;

    since = now();
    result = atomic_load(&pool->stop) ? -ECANCELED : make_call(job, &pool->stop);
    job->result = result;
    job->nanoseconds = now() - since;
    pthread_mutex_lock(&pool->mutex);
    if (pool->is_closed)
        return; /* No thread with the GIL will release the job, so its memory is lost. */
    append(&pool->done, job);
    atomic_fetch_add(&pool->done_count, 1);
    if (answer != NULL) {
        /* Answer before writing to the eventfd, because the kernel waits for the answer. */
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

/* Wait for a job from hand_over(), and return it, with the mutex unlocked.  If the thread must end,
 * return NULL, with the mutex locked.  The caller must hold the mutex. */
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

/* Give a job to the thread that fell asleep last, whose caches are the warmest; NULL makes the
 * thread end.  Return the address for wake().  The caller must hold the mutex, and a thread must be
 * asleep. */
static atomic_int *hand_over(struct pool *pool, struct job *job)
{
    struct sleeper *top = pool->sleepers;

    pool->sleepers = top->below;
    top->job = job;
    atomic_store(&top->is_woken, 1);
    return &top->is_woken;
}

/* Wake the thread that waits at an address.  That thread may have noticed `is_woken` by itself, and
 * gone on.  Then the address may belong to another sleeper, whose thread wakes and waits again. */
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

/* Remove a job from the queue, and return whether it was there.  If it was not, a thread has taken
 * the job, which no longer belongs to the caller.  The caller must hold the mutex. */
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

int pool_queue(struct pool *pool, struct job *job, struct list *garbage)
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
    /* If another thread runs, it takes the job.  If none runs, one may have taken the job and ended
     * meanwhile. */
    if (pool->threads || !withdraw(pool, job))
        failed = 0;
    pthread_mutex_unlock(&pool->mutex);
    return failed;
}

/* --- the threads that hold the GIL --------------------------------------------------- */

struct pool *pool_new(int max_threads, double idle_seconds)
{
    struct pool *pool = PyMem_RawCalloc(1, sizeof *pool);

    if (pool == NULL) {
        errno = ENOMEM;
        return NULL;
    }
    pool->eventfd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (pool->eventfd < 0) {
        PyMem_RawFree(pool);
        return NULL;
    }
    pthread_mutex_init(&pool->mutex, NULL);
    pool->references = 1;
    pool->max_threads = max_threads;
    pool->idle_nanoseconds = (int64_t)(idle_seconds * (double)NANOSECONDS);
    return pool;
}

int pool_eventfd(const struct pool *pool)
{
    return pool->eventfd;
}

long pool_pending(struct pool *pool)
{
    return atomic_load(&pool->pending);
}

int pool_has_finished(struct pool *pool)
{
    return atomic_load(&pool->done_count) > 0;
}

int pool_threads(struct pool *pool)
{
    int threads;

    pthread_mutex_lock(&pool->mutex);
    threads = pool->threads;
    pthread_mutex_unlock(&pool->mutex);
    return threads;
}

struct list pool_take_finished(struct pool *pool, struct list *garbage)
{
    struct list jobs;
    uint64_t count;
    ssize_t length;

    /* Read the eventfd before taking the list.  If a thread writes to the eventfd in between, the
     * event loop wakes once more, and finds no job.  In the other order, the read could consume
     * the notification of a job that was put on the list after the list was taken. */
    length = read(pool->eventfd, &count, sizeof count);
    (void)length; /* fails if nothing has been written */
    pthread_mutex_lock(&pool->mutex);
    jobs = take_all(&pool->done);
    *garbage = take_all(&pool->garbage);
    pool->is_notified = 0;
    atomic_fetch_sub(&pool->done_count, jobs.length);
    pthread_mutex_unlock(&pool->mutex);
    return jobs;
}

void pool_put_back(struct pool *pool, struct list jobs)
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

struct list pool_set_collected(struct pool *pool, struct list jobs)
{
    struct list answered = {0};
    struct job *job;

    pthread_mutex_lock(&pool->mutex);
    while ((job = take_first(&jobs)) != NULL) {
        job->is_collected = 1;
        if (job->is_answered) /* otherwise the thread that answers puts the job on `garbage` */
            append(&answered, job);
    }
    pthread_mutex_unlock(&pool->mutex);
    atomic_fetch_sub(&pool->pending, answered.length);
    return answered;
}

struct list pool_close(struct pool *pool)
{
    struct list released;
    struct job *job;

    pthread_mutex_lock(&pool->mutex);
    pool->is_closed = 1;
    atomic_store(&pool->stop, 1);
    released = take_all(&pool->queue);
    while ((job = take_first(&pool->garbage)) != NULL)
        append(&released, job);
    while ((job = take_first(&pool->done)) != NULL)
        if (job->is_answered) /* otherwise the answer still needs the job's buffer */
            append(&released, job);
    while (pool->sleepers != NULL)
        wake(hand_over(pool, NULL));
    if (!pool->notifiers) {
        close(pool->eventfd);
        pool->eventfd = -1;
    }
    drop_pool(pool);
    return released;
}
