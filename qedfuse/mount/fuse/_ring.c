/*
 * A queue of reads that the kernel makes while no thread of this process waits for them (io_uring).
 *
 * The submission queue and the completion queue are memory that is shared with the kernel.  Each
 * entry carries a pointer, by which the caller knows the read.  The index of an entry in its queue
 * consists of the lower bits of a counter.
 *
 * If the data is not in the page cache, the kernel asks the disk for it, and returns.  When the
 * data has arrived, there is *work*: copying the data and reporting the end.  The work is done only
 * during ring_run(), by the calling thread (IORING_SETUP_DEFER_TASKRUN), so no signal or interrupt
 * disturbs that thread.  For each piece of work the kernel takes three steps: it adds the work to a
 * list, sets a flag in the shared memory, and writes to an eventfd, which wakes an event loop that
 * sleeps.  It does the last two only if the list was empty.  If ring_run() does the work between
 * the first step and the second, the flag is set for work that is done, and can stay set.  So a
 * caller must not wait until the flag is clear.
 *
 * All functions must be called by the thread that has called ring_open(), as the kernel demands
 * (IORING_SETUP_SINGLE_ISSUER).  The caller must not have more than RING_ENTRIES reads between
 * ring_add() and ring_next().  Then neither queue ever overflows.
 *
 * Linux 6.1 or newer is needed.  The kernel refuses a queue if the administrator or a sandbox
 * forbids io_uring.
 */

#include "_extraops.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What Linux 6.1 has, and headers of older versions lack. */
#ifndef IORING_SETUP_TASKRUN_FLAG
#define IORING_SETUP_TASKRUN_FLAG (1U << 9)
#define IORING_SQ_TASKRUN (1U << 2)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

/* Limits the number of threads of the kernel for reads that it cannot make without a thread
 * (IORING_REGISTER_IOWQ_MAX_WORKERS, Linux 5.15). */
#define REGISTER_MAX_WORKERS 19

static struct {
    int fd; /* -1 while there is no ring */
    int eventfd;
    char *queues; /* the counters, and the completion queue */
    size_t queues_bytes;
    struct io_uring_sqe *submissions;
    size_t submissions_bytes;
    struct io_uring_cqe *completions;
    /* The kernel takes entries at the head of the submission queue, this program at the head of the
     * completion queue. */
    unsigned int *submission_tail, *completion_head, *completion_tail;
    unsigned int *flags; /* IORING_SQ_TASKRUN */
    unsigned int submission_mask, completion_mask;
    unsigned int unsubmitted; /* entries that the kernel has not taken */
} ring = {.fd = -1, .eventfd = -1};

/* Calls io_uring_enter(2); returns its result, or -1 with errno. */
static int enter(unsigned int count, unsigned int flags)
{
    return (int)syscall(SYS_io_uring_enter, ring.fd, count, 0, flags, NULL, 0);
}

/* Maps memory of the ring; returns NULL if that fails. */
static void *map(size_t length, off_t what)
{
    void *found = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd,
                       what);

    return found == MAP_FAILED ? NULL : found;
}

/* Returns the address of a counter, a mask or the flags of the ring. */
static unsigned int *number_at(unsigned int offset)
{
    return (unsigned int *)(ring.queues + offset);
}

/* Maps the queues of a ring that was just made; returns 0, or -1 with errno. */
static int map_queues(const struct io_uring_params *made)
{
    size_t first = made->sq_off.array + made->sq_entries * sizeof(unsigned int);
    size_t second = made->cq_off.cqes + made->cq_entries * sizeof *ring.completions;
    unsigned int *order, at;

    if (!(made->features & IORING_FEAT_SINGLE_MMAP)) { /* one mapping must have both queues */
        errno = ENOSYS;
        return -1;
    }
    ring.queues_bytes = first > second ? first : second;
    ring.queues = map(ring.queues_bytes, IORING_OFF_SQ_RING);
    ring.submissions_bytes = made->sq_entries * sizeof *ring.submissions;
    ring.submissions = map(ring.submissions_bytes, IORING_OFF_SQES);
    if (ring.queues == NULL || ring.submissions == NULL)
        return -1;
    ring.completions = (struct io_uring_cqe *)(ring.queues + made->cq_off.cqes);
    ring.submission_tail = number_at(made->sq_off.tail);
    ring.submission_mask = *number_at(made->sq_off.ring_mask);
    ring.flags = number_at(made->sq_off.flags);
    ring.completion_head = number_at(made->cq_off.head);
    ring.completion_tail = number_at(made->cq_off.tail);
    ring.completion_mask = *number_at(made->cq_off.ring_mask);
    order = number_at(made->sq_off.array); /* order[n]: index of the entry that is taken n-th */
    for (at = 0; at < made->sq_entries; at++)
        order[at] = at;
    return 0;
}

