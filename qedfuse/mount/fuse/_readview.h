/*
 * The ReadView of a disk: the objects by which the extension finds the disk's data (_readview.c).
 * All functions must be called with the GIL held.
 */

#ifndef QEDFUSE_READVIEW_H
#define QEDFUSE_READVIEW_H

#include "_extraops.h"

/*
 * What locates the data of one disk.  A slice is a part of an L2 table of the top image.  For each
 * slice there is an array of codes, which say for each cluster where a backing file holds it
 * (disk/lookup/flattenedbacking.py).  The table cache keeps such an array as it keeps a slice, with
 * the pair of `codes_key` and the slice's number as its key.
 */
typedef struct {
    PyObject_HEAD
    PyObject *layer;     /* QedLayer: the top image; `header.image_size` is the size of the disk */
    PyObject *keys;      /* dict: slice number -> the slice's key in the table cache, or None if the
                          * disk has no L2 table there */
    PyObject *get_slice; /* returns the slice with a key; None if the slice is not in memory */
    PyObject *codes_key; /* first part of the keys of codes; None without backing files */
    PyObject *epochs;    /* Epochs: a read that waits for the host enters one */
    struct read_file *files; /* the files of the chain, by depth; the top image has depth 0 */
    Py_buffer file_reads;    /* for each file two numbers: of reads, and of bytes (FileReads) */
    uint64_t file_count;
    unsigned int cluster_bits; /* binary logarithm of the cluster size in bytes */
    unsigned int slice_bits;   /* binary logarithm of the number of entries in a slice */
    uint64_t window_start;     /* guest offset of the window, the part of the disk that reads see */
    long long window_bytes;    /* length of the window, within the disk; -1: the whole disk */
    struct in_place_writes *writes; /* NULL if Python must carry out all writes */
    PyObject *cache_key;     /* first part of the keys of slices of the top image's tables, for
                              * lseek(2) (_seek.c); NULL if Python must answer each lseek(2) */
    unsigned int table_bits; /* binary logarithm of the number of entries in a table */
} ReadView;

/* Returns an attribute as a number; -1 with an exception if that fails. */
long long number_attribute(PyObject *object, PyObject *name);

/* Returns a new reference to the view of the disk of a handle or an inode number, if a range lies
 * within the disk or the window.  Otherwise returns NULL; an exception may be set then. */
ReadView *view_with(uint64_t handle, off_t start, size_t size);

/* Returns the size in bytes of the disk, or of the window; -1 with an exception if that fails. */
long long view_size(ReadView *self);

/* Returns the file offset of the L1 table of the top image; -1 with an exception if that fails. */
long long l1_table_offset(ReadView *self);

/* Returns the entries of the slice with a key of the table cache.  Returns NULL if the slice is not
 * in memory or has an invalid entry; an exception may be set then. */
PyObject *valid_entries(ReadView *self, PyObject *key);

/* Finds the place of a range of the disk.  If the range is one run of data in one file, within one
 * slice of the top image, returns 1, and sets `offset` to the file offset of the range, and `depth`
 * to the depth of the file.  Returns 0 for every other range, and if a slice or codes that are
 * needed are not in memory; an exception may be set then. */
int find_range(ReadView *self, uint64_t start, size_t length, uint64_t *offset, uint64_t *depth);

#endif
