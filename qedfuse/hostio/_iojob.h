/* A call on a file, which a thread of the pool makes; and lists of calls. */

#ifndef QEDFUSE_IOJOB_H
#define QEDFUSE_IOJOB_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>
#include <stdint.h>
#include <sys/uio.h>

enum kind { READ, READ_EXPORT, WRITE, DATASYNC, TRUNCATE, FALLOCATE };

struct job {
    struct job *next; /* in the list that holds the job */
    enum kind kind;
    int fd;
    int mode;              /* of fallocate(2) */
    int64_t offset;        /* in the file or the export.  In a TRUNCATE it is the new size.  -1 in a
                            * READ means the position of the descriptor */
    int64_t length;        /* of fallocate(2) */
    struct iovec *parts;   /* what is left to read or write; the array lies behind `buffers` */
    size_t part_count;
    PyObject *tag;         /* what the submitter has given to recognise the call */
    PyObject *capsule;     /* holds the answer; NULL without one */
    struct answer *answer; /* the thread calls it with the result; NULL without one */
    int64_t result;        /* of make_call() */
    int64_t nanoseconds;   /* duration of make_call() */
    int is_collected;      /* under the pool's mutex: the event loop no longer needs the job */
    int is_answered;       /* under the pool's mutex: no answer is running or will run */
    Py_ssize_t buffer_count;
    Py_buffer buffers[];
};

struct list {
    struct job *first, *last;
    Py_ssize_t length;
};

static inline void append(struct list *list, struct job *job)
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
static inline struct job *take_first(struct list *list)
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
static inline struct list take_all(struct list *list)
{
    struct list all = *list;

    *list = (struct list){0};
    return all;
}

/* Makes the system calls of a job; returns the number of bytes read or written (0 for other kinds),
 * or -errno.  After `stop` is set, the descriptor of a file may belong to another file, so no
 * further call is made for a file.  The descriptor of an export stays open until the end. */
int64_t make_call(struct job *job, const atomic_int *stop);

#endif
