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

/* Return the number of the present session; a request of an earlier one must not be answered. */
unsigned long session_number(void);

/*
 * Keep the session of that number from ending until unlock_session(), and return 1.  Return 0, and
 * keep nothing, if the session has ended.  May be called without the GIL.
 */
int lock_session(unsigned long number);
void unlock_session(void);

/* Replaces read, write and fsync in a copy of pyfuse3's table of operations (_dataops.c). */
void replace_data_operations(struct fuse_lowlevel_ops *table);

/* Sets the three functions that try to answer, or none (_dataops.c). */
PyObject *set_data_handlers(PyObject *module, PyObject *args);

/* Returns a PendingRead for the read that is being handled (_dataops.c). */
PyObject *defer_read(PyObject *module, PyObject *unused);

/* Tries to answer the read that is being handled with the pages of a file (_dataops.c). */
PyObject *reply_from_file(PyObject *module, PyObject *args);

/* Makes the type of deferred reads; returns 0, or -1 with an exception (_dataops.c). */
int make_pending_read_type(void);

#endif
