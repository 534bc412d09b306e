#!/usr/bin/env bash
# Runs tests of the C extensions with the sanitizers of gcc:  tests/sanitize.sh [-s] [KIND]...
#
# KIND is `address` (invalid memory accesses and undefined behaviour, with -fsanitize=address and
# -fsanitize=undefined) or `thread` (data races, with -fsanitize=thread); without one, both.  With
# -s only the share that each tests/run.sh includes is run.
#
# Each kind gets a temporary copy of this tree whose extensions are built for it.  Python and all
# other libraries are not instrumented, so these reports are turned off:
# - Leaks.  The interpreter frees most of its memory only by exiting, and the calls in progress of
#   a freed pool are lost on purpose (hostio/_iopool.c).
# - Races in which no extension takes part.  The atomic operations by which other code orders its
#   accesses are invisible.  Locks of the interpreter and of libfuse are visible, so accesses of the
#   extensions are ordered by the GIL as well.
# - The end of a process that is forked beside threads and creates a thread, as mounts in the
#   background do.
#
# Exit code: 0 if all tests pass and no sanitizer reports anything, otherwise 1.
set -eu
# shellcheck source=tests/shared.sh
. "$(dirname "${BASH_SOURCE[0]}")/shared.sh"

only_share='' kinds=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        -s) only_share=yes ;;
        address | thread) kinds+=("$1") ;;
        *) die "found $1, expected -s, address or thread" ;;
    esac
    shift
done
[ ${#kinds[@]} -gt 0 ] || kinds=(address thread)

# shellcheck disable=SC2034  # used by reference
address_share=(
    tests/unit/test_{iothreads,hostcalls,started_reads,extraops,dataops,burst,queuedreads,seek,inplacewrite}.py
    tests/property/test_entry_rules.py tests/mounted/test_read_paths.py
    tests/fuzz/test_targets.py::test_inputs_for_c_code_find_nothing
)
# shellcheck disable=SC2034  # used by reference
address_rest=(
    tests/unit/test_{hostfile,fuse_operations,datarequests,cachedread}.py tests/toolbox/test_{check,map}.py
    tests/mounted/test_{mount_load,discard,kill,remount,umount}.py tests/fuzz/test_fuzz.py
)
# shellcheck disable=SC2034  # used by reference
thread_share=(tests/unit/test_{iothreads,hostcalls,extraops,dataops,burst,queuedreads}.py)
# shellcheck disable=SC2034  # used by reference
thread_rest=(
    tests/unit/test_hostfile.py
    tests/mounted/test_{read_paths,mount_load,discard}.py tests/fuzz/test_fuzz.py
)

needs_end_during_creation=tests/unit/test_iothreads.py::test_the_call_is_made_while_no_thread_can_be_created

install_for_tests
scratch=$(mktemp -d)
trap 'rm -rf --one-file-system "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# library NAME: print the path of a library of gcc.
library() {
    local path
    path=$(gcc -print-file-name="$1")
    [ "$path" != "$1" ] || die "gcc has no $1"
    printf '%s\n' "$path"
}

# make_instrumented KIND: make a copy of the tree for a sanitizer.
make_instrumented() {
    local copy=$scratch/$1 runtime file
    local flags=-fsanitize=thread
    if [ "$1" = address ]; then
        # Undefined behaviour raises SIGILL, which the address sanitizer reports.  The library for
        # undefined behaviour would report to stderr, because the other one is loaded first.
        flags='-fsanitize=address,undefined -fsanitize-undefined-trap-on-error -fno-crossjumping -fno-tree-tail-merge'
        runtime=$(library libasan.so)
    else
        runtime=$(library libtsan.so)
    fi
    make_copy "$copy" CFLAGS="$flags -O1 -g -fno-omit-frame-pointer" LDFLAGS="$flags"
    # An extension that could not be built would be left out without an error.
    for file in mount/fuse/_extraops hostio/_iothreads remote/_crc32 check/_sweep tools/inspection/_maplines; do
        nm -D "$copy/qedfuse/$file".*.so | grep -q -e __asan_load -e __asan_report -e __tsan_read ||
            die "the sanitizer's calls are missing in $file"
    done
    # A sanitizer's library must be loaded before all others.  Each Python of the copy loads it into
    # itself, but not into the programs that it starts: QEMU hangs with it.
    cat >"$copy/.venv/preloaded.py" <<END
import os, sys
if os.environ.get("LD_PRELOAD") == "$runtime":
    del os.environ["LD_PRELOAD"]
else:
    os.environ["LD_PRELOAD"] = "$runtime"
    os.execv(sys.executable, sys.orig_argv)
END
    file=$(echo "$copy"/.venv/lib/python*/site-packages)
    printf '%s\nimport preloaded\n' "$copy/.venv" >"$file/preloaded.pth"
}

# run_instrumented KIND TEST...: run tests; fails if one fails, or if the sanitizer reports anything.
run_instrumented() {
    local copy=$scratch/$1 reports=$scratch/reports.$1 code=0 file
    shift
    mkdir -p "$reports"
    (
        cd "$copy"
        export ASAN_OPTIONS="log_path=$reports/report:detect_leaks=0:detect_stack_use_after_return=1:handle_sigill=2"
        export TSAN_OPTIONS="log_path=$reports/report:ignore_noninstrumented_modules=1:history_size=7:die_after_fork=0"
        # Memory and threads of a process are those of a new interpreter, as for users.
        export QEDFUSE_TEST_START=new
        export PYTHONMALLOC=malloc # otherwise the sanitizers see one block in place of many objects
        exec "${fixed_addresses[@]}" .venv/bin/python -m pytest -q --timeout 600 -o faulthandler_timeout=500 "$@"
    ) || code=1
    for file in "$reports"/*; do
        [ -s "$file" ] || continue
        code=1
        cat "$file" >&2
    done
    return "$code"
}

# The thread sanitizer of gcc 12 cannot start if the kernel chooses addresses with many random bits.
fixed_addresses=(setarch --addr-no-randomize)
"${fixed_addresses[@]}" true 2>/dev/null || fixed_addresses=(env)

failed=0
for kind in "${kinds[@]}"; do
    say "Sanitizer: $kind"
    make_instrumented "$kind"
    declare -n share=${kind}_share rest=${kind}_rest
    tests=("${share[@]}")
    [ -n "$only_share" ] || tests+=("${rest[@]}")
    # From gcc 14 on the address sanitizer holds a lock while a thread is created, and a thread takes the
    # same lock when it ends.  So no thread can end during a creation, for which this test waits.
    if [ "$kind" = address ] && [ "$(gcc -dumpversion | cut -d. -f1)" -ge 14 ]; then
        say "Left out with the address sanitizer of gcc 14 and newer: ${needs_end_during_creation##*::}"
        tests+=("--deselect=$needs_end_during_creation")
    fi
    run_instrumented "$kind" "${tests[@]}" || failed=1
done
[ "$failed" = 0 ] || die "a test or a sanitizer has found an error"
