/*
 * Finds out whether splice(2) would wait for a page of a range.
 *
 * cachestat(2) also counts pages that are not valid: the kernel is still reading them, or could not
 * read them.  splice(2) waits for the first and reads the second again.  Both would stop the event
 * loop, and thus all disks of the mount, for as long as the host's disk does not answer.
 *
 * A read with RWF_NOWAIT that returns all bytes shows that their pages are valid.  They stay valid
 * until they leave the page cache, which cachestat(2) reports, unless they have come back before it
 * is called.  A read has brought them back then.  If that was a request of this mount, the request
 * had to wait, and so all that is known about pages is dropped whenever a request has to wait.  If it
 * was read-ahead or a read of another program that goes on still, it has not reached the end of the
 * range in most cases.  So the last byte is read, too.
 *
 * For a long range that has not been read yet, mincore(2) on a mapping says which pages are valid.
 *
 * The functions that other files call are described in _extraops.h.
 */

#include "_extraops.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The minimum length for which a mapping costs less than a copy of the data. */
#define MIN_LOOK_BYTES (1 << 18)

#define GROUP_PAGES 64
#define GROUPS (1 << 15) /* 8 GiB of pages of 4 KiB */

/* Pages that are known to be valid. */
struct group {
    uint64_t generation; /* the group is empty unless this is the present generation */
    uint64_t key;        /* see key_of() */
    uint64_t pages;      /* a bit for each page */
};

static struct group groups[GROUPS];
static uint64_t generation = 1;

#define FD_BITS 20

static uint64_t key_of(int fd, uint64_t number)
{
    return number << FD_BITS | (uint64_t)fd;
}

static struct group *group_at(int fd, uint64_t number)
{
    return groups + ((number ^ (uint64_t)fd << 7) & (GROUPS - 1));
}

/* Returns the bits of the pages `first` to `last` (inclusive) that lie in the group `number`. */
static uint64_t bits_of(uint64_t number, uint64_t first, uint64_t last)
{
    uint64_t begin = number * GROUP_PAGES, bits = ~(uint64_t)0;

    if (first > begin)
        bits <<= first - begin;
    if (last < begin + GROUP_PAGES - 1)
        bits &= ~(uint64_t)0 >> (begin + GROUP_PAGES - 1 - last);
    return bits;
}

static uint64_t page_of(uint64_t offset)
{
    return offset / (uint64_t)sysconf(_SC_PAGESIZE);
}

void note_valid_pages(int fd, uint64_t offset, size_t size)
{
    uint64_t first = page_of(offset), last = page_of(offset + size - 1), number;
    struct group *group;

    if (fd >> FD_BITS)
        return;
    for (number = first / GROUP_PAGES; number <= last / GROUP_PAGES; number++) {
        group = group_at(fd, number);
        if (group->generation != generation || group->key != key_of(fd, number))
            *group = (struct group){generation, key_of(fd, number), 0};
        group->pages |= bits_of(number, first, last);
    }
}

void forget_valid_pages(void)
{
    generation++;
}

/* Returns whether each page of a range was found valid once since the last request that had to
 * wait. */
static int were_valid(int fd, uint64_t offset, size_t size)
{
    uint64_t first = page_of(offset), last = page_of(offset + size - 1), number, bits;
    const struct group *group;

    if (fd >> FD_BITS)
        return 0;
    for (number = first / GROUP_PAGES; number <= last / GROUP_PAGES; number++) {
        group = group_at(fd, number);
        bits = bits_of(number, first, last);
        if (group->generation != generation || group->key != key_of(fd, number) ||
            (group->pages & bits) != bits)
            return 0;
    }
    return 1;
}

/* Returns whether the last byte of a range can be read without waiting. */
static int has_end(int fd, int flags, uint64_t offset, size_t size)
{
    char byte;
    struct iovec vector = {&byte, 1};

    return preadv2(fd, &vector, 1, (off_t)(offset + size - 1), flags) == 1;
}

/* Returns whether mincore(2) says which pages of a file are valid.  To a process that neither owns
 * the file nor may write to it, it reports every page as valid (can_do_mincore() in mm/mincore.c). */
static int may_look(int fd)
{
    struct statx status;

    /* Not fstat(), which would also read the times and so make later writes slower; see
     * size_and_blocks() in hostio/systemcalls.py. */
    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_UID, &status))
        return 0;
    return status.stx_uid == geteuid() ||
           !syscall(SYS_faccessat2, fd, "", W_OK, AT_EMPTY_PATH | AT_EACCESS);
}

/* Returns whether a mapping shows that all pages of a range are valid. */
static int look(int fd, uint64_t offset, size_t size)
{
    uint64_t within = offset & ((uint64_t)sysconf(_SC_PAGESIZE) - 1);
    size_t bytes = (size_t)within + size;
    char *address;
    int are_valid;

    if (!may_look(fd))
        return 0;
    /* Only the range, because the address space may be too small for the whole file. */
    address = mmap(NULL, bytes, PROT_NONE, MAP_SHARED, fd, (off_t)(offset - within));
    if (address == MAP_FAILED)
        return 0;
    are_valid = has_valid_pages(address, within, size);
    munmap(address, bytes);
    return are_valid;
}

int may_splice_pages(int fd, int flags, uint64_t offset, size_t size)
{
    if (were_valid(fd, offset, size))
        return cached_pages(fd, offset, size) == PAGES_CACHED && has_end(fd, flags, offset, size);
    if (size < MIN_LOOK_BYTES || cached_pages(fd, offset, size) != PAGES_CACHED ||
        !look(fd, offset, size))
        return 0;
    note_valid_pages(fd, offset, size);
    return 1;
}
