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

/* Replaces read, write and fsync in a copy of pyfuse3's table of operations (_dataops.c). */
void replace_data_operations(struct fuse_lowlevel_ops *table);

/* Sets the three functions that try to answer, or none (_dataops.c). */
PyObject *set_data_handlers(PyObject *module, PyObject *args);

#endif
