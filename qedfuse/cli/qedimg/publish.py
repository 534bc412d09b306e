"""``qedimg publish``: copy an image to an object store, from which other machines mount it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.copying.publish import Published

EXAMPLE: Final = "qedimg publish golden.qed s3://images/golden.qed"
DESCRIPTION: Final = """\
Copy IMAGE, a QED image or a raw file, to an object store as one object, and compare the object
with the file.  URL is s3://BUCKET/KEY, gs://BUCKET/KEY or az://CONTAINER/KEY.  The object
appears when it is complete.  An image with a backing file is refused, unless --flatten makes
one image of the chain first.

The output ends with the commands that mount a new writable disk over the published image or
file.  Credentials come from the file that --credentials names, or from the environment
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and others)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("url", metavar="URL")
    parser.add_argument(
        "--flatten",
        action="store_true",
        help="publish one new QED image with the content of IMAGE and its backing files; it is "
        "made in TMPDIR (/var/tmp) first",
    )
    parser.add_argument("--force", action="store_true", help="replace the object if it exists")
    common.add_share(parser)
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Publish the image, print the object and the commands that mount it, and return 0.

    Raises:
        QedError: The image was not published.
    """
    from qedfuse.tools.copying.publish import publish  # noqa: PLC0415  imported late: --help must not load it

    with progress(arguments, "Publishing") as on_progress:

        async def copy() -> Published:
            return await publish(
                arguments.image,
                arguments.url,
                flatten=arguments.flatten,
                overwrite=arguments.force,
                options=common.open_options(arguments),
                progress=on_progress,
            )

        result = run_async(copy)
    version = f" (versionId {result.version})" if result.version else ""
    print_line(arguments, f"{result.url}: {result.size} bytes, compared with the file{version}")
    url = shlex.quote(result.url)
    if result.is_raw:
        # The mount option ``overlay`` makes overlays over images only, so ``qedimg create`` makes
        # this overlay.  A comma would end the mount option ``backing_url``, so a comma in the URL
        # is escaped.
        prefix = shlex.quote(f"backing_url={result.url.replace(',', '%2C')}")
        print_line(arguments, f"qedimg create -b {url} -F raw vm1.qed")
        print_line(arguments, f"qedfuse -o {prefix} vm1.qed /mnt/vm1")
    else:
        print_line(arguments, f"qedfuse -o overlay=vm1.qed {url} /mnt/vm1")
    return 0
