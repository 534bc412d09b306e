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

/* Returns a Request that must answer `request`; NULL with an exception.  `size` is the length of a
 * read, or 0 for another request (_request.c). */
PyObject *new_request(fuse_req_t request, size_t size);

/* Prepares new_request().  Returns 0, or -1 with an exception (_request.c). */
int init_requests(void);

/* Makes every Request that exists unusable: it can answer no more.  Called when a session begins
 * and when it ends (_request.c). */
void forget_requests(void);

/* Replaces init, read, write and fsync in a copy of pyfuse3's table of operations (_dataops.c). */
void replace_data_operations(struct fuse_lowlevel_ops *table);

/* Returns whether a table has the init of _dataops.c, which calls limit_reads(). */
int has_own_init(const struct fuse_lowlevel_ops *table);

/* Sets the Python functions for reads, writes and fsyncs; None for no function (_dataops.c). */
PyObject *set_data_handlers(PyObject *module, PyObject *args);

/* Returns a Request for the read that is being handled (_dataops.c). */
PyObject *defer_read(PyObject *module, PyObject *unused);

/* Tries to splice the pages of a file into the answer to the current read (_dataops.c). */
PyObject *reply_from_file(PyObject *module, PyObject *args);

/* Takes requests of a session in bursts from now on: several in a row, without going back to
 * pyfuse3's loop (_burst.c). */
void begin_bursts(void *session);

/* Allocates memory for requests of bursts; writes have at most `max_write` bytes (_burst.c). */
void reserve_request_memory(size_t max_write);

/* Takes no more requests, and frees the memory (_burst.c). */
void end_bursts(void);

/* Takes waiting requests and, while polling is permitted, those that arrive soon, up to a limit.
 * The caller must hold the GIL.  It must have answered or queued the request that is being handled,
 * or have made a Request for it (_burst.c). */
void take_more(void);

/* Returns how many requests were taken in bursts since the last call (_burst.c). */
PyObject *take_burst_count(PyObject *module, PyObject *unused);

/* Permits bursts to poll for requests (_burst.c). */
PyObject *permit_polling(PyObject *module, PyObject *args);

/* Forbids bursts to poll for requests (_burst.c). */
PyObject *forbid_polling(PyObject *module, PyObject *unused);

/* Returns how many seconds the last poll took.  Returns 0 if a request has come since the poll
 * began, or if an earlier call has returned the seconds of this poll (_burst.c). */
PyObject *take_polled_seconds(PyObject *module, PyObject *unused);

/* Minimum and maximum length of a read that is answered with the pages of a file, by splice(2).  To
 * copy a shorter reply costs less than to splice it.  A pipe of 1 MiB, the usual limit, may be too
 * small for a longer reply. */
#define MIN_SPLICE_BYTES (1 << 15)
#define MAX_SPLICE_BYTES (1 << 19)

/* Returns whether a read of a length may be answered with the pages of a file (_splice.c). */
int may_splice(size_t size);

/* Answers a read with the pages of a file, if may_splice() and may_splice_pages(), whose `flags`
 * these are.  Returns whether the read was answered.  The caller must hold the GIL (_splice.c). */
int splice_reply(fuse_req_t request, int fd, int flags, off_t offset, size_t size);

/* Returns `changed`, filled with arguments for fuse_session_new() that limit reads to
 * MAX_SPLICE_BYTES; the caller frees it.  Returns `given` if it has the limit already, or if memory
 * is lacking.  The table of operations must have the init of _dataops.c (_maxread.c). */
struct fuse_args *limited_arguments(struct fuse_args *given, struct fuse_args *changed);

/* Sets the limit for libfuse, if the arguments of the session have it (_maxread.c). */
void limit_reads(struct fuse_conn_info *connection);

/* Permits answers with pages, for the reads of a new session (_splice.c). */
void begin_splicing(void);

/* Lets no further read be answered with pages (_splice.c). */
void end_splicing(void);

/* What the page cache has of a range; PAGES_UNKNOWN if the kernel does not say. */
enum pages { PAGES_MISSING, PAGES_CACHED, PAGES_UNKNOWN };

/* Returns whether the page cache has a page for each byte of a range.  A page may be invalid: the
 * kernel still reads it, or has failed to write it.  A read with RWF_NOWAIT stops at such a page,
 * but splice(2) makes the kernel read it again (_pagecache.c). */
enum pages cached_pages(int fd, uint64_t offset, size_t size);

