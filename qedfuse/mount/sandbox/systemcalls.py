"""The system calls that a server in a sandbox may make.

The names are those of libseccomp.  `CallFilter` ignores names that libseccomp or the architecture
lacks, so the lists can contain both old and new names of a call.
"""

from __future__ import annotations

from typing import Final

ALWAYS: Final = (
    # memory and threads
    *("brk", "mmap", "mmap2", "munmap", "mremap", "mprotect", "madvise", "mincore", "membarrier"),
    *("futex", "futex_time64", "futex_waitv", "set_robust_list", "rseq", "set_tid_address"),
    *("sched_yield", "sched_getaffinity", "exit", "exit_group", "restart_syscall", "getcpu"),
    *("sched_getparam", "sched_getscheduler", "sched_get_priority_max", "sched_get_priority_min"),
    *("sigaltstack", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait"),
    *("getrlimit", "ugetrlimit", "getrusage", "sysinfo", "uname"),
    # time and random numbers
    *("clock_gettime", "clock_gettime64", "clock_getres", "clock_getres_time64", "gettimeofday"),
    *("clock_nanosleep", "clock_nanosleep_time64", "nanosleep", "time", "times", "getrandom"),
    # identity of the process
    *("getpid", "getppid", "gettid", "getpgrp", "getpgid", "getsid", "getgroups"),
    *("getuid", "geteuid", "getgid", "getegid", "getresuid", "getresgid", "capget"),
    # waiting for files
    *("poll", "ppoll", "ppoll_time64", "select", "pselect6", "_newselect"),
    *("epoll_create", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2"),
    *("eventfd2", "pipe", "pipe2", "signalfd4"),
    *("timerfd_create", "timerfd_settime", "timerfd_gettime"),
    # the bytes of open files
    *("read", "readv", "pread64", "preadv", "preadv2", "write", "writev", "pwrite64", "pwritev"),
    *("pwritev2", "lseek", "_llseek", "splice", "tee", "vmsplice", "sendfile", "sendfile64"),
    *("copy_file_range", "fallocate", "ftruncate", "ftruncate64", "fsync", "fdatasync"),
    *("sync_file_range", "sync_file_range2", "syncfs", "fadvise64", "fadvise64_64", "readahead"),
    # descriptors
    *("close", "close_range", "dup", "dup2", "dup3", "fcntl", "fcntl64", "flock", "memfd_create"),
    *("fstat", "fstat64", "newfstatat", "fstatat64", "statx", "stat", "stat64", "lstat", "lstat64"),
    *("fstatfs", "fstatfs64", "statfs", "statfs64", "getdents", "getdents64", "cachestat"),
    # names; Landlock decides which files can be opened or removed
    *("open", "openat", "openat2", "access", "faccessat", "faccessat2", "getcwd"),
    *("readlink", "readlinkat", "truncate", "truncate64", "umask", "fchmod"),
    *("mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "rename", "renameat", "renameat2"),
    *("utimensat", "utimensat_time64", "fgetxattr"),
    # sockets that are open, and accepting connections
    *("getsockname", "getpeername", "getsockopt", "setsockopt", "shutdown", "accept", "accept4"),
    *("sendmsg", "recvfrom", "recvmsg", "recvmmsg", "recvmmsg_time64", "send", "recv"),
    # the end of a helper or of qemu-nbd
    *("wait4", "waitid", "waitpid", "pidfd_open"),
    # reads in a queue of the kernel; the queue is made before the filter is in force
    *("io_uring_enter",),
)
"""Calls that are permitted with any arguments."""

IOCTLS: Final = {
    "FIONREAD": 0x541B,
    "FIONBIO": 0x5421,
    "FIONCLEX": 0x5450,
    "FIOCLEX": 0x5451,
    "TCGETS": 0x5401,
    "FS_IOC_FIEMAP": 0xC020660B,
    "FUSE_DEV_IOC_CLONE": 0x8004E500,
}
"""The commands of ioctl(2) that are permitted, with the numbers of most architectures."""

CONNECT: Final = ("connect", "bind", "sendto", "sendmmsg")
"""Calls with the address of a socket, permitted only if the mount reads a file from a server or
from qemu-nbd.  With these calls an attacker could make other services of the host do what the
sandbox forbids.  sendto(2) without an address is always permitted.  The address of sendmsg(2) lies
in memory, where a filter cannot read it, and the call is needed, so it is in `ALWAYS`."""

NOT_IMPLEMENTED: Final = ("clone3",)
"""Calls that fail with ENOSYS, so that the C library uses clone(2).  A filter cannot read the flags
of clone3(2), which lie in memory."""

KILL: Final = ("kill", "pidfd_send_signal")
"""Calls that end qemu-nbd."""

CHMOD: Final = ("chmod", "fchmodat", "fchmodat2")
"""Calls that set the permissions of a file by its name.  The server of a writable mount calls
chmod(2) on a disk of its own mount, with the permissions that the disk already has: the reply to
this request also gives the kernel the size of the disk (`SizeFixup`)."""
