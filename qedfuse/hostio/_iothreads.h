/* The part of an answer that the pool of threads uses.  At the end of a read, a thread of the pool
 * calls `call`, which replies to the request for which the data was read.  The struct is a
 * member of a larger one, which belongs to the module that replies.  See _iothreads.c. */

#ifndef QEDFUSE_IOTHREADS_H
#define QEDFUSE_IOTHREADS_H

struct answer {
    void (*call)(struct answer *self, const void *data, long long result);
};

#endif
