#!/usr/bin/env bash
# Tests that need their own machine, in a virtual machine with Debian's kernel.  They are
# not part of tests/run.sh: without KVM they take from minutes to an hour.
#
#   tests/vm/run.sh pressure [CASE...]            memory pressure; prints a table
#   tests/vm/run.sh pressure-512                  the same in 512 MB without a memory cgroup
#   tests/vm/run.sh powercut [ROUNDS [SEED]]      power cuts (50 rounds); prints a table
#   tests/vm/run.sh partitions                    losetup --partscan makes partition devices
#   tests/vm/run.sh units                         unit tests that need CAP_SYS_RESOURCE
#   tests/vm/run.sh shell COMMAND...              any command, in /src
#
# Needs root and 5 GB below VM_DIR (/var/tmp/qedfuse-vm), where the machine is kept.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../examples/setup.sh"
vm_dir=$(realpath -m "${VM_DIR:-/var/tmp/qedfuse-vm}")
# shellcheck source=tests/vm/machine.sh
. "$root/tests/vm/machine.sh"
cuts_per_kill=4 # number of disks that are made from one log

usage() {
    sed -n '/^#   /s/^# *//p' "${BASH_SOURCE[0]}" >&2
    exit 1
}

# powercut ROUNDS SEED: kill machines, and check the disks that power cuts leave.
powercut() {
    local rounds=$1 seed=$2 work=$vm_dir/powercut round first status=0
    rm -rf "$work"
    mkdir -p "$work"
    printf '%s\n' '| round | log | cut at | synced | faults |' '| --- | --- | --- | --- | --- |'
    for ((first = 0; first < rounds; first += cuts_per_kill)); do
        kill_machine "$((seed + first))"
        machine_disks=()
        for ((round = first; round < first + cuts_per_kill && round < rounds; round++)); do
            python3 "$root/tests/vm/replay.py" --seed "$((seed + round))" \
                "$work/log.raw" "$work/$round.raw"
            machine_disks+=(-drive "file=$work/$round.raw,format=raw,if=none,id=round$round"
                -device "virtio-blk-pci,drive=round$round")
        done
        cut_after='' limit=3000 boot_machine \
            python -m tests.vm.powercut check --first "$first" --count "$((round - first))" || status=1
        rm -f "$work"/*.raw
    done
    return "$status"
}

# kill_machine SEED: run the workload until QEMU is killed; the drive's log remains.
kill_machine() {
    rm -f "$work/disk.raw" "$work/log.raw"
    truncate --size 1G "$work/disk.raw"
    truncate --size 20G "$work/log.raw"
    local drive=driver=blklogwrites,node-name=logged
    drive+=,file.driver=file,file.filename=$work/disk.raw
    drive+=,log.driver=file,log.filename=$work/log.raw
    machine_disks=(-blockdev "$drive" -device "virtio-blk-pci,drive=logged")
    RANDOM=$1
    cut_after=$((RANDOM % 30 + 5)) limit=900 boot_machine \
        python -m tests.vm.powercut work --seed "$1" >"$work/out" || {
        cat "$work/out"
        die "seed $1: the machine ended by itself"
    }
}

# A function, so that bash has read the whole script before it runs.
main() {
    [ $# -gt 0 ] || usage
    local what=$1
    shift
    case $what in
        pressure | pressure-512 | powercut | partitions | units | shell) make_machine ;;
        *) usage ;;
    esac
    case $what in
        pressure) boot_machine python -m tests.vm.pressure "$@" ;;
        pressure-512)
            memory=512 boot_machine python -m tests.vm.pressure "$@" \
                whole-machine whole-machine-buffered-loop whole-machine-raw
            ;;
        powercut) powercut "${1:-50}" "${2:-1}" ;;
        partitions) boot_machine bash tests/vm/partitions.sh ;;
        units)
            boot_machine python -m pytest -q -p no:cacheprovider \
                tests/unit/test_mount_memorypressure.py tests/mounted/test_mount_start.py \
                -k 'protected or harms_nothing or oom_score'
            ;;
        shell) boot_machine "$@" ;;
    esac
}

main "$@"
exit
