/*
 * Limits the length of the kernel's reads to the maximum length of a reply that can be spliced.
 *
 * A reply to a longer read does not fit into a pipe, so its data would be copied twice (_splice.c).
 * Two spliced reads take less time than one read of twice the length that is not spliced.  Writes
 * keep their length: their data is copied in any case, and fewer requests cost less.
 *
 * The kernel learns the limit from a mount option, and libfuse demands that the file system repeats
 * it in FUSE INIT.  So this module adds the option to the arguments of libfuse, and sets the same
 * number in on_init() (_dataops.c).
 *
 * The functions that other files call are described in _extraops.h.
 */

#include "_extraops.h"

#include <fuse_opt.h>
#include <stdio.h>
#include <string.h>

static int is_limited; /* whether the arguments of the session have the option */

struct fuse_args *limited_arguments(struct fuse_args *given, struct fuse_args *changed)
{
    char option[32];
    int at, failed = 0;

    snprintf(option, sizeof option, "-omax_read=%d", MAX_SPLICE_BYTES);
    is_limited = 1;
    /* From 3.17 on, libfuse's fuse_session_new calls fuse_session_new_versioned.  _extraops.c
     * replaces both, so this function may be called a second time, with arguments that already have
     * the option. */
    if (given->argc && strcmp(given->argv[given->argc - 1], option) == 0)
        return given;
    for (at = 0; at < given->argc; at++)
        failed |= fuse_opt_add_arg(changed, given->argv[at]);
    failed |= fuse_opt_add_arg(changed, option);
    is_limited = !failed;
    return failed ? given : changed;
}

void limit_reads(struct fuse_conn_info *connection)
{
    if (is_limited)
        connection->max_read = MAX_SPLICE_BYTES;
}
