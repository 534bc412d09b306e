"""Shows whether QED images are clean: the NEED_CHECK bit, and what the check finds.

    python examples/state.py IMAGE...

The images are only read, and no backing file is opened.  Ends with 0 if all are clean.
"""

from __future__ import annotations

import sys

import trio

from qedfuse import QedError
from qedfuse.check.walk import check_image
from qedfuse.disk.backing import read_header
from qedfuse.hostio.hostfile import PosixFile
from qedfuse.hostio.locking import LockMode, lock_image


async def show(path: str) -> bool:
    """Print one line for the image and one for each finding; tell whether it is clean."""
    file = PosixFile.open(path)
    try:
        # Keeps writers out, so that nothing changes while it is being looked at.
        lock_image(file.fd, LockMode.READ, file.name)
        header = await read_header(file)
        report = await check_image(file, header)
    finally:
        file.close()
    bit = "set" if header.need_check else "clear"
    found = f"{report.errors} errors, {report.leaks} leaked clusters"
    print(f"{file.name}: disk of {header.image_size} bytes, NEED_CHECK {bit}, check: {found}")
    for finding in report.findings:
        print(f"  {finding.severity.name.lower()}: {finding.message}")
    return not (header.need_check or report.errors or report.leaks)


def main() -> int:
    """Show each image that the command line names."""
    clean = True
    for path in sys.argv[1:]:
        try:
            clean &= trio.run(show, path)
        except QedError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
