"""The text output of ``qedimg check``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg.output import print_line
from qedfuse.remote.address import shown_name
from qedfuse.text import printable
from qedfuse.tools.repair.checkresult import KeepReason
from qedfuse.util.sizes import format_size

if TYPE_CHECKING:
    import argparse

    from qedfuse.check.findings import CheckReport
    from qedfuse.tools.repair.checkresult import CheckResult

_KEEP_TEXTS: Final = {
    KeepReason.REPAIR: (
        "a bad entry may have pointed to it; once you are satisfied with the repair"
    ),
    KeepReason.HARD_LINKS: (
        "the image has several hard links, and the backup of an earlier repair may lie beside "
        "another one; if the image was never repaired, or you are satisfied with the repair"
    ),
}
"""Why leaked space is kept, and when it may be freed."""


def print_result(arguments: argparse.Namespace, result: CheckResult) -> None:
    """Print the findings, the outcome of a repair or an undo, and a summary."""
    # If there is a backup, the plan was printed when the backup was complete.
    if result.backup is None:
        print_plan(arguments, result)
    if arguments.repair:
        _print_repair(arguments, result)
    if result.undone:
        print_line(
            arguments,
            f"restored: {result.undone} ranges; the file had {result.bytes_before} bytes and has "
            f"{result.bytes_after}",
        )
    _print_summary(arguments, result)


def print_plan(arguments: argparse.Namespace, result: CheckResult) -> None:
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
        if result.before.leaks and not result.before.errors and not result.keep_reason:
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
    if result.keep_reason:
        name = shlex.quote(shown_name(arguments.image))
        force = " --force" if result.after.is_implausible and not result.after.errors else ""
        space = "leaked space" if result.before.leaks else "space that the repair leaks"
        stays = "would stay" if result.dry else "stays"
        print_line(
            arguments,
            f"{space} {stays}, because {_KEEP_TEXTS[result.keep_reason]}, free the space with: "
            f"qedimg check -r leaks{force} {name}",
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
