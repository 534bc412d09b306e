#!/usr/bin/env bash
# The README's first recipe works as written where the kernel reads partition tables itself:
# partitions of a mounted disk become devices, and file systems on them can be mounted.
# Runs as root in the virtual machine.
set -eu
mkdir -p /srv/images
truncate --size 200M /srv/disk.raw
printf '%s\n' 'label: gpt' 'start=2048, size=200000' 'start=204800, size=100000' |
    sfdisk --quiet /srv/disk.raw
mkdir /srv/tree
echo 'hello from a partition' >/srv/tree/file
mkfs.ext4 -q -d /srv/tree -E offset=1048576 /srv/disk.raw 90M
qedimg convert -O qed /srv/disk.raw /srv/images/vm.qed

# No partx(8): the kernel must have made the devices.
mkdir -p /mnt/vm
qedfuse /srv/images/vm.qed /mnt/vm
loop=$(losetup --find --show --partscan --direct-io=on /mnt/vm/vm.raw)
test -b "${loop}p1"
test -b "${loop}p2"
test "$(cat "/sys/block/${loop#/dev/}/${loop#/dev/}p2/start")" = 204800
losetup --detach "$loop"
qedfuse umount /mnt/vm

recipe=$(sed -n '/^### Use the file systems in an image$/,/^```$/{/^mkdir/,/^qedfuse umount/p}' README.md)
use='cat /mnt/root/file; echo changed >/mnt/root/file'
shown=$(bash -euc "${recipe/umount/$use; umount}")
printf '%s\n' "$shown" | grep -qx 'hello from a partition'
qedimg check /srv/images/vm.qed
qemu-img check -q -f qed /srv/images/vm.qed || [ $? = 3 ]
qedimg convert -O raw /srv/images/vm.qed /srv/after.raw
test "$(debugfs -R 'cat file' '/srv/after.raw?offset=1048576' 2>/dev/null)" = changed
echo "partitions: the kernel made ${loop}p1 and ${loop}p2; the recipe works as written"
