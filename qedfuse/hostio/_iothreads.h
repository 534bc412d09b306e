/* What the owner of an answer must know; _iothreads.c says how answers are used. */

#ifndef QEDFUSE_IOTHREADS_H
#define QEDFUSE_IOTHREADS_H

struct answer {
    void (*call)(struct answer *self, const void *data, long long result);
};

#endif
