/*
 * Finds out whether the page cache has a range of a file, without reading the range.
 *
 * The functions that other files call are described in _extraops.h.
 */

#include "_extraops.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* cachestat(2), which the headers of Debian 12 lack. */
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

/* The maximum number of pages in a read, with the smallest page size. */
#define MAX_PAGES ((1 << 20) / 4096 + 1)

struct page_range {
    uint64_t offset, length;
};

struct page_counts {
    uint64_t cached, dirty, writeback, evicted, recently_evicted;
};

static int has_no_cachestat; /* whether cachestat(2) has failed because the kernel is older than Linux 6.5 */

int can_count_pages(void)
{
    return !has_no_cachestat;
}

/* Counts the pages that the page cache has of a range; returns whether the kernel has counted them. */
static int count_pages(int fd, uint64_t offset, size_t size, struct page_counts *counts)
{
    struct page_range range = {offset, size};

    if (has_no_cachestat)
        return 0;
    if (!syscall(SYS_cachestat, fd, &range, counts, 0))
        return 1;
    has_no_cachestat = errno == ENOSYS;
    return 0;
}

enum pages cached_pages(int fd, uint64_t offset, size_t size)
{
    struct page_counts counts;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t pages = (offset + size - 1) / page - offset / page + 1;

    if (!count_pages(fd, offset, size, &counts))
        return PAGES_UNKNOWN;
    return counts.cached == pages ? PAGES_CACHED : PAGES_MISSING;
}

int are_clean(int fd, uint64_t offset, size_t size)
{
    struct page_counts counts;

    return count_pages(fd, offset, size, &counts) && counts.dirty == 0 && counts.writeback == 0;
}

int has_valid_pages(char *address, uint64_t offset, size_t size)
{
    static unsigned char found[MAX_PAGES];
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint64_t start = offset & ~(uint64_t)(page - 1);
    size_t bytes = (size_t)(offset - start) + size, pages = (bytes + page - 1) / page, at;

    if (address == NULL || pages > MAX_PAGES || mincore(address + start, bytes, found))
        return 0;
    for (at = 0; at < pages; at++)
        if ((found[at] & 1) == 0)
            return 0;
    return 1;
}
