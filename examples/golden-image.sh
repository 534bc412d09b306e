#!/usr/bin/env bash
# A golden image, overlays of it for two machines, and a new golden image from one of them.
#
#   examples/golden-image.sh [DIRECTORY]
#
# Works in a temporary directory within DIRECTORY, which is removed at the end.
# Needs qedfuse and qedimg (examples/install.sh) and e2fsprogs.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=examples/scratch.sh
. "$(dirname "${BASH_SOURCE[0]}")/scratch.sh"
install_packages mkfs.ext4=e2fsprogs

say "The golden image: a disk with the file system that all machines start from"
qedimg create golden.qed 64M
mkdir tree
echo "release 1" >tree/release
mount_disk golden.qed
mkfs.ext4 -q -d tree disk/golden.raw
unmount_disk

say "Two machines: overlays that are still empty"
qedimg create -b golden.qed web.qed
qedimg create -b golden.qed mail.qed
qedimg compare golden.qed web.qed
ls -ls -- *.qed

say "One of them changes, and only its overlay grows"
echo "release 2" >tree/release
mount_disk web.qed
debugfs -w -R 'rm release' disk/web.raw 2>/dev/null
debugfs -w -R 'write tree/release release' disk/web.raw 2>/dev/null
unmount_disk
qedimg compare golden.qed web.qed || [ $? = 1 ]
qedimg compare golden.qed mail.qed
ls -ls -- *.qed

say "The next golden image: a copy of the first one, into which the change is committed"
# The first one must not change, because mail.qed still reads from it.
qedimg convert -O qed golden.qed golden-2.qed
qedimg rebase -u -b golden-2.qed -F qed web.qed
qedimg commit web.qed
qedimg compare golden-2.qed web.qed
qedimg info --backing-chain web.qed

say "Each machine has its own release"
for machine in web mail; do
    mount_disk "$machine.qed" -o ro
    printf '%s: %s\n' "$machine" "$(debugfs -R 'cat release' "disk/$machine.raw" 2>/dev/null)"
    unmount_disk
done
qedimg check golden-2.qed
say "Done"
