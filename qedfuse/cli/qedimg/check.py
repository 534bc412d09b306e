"""``qedimg check``: find damage and leaked space in an image, and repair them."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from qedfuse.check.fastcheck import fast_check
from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_json, print_line
from qedfuse.cli.qedimg.progress import erase_bar, progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import UsageError
from qedfuse.remote.address import is_url, shown_name, without_secrets
from qedfuse.text import printable
from qedfuse.tools.repair.checkresult import CheckResult
from qedfuse.util.sizes import format_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from qedfuse.check.findings import CheckReport
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
beside the file to which IMAGE leads if it is a symbolic link.  --undo with this file
reverts the repair if nothing else has changed the image since.  If a repair is
interrupted, run it again.  The second run does not find what the first has cleared, so
the text output lists the lost ranges before the first change.

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
            _print_plan(arguments, planned)
            sys.stdout.flush()

    result = _try_fast_check(arguments)
    if result is None:
        with progress(arguments, "Checking") as on_progress:
            result = run_async(_work, arguments, on_progress, on_plan)
    if arguments.output == "json":
        print_json(_as_json(arguments, result))
    else:
        _print(arguments, result)
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
            "leaks-kept": result.leaks_kept,
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


def _print(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print the findings, the outcome of a repair or an undo, and a summary."""
    # If there is a backup, the plan was printed when the backup was complete.
    if result.backup is None:
        _print_plan(arguments, result)
    if arguments.repair:
        _print_repair(arguments, result)
    if result.undone:
        print_line(
            arguments,
            f"restored: {result.undone} ranges; the file had {result.bytes_before} bytes and has "
            f"{result.bytes_after}",
        )
    _print_summary(arguments, result)


def _print_plan(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print the findings, the ranges that are lost, and the name of the backup, if any."""
    before = result.before
    for finding in sorted(before.findings, key=lambda item: -item.severity):
        line = f"{finding.severity.name.lower()}: {finding.code.value}: {finding.message}"
        print_line(arguments, line)
    name, hidden = shown_name(arguments.image), before.hidden_findings
    if hidden:
        print_line(arguments, f"{name}: {hidden} more findings of these kinds are not shown")
    for lost in result.lost:
        text = f"lost: {lost.length} bytes of the disk at {lost.start} ({lost.code.value})"
        print_line(arguments, f"would be {text}" if result.dry else text)
    if result.backup is not None:
        print_line(arguments, f"backup of all that the repair changes: {printable(result.backup)}")


def _print_repair(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print what a repair did, or what it would do."""
    plan = result.plan
    would = "would be " if result.dry else ""
    if plan.cleared or plan.copied:
        print_line(
            arguments,
            f"{would}repaired: {plan.cleared} entries cleared, {plan.copied} clusters copied, "
            f"about {format_size(plan.written)} written",
        )
    if result.dry:
        if result.before.leaks and not result.before.errors and not result.leaks_kept:
            print_line(arguments, f"would be freed: {result.before.leaks} leaked clusters")
        if result.needs_force:
            print_line(arguments, "the repair needs --force")
    elif result.bytes_after != result.bytes_before or result.leaks_fixed:
        # A repair of errors frees no space.  If it makes an invalid table valid, the clusters of
        # the table are no longer leaked, and `leaks_fixed` counts them.
        is_freed = result.leaks_fixed and not result.before.errors
        freed = f"freed: {result.leaks_fixed} leaked clusters; " if is_freed else ""
        print_line(
            arguments,
            f"{freed}the file had {result.bytes_before} bytes and has {result.bytes_after}",
        )
    _print_kept(arguments, result)


def _print_kept(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print why leaked space was kept, and how to free it; nothing if none was kept."""
    if result.leaks_kept:
        name = shlex.quote(shown_name(arguments.image))
        force = " --force" if result.after.is_implausible and not result.after.errors else ""
        space = "leaked space" if result.before.leaks else "space that the repair leaks"
        stays = "would stay" if result.dry else "stays"
        print_line(
            arguments,
            f"{space} {stays}, because a bad entry may have pointed to it; once you are "
            f"satisfied with the repair, free the space with: qedimg check -r leaks{force} {name}",
        )
    elif result.before.leaks and result.after.errors and not result.dry:
        print_line(arguments, "leaked space is not freed while there is damage (see: -r all)")


def _print_summary(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print the state of the image after the check, repair or undo, and its numbers."""
    after, total = result.after, result.total_clusters
    # L2 entries with an invalid offset or past the end of the disk are left out, because the number
    # is printed as a fraction of the disk's clusters.
    used = after.allocated_clusters - after.past_end_clusters
    notes = sum(count for code, count in after.counts.items() if not code.severity)
    listed = after.listed_clusters
    print_line(
        arguments,
        f"{shown_name(arguments.image)}: {_state(after)}: errors: {after.errors}, leaked "
        f"clusters: {after.leaks}, notes: {notes}"
        + ("" if listed is None else f", free clusters in the list: {listed}"),
    )
    if total:
        fragmented = after.fragmented_clusters / max(1, after.referenced_clusters)
        print_line(
            arguments,
            f"{used}/{total} = {used / total:.2%} allocated, {fragmented:.2%} fragmented",
        )


def _state(report: CheckReport) -> str:
    """Return the state of an image in one or two words."""
    if report.errors:
        return "damaged"
    return "leaks space" if report.leaks else "sound"
