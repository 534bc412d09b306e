/*
 * Does the work of a job of the thread pool: a system call on a file, or a read from an NBD server.
 *
 * This code runs without the GIL and without the pool's mutex.
 */

#include "_iojob.h"

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_PARTS 1024                    /* maximum number of buffers in one system call: IOV_MAX */
#define MAX_EXPORT_READ_BYTES (32u << 20) /* longest read that an NBD server allows by default */

/* Leave out the first `count` bytes of the parts of a job. */
static void skip(struct job *job, size_t count)
{
    while (job->part_count && count >= job->parts->iov_len) {
        count -= job->parts->iov_len;
        job->parts++;
        job->part_count--;
    }
    if (job->part_count) {
        job->parts->iov_base = (char *)job->parts->iov_base + count;
        job->parts->iov_len -= count;
    }
}

/* Read or write all parts of a job; return the number of bytes, or -errno.  A read ends early at
 * the end of the file.  If `stop` is set and bytes are left, the result is -ECANCELED. */
static int64_t transfer(struct job *job, const atomic_int *stop)
{
    int64_t total = 0;

    skip(job, 0); /* leaves out empty parts at the beginning */
    while (job->part_count) {
        int count = job->part_count < MAX_PARTS ? (int)job->part_count : MAX_PARTS;
        off_t offset = (off_t)(job->offset + total);
        ssize_t moved;

        if (job->kind == WRITE)
            moved = pwritev(job->fd, job->parts, count, offset);
        else /* the offset -1 stands for the position of the descriptor; a pipe needs this */
            moved = preadv2(job->fd, job->parts, count, job->offset == -1 ? -1 : offset, 0);
        if (moved < 0 && errno != EINTR)
            return -errno;
        if (moved == 0) {
            if (job->kind == READ)
                break;
            return -EIO; /* the kernel has accepted nothing, and has reported no error */
        }
        if (moved > 0) {
            total += moved;
            skip(job, (size_t)moved);
        }
        if (job->part_count && atomic_load(stop))
            return -ECANCELED;
    }
    return total;
}

/* Receive exactly `length` bytes from a socket; return 0, or -errno. */
static int receive(int fd, void *buffer, size_t length)
{
    while (length) {
        ssize_t received = recv(fd, buffer, length, MSG_WAITALL);

        if (received < 0 && errno != EINTR)
            return -errno;
        if (received == 0)
            return -ECONNRESET;
        if (received > 0) {
            buffer = (char *)buffer + received;
            length -= (size_t)received;
        }
    }
    return 0;
}

/* Read from an export of an NBD server into a job's only buffer; return the number of bytes, or
 * -errno.  After an error the connection must not be used again.  No other thread may use the
 * connection during the call, and the server must send simple replies. */
static int64_t read_export(struct job *job)
{
    size_t length = job->parts->iov_len;
    struct __attribute__((packed)) {
        uint32_t magic;
        uint16_t flags, command;
        uint64_t cookie, offset;
        uint32_t length;
    } request = {
        .magic = htobe32(0x25609513),
        .cookie = htobe64((uint64_t)job->offset),
        .offset = htobe64((uint64_t)job->offset),
        .length = htobe32((uint32_t)length),
    };
    struct __attribute__((packed)) {
        uint32_t magic, error;
        uint64_t cookie;
    } reply;
    ssize_t sent;
    int failed;

    if (length == 0 || length > MAX_EXPORT_READ_BYTES)
        return -EINVAL;
    do
        sent = send(job->fd, &request, sizeof request, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent != (ssize_t)sizeof request)
        return sent < 0 ? -errno : -EIO;
    failed = receive(job->fd, &reply, sizeof reply);
    if (failed)
        return failed;
    if (reply.magic != htobe32(0x67446698) || reply.cookie != request.cookie || reply.error)
        return -EIO;
    failed = receive(job->fd, job->parts->iov_base, length);
    return failed ? failed : (int64_t)length;
}

int64_t make_call(struct job *job, const atomic_int *stop)
{
    int failed;

    if (job->kind == READ || job->kind == WRITE)
        return transfer(job, stop);
    if (job->kind == READ_EXPORT)
        return read_export(job);
    do {
        if (job->kind == DATASYNC)
            failed = fdatasync(job->fd);
        else if (job->kind == TRUNCATE)
            failed = ftruncate(job->fd, (off_t)job->offset);
        else
            failed = fallocate(job->fd, job->mode, (off_t)job->offset, (off_t)job->length);
    } while (failed && errno == EINTR && !atomic_load(stop));
    return failed ? -errno : 0;
}