/* Returns whether no page of a range is dirty or being written; 0 if unknown (_pagecache.c). */
int are_clean(int fd, uint64_t offset, size_t size);

/* Returns 0 after a call has shown that the kernel lacks cachestat(2); 1 before (_pagecache.c). */
int can_count_pages(void);

/* Returns whether the page cache has a valid page for each byte of a range of at most 1 MiB, of a
 * file that is mapped at `address`; 0 if that is NULL.  Slower than cached_pages()
 * (_pagecache.c). */
int has_valid_pages(char *address, uint64_t offset, size_t size);

/* Returns whether splice(2) of a range will not wait, as far as that can be known; `flags` are those
 * with which a read does not wait.  The caller must hold the GIL (_validpages.c). */
int may_splice_pages(int fd, int flags, uint64_t offset, size_t size);

/* Records that a read with such flags has returned all bytes of a range (_validpages.c). */
void note_valid_pages(int fd, uint64_t offset, size_t size);

/* Drops all that note_valid_pages() has recorded.  Call it when a request has to wait for the host,
 * and when a descriptor can have got another file (_validpages.c). */
void forget_valid_pages(void);

/* What became of an attempt to answer a read from the page cache.  NOT_ALLOWED: nothing was read.
 * NOT_CACHED: data is missing or unusable.  FAILED: an error, or a file with checked units has
 * changed its length or lost a page. */
enum attempt { NOT_ALLOWED, ANSWERED, NOT_CACHED, FAILED };

/* What became of a read that _cachedread.c has tried to answer. */
enum cached_read { PASSED_ON, REPLIED, QUEUED };

/* Answers a read from memory, or queues it if only its tables are in memory.  The caller must hold
 * the GIL (_cachedread.c). */
enum cached_read answer_cached_read(fuse_req_t request, fuse_ino_t inode, uint64_t handle, off_t start,
                                    size_t size);

/* The operations that are counted here, in the order of OPERATIONS in requestcounters.py. */
enum operation { COUNT_READ, COUNT_WRITE, COUNT_FLUSH };

/* Returns the time of CLOCK_MONOTONIC in nanoseconds (_counters.c). */
int64_t monotonic_time(void);

/* Returns the start time for count_fast(); 0 if the request is not timed (_counters.c). */
int64_t sampled_start(fuse_ino_t inode, enum operation operation);

/* Counts a request that did not wait; `start` is from sampled_start() (_counters.c). */
void count_fast(fuse_ino_t inode, enum operation operation, size_t size, int64_t start);

/* Counts a request that had to wait; `start` is from monotonic_time() (_counters.c). */
void count_waited(fuse_ino_t inode, enum operation operation, size_t size, int64_t start);

/* Sets the first counted inode, and the arrays of counts from this inode on (_counters.c). */
PyObject *set_counters(PyObject *module, PyObject *args);

/* What the extension needs to write to a disk, from an InPlaceWrites (datapath/readtables.py). */
struct in_place_writes;

/* Makes the struct, which free_writes() frees; NULL with an exception (_inplacewrite.c). */
struct in_place_writes *make_writes(PyObject *source);

/* Frees the struct, which may be NULL (_inplacewrite.c). */
void free_writes(struct in_place_writes *writes);

/* Where the bytes of a write belong. */
struct write_place {
    PyObject *view; /* ReadView, which keeps `writes`; the caller must release this reference */
    const struct in_place_writes *writes;
    uint64_t offset; /* offset in the file of the top image */
};

/* Finds where the top image has a range as one run, if the extension writes to this disk.  Returns
 * 1 and sets `place`; or returns 0, perhaps with an exception (_readview.c). */
int find_allocated(uint64_t handle, off_t start, size_t size, struct write_place *place);

/* Writes all of `data` at a guest offset, and returns 1; or returns 0, and may have written a part.
 * The caller must hold the GIL (_inplacewrite.c). */
int write_in_place(uint64_t handle, const char *data, size_t size, off_t start);

/* Prepares write_in_place().  Returns 0, or -1 with an exception (_inplacewrite.c). */
int init_in_place_writes(void);

/* Returns whether may_seek(inode) permits an lseek; 0 if it raises.  The caller must hold the
 * GIL (_extraops.c). */
int is_seek_permitted(fuse_ino_t inode);

/* Answers lseek(2) for data or holes, if is_seek_permitted(), and returns 1; or returns 0 without
 * an answer.  The caller must hold the GIL (_seek.c). */
