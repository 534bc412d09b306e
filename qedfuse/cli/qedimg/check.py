"""``qedimg check``: find damage and leaked space in an image, and repair them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qedfuse.check.fastcheck import fast_check
from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_json, print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import UsageError
from qedfuse.text import printable
from qedfuse.tools.repair.checkresult import CheckResult
from qedfuse.util.sizes import format_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from qedfuse.check.findings import CheckReport

EXAMPLE: Final = "qedimg check -r all --dry-run vm.qed"
DESCRIPTION: Final = """\
Find damage and leaked space, and print a line for each finding, notes included.
Only the image itself is read, never its base.

-r leaks frees leaked space: the highest clusters move into the gaps, and the file is
cut off after the last one.  An image with worse damage is left alone.

-r all repairs damage: a cluster with several owners is copied for each of them, and
an entry that points nowhere is cleared.  The ranges of the disk whose content is lost
or doubtful are listed.  Everything that the repair changes is saved beside the image
first, in IMAGE.before-repair; --undo puts it back, as long as nothing else has changed
the image.  A repair that is interrupted can be run again.

A run that repairs frees no space, and exits with 3 if there is leaked space: the
cluster that a cleared entry pointed to is leaked now, and may be your data.  Look at
the disk, but read-only, since a mount for writing reuses leaked space.  Once you are
satisfied, free it with -r leaks; -r all does so only if the image has no damage and
IMAGE.before-repair does not exist.

If nothing in an image is in use, or far more is leaked than in use, -r leaks and
-r all need --force: a wrong bit in the header has the same effect, and the repair
would overwrite data."""

SOUND: Final = 0
FAILED: Final = 1
ERRORS: Final = 2
LEAKS: Final = 3
EXIT_CODES: Final = {
    SOUND: "sound, or completely repaired",
    FAILED: "not completed, or refused without --force",
    ERRORS: "damage remains",
    LEAKS: "leaked space remains, and nothing worse, also after a repair",
    70: "a bug",
    130: "interrupted",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-f", dest="format", choices=("qed",), help="the only supported format")
    parser.add_argument(
        "-r",
        "--repair",
        choices=("leaks", "all"),
        help="free leaked space, or repair damage",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what -r would do, and change nothing"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="repair even if that writes far more data than the file has, or if hardly "
        "anything seems to be in use",
    )
    parser.add_argument(
        "--undo", metavar="FILE", help="revert a repair, from the backup that it made"
    )
    common.add_output(parser)
    common.add_share(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check, repair or revert a repair, as the arguments say; return the exit code."""
    if (arguments.dry_run or arguments.force) and not arguments.repair:
        option = "--dry-run" if arguments.dry_run else "--force"
        msg = f"{option}: expected -r as well (see: qedimg check --help)"
        raise UsageError(msg)
    if arguments.force_share and arguments.repair and not arguments.dry_run:
        msg = "-U: a repair needs the image for itself"
        raise UsageError(msg)
    if arguments.undo is not None and (arguments.repair or arguments.force_share):
        msg = "--undo: expected no -r and no -U with it (see: qedimg check --help)"
        raise UsageError(msg)
    result = _try_fast_check(arguments)
    if result is None:
        with progress(arguments, "Checking") as report:
            result = run_async(_work, arguments, report)
    if arguments.output == "json":
        print_json(_as_json(arguments, result))
    else:
        _print(arguments, result)
    if result.after.errors:
        return ERRORS
    return LEAKS if result.after.leaks else SOUND


def _try_fast_check(arguments: argparse.Namespace) -> CheckResult | None:
    """Return the result if the image is plainly sound; otherwise None, for the full check."""
    if arguments.repair is not None or arguments.undo is not None:
        return None
    found = fast_check(arguments.image, share=arguments.force_share)
    return found and CheckResult.of_check(*found)


async def _work(arguments: argparse.Namespace, report: Callable[[int, int], None]) -> CheckResult:
    """Run the full check, a dry run, a repair, or its reversal."""
    from qedfuse.tools.repair.imagecheck import check, plan, repair, undo  # noqa: PLC0415  a quick --help

    path, level, share = arguments.image, arguments.repair, arguments.force_share
    if arguments.undo is not None:
        return await undo(path, arguments.undo, progress=report)
    if level is None:
        return await check(path, share=share, progress=report)
    if arguments.dry_run:
        return await plan(path, level, share=share, progress=report)
    return await repair(path, level, force=arguments.force, progress=report)


