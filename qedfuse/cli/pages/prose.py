"""The parts of the man pages' text that are not taken from the programs' help.

In these texts an empty line begins a paragraph.  Indented lines form an example, whose lines
are not joined.  Back quotes mark words that are typed literally.
"""

from __future__ import annotations

from typing import Final

DATE: Final = "2026-11-27"
"""The date in the footer of the pages: when their text was last reviewed."""

QEDIMG_NAME: Final = "create, inspect, check, convert and repair QED disk images"

QEDIMG: Final = """\
qedimg is the toolbox for disk images in QEMU's QED format.  It needs QEMU only for
formats other than QED and raw.  Where qemu-img(1) has the same command, the options,
JSON keys and exit codes are the same as far as possible.

qedimg takes the same locks as QEMU.  It does not change an image that another program has
open.  Only with `-U` does it read an image that another program has open for writing.  A
new image gets its name only when it is complete, so no partial file is left behind, not
even after Ctrl-C.

Sizes are in bytes, or have a suffix `K`, `M`, `G`, `T`, `P` or `E` (powers of 1024).
Options and operands can be in any order; all words after `--` are operands.
"""

QEDIMG_BACKING: Final = """\
The name of the base is stored in the image, so an untrusted image can name any of your
files.  Therefore, by default, a base is used only if it is in the directory of the image
that names it or in a directory below.  `--backing any` and `--backing-dir` allow more.
A message names the option of a mount: `backing_dir=DIR` is `--backing-dir DIR` here.
`info` opens a base of a QED image only with `--backing-chain` or `--partitions`.  `check`
never opens a base.
"""

QEDIMG_SIGNALS: Final = """\
`SIGINT`, `SIGTERM` and `SIGHUP` end a command cleanly: a partial file is removed, and an
image that was being changed is closed in a sound state.  `convert -n`
and `commit` write into an existing disk, which has only a part of the new content then; run
the same command again.  After a `convert -n` that has not completed a line names that disk.
`SIGUSR1` prints the progress.  A
progress bar appears on a terminal if the work takes more than a second.
"""

QEDIMG_ENVIRONMENT: Final = (
    ("QEDIMG_TRACEBACK", "If set to any value, an internal error prints a traceback."),
)

QEDFUSE_NAME: Final = "show QED disk images as flat raw files"

QEDFUSE: Final = """\
qedfuse mounts disk images in QEMU's QED format as flat raw files, for reading and for
writing, with the content of their backing files.  losetup(8), fdisk(8), dd(1), fsck(8) and
every other program then work on the disk as on a raw image.

The command returns when the disk can be used, and a background process serves the mount.
Writes are durable after fsync(2), and after a clean unmount.

An image is locked as QEMU locks it: a running virtual machine and a mount cannot corrupt
each other's data.
"""

QEDFUSE_OPTIONS: Final = """\
Parentheses after an option contain its default, and then other fixed values that it
accepts.  Options are separated by commas; a comma within a value is written `\\,` and a
backslash `\\\\`.  An unknown option is an error.  Options for mount(8) or
systemd.mount(5), such as `noauto`, `nofail`, `_netdev` and `x-...`, are accepted and
ignored.
"""

QEDFUSE_UMOUNT: Final = """\
`qedfuse umount` unmounts, and returns when everything is durable and the process that
served the mount has ended.  With `--timeout SECONDS` the command fails if the process has not
ended after SECONDS.  umount(8) and fusermount3(1) do not wait for the process, which ends
shortly after they return.
"""

QEDFUSE_STATS: Final = """\
`qedfuse stats` prints what the disks of a mount have done since the mount began: requests,
bytes, errors and times of reads, writes, flushes and discards, hit rates of the caches, the
space in the image, and the reads of each file of the chain.  Without a mountpoint the command
prints the statistics of all mounts of the user; if the user is root, of the mounts of all users.
Only the owner of a mount and root may read its statistics.  If the server does not answer within
5 seconds, the command fails.
"""

QEDFUSE_FSTAB: Final = """\
If the links `mount.qedfuse` and `mount.fuse.qedfuse` exist in /sbin, mount(8) and
fstab(5) accept the types `qedfuse` and `fuse.qedfuse`:

    /srv/images/vm.qed  /mnt/vm    fuse.qedfuse  noauto  0  0
    /mnt/vm/vm.raw      /mnt/root  ext4  noauto,loop,offset=1048576  0  0

With the option `user` or `users` an ordinary user can mount and unmount the disk.
mount(8) does not read `x-systemd.requires=`: for a line that needs a service such as
`qedfuse@vm.service`, use `systemctl start` with the unit of the mountpoint.

If mount(8) runs qedfuse, `-f` and `-s` have the meaning that mount(8) gives them: with
`-f` qedfuse checks and opens the image but does not mount, and with `-s` it ignores
unknown options.
"""

QEDFUSE_SIGNALS: Final = """\
After `SIGTERM`, `SIGINT` or `SIGHUP` the process makes everything durable immediately and
unmounts.  If a program has the disk open, the process serves the disk until the last
close.  After a second `SIGTERM` or `SIGINT` the process does not wait for the last close, but
tries for at most 10 seconds to make everything durable.  `SIGHUP` does not count as the second
signal, because the end of a login session sends it together with `SIGTERM`.  A write to the
image that is in progress after these 10 seconds is completed before the mount ends.  If the mount
ends before everything is durable, the log says so and the exit code is 2.

A `SIGINT` or `SIGHUP` that is ignored when `qedfuse` starts, as in a background job of a script or
under nohup(1), stays ignored.

After `SIGUSR1` the process logs a summary of its statistics in one line.  After `SIGUSR2` it also
logs what each of its tasks waits for, which helps in a bug report.
"""

QEDFUSE_EXAMPLES: Final = """\
Use the file systems in an image:

    qedfuse /srv/images/vm.qed /mnt/vm
    loop=$(losetup --find --show --partscan --direct-io=on /mnt/vm/vm.raw)
    mount "${loop}p1" /mnt/root
    umount /mnt/root
    losetup --detach "$loop"
    qedfuse umount /mnt/vm

Try something out, with all changes in an overlay:

    qedfuse -o overlay=try.qed vm.qed /mnt/vm

Look at an image while a virtual machine writes to it, without changing the image:

    qedfuse -o force_share vm.qed /mnt/vm
"""

QEDFUSE_NOTES: Final = """\
The kernel's file system drivers do not expect hostile input: use them to mount a file
system in an image only if you trust the image.  Read other images with programs that run
without privileges.

If the process that serves a mount has died, every access to the mountpoint fails until the
mount is removed, because an empty directory would look like an empty disk.
The command `fusermount3 -u MOUNTPOINT` removes the mount, but not the directory.

"""
