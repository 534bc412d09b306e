#!/usr/bin/env bash
# Sets up all that the tests need, then runs the linters, the type checker and all tests.
# All stages run, even if one fails, and the last lines say how each ended.  Exit code: 0 if all
# passed, otherwise 1.
# Large tests do a fixed share; with --all, they do all:
#   tests/run.sh --all
# With other arguments, which are passed to pytest, the tests run in one process, and only once:
#   tests/run.sh -k header
set -eu
# shellcheck source=tests/shared.sh
. "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
# shellcheck source=tests/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
cd "$root"

if [ "${1-}" = --all ]; then
    shift
    # All seeds and states (tests/support/share.py), and no process of the program is forked from a
    # fork server (tests/support/forkserver.py).
    export QEDFUSE_TEST_SHARE=all QEDFUSE_TEST_START=new
    share=()
else
    share=(-s)
fi

lint() {
    local flags includes sources
    shellcheck --external-sources examples/*.sh benchmarks/*.sh packaging/*.sh tests/*.sh \
        tests/vm/*.sh tests/vm/init .ci/run
    "$venv/bin/ruff" check .
    read -r -a flags < <(pkg-config --cflags fuse3)
    includes=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    mapfile -t sources < <(find qedfuse -name '*.c')
    gcc -std=gnu11 -fsyntax-only -Wall -Wextra -Werror "${flags[@]}" -I"$includes" "${sources[@]}"
    gcc -std=gnu11 -fsyntax-only -Wall -Wextra -Werror "${flags[@]}" benchmarks/passthrough.c
    "$venv/bin/ruff" format --check .
}

types() {
    "$venv/bin/mypy"
}

all_tests() {
    install_azurite
    run_tests tests
}

# Reads, writes and flushes of mounts.
io_tests=(tests/mounted/test_{read_paths,mount_load,kill}.py tests/fuzz/test_fuzz.py)

# Threads of trio in place of native threads.
threads_of_trio() {
    QEDFUSE_HOST_CALLS=threads run_tests "${io_tests[@]}"
}

without_extensions() {
    tests/without_extensions.sh tests/unit/test_extensions.py "${io_tests[@]}"
}

address_sanitizer() {
    tests/sanitize.sh "${share[@]}" address
}

thread_sanitizer() {
    tests/sanitize.sh "${share[@]}" thread
}

if [ $# -gt 0 ]; then
    install_for_tests
    say "Lint"
    lint
    say "Types"
    types
    say "Tests"
    exec "$venv/bin/python" -m pytest "$@"
fi
begin_install_for_tests
# The tests wait half of their time for programs, servers and disks; what needs one processor
# without a pause runs beside them.
run_lanes all_tests \
    "lint types address_sanitizer thread_sanitizer threads_of_trio without_extensions"
