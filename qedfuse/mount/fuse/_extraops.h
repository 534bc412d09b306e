/* What the C files of the extension share. */

#ifndef QEDFUSE_EXTRAOPS_H
#define QEDFUSE_EXTRAOPS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 312
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fuse_lowlevel.h>

/* Makes a Request object, which must answer a request of the kernel; NULL with an exception.  `size`
 * is the length of a read, and 0 for other requests (_extraops.c). */
PyObject *new_request(fuse_req_t request, size_t size);

/* Replaces read, write and fsync in a copy of pyfuse3's table of operations (_dataops.c). */
void replace_data_operations(struct fuse_lowlevel_ops *table);

/* Sets the three functions that try to answer, or none (_dataops.c). */
PyObject *set_data_handlers(PyObject *module, PyObject *args);

/* Returns a Request for the read that is being handled (_dataops.c). */
PyObject *defer_read(PyObject *module, PyObject *unused);

/* Tries to answer the read that is being handled with the pages of a file (_dataops.c). */
PyObject *reply_from_file(PyObject *module, PyObject *args);

/* Takes requests of a session in bursts from now on (_burst.c). */
void begin_bursts(void *session);

/* Takes no more requests, and frees the memory (_burst.c). */
void end_bursts(void);

/* Takes the requests that the kernel has, up to a limit.  The caller must hold the GIL, and must
 * have answered the request that is being handled, or must have made its Request (_burst.c). */
void take_more(void);

/* Returns how many requests were taken in bursts since the last call (_burst.c). */
PyObject *burst_requests(PyObject *module, PyObject *unused);

/* Minimum and maximum length of a read that is answered with the pages of a file.  For shorter
 * ones a copy costs less.  The reply must fit into a pipe, whose size the kernel limits to 1 MiB
 * for most processes. */
#define MIN_SPLICE_BYTES (1 << 15)
#define MAX_SPLICE_BYTES (1 << 19)

/* Answers a read with the pages of a file, if its length permits that and all pages are in the page
 * cache; returns whether it did.  The caller must hold the GIL (_dataops.c). */
int splice_reply(fuse_req_t request, int fd, off_t offset, size_t size);

/* Answers a read whose tables and data are in memory; returns whether it did.  The caller must hold
 * the GIL (_cachedread.c). */
int answer_cached_read(fuse_req_t request, uint64_t handle, off_t start, size_t size);

/* Prepares the following two functions.  Returns 0, or -1 with an exception (_cachedread.c). */
int init_cached_reads(void);

/* Makes a ReadView, by which reads of a disk are answered (_cachedread.c). */
PyObject *read_view(PyObject *module, PyObject *args);

/* Sets the ReadViews by which reads are answered from now on (_cachedread.c). */
PyObject *set_read_views(PyObject *module, PyObject *args);

/* Gives a function the name of one of libfuse's, which callers find in its place. */
#define INTERPOSES(name) __asm__(name) __attribute__((visibility("default")))

/* Returns libfuse's own function of a name that this module defines too; NULL if not found
 * (_extraops.c). */
void *libfuse_function(const char *name);

/* Lets reads of the session's device no longer block (_burst.c). */
PyObject *stop_blocking(PyObject *module, PyObject *unused);

#endif