def _as_json(arguments: argparse.Namespace, result: CheckResult) -> dict[str, Any]:
    """Return the JSON: qemu-img's keys, omitted when it omits them, then qedfuse's own."""
    report = result.after
    repaired = bool(arguments.repair) and not result.dry
    optional = {
        "corruptions": report.errors,
        "leaks": report.leaks,
        "corruptions-fixed": result.errors_fixed if repaired else 0,
        "leaks-fixed": result.leaks_fixed if repaired else 0,
        "total-clusters": result.total_clusters,
        "allocated-clusters": report.referenced_clusters,
        "fragmented-clusters": report.fragmented_clusters,
    }
    value: dict[str, Any] = {
        "filename": arguments.image,
        "format": "qed",
        "check-errors": 0,
        **{key: number for key, number in optional.items() if number},
    }
    # The findings are those before a repair, since they are what it repaired.
    shown = result.before
    value |= {key.replace("_", "-"): item for key, item in shown.as_json().items() if key in _OWN}
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


_OWN: Final = ("file_clusters", "listed_clusters", "counts", "findings")
"""The keys of `CheckReport.as_json` that qemu-img's JSON lacks."""


def _print(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print the findings, the outcome of a repair, and a summary."""
    report = result.before
    for finding in sorted(report.findings, key=lambda item: -item.severity):
        line = f"{finding.severity.name.lower()}: {finding.code.value}: {finding.message}"
        print_line(arguments, line)
    # A single finding represents all leaked clusters.
    hidden = sum(report.counts.values()) - report.leaks - len(report.findings)
    hidden += any(item.code.value == "leaked-clusters" for item in report.findings)
    name = printable(arguments.image)
    if hidden > 0:
        print_line(arguments, f"{name}: {hidden} more findings of these kinds are not shown")
    if arguments.repair:
        _print_repair(arguments, result)
    if result.undone:
        print_line(
            arguments,
            f"restored: {result.undone} ranges; the file had {result.bytes_before} bytes and has "
            f"{result.bytes_after}",
        )
    _print_summary(arguments, result)


def _print_repair(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print what a repair did, or would do in a dry run, and what is lost."""
    done = result.plan
    would = "would be " if result.dry else ""
    for lost in result.lost:
        text = f"lost: {lost.length} bytes of the disk at {lost.start} ({lost.code.value})"
        print_line(arguments, f"would be {text}" if result.dry else text)
    if done.cleared or done.copied:
        print_line(
            arguments,
            f"{would}repaired: {done.cleared} entries cleared, {done.copied} clusters copied, "
            f"about {format_size(done.written)} written",
        )
    if result.backup is not None:
        print_line(arguments, f"backup of the tables: {printable(result.backup)}")
    if result.dry:
        if result.before.leaks and not result.before.errors and not result.leaks_kept:
            print_line(arguments, f"would be freed: {result.before.leaks} leaked clusters")
        if result.needs_force:
            print_line(arguments, "this needs --force")
    elif result.bytes_after != result.bytes_before or result.leaks_fixed:
        freed = "" if result.leaks_kept else f"freed: {result.leaks_fixed} leaked clusters; "
        print_line(
            arguments,
            f"{freed}the file had {result.bytes_before} bytes and has {result.bytes_after}",
        )
    _print_kept(arguments, result)


def _print_kept(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print why leaked space was kept, and how to free it."""
    if result.leaks_kept:
        name = printable(arguments.image)
        force = " --force" if result.after.is_implausible and not result.after.errors else ""
        stays = "would stay" if result.dry else "stays"
        print_line(
            arguments,
            f"leaked space {stays}, because a bad entry may have pointed to it; once you are "
            f"satisfied with the repair, free it with: qedimg check -r leaks{force} {name}",
        )
    elif result.before.leaks and result.after.errors and not result.dry:
        print_line(arguments, "leaked space is not freed while there is damage (see: -r all)")


def _print_summary(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print the state of the image at the end, in counts."""
    report, total = result.after, result.total_clusters
    used = report.allocated_clusters
    notes = sum(count for code, count in report.counts.items() if not code.severity)
    listed = report.listed_clusters
    print_line(
        arguments,
        f"{printable(arguments.image)}: {_state(report)}: errors: {report.errors}, leaked "
        f"clusters: {report.leaks}, notes: {notes}"
        + ("" if listed is None else f", free clusters in the list: {listed}"),
    )
    if total:
        parts = report.fragmented_clusters / used if used else 0.0
        print_line(
            arguments,
            f"{used}/{total} = {used / total:.2%} allocated, {parts:.2%} fragmented",
        )


def _state(report: CheckReport) -> str:
    """Return the state of the image in one or two words."""
    if report.errors:
        return "damaged"
    return "leaks space" if report.leaks else "sound"
