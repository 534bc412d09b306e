/* The baseline: a pass-through file system for flat files, to measure FUSE itself.
 *
 *     passthrough FILE... MOUNTPOINT     serves MOUNTPOINT/disk0.raw, ... until unmounted
 *
 * It avoids all costs that a server can avoid: it uses libfuse's low-level interface, no
 * path lookups, requests of up to 1 MiB, the kernel's write-back cache, names and attributes
 * that never expire, and one buffer per thread for all answers.  What remains is the way from
 * the kernel and back, and one system call on a flat file.
 *
 * It has one thread, unless the environment variable THREADS is "many", which the benchmark
 * sets for concurrent requests, where threads pay off.  As in qedfuse, data goes through
 * memory and not through pipes.
 */
#define FUSE_USE_VERSION 312
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { FIRST_INODE = 2, MAX_FILES = 16, MAX_REQUEST_BYTES = 1 << 20 };

static const double FOREVER = 86400.0;
static const char NAME[] = "disk%d.raw";

static int files[MAX_FILES];
static int file_count;
static _Thread_local char *answer; /* MAX_REQUEST_BYTES, allocated by a thread's first read */

static int descriptor(fuse_ino_t inode)
{
    return files[inode - FIRST_INODE];
}

static void describe(fuse_ino_t inode, struct stat *what)
{
    if (fstat(inode == FUSE_ROOT_ID ? files[0] : descriptor(inode), what) != 0)
        memset(what, 0, sizeof *what);
    what->st_ino = inode;
    if (inode == FUSE_ROOT_ID) {
        what->st_mode = S_IFDIR | 0755;
        what->st_nlink = 2;
        what->st_size = 0;
    } else {
        what->st_mode = S_IFREG | 0644;
    }
}

static void on_init(void *data, struct fuse_conn_info *connection)
{
    (void)data;
    if (connection->capable & FUSE_CAP_WRITEBACK_CACHE)
        connection->want |= FUSE_CAP_WRITEBACK_CACHE;
    connection->max_read = MAX_REQUEST_BYTES; /* as in the options, or libfuse refuses */
    connection->max_write = MAX_REQUEST_BYTES;
    connection->max_readahead = MAX_REQUEST_BYTES;
    connection->max_background = 64;
    connection->congestion_threshold = 48;
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
    struct fuse_entry_param entry = {.attr_timeout = FOREVER, .entry_timeout = FOREVER};
    char known[32];
    int number;

    for (number = 0; parent == FUSE_ROOT_ID && number < file_count; number++) {
        snprintf(known, sizeof known, NAME, number);
        if (strcmp(name, known) == 0) {
            entry.ino = FIRST_INODE + number;
            describe(entry.ino, &entry.attr);
            fuse_reply_entry(request, &entry);
            return;
        }
    }
    fuse_reply_err(request, ENOENT);
}

static void on_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    struct stat what;

    (void)info;
    describe(inode, &what);
    fuse_reply_attr(request, &what, FOREVER);
}

static void on_setattr(fuse_req_t request, fuse_ino_t inode, struct stat *wanted, int which,
                       struct fuse_file_info *info)
{
    (void)wanted;
    if (which & FUSE_SET_ATTR_SIZE)
        fuse_reply_err(request, EPERM); /* a disk keeps its size */
    else
        on_getattr(request, inode, info);
}

static void on_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    if (inode == FUSE_ROOT_ID) {
        fuse_reply_err(request, EISDIR);
        return;
    }
    info->keep_cache = 1;
    info->noflush = 1;
    fuse_reply_open(request, info);
}

static void on_readdir(fuse_req_t request, fuse_ino_t inode, size_t capacity, off_t from,
                       struct fuse_file_info *info)
{
    char entries[MAX_FILES * 64], name[32];
    struct stat what;
    size_t size, total = 0;

