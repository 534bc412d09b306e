#!/usr/bin/env bash
# A golden image in an object store, and two machines that start from it, each with its own overlay.
#
#   examples/golden-image-in-a-bucket.sh s3://BUCKET [DIRECTORY]
#
# The bucket must exist.  The object golden-example-PID.qed stays in it; the rest is in a temporary
# directory within DIRECTORY, which is removed at the end.
# Credentials are those of the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and
# AWS_ENDPOINT_URL for a store other than Amazon's.
# Needs qedfuse and qedimg (examples/install.sh), obstore in the same environment
# (/opt/qedfuse/bin/pip install 'obstore>=0.12' 'urllib3>=2.2') and e2fsprogs.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
bucket=${1:---help}
case $bucket in
    -h | --help) set -- --help ;;
    *) shift ;;
esac
# shellcheck source=examples/scratch.sh
. "$(dirname "${BASH_SOURCE[0]}")/scratch.sh"
install_packages mkfs.ext4=e2fsprogs
url=${bucket%/}/golden-example-$$.qed
export XDG_CACHE_HOME=$work/cache

say "The golden image: a disk with the file system that all machines start from"
qedimg create golden.qed 64M
mkdir tree
echo "release 1" >tree/release
mount_disk golden.qed
mkfs.ext4 -q -d tree disk/golden.raw
unmount_disk

say "It is published: any machine that may read the bucket can start from it now"
qedimg publish golden.qed "$url"
rm golden.qed

say "This machine fetches what it will need; without this, reads fetch it"
qedimg warm "$url"
qedimg info "$url"

say "Two machines: each has a disk of its own over the image in the bucket"
for machine in web mail; do
    mount_disk -o "overlay=$machine.qed" "$url"
    disk=$(echo disk/*)
    echo "release of $machine" >tree/release
    debugfs -w -R 'rm release' "$disk" 2>/dev/null
    debugfs -w -R 'write tree/release release' "$disk" 2>/dev/null
    unmount_disk
done
ls -ls -- *.qed

say "They are mounted again: each has its own release, and the image in the bucket the first one"
for machine in web mail; do
    mount_disk -o "overlay=$machine.qed" "$url"
    printf '%s: %s\n' "$machine" "$(debugfs -R 'cat release' disk/* 2>/dev/null)"
    e2fsck -fn disk/* >/dev/null 2>&1
    unmount_disk
done
mount_disk -r "$url"
printf 'bucket: %s\n' "$(debugfs -R 'cat release' disk/* 2>/dev/null)"
unmount_disk
say "Done: the object $url stays"
