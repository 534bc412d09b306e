"""``qedimg check``: what is wrong with an image, and mending it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qedfuse.check.fastcheck import fast_check
from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_json, say
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
Look for damage and leaked space; one line for each thing that is wrong or odd.
Only the image itself is read, never its base.

-r leaks gives leaked space back to the host.  Clusters move into the gaps for
that, so that the file ends with none.  An image with worse damage is left alone.

-r all repairs: a cluster with several owners is copied for each, and an entry
that points nowhere is cleared.  The ranges of the disk that are lost or in doubt
are listed.  What a repair changes is saved beside the image first, as it was, in
IMAGE.before-repair; --undo puts it back, as long as nothing else has changed the
image.  A repair that is interrupted can be run again.

A run that repairs gives no space back, and ends with 3 if there is leaked space: what
a cleared entry named is leaked now, and may be your data.  Look at the disk, but
read-only, since a mount for writing uses leaked space.  Once you are content, give it
back with -r leaks; -r all does so only without damage and IMAGE.before-repair.

An image of which nothing is in use, or in which far more is leaked than in use, is
repaired only with --force, by -r leaks and by -r all: one wrong bit in the header
looks like that, and the repair would write over data."""

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
    """Declare what the subcommand takes."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-f", dest="format", choices=("qed",), help="the only format there is")
    parser.add_argument(
        "-r",
        "--repair",
        choices=("leaks", "all"),
        help="give back leaked space, or repair damage",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what -r would do, and change nothing"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="repair also where that writes far more than the file has, or where hardly "
        "anything seems to be in use",
    )
    parser.add_argument(
        "--undo", metavar="FILE", help="put back what a repair has changed, from its backup"
    )
    common.add_output(parser)
    common.add_share(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check, and repair if that is asked for."""
    if (arguments.dry_run or arguments.force) and not arguments.repair:
        option = "--dry-run" if arguments.dry_run else "--force"
        msg = f"{option}: expected -r as well (see: qedimg check --help)"
        raise UsageError(msg)
    if arguments.force_share and arguments.repair and not arguments.dry_run:
        msg = "-U: a repair shares the image with nobody"
        raise UsageError(msg)
    if arguments.undo is not None and (arguments.repair or arguments.force_share):
        msg = "--undo: expected no -r and no -U with it (see: qedimg check --help)"
        raise UsageError(msg)
    result = _glance(arguments)
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


def _glance(arguments: argparse.Namespace) -> CheckResult | None:
    """Look whether the image is plainly sound; None if there is more to say or to do."""
    if arguments.repair is not None or arguments.undo is not None:
        return None
    found = fast_check(arguments.image, share=arguments.force_share)
    return found and CheckResult.of_check(*found)


async def _work(arguments: argparse.Namespace, report: Callable[[int, int], None]) -> CheckResult:
    """Do what the arguments say."""
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
    """Give the keys that qemu-img has, left out where it leaves them out, and ours."""
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
    # What was found first is what a repair was about.
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
"""What our JSON has beyond qemu-img's, from `CheckReport.as_json`."""


def _print(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print the findings, what was done about them, and a summary."""
    report = result.before
    for finding in sorted(report.findings, key=lambda item: -item.severity):
        line = f"{finding.severity.name.lower()}: {finding.code.value}: {finding.message}"
        say(arguments, line)
    # One finding of leaks stands for all leaked clusters.
    hidden = sum(report.counts.values()) - report.leaks - len(report.findings)
    hidden += any(item.code.value == "leaked-clusters" for item in report.findings)
    name = printable(arguments.image)
    if hidden > 0:
        say(arguments, f"{name}: {hidden} more findings of these kinds are not shown")
    if arguments.repair:
        _print_repair(arguments, result)
    if result.undone:
        say(
            arguments,
            f"put back: {result.undone} pieces; the file had {result.bytes_before} bytes and has "
            f"{result.bytes_after}",
        )
    _print_summary(arguments, result)


def _print_repair(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print what a repair did or would do, and what is lost."""
    done = result.plan
    would = "would be " if result.dry else ""
    for lost in result.lost:
        text = f"lost: {lost.length} bytes of the disk at {lost.start} ({lost.code.value})"
        say(arguments, f"would be {text}" if result.dry else text)
    if done.cleared or done.copied:
        say(
            arguments,
            f"{would}repaired: {done.cleared} entries cleared, {done.copied} clusters copied, "
            f"about {format_size(done.written)} written",
        )
    if result.backup is not None:
        say(arguments, f"the tables as they were: {printable(result.backup)}")
    if result.dry:
        if result.before.leaks and not result.before.errors and not result.leaks_kept:
            say(arguments, f"would be given back: {result.before.leaks} leaked clusters")
        if result.needs_force:
            say(arguments, "this takes --force")
    elif result.bytes_after != result.bytes_before or result.leaks_fixed:
        given = "" if result.leaks_kept else f"given back: {result.leaks_fixed} leaked clusters; "
        say(
            arguments,
            f"{given}the file had {result.bytes_before} bytes and has {result.bytes_after}",
        )
    _print_kept(arguments, result)


def _print_kept(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print why leaked space is not given back, and how it will be."""
    if result.leaks_kept:
        name = printable(arguments.image)
        force = " --force" if result.after.doubtful and not result.after.errors else ""
        stays = "would stay" if result.dry else "stays"
        say(
            arguments,
            f"leaked space {stays}, as it may be what a bad entry named; to give it back, "
            f"once you are content with the repair: qedimg check -r leaks{force} {name}",
        )
    elif result.before.leaks and result.after.errors and not result.dry:
        say(arguments, "leaked space is not given back while there is damage (see: -r all)")


def _print_summary(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print how the image is now."""
    report, total = result.after, result.total_clusters
    used = report.allocated_clusters
    notes = sum(count for code, count in report.counts.items() if not code.severity)
    listed = report.listed_clusters
    say(
        arguments,
        f"{printable(arguments.image)}: {_state(report)}: errors: {report.errors}, leaked "
        f"clusters: {report.leaks}, notes: {notes}"
        + ("" if listed is None else f", free clusters in the list: {listed}"),
    )
    if total:
        parts = report.fragmented_clusters / used if used else 0.0
        say(
            arguments,
            f"{used}/{total} = {used / total:.2%} allocated, {parts:.2%} fragmented",
        )


def _state(report: CheckReport) -> str:
    """Sum up in a word."""
    if report.errors:
        return "damaged"
    return "leaks space" if report.leaks else "sound"