    (void)info;
    if (capacity > sizeof entries)
        capacity = sizeof entries;
    for (; inode == FUSE_ROOT_ID && from < file_count; from++) {
        snprintf(name, sizeof name, NAME, (int)from);
        describe(FIRST_INODE + from, &what);
        size = fuse_add_direntry(request, entries + total, capacity - total, name, &what, from + 1);
        if (size > capacity - total)
            break; /* it did not fit and was not written */
        total += size;
    }
    fuse_reply_buf(request, entries, total);
}

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset,
                    struct fuse_file_info *info)
{
    ssize_t done;

    (void)info;
    if (answer == NULL && (answer = aligned_alloc(4096, MAX_REQUEST_BYTES)) == NULL) {
        fuse_reply_err(request, ENOMEM);
        return;
    }
    if (size > MAX_REQUEST_BYTES)
        size = MAX_REQUEST_BYTES;
    done = pread(descriptor(inode), answer, size, offset);
    if (done < 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_buf(request, answer, (size_t)done);
}

static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size,
                     off_t offset, struct fuse_file_info *info)
{
    ssize_t done = pwrite(descriptor(inode), data, size, offset);

    (void)info;
    if (done < 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_write(request, (size_t)done);
}

static void on_fsync(fuse_req_t request, fuse_ino_t inode, int data_only,
                     struct fuse_file_info *info)
{
    (void)data_only;
    (void)info;
    fuse_reply_err(request, fdatasync(descriptor(inode)) == 0 ? 0 : errno);
}

static void on_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset,
                         off_t length, struct fuse_file_info *info)
{
    (void)info;
    fuse_reply_err(request, fallocate(descriptor(inode), mode, offset, length) == 0 ? 0 : errno);
}

static void on_lseek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence,
                     struct fuse_file_info *info)
{
    off_t found = lseek(descriptor(inode), offset, whence);

    (void)info;
    if (found < 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_lseek(request, found);
}

static void on_statfs(fuse_req_t request, fuse_ino_t inode)
{
    struct statvfs what;

    (void)inode;
    if (fstatvfs(files[0], &what) != 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_statfs(request, &what);
}

/* libfuse answers a missing operation with ENOSYS, and the kernel does not send it again. */
static const struct fuse_lowlevel_ops operations = {
    .init = on_init,
    .lookup = on_lookup,
    .getattr = on_getattr,
    .setattr = on_setattr,
    .open = on_open,
    .readdir = on_readdir,
    .read = on_read,
    .write = on_write,
    .fsync = on_fsync,
    .fallocate = on_fallocate,
    .lseek = on_lseek,
    .statfs = on_statfs,
};

int main(int count, char **words)
{
    char *options[] = {words[0], "-o", "fsname=baseline,subtype=baseline,max_read=1048576", NULL};
    struct fuse_args arguments = FUSE_ARGS_INIT(3, options);
    const char *threads = getenv("THREADS");
    struct fuse_session *session;
    int code = 1;

    if (count < 3 || count > MAX_FILES + 2) {
        fprintf(stderr, "usage: passthrough FILE... MOUNTPOINT (up to %d files)\n", MAX_FILES);
        return 1;
    }
    for (file_count = 0; file_count < count - 2; file_count++) {
        files[file_count] = open(words[1 + file_count], O_RDWR | O_CLOEXEC);
        if (files[file_count] < 0) {
            perror(words[1 + file_count]);
            return 1;
        }
    }
    session = fuse_session_new(&arguments, &operations, sizeof operations, NULL);
    if (session == NULL)
        return 1;
    if (fuse_set_signal_handlers(session) == 0) {
        if (fuse_session_mount(session, words[count - 1]) == 0) {
            if (threads != NULL && strcmp(threads, "many") == 0)
                code = fuse_session_loop_mt(session, NULL);
            else
                code = fuse_session_loop(session);
            fuse_session_unmount(session);
        }
        fuse_remove_signal_handlers(session);
    }
    fuse_session_destroy(session);
    return code != 0;
}
