/*
 * The pool of threads, as the threads that hold the GIL use it (_iopool.c).
 *
 * No function here touches a Python object, or waits for a call.  The jobs that a function returns belong
 * to the caller.
 */

#ifndef QEDFUSE_IOPOOL_H
#define QEDFUSE_IOPOOL_H

#include "_iojob.h"

struct pool;

/* Makes a pool of at most `max_threads` threads, each of which ends when it has got no job for
 * `idle_seconds`.  Returns the pool, or NULL with errno. */
struct pool *pool_new(int max_threads, double idle_seconds);

/* Queues a job.  Wakes or creates a thread, unless a coming thread will take the job or max_threads
 * threads are busy.  Returns 0; the job then belongs to the pool.  If there is no thread to take the
 * job and none can be created, does not queue the job, and returns an errno.  In both cases the caller
 * must release the jobs in *garbage. */
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
 * pool_set_collected() or to pool_put_back(), and must release the jobs in *garbage. */
struct list pool_take_finished(struct pool *pool, struct list *garbage);

/* Inserts jobs at the beginning of the list of finished jobs again. */
void pool_put_back(struct pool *pool, struct list jobs);

/* Marks jobs as collected.  Returns those that the caller must release; the others are still being
 * answered, and become garbage after that. */
struct list pool_set_collected(struct pool *pool, struct list jobs);

/* Leaves the pool to its threads, the last of which frees it, or frees it if there are none.  Calls
 * that no thread has begun are never made.  Calls and answers in progress end some time later, and
 * what their jobs hold is never released, because no thread of the pool may touch Python's objects.
 * Returns the other jobs, which the caller must release. */
struct list pool_close(struct pool *pool);

#endif