/* Permits only reads and starts the queue; returns 0, or -1 with errno.  The queue needs a limit of
 * its own, because a sandbox's filter of system calls does not see its operations. */
static int restrict_and_enable(void)
{
    struct io_uring_restriction only_reads = {.opcode = IORING_RESTRICTION_SQE_OP,
                                              .sqe_op = IORING_OP_READ};

    if (syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_RESTRICTIONS, &only_reads, 1) < 0)
        return -1;
    return (int)syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}

int ring_open(void)
{
    struct io_uring_params parameters = {.flags = IORING_SETUP_SINGLE_ISSUER |
                                                  IORING_SETUP_DEFER_TASKRUN |
                                                  IORING_SETUP_TASKRUN_FLAG |
                                                  IORING_SETUP_R_DISABLED};
    unsigned int workers[] = {RING_ENTRIES, 0};
    int failed;

    if (ring.fd >= 0) {
        errno = EBUSY;
        return -1;
    }
    ring.fd = (int)syscall(SYS_io_uring_setup, RING_ENTRIES, &parameters);
    if (ring.fd < 0)
        return -1;
    ring.eventfd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ring.eventfd >= 0 && map_queues(&parameters) == 0 &&
        syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_EVENTFD, &ring.eventfd, 1) == 0) {
        /* One thread for each read, so that no read waits for a thread that reads a slow file. */
        syscall(SYS_io_uring_register, ring.fd, REGISTER_MAX_WORKERS, workers, 2);
        if (restrict_and_enable() == 0)
            return ring.eventfd;
    }
    failed = errno;
    ring_close();
    errno = failed;
    return -1;
}

void ring_close(void)
{
    if (ring.queues != NULL)
        munmap(ring.queues, ring.queues_bytes);
    if (ring.submissions != NULL)
        munmap(ring.submissions, ring.submissions_bytes);
    if (ring.eventfd >= 0)
        close(ring.eventfd);
    if (ring.fd >= 0)
        close(ring.fd);
    memset(&ring, 0, sizeof ring);
    ring.fd = ring.eventfd = -1;
}

int ring_is_open(void)
{
    return ring.fd >= 0;
}

void ring_add(void *read, int fd, uint64_t offset, void *data, size_t size)
{
    unsigned int tail = *ring.submission_tail;

    ring.submissions[tail & ring.submission_mask] = (struct io_uring_sqe){
        .opcode = IORING_OP_READ,
        .fd = fd,
        .off = offset,
        .addr = (uint64_t)(uintptr_t)data,
        .len = (unsigned int)size,
        .user_data = (uint64_t)(uintptr_t)read,
    };
    __atomic_store_n(ring.submission_tail, tail + 1, __ATOMIC_RELEASE);
    ring.unsubmitted++;
}

unsigned int ring_unsubmitted(void)
{
    return ring.unsubmitted;
}

int ring_submit(void)
{
    while (ring.unsubmitted) {
        int taken = enter(ring.unsubmitted, 0);
        if (taken > 0)
            ring.unsubmitted -= (unsigned int)taken;
        else if (taken == 0)
            return EAGAIN;
        else if (errno != EINTR)
            return errno;
    }
    return 0;
}

void *ring_take_back(void)
{
    unsigned int tail = *ring.submission_tail - 1;

    if (!ring.unsubmitted)
        return NULL;
    /* The kernel looks at the tail only during enter(), so it cannot have taken the entry. */
    ring.unsubmitted--;
    __atomic_store_n(ring.submission_tail, tail, __ATOMIC_RELEASE);
    return (void *)(uintptr_t)ring.submissions[tail & ring.submission_mask].user_data;
}

int ring_has_work(void)
{
    return (__atomic_load_n(ring.flags, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN) != 0;
}

int ring_run(void)
{
    int failed;

    do
        failed = enter(0, IORING_ENTER_GETEVENTS) < 0 ? errno : 0;
    while (failed == EINTR);
    return !failed && ring_unnotify();
}

int ring_unnotify(void)
{
    uint64_t count;

    return read(ring.eventfd, &count, sizeof count) > 0; /* fails if the eventfd is not readable */
}

void *ring_next(int *result)
{
    unsigned int head = *ring.completion_head;
    struct io_uring_cqe *entry = ring.completions + (head & ring.completion_mask);
    void *read;

    if (head == __atomic_load_n(ring.completion_tail, __ATOMIC_ACQUIRE))
        return NULL;
    read = (void *)(uintptr_t)entry->user_data;
    *result = entry->res;
    __atomic_store_n(ring.completion_head, head + 1, __ATOMIC_RELEASE);
    return read;
}
