"""``qedimg check``: find damage and leaked space in an image, and repair them."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from qedfuse.check.fastcheck import fast_check
from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.checktext import print_plan, print_result
from qedfuse.cli.qedimg.output import print_json
from qedfuse.cli.qedimg.progress import erase_bar, progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import UsageError
from qedfuse.remote.address import is_url, without_secrets
from qedfuse.tools.repair.checkresult import CheckResult

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from qedfuse.util.backgroundtasks import Progress

EXAMPLE: Final = "qedimg check -r all --dry-run vm.qed"
DESCRIPTION: Final = """\
Find damage and leaked space, and print a line for each finding, but at most 50 of the
same kind.  Findings that are unusual but harmless are printed as notes.  Only the image
itself is read, never its base.  Without -r, IMAGE may be a URL: https://, s3://, gs://,
az://, nbd:// and others.

-r leaks frees leaked space: it moves the highest clusters of the file into the free
ones and shortens the file.  It does not change an image that has damage.

-r all repairs damage.  If several table entries point to one cluster, each entry but the
first gets a copy of it.  An invalid entry is cleared.  The ranges of the disk whose
content is lost or doubtful are listed.  Before anything is changed, all bytes that will
change are saved in IMAGE.before-repair (IMAGE.before-repair.2 and so on if that exists),
beside the file to which IMAGE leads if it is a symbolic link.  If that directory is not
writable, repair a copy of the image elsewhere.  --undo with the saved file reverts the
repair if nothing else has changed the image since.  If a repair is interrupted, run it
again.  The second run does not find what the first has cleared, so the text output lists
the lost ranges before the first change.

After -r all has cleared entries, the clusters to which these entries pointed are leaked,
and may hold your data.  Therefore the same run frees no space, and exits with 3 if
clusters are leaked.  Look at the disk, but only read it: a mount for writing reuses
leaked space.  When you no longer need the leaked clusters, free them with -r leaks.  -r all
frees them only if the image has no damage and no other hard link, and IMAGE.before-repair
does not exist.

In two cases the header itself may be damaged: an image with damage or leaks has no data
cluster in use, or far more clusters are leaked than in use.  A repair could then overwrite
data, and needs --force.  -r all also needs --force if the repair would write more than
64 MiB and more than the file takes up."""

SOUND: Final = 0
FAILED: Final = 1
ERRORS: Final = 2
LEAKS: Final = 3
EXIT_CODES: Final = {
    SOUND: "sound, or completely repaired",
    FAILED: "not completed, or refused without --force",
    ERRORS: "damage remains",
    LEAKS: "no damage, but leaked space remains",
    70: "a bug",
    130: "interrupted",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    common.add_qed_format(parser)
    parser.add_argument(
        "-r",
        "--repair",
        choices=("leaks", "all"),
        help="leaks: free leaked space; all: repair damage, or free leaked space if there is no "
        "damage",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what -r would do, and change nothing"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="repair even if the repair writes more than 64 MiB and more than the file takes up, "
        "or if the header may be damaged",
    )
    parser.add_argument(
        "--undo", metavar="FILE", help="revert the repair that saved the old content in FILE"
    )
    common.add_output(parser)
    common.add_share(parser)
    common.add_remote(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check, repair or revert a repair, and print the result; return the exit code.

    Raises:
        UsageError: The options conflict.
        QedError: The check, the repair or the reversal failed, or was refused.
    """
    if (arguments.dry_run or arguments.force) and not arguments.repair:
        option = "--dry-run" if arguments.dry_run else "--force"
        msg = f"{option}: expected -r as well (see: qedimg check --help)"
        raise UsageError(msg)
    if arguments.force_share and arguments.repair and not arguments.dry_run:
        msg = "-U: a repair needs an image that no other program has open"
        raise UsageError(msg)
    if arguments.undo is not None and (arguments.repair or arguments.force_share):
        msg = "--undo: expected neither -r nor -U (see: qedimg check --help)"
        raise UsageError(msg)

    def on_plan(planned: CheckResult) -> None:
        """Print what a repair will change, before it begins; nothing for JSON."""
        if arguments.output == "json":
            return
        erase_bar()
        # A failed write must not keep the repair from being made.  The same write fails again when
        # the result is printed, and is reported then.
        with suppress(OSError):
            print_plan(arguments, planned)
            sys.stdout.flush()

    result = _try_fast_check(arguments)
    if result is None:
        with progress(arguments, "Checking") as on_progress:
            result = run_async(_work, arguments, on_progress, on_plan)
    if arguments.output == "json":
        print_json(_as_json(arguments, result))
    else:
        print_result(arguments, result)
    if result.after.errors:
        return ERRORS
    return LEAKS if result.after.leaks else SOUND


