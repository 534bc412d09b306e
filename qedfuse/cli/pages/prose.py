"""What the man pages say beyond the programs' own help.

An empty line begins a paragraph, indented lines are shown as they are, and back quotes
mark what is typed.
"""

from __future__ import annotations

from typing import Final

DATE: Final = "2026-11-23"
"""When the pages were last read through."""

QEDIMG_NAME: Final = "make, inspect, check, convert and repair QED disk images"

QEDIMG: Final = """\
qedimg is the toolbox for disk images in QEMU's QED format.  It needs no QEMU, and where
qemu-img(1) has the same command, options, JSON keys and exit codes are the same as far
as possible.

An image that another program has open is left alone, as QEMU's own locks demand; `-U`
reads beside a writer.  A new image gets its name when it is complete, so nothing
half-made is left behind, also not after Ctrl-C.

Sizes are bytes, or numbers with a suffix `K`, `M`, `G`, `T`, `P` or `E` (powers of 1024).
Options and names may stand in any order; after `--` all words are names.
"""

QEDIMG_BACKING: Final = """\
An image names its base itself, and an image from a stranger may name any file of yours.
So a base is used only if it lies in the directory of the image that names it, or below,
unless `--backing any` or `--backing-dir` allows more.  `info` and `check` open no base
unless they are asked to.
"""

QEDIMG_SIGNALS: Final = """\
`SIGINT` and `SIGTERM` end a command cleanly: what was half-made is removed, and an image
that was being changed is sound.  `SIGUSR1` prints how far the work has come.  A progress
bar is shown on a terminal when the work takes more than a second.
"""

QEDIMG_ENVIRONMENT: Final = (
    ("QEDIMG_TRACEBACK", "Set to anything, an internal error shows where it happened."),
)

QEDFUSE_NAME: Final = "show QED disk images as flat raw files"

QEDFUSE: Final = """\
qedfuse mounts disk images in QEMU's QED format as flat raw files, for reading and for
writing, backing files included.  losetup(8), fdisk(8), dd(1), fsck(8) and every other
program then work on the disk as on a raw image.

The command returns when the disk can be used, and the mount goes on in the background.
What is written is durable after fsync(2), which includes every clean unmount.

An image is locked as QEMU locks it: a running virtual machine and a mount cannot spoil
each other's data.
"""

QEDFUSE_OPTIONS: Final = """\
Options are words between commas; a comma within a value is written `\\,` and a backslash
`\\\\`.  An option that nobody knows is an error.  What is meant for mount(8) or
systemd.mount(5), such as `noauto`, `nofail`, `_netdev` and `x-...`, is accepted.
"""

QEDFUSE_UMOUNT: Final = """\
`qedfuse umount` unmounts, and returns when everything is durable and the process behind
the mount has ended.  With `--timeout` it waits so many seconds and no longer.  After plain
umount(8) or fusermount3(1) the process takes a moment longer.
"""

QEDFUSE_FSTAB: Final = """\
Where the links `mount.qedfuse` and `mount.fuse.qedfuse` are in /sbin, mount(8) and
fstab(5) know the types `qedfuse` and `fuse.qedfuse`:

    /srv/images/vm.qed  /mnt/vm    fuse.qedfuse  noauto  0  0
    /mnt/vm/vm.raw      /mnt/root  ext4  noauto,loop,offset=1048576  0  0

Run by mount(8), `-f` does everything but mount, and `-s` drops options that are unknown.
"""

QEDFUSE_SIGNALS: Final = """\
`SIGTERM` and `SIGINT` make everything durable at once and unmount; a disk that is in use
is served until its last close.  A second one does not wait for that: after 10 seconds the
mount ends also if not everything is durable; then the log says so and the exit code is 2.
"""

QEDFUSE_EXAMPLES: Final = """\
Use the file systems in an image:

    qedfuse /srv/images/vm.qed /mnt/vm
    loop=$(losetup --find --show --partscan --direct-io=on /mnt/vm/vm.raw)
    mount "${loop}p1" /mnt/root
    umount /mnt/root
    losetup --detach "$loop"
    qedfuse umount /mnt/vm

Try something out, and change only the overlay:

    qedfuse -o overlay=try.qed vm.qed /mnt/vm

Look at an image that must not be changed, beside the virtual machine that writes to it:

    qedfuse -o force_share vm.qed /mnt/vm
"""

QEDFUSE_NOTES: Final = """\
A file system in an image is code's input: mounting it with the kernel's own drivers is
for images that you trust.  Read others with programs that run without privileges.

When the process behind a mount has died, the mountpoint stays dead on purpose, since an
empty directory would look like an empty disk.  `fusermount3 -u` removes it.
"""