int answer_seek(fuse_req_t request, fuse_ino_t inode, int whence, off_t start);

/* Prepares answer_cached_read().  Returns 0, or -1 with an exception (_cachedread.c). */
int init_cached_reads(void);

/* Prepares read_view() and set_read_views().  Returns 0, or -1 with an exception (_readview.c). */
int init_read_views(void);

/* Makes a ReadView, by which requests to a disk are answered (_readview.c). */
PyObject *read_view(PyObject *module, PyObject *args);

/* Sets the ReadViews by which requests are answered from now on (_readview.c). */
PyObject *set_read_views(PyObject *module, PyObject *args);

/* The parts of a file that may be read, as CheckedUnits describes them (hostio/pagesource.py). */
struct checked_units {
    Py_buffer ready;        /* for each unit 0 if it may not be read; `obj` is NULL if the whole file may */
    Py_buffer zero_blocks;  /* for each unit the blocks known to be all zeros; may lack the last units */
    unsigned int unit_bits; /* binary logarithm of the number of bytes in a unit */
    uint64_t content_bytes; /* offset at which the readable part of the file ends */
    off_t file_bytes;       /* length while one process uses the file; with several it has 1 byte more */
    char *address;          /* address of a mapping of the file, for mincore(2) */
    off_t seen_bytes;       /* length of the file when it was looked at last */
    PyObject *forget;       /* called with the first and the last unit of a read that failed */
};

/* Fills a zeroed struct from a CheckedUnits of the file `fd`.  Returns 0, or -1 with an exception
 * (_checkedunits.c). */
int fill_units(struct checked_units *units, PyObject *source, int fd);

/* Releases the references that units hold (_checkedunits.c). */
void clear_units(struct checked_units *units);

/* Returns whether a file has checked units; if not, all of it may be read (_checkedunits.c). */
int has_units(const struct checked_units *units);

/* Returns whether the file's length is valid and has not changed since the last call (at first:
 * since fill_units()).  Call it after a read, and use the bytes only if it returns true: another
 * length can mean that the file was cut (_checkedunits.c). */
int keeps_length(struct checked_units *units, int fd);

/* Returns whether the page cache has all of a range.  Then a read brings no unchecked bytes into
 * the page cache, where another process could read them (_checkedunits.c). */
int may_try_units(const struct checked_units *units, int fd, uint64_t offset, size_t size);

/* Answers a read with pages, after may_try_units() was true.  Returns NOT_ALLOWED, and has read
 * nothing, if may_splice() is false or there is no pipe.  Returns FAILED if the length has changed
 * or a page is missing.  The caller must hold the GIL (_splice.c). */
enum attempt splice_units(fuse_req_t request, struct checked_units *units, int fd, off_t offset,
                          size_t size);

/* Returns whether the extension may read a range: its units are ready, and the read need not start
 * the fetch of later units for a sequential reader (_checkedunits.c). */
int may_read_units(const struct checked_units *units, uint64_t offset, size_t size);

/* Returns whether a range whose content is `data` may have a hole (_checkedunits.c). */
int may_have_holes(const struct checked_units *units, const char *data, uint64_t offset, size_t size);

/* Makes the units of a failed read not ready: the bytes that the kernel now brings into the page
 * cache are unchecked.  May set an exception (_checkedunits.c). */
void forget_units(const struct checked_units *units, uint64_t offset, size_t size);

/* Where other files have the bytes of a file, as StoredRuns describes it (hostio/pagesource.py). */
struct stored_runs {
    Py_buffer cells;         /* `obj` is NULL if the file has its bytes itself */
    uint64_t capacity;       /* maximum number of runs */
    struct read_file *files; /* the files to which the runs refer */
    uint64_t file_count;
};

/* A file of a chain, as a PageSource describes it (hostio/pagesource.py). */
struct read_file {
    PyObject *policy; /* ReadPolicy; NULL if the extension must not read the file */
    int fd;
    unsigned int queued; /* number of queued reads */
    int flags;           /* of preadv2(), with which a read does not wait */
    struct checked_units units;
    struct stored_runs runs;
};

/* Fills an array with a file for each PageSource or None of a tuple.  Returns the array, which
 * free_files() frees, or NULL with an exception (_readfiles.c). */
struct read_file *make_files(PyObject *sources);

/* Frees an array of files, which may be NULL (_readfiles.c). */
void free_files(struct read_file *files, uint64_t count);

