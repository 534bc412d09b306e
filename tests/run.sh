#!/usr/bin/env bash
# Sets up all that the tests need, then runs the linters, the type checker and all tests.
# The tests run in several processes.  With arguments, which are passed to pytest, all run in one:
#   tests/run.sh -k header
set -eu
# shellcheck source=tests/shared.sh
. "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
cd "$root"

install_for_tests

say "Lint"
shellcheck --external-sources examples/*.sh benchmarks/*.sh packaging/*.sh tests/*.sh tests/vm/*.sh \
    tests/vm/init .ci/run
"$venv/bin/ruff" check .
read -r -a flags < <(pkg-config --cflags fuse3)
includes=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
gcc -std=gnu11 -fsyntax-only -Wall -Wextra -Werror "${flags[@]}" -I"$includes" \
    qedfuse/{mount/fuse,check,tools/inspection,hostio}/*.c
gcc -std=gnu11 -fsyntax-only -Wall -Wextra -Werror "${flags[@]}" benchmarks/passthrough.c
"$venv/bin/ruff" format --check .
say "Types"
if [ $# -eq 0 ]; then
    # The type checker uses one processor.  Another one compiles the tests meanwhile.
    "$venv/bin/python" -m pytest --quiet --collect-only tests >/dev/null 2>&1 &
fi
"$venv/bin/mypy"
wait # an error appears again when the tests are run
say "Tests"
[ $# -eq 0 ] || exec "$venv/bin/python" -m pytest "$@"
run_tests tests
# Reads, writes and flushes of mounts.
io_tests=(
    tests/unit/test_extensions.py
    tests/mounted/test_{read_paths,mount_load,kill}.py tests/fuzz/test_fuzz.py
)
say "Tests with threads of trio in place of native threads"
QEDFUSE_HOST_CALLS=threads run_tests "${io_tests[@]}"
tests/without_extensions.sh "${io_tests[@]}"
tests/sanitize.sh -s
