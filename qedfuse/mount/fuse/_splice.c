/*
 * Replies with the pages of a file, which the kernel takes from its page cache (splice(2)), so that
 * the data is copied once instead of twice.
 *
 * The pages are put into a pipe first, and libfuse passes them on only if the pipe has them all.  If
 * libfuse took them from the file, it would answer with the first part of a range whose second part
 * cannot be read, and the kernel would take the missing bytes for zeros, or for the end of the disk.
 * A file that caches a remote file (CheckedUnits in hostio/pagesource.py) may be cut at any time.
 * So its length is checked (keeps_length()) between the two steps.
 *
 * Everything happens in the thread of the event loop, with the GIL held.  The functions that other
 * files call are described in _extraops.h.
 */

#include "_extraops.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/* Capacity of the pipe in bytes, a power of two.  The longest reply needs one page more than its
 * length if it begins within a page. */
#define PIPE_BYTES (2 * MAX_SPLICE_BYTES)

static int can_splice; /* whether libfuse may splice in this session */
static int staging[2] = {-1, -1}; /* the empty pipe of this module, or -1 */

int may_splice(size_t size)
{
    return can_splice && can_count_pages() && size >= MIN_SPLICE_BYTES && size <= MAX_SPLICE_BYTES;
}

static void close_pipe(void)
{
    if (staging[0] >= 0) {
        close(staging[0]);
        close(staging[1]);
    }
    staging[0] = staging[1] = -1;
}

/* Makes the pipe unless it exists; returns whether it exists now. */
static int open_pipe(void)
{
    if (staging[0] >= 0)
        return 1;
    if (pipe2(staging, O_CLOEXEC | O_NONBLOCK)) {
        staging[0] = staging[1] = -1;
        return 0;
    }
    if (fcntl(staging[1], F_SETPIPE_SZ, PIPE_BYTES) < PIPE_BYTES) {
        close_pipe();
        can_splice = 0; /* a limit for the pipes of this user; each attempt costs six system calls */
    }
    return staging[0] >= 0;
}

/* Puts the pages of a range into the empty pipe; returns whether the pipe has all of them. */
static int stage(int fd, off_t offset, size_t size)
{
    off_t at = offset, end = offset + (off_t)size;

    while (at < end &&
           splice(fd, &at, staging[1], NULL, (size_t)(end - at), SPLICE_F_NONBLOCK) > 0)
        ;
    return at == end;
}

/* Answers with the pages in the pipe, which has exactly `size` bytes. */
static void reply_staged(fuse_req_t request, size_t size)
{
    struct fuse_bufvec pages = FUSE_BUFVEC_INIT(size);
    char rest;

    pages.buf[0].flags = FUSE_BUF_IS_FD;
    pages.buf[0].fd = staging[0];
    fuse_reply_data(request, &pages, 0);
    /* The pages stay in the pipe if libfuse has answered with an error, for example because memory
     * was lacking.  It returns 0 even then, so its result is of no use. */
    if (read(staging[0], &rest, 1) >= 0 || errno != EAGAIN)
        close_pipe();
}

int splice_reply(fuse_req_t request, int fd, int flags, off_t offset, size_t size)
{
    if (!may_splice(size) || !may_splice_pages(fd, flags, (uint64_t)offset, size) || !open_pipe())
        return 0;
    if (!stage(fd, offset, size)) {
        close_pipe();
        forget_valid_pages();
        return 0;
    }
    reply_staged(request, size);
    return 1;
}

enum attempt splice_units(fuse_req_t request, struct checked_units *units, int fd, off_t offset,
                          size_t size)
{
    if (!may_splice(size) || !open_pipe())
        return NOT_ALLOWED;
    if (!stage(fd, offset, size) || !keeps_length(units, fd)) {
        close_pipe();
        return FAILED;
    }
    reply_staged(request, size);
    return ANSWERED;
}

void begin_splicing(void)
{
    can_splice = 1;
}

void end_splicing(void)
{
    can_splice = 0;
    close_pipe();
}
