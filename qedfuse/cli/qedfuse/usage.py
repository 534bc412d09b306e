"""The text of ``qedfuse --help``, from which the man page and the completions are made too."""

from __future__ import annotations

from typing import Final

USAGE: Final = """\
usage: qedfuse SOURCE... MOUNTPOINT [OPTION...]
       qedfuse umount MOUNTPOINT [--timeout SECONDS]
       qedfuse stats [MOUNTPOINT] [--output human|json|prometheus] [--watch]

Show QED disk images as flat raw files.

SOURCE      a QED image, or a directory, which stands for every QED image in it; or a
            URL (https, s3, gs, az, nbd...) with -r, snapshot or overlay=FILE
MOUNTPOINT  a directory, where vm.qed becomes vm.raw and any other NAME becomes
            NAME.raw; or, for one image, a file that becomes the disk

  -o OPTION[,OPTION...]  see below
  -f, --foreground       stay in the foreground
  -d, --debug            stay in the foreground and log each request
  -r, --read-only        the same as -o ro
  -s                     ignored (if mount(8) runs qedfuse: ignore unknown options)
  --pidfile FILE         write the process number to FILE once the disk can be used
  -h, --help             show this help
  -V, --version          show the version

Options of -o; the default and then other values are in parentheses:
  ro, rw                 whether the disk can be written to (rw)
  allow_other            allow access by other users; uid, gid and umask apply
  allow_root             allow access by root, but not by other users
  uid=N, gid=N           owner of the disk (the caller)
  umask=OCTAL            permissions removed from 0666 (077)
  nonempty               mount also over a file that is a disk image
  partitions             show each partition as a file too: vm.raw.p1, vm.raw.p2, ...
  partition=N            show only partition N; the mountpoint may be a file
  growable               let truncate(1) and writes past the end enlarge the disk
  truncate=zero          truncation, as by cp and >, writes zeros past the new end,
                         and the disk keeps its size (refuse)
  discard, nodiscard     whether discards free space, or only write zeros (discard)
  detect_zeroes=on       allocate no space for zeros that are written (off; unmap: also
                         free the space that the zeros overwrite)
  freelist=on            keep a list of free space in the image between mounts; QEMU
                         refuses an image with a list (default: unchanged; off)
  compact=full           make the file as short as possible when the mount ends (auto:
                         within the two limits below, if tables were changed; off)
  compact_size=SIZE      how much compact=auto may move (64M)
  compact_time=SECONDS   how long compact=auto may take (1)
  snapshot               drop all writes when the mount ends
  overlay=FILE           send all writes to this QED overlay, created if missing
  backing=any            use backing files from anywhere (confined: only from the
                         directory of the image that names them; none: refuse all)
  backing_dir=DIR        allow backing files from DIR too (may be repeated)
  backing_format=raw     format of all backing files, whatever they contain (default: as
                         the image or their first bytes say; qed, qcow2, vmdk, ...)
  foreign=qemu           let QEMU read backing files in other formats than QED and raw (off)
  backing_url=PREFIX     allow backing files whose URL begins with PREFIX (may be repeated)
  base_changed           accept a backing file that has changed since the image was made
                         over it, and remember its new version
  cache_dir=DIR          where files on servers are cached ($XDG_CACHE_HOME/qedfuse)
  remote_cache_size=SIZE  how large that cache may become (default: 5 % of the file
                         system stay free)
  prefetch=all           fetch all that the disk can need of files on servers, while no
                         reader waits for a server (off)
  remote_timeout=SECONDS  how long a failed request to a server is repeated (60)
  remote_attempt_timeout=SECONDS  how long one attempt of a request may take (10)
  remote_connect_timeout=SECONDS  how long connecting to a server may take (5)
  credentials=FILE       read variables, such as AWS_ACCESS_KEY_ID, from lines NAME=VALUE;
                         only the owner of FILE may have access to it (the environment)
  allow_http             allow http:// to other machines
  allow_unpinned         read a file although its server gives neither an ETag nor the
                         time of the last change
  force_share            read-only, while another program writes to the image
  direct_io              keep nothing in the kernel's page cache
  readahead=SIZE         how far the kernel reads ahead (512K; kernel: its default);
                         only root can exceed the kernel's default
  commit=SECONDS         maximum time for which changed tables are only in memory (5)
  poll=MICROSECONDS      how long to poll for the next request before sleeping (100; off)
  metrics=ADDRESS        serve metrics for Prometheus on a port of loopback, or unix:PATH
  cache_size=SIZE        memory for the tables of each disk and its backing files (32M)
  memory_limit=SIZE      limit of the address space of the mount's process
  sandbox=on|off|strict  give up access that the mount does not need, as far as the
                         kernel can; strict: refuse the mount if a part is missing (on)
  nosuid nodev noexec noatime sync dirsync and other options of mount(8)

"umount" unmounts, and returns when everything is durable and the mount's process has
ended.  "stats" prints what a mount, or each mount of the user, does: requests, times,
hit rates, space; with --watch every second.  qedimg creates, checks, repairs and
converts images (see: qedimg --help).

Exit codes: 0 done; 1 usage; 2 the host's file system or kernel; 12 not a usable QED
image; 13 corrupt; 14 unknown features; 15 needs a check; 16 in use; 17 backing file;
18 mountpoint; 19 privileges; 21 FUSE; 22 a server; 23 a file on a server has changed;
25 QEMU, for its other formats; 26 no such file on a server; 27 a server refuses
access; 32 any other failure; 70 a bug; 130 interrupted.
"""
