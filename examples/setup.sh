# shellcheck shell=bash disable=SC2034  # used by the scripts that source this
# Set-up that the scripts share; source it, do not run it.
#
# Each function does nothing if nothing is missing, so the scripts call it every time.
# Progress goes to stderr.  PYTHON names the Python to use (python3).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=${PYTHON:-python3}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # for ordinary users: sfdisk, fdisk, losetup

say() { printf '== %s\n' "$*" >&2; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# have WHAT: whether WHAT is installed: a program, or one of the other names below.
have() {
    case $1 in
        library:*) "$python" -c "import ctypes; ctypes.CDLL('${1#library:}')" ;;
        lib:*) pkg-config --exists "${1#lib:}" ;;
        python-headers)
            "$python" -c 'import os, sysconfig as s, sys
sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' ;;
        c-headers) printf '#include <stdlib.h>\n' | gcc -E - ;;
        python-venv) "$python" -c 'import ensurepip, venv' ;;
        *) command -v "$1" ;;
    esac >/dev/null 2>&1
}

# The needs of the project itself, as WHAT=PACKAGE (of Debian 12 and 13).
# pyfuse3 has no binary package on PyPI, so pip builds it: compiler, headers, pkg-config.
runtime_needs=(
    "$python=python3" python-venv=python3-venv python-headers=python3-dev
    fusermount3=fuse3 gcc=gcc c-headers=libc6-dev pkg-config=pkg-config lib:fuse3=libfuse3-dev
    library:libseccomp.so.2=libseccomp2
)

# install_packages WHAT=PACKAGE...: install the package of each WHAT that is missing.
install_packages() {
    local need sudo='' missing=()
    for need; do
        if ! have "${need%=*}" && [[ " ${missing[*]-} " != *" ${need##*=} "* ]]; then
            missing+=("${need##*=}")
        fi
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        # Without a terminal sudo cannot ask for a password.
        if have sudo && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then sudo=sudo; else sudo=none; fi
    fi
    if [ "$sudo" = none ] || ! have apt-get; then
        die "please install these packages (Debian's names): ${missing[*]}"
    fi
    say "Installing system packages: ${missing[*]}"
    local log
    log=$(mktemp)
    if ! {
        $sudo apt-get update -qq &&
            $sudo env DEBIAN_FRONTEND=noninteractive \
                apt-get install -y -qq --no-install-recommends "${missing[@]}"
    } </dev/null >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "apt-get could not install: ${missing[*]}"
    fi
    rm -f "$log"
}

# check_fuse: end the script if FUSE cannot mount and unmount here.
check_fuse() {
    [ -e /dev/fuse ] || [ "$(id -u)" != 0 ] || ! have modprobe || modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] ||
        die "/dev/fuse is missing: load the kernel module (modprobe fuse) or give the container the device"
    # fusermount3 needs /etc/mtab to unmount; a minimal container may lack it.
    [ -e /etc/mtab ] || [ "$(id -u)" != 0 ] || ln -s ../proc/self/mounts /etc/mtab
    [ -e /etc/mtab ] || die "/etc/mtab is missing: as root: ln -s ../proc/self/mounts /etc/mtab"
}

# make_venv: create a virtual environment for $python in $venv, unless a working one exists.
make_venv() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$python" --version) is too old: found by the name $python, expected 3.11 or newer"
    # An environment that was moved or not completed is replaced: its scripts contain its path.
    if [ "$(cat "$venv/.made-for" 2>/dev/null)" != "$venv $("$python" --version)" ] ||
        ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        say "Creating a virtual environment in $venv"
        "$python" -m venv --clear "$venv"
        printf '%s %s\n' "$venv" "$("$python" --version)" >"$venv/.made-for"
    fi
}

# install_project [EXTRA]: install the project and its needs, if its build inputs have changed.
install_project() {
    make_venv
    local extra=${1:-} wanted stamp
    wanted=$(find "$root/qedfuse" -name "*.[ch]" -print0 | sort -z |
        xargs -0 cat "$root/pyproject.toml" "$root/setup.py" | sha256sum)
    for stamp in "$venv/.installed-test" "$venv/.installed${extra:+-$extra}"; do
        [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
    done
    say "Installing qedfuse${extra:+ and the needs of its tests} into $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -e "$root${extra:+[$extra]}"
    printf '%s\n' "$wanted" >"$venv/.installed${extra:+-$extra}"
}