def _try_fast_check(arguments: argparse.Namespace) -> CheckResult | None:
    """Return the result of the fast check, or None if the full check is needed."""
    if arguments.repair is not None or arguments.undo is not None or is_url(arguments.image):
        return None
    found = fast_check(arguments.image, share=arguments.force_share)
    return found and CheckResult.of_check(*found)


async def _work(
    arguments: argparse.Namespace,
    on_progress: Progress,
    on_plan: Callable[[CheckResult], None],
) -> CheckResult:
    """Do the full check, a dry run, a repair or an undo, and return its result."""
    from qedfuse.tools.repair.imagecheck import check, plan, repair, undo  # noqa: PLC0415  imported late: --help must not load it

    path, level, share = arguments.image, arguments.repair, arguments.force_share
    if arguments.undo is not None:
        return await undo(path, arguments.undo, progress=on_progress)
    if level is None:
        remote = common.remote_options(arguments)
        return await check(path, share=share, remote=remote, progress=on_progress)
    if arguments.dry_run:
        return await plan(path, level, share=share, progress=on_progress)
    force = arguments.force
    return await repair(path, level, force=force, progress=on_progress, on_plan=on_plan)


def _as_json(arguments: argparse.Namespace, result: CheckResult) -> dict[str, Any]:
    """Return the result as JSON values; as in qemu-img, some numbers are omitted if they are 0."""
    after = result.after
    repaired = bool(arguments.repair) and not result.dry
    optional = {
        "corruptions": after.errors,
        "leaks": after.leaks,
        "corruptions-fixed": result.errors_fixed if repaired else 0,
        "leaks-fixed": result.leaks_fixed if repaired else 0,
        "total-clusters": result.total_clusters,
        # As in qemu-img, this includes L2 entries with an invalid offset, and those past the end of
        # the disk.  The number in the text does not.
        "allocated-clusters": after.referenced_clusters,
        "fragmented-clusters": after.fragmented_clusters,
    }
    value: dict[str, Any] = {
        "filename": without_secrets(arguments.image),
        "format": "qed",
        "check-errors": 0,
        **{key: number for key, number in optional.items() if number},
    }
    # These values are from the check before the repair, and show what was repaired.
    found = result.before.as_json()
    value |= {key.replace("_", "-"): found[key] for key in _ADDED_KEYS}
    if arguments.repair:
        value["repair"] = {
            "dry-run": result.dry,
            "needs-force": result.needs_force,
            "entries-cleared": result.plan.cleared,
            "clusters-copied": result.plan.copied,
            "bytes-written": result.plan.written,
            "lost": [
                {"start": item.start, "length": item.length, "code": item.code.value}
                for item in result.lost
            ],
            "backup": result.backup,
            "leaks-kept": result.keep_reason is not None,
            "file-size-before": result.bytes_before,
            "file-size": result.bytes_after,
        }
    if result.undone:
        value["undo"] = {
            "pieces": result.undone,
            "file-size-before": result.bytes_before,
            "file-size": result.bytes_after,
        }
    return value


_ADDED_KEYS: Final = ("file_clusters", "listed_clusters", "counts", "findings")
"""The keys of `CheckReport.as_json` that the JSON has too, with dashes in place of underscores."""
