/*
 * Replies with the pages of a file, which the kernel takes from its page cache (splice(2)), so that
 * it copies the data once instead of twice.
 *
 * If the data may be used only while the file has a certain length, the pages are put into a pipe of
 * this module first, and the length is compared before libfuse passes the pages of the pipe on.
 *
 * Everything happens in the thread of the event loop, with the GIL held.  The functions that other
 * files call are described in _extraops.h.
 */

#include "_extraops.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* cachestat(2), which the headers of Debian 12 lack. */
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

/* Capacity of the pipe in bytes: enough for the pages of the longest reply, which can begin and end
 * within a page. */
#define PIPE_BYTES (2 * MAX_SPLICE_BYTES)

struct page_range {
    uint64_t offset, length;
};

struct page_counts {
    uint64_t cached, dirty, writeback, evicted, recently_evicted;
};

static int can_splice; /* whether libfuse may splice in this session */
static int staging[2] = {-1, -1}; /* the empty pipe of this module, or -1 */

/* Returns whether the page cache holds all of a range, so that a reply with these pages does not
 * wait for the disk.  Returns 0 also if the file ends within the range, or if the kernel cannot
 * say. */
static int is_cached(int fd, off_t offset, size_t size)
{
    struct page_range range = {(uint64_t)offset, size};
    struct page_counts counts;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t pages = ((uint64_t)offset + size - 1) / page - (uint64_t)offset / page + 1;
    struct statx status;

    /* Not fstat(), which would also read the times and so make later writes slower; see
     * size_and_blocks() in hostio/systemcalls.py. */
    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_SIZE, &status) ||
        status.stx_size < (uint64_t)offset + size)
        return 0;
    if (syscall(SYS_cachestat, fd, &range, &counts, 0)) {
        if (errno == ENOSYS) /* before Linux 6.5 */
            can_splice = 0;
        return 0;
    }
    return counts.cached == pages;
}

static void close_pipe(void)
{
    if (staging[0] >= 0) {
        close(staging[0]);
        close(staging[1]);
    }
    staging[0] = staging[1] = -1;
}

/* Makes the pipe unless there is one; returns whether there is one. */
static int open_pipe(void)
{
    if (staging[0] >= 0)
        return 1;
    if (pipe2(staging, O_CLOEXEC | O_NONBLOCK)) {
        staging[0] = staging[1] = -1;
        return 0;
    }
    if (fcntl(staging[1], F_SETPIPE_SZ, PIPE_BYTES) < PIPE_BYTES)
        close_pipe();
    return staging[0] >= 0;
}

/* Puts the pages of a range into the empty pipe; returns whether they are all there, and the file has
 * its length.  If not, the pipe is closed. */
static int stage(int fd, off_t offset, size_t size, off_t file_bytes)
{
    off_t at = offset, end = offset + (off_t)size;

    while (at < end &&
           splice(fd, &at, staging[1], NULL, (size_t)(end - at), SPLICE_F_NONBLOCK) > 0)
        ;
    if (at == end && lseek(fd, 0, SEEK_END) == file_bytes)
        return 1;
    close_pipe();
    return 0;
}

int splice_reply(fuse_req_t request, int fd, off_t offset, size_t size, off_t file_bytes)
{
    struct fuse_bufvec pages = FUSE_BUFVEC_INIT(size);

    if (!can_splice || size < MIN_SPLICE_BYTES || size > MAX_SPLICE_BYTES ||
        !is_cached(fd, offset, size))
        return 0;
    pages.buf[0].flags = FUSE_BUF_IS_FD;
    if (file_bytes == ANY_LENGTH) {
        pages.buf[0].flags |= FUSE_BUF_FD_SEEK;
        pages.buf[0].fd = fd;
        pages.buf[0].pos = offset;
        fuse_reply_data(request, &pages, 0);
        return 1;
    }
    if (!open_pipe() || !stage(fd, offset, size, file_bytes))
        return 0;
    pages.buf[0].fd = staging[0];
    if (fuse_reply_data(request, &pages, 0))
        close_pipe(); /* pages may have stayed in the pipe */
    return 1;
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
