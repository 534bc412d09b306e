/*
 * The pool of threads, as the threads that hold the GIL use it (_iopool.c).
 *
 * No function here touches a Python object, or waits for a call.  When a call has ended, the thread
 * of the pool may *answer* the job: it calls a C function of the job, which replies to a request of
 * the kernel.  A job is *collected* when Python has taken its result.
 *
 * The jobs that a function returns belong to the caller.  So do the jobs in *garbage: they were
 * still being answered when pool_set_collected() was called for them.  To release them, the caller
 * needs the GIL.
 */

#ifndef QEDFUSE_IOPOOL_H
#define QEDFUSE_IOPOOL_H

#include "_iojob.h"

struct pool;

/* Makes a pool of at most `max_threads` threads, each of which ends when it has got no job for
 * `idle_seconds`.  Returns the pool, or NULL with errno. */
struct pool *pool_new(int max_threads, double idle_seconds);

/* Queues a job, which then belongs to the pool, and returns 0.  Wakes or creates a thread if
 * necessary.  If the pool has no thread and cannot create one, returns an errno, and does not queue
 * the job. */
int pool_queue(struct pool *pool, struct job *job, struct list *garbage);

/* Returns the eventfd, which becomes readable when finished jobs can be taken. */
int pool_eventfd(const struct pool *pool);

/* Returns how many jobs have not been collected, or are still being answered. */
long pool_pending(struct pool *pool);

/* Returns whether there are finished jobs that have not been taken. */
int pool_has_finished(struct pool *pool);

/* Returns how many threads the pool has now. */
int pool_threads(struct pool *pool);

/* Takes the finished jobs, and makes the eventfd unreadable.  The caller must pass the jobs to
 * pool_set_collected() or to pool_put_back(). */
struct list pool_take_finished(struct pool *pool, struct list *garbage);

/* Puts jobs back at the beginning of the list of finished jobs. */
void pool_put_back(struct pool *pool, struct list jobs);

/* Marks jobs as collected.  Returns those that the caller must release; the others are still being
 * answered, and become garbage after that. */
struct list pool_set_collected(struct pool *pool, struct list jobs);

/* Closes the pool.  The last of its threads frees its memory; without threads this function does.
 * Calls that no thread has begun are never made.  Calls and answers in progress end somewhat later,
 * and what their jobs hold is never released, because no thread of the pool may touch Python's
 * objects.  Returns all jobs that are not in progress; the caller must release them. */
struct list pool_close(struct pool *pool);

#endif
