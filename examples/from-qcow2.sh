#!/usr/bin/env bash
# Moves a disk from qcow2 to QED, changes it, and moves it back.
#
#   examples/from-qcow2.sh [DIRECTORY]
#
# Works in a temporary directory within DIRECTORY, which is removed at the end; the disk
# is a sample.
# Needs qedfuse and qedimg (examples/install.sh), qemu-utils and e2fsprogs.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=examples/scratch.sh
. "$(dirname "${BASH_SOURCE[0]}")/scratch.sh"
install_packages mkfs.ext4=e2fsprogs qemu-img=qemu-utils

say "A sample: a file system in a qcow2 image"
mkdir tree
echo "It came from qcow2." >tree/origin
truncate --size 64M sample.raw
mkfs.ext4 -q -d tree sample.raw
qemu-img convert -f raw -O qcow2 sample.raw vm.qcow2
rm sample.raw

say "To QED: qemu-img converts it to a raw file with holes, and qedimg converts that to QED"
qemu-img convert -f qcow2 -O raw vm.qcow2 vm.raw
qedimg convert -f raw -O qed vm.raw vm.qed
qedimg compare -f raw -F qed vm.raw vm.qed
rm vm.raw
ls -ls -- vm.*

say "A file is added to it"
echo "It was a QED image for a while." >tree/history
mount_disk vm.qed
debugfs -w -R 'write tree/history history' disk/vm.raw 2>/dev/null
unmount_disk

say "Back to qcow2: qedimg passes the disk to qemu-img"
qedimg convert -O qcow2 vm.qed back.qcow2
qemu-img check back.qcow2
qemu-img convert -f qcow2 -O raw back.qcow2 back.raw
qedimg compare -f raw -F qed back.raw vm.qed
debugfs -R 'cat history' back.raw 2>/dev/null
say "Done"