/* Returns the file that stores a range of `file` as one run, and changes `offset` to the offset in
 * it; NULL if no such file is known.  A file without runs stores its bytes itself
 * (_readfiles.c). */
struct read_file *storing_file(struct read_file *file, uint64_t *offset, size_t size);

/* Where the bytes of a read are. */
struct read_place {
    PyObject *view; /* ReadView, which keeps the other objects */
    struct read_file *file;
    PyObject *epochs; /* Epochs */
    uint64_t offset;  /* file offset */
    uint64_t *counts; /* two numbers for the file: of reads, and of bytes that were read */
};

/* Counts a read of `size` bytes of the file at a place (_cachedread.c). */
void count_file_read(const struct read_place *place, size_t size);

/* Queues a read for end_queued_reads() and returns 1; or returns 0, perhaps with an exception.
 * `start` is the guest offset.  `was_tried` says that the page cache lacks the data.  The caller
 * must hold the GIL, and call end_queued_reads() after the burst (_queuedread.c). */
int queue_read(fuse_req_t request, fuse_ino_t inode, uint64_t handle, off_t start, size_t size,
               struct read_place place, int was_tried);

/* Submits the reads that were queued, and answers those that have ended.  The caller must hold the
 * GIL (_queuedread.c). */
void end_queued_reads(void);

/* Prepares queue_read() and end_queued_reads().  Returns 0, or -1 with an exception (_queuedread.c). */
int init_queued_reads(void);

/* Makes the queue, and returns the eventfd that becomes readable when reads have ended
 * (_queuedread.c). */
PyObject *open_read_queue(PyObject *module, PyObject *args);

/* Removes the queue, which must be empty (_queuedread.c). */
PyObject *close_read_queue(PyObject *module, PyObject *unused);

/* Calls end_queued_reads() (_queuedread.c). */
PyObject *py_end_queued_reads(PyObject *module, PyObject *unused);

/* Returns how many reads are in the queue (_queuedread.c). */
PyObject *queued_reads(PyObject *module, PyObject *unused);

/* Maximum number of reads in the ring, an io_uring(7) for reads of files. */
#define RING_ENTRIES 256

/* Makes the ring; returns its eventfd, or -1 with errno (_ring.c). */
int ring_open(void);

/* Removes the ring, if there is one; the kernel must have ended all reads (_ring.c). */
void ring_close(void);

/* Returns whether there is a ring (_ring.c). */
int ring_is_open(void);

/* Adds a read of `size` bytes of a file, which ring_submit() passes to the kernel.  `read` is what
 * ring_next() returns after the end of the read (_ring.c). */
void ring_add(void *read, int fd, uint64_t offset, void *data, size_t size);

/* Returns the number of reads that were added and not submitted (_ring.c). */
unsigned int ring_unsubmitted(void);

/* Passes to the kernel all reads that were added.  The kernel begins to make them.  Returns 0, or an
 * errno if the kernel has not taken all of them (_ring.c). */
int ring_submit(void);

/* Removes and returns the read that was added last and not submitted; NULL if there is none
 * (_ring.c). */
void *ring_take_back(void);

/* Returns whether there may be work for ring_run() (_ring.c). */
int ring_has_work(void);

/* Completes reads whose data has arrived, and returns ring_unnotify(); 0 if the kernel refuses, as
 * for a thread that has not called ring_open() (_ring.c). */
int ring_run(void);

/* Empties the eventfd; returns whether it was readable.  If so, there may be work, so the caller
 * must call ring_has_work() next (_ring.c). */
int ring_unnotify(void);

/* Returns a read that has ended, and sets `result` to its bytes or a negative errno; NULL if there
 * is none (_ring.c). */
void *ring_next(int *result);

/* Returns the number of the session that exists now (_request.c). */
unsigned long current_session(void);

/* A name of a Python attribute, and the variable that gets the interned string. */
struct interned_name {
    PyObject **variable;
    const char *name;
};

/* Sets the variables of `count` names.  Returns 0, or -1 with an exception (_extraops.c). */
int intern_names(const struct interned_name *names, size_t count);

/* Gives a function the name of one of libfuse, so that callers call this one. */
#define INTERPOSES(name) __asm__(name) __attribute__((visibility("default")))

/* Returns libfuse's own function of a name; NULL if not found (_extraops.c). */
void *libfuse_function(const char *name);

/* Makes reads of the session's device non-blocking; returns whether that was possible (_burst.c). */
PyObject *stop_blocking(PyObject *module, PyObject *unused);

#endif
