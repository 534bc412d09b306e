"""The clusters that the scan has marked as used, and those that change during the scan.

The scan reads the tables while requests change them, as a concurrent garbage collector marks
objects while the program runs.  `Marking.record_change` and `Marking.record_drop` are the *write
barrier*: they record each cluster whose state changes during the scan, and the scan's result for
such a cluster is ignored.  So a cluster counts as found free only if no entry referred to it when
the scan began, and its state has not changed since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.disk.space.ownerbitmap import OwnerBitmap
from qedfuse.errors import NeedsCheckError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qedfuse.disk.space.freemap import FreeMap

_BEFORE_FIRST_SLICE: Final = -1
"""A number below the file offset of any slice: no slice has been marked."""


class Marking:
    """The marks of one scan of one image.

    Attributes:
        active: Whether changes are recorded: from `begin` to `end`.
        changed: The clusters whose state has changed since `begin`.
        owners: The clusters that have been marked so far: those to which a table entry or the
            header refers, or has referred since `begin`.
    """

    def __init__(self, empty: FreeMap, name: str) -> None:
        """Prepare a scan; nothing is marked or recorded yet.

        Args:
            empty: An empty map; all maps of this object get its division into blocks.
            name: Name of the file in messages.
        """
        self._name = name
        self.active = False
        self.changed = empty.empty_like()
        self.owners = OwnerBitmap(0, name)
        # Number of references since `restart` whose cluster was marked already.
        self._marked_duplicates = 0
        # Number of references that were dropped after another reference to the same cluster.
        self._dropped_twice = 0
        # The value of `_dropped_twice` at the last `restart`.  The walk does not find these
        # references any more, so `duplicates` adds their number.  A second reference that is
        # dropped after the `restart` is in `_marked_duplicates`: `mark` or `record_drop` counts it.
        self._dropped_twice_before_walk = 0
        # The clusters that have lost a reference since `begin`.
        self._dropped = empty.empty_like()
        self._marked_up_to = _BEFORE_FIRST_SLICE
        self._clusters = 0
        # The error because of which clusters could not be marked; None without one.
        self._limit_error: NeedsCheckError | None = None

    @property
    def duplicates(self) -> int:
        """How many references were found whose cluster had another owner."""
        return self._marked_duplicates + self._dropped_twice_before_walk

    def begin(self, clusters: int) -> None:
        """Start recording changes of a file that has ``clusters`` clusters."""
        self.active = True
        self._clusters = clusters
        self.owners = OwnerBitmap(clusters, self._name)

    def restart(self) -> None:
        """Remove all marks, before a walk through the tables from the beginning.

        Clusters that lost a reference since `begin` are marked again, because the walk does not
        find the dropped references any more.

        Raises:
            NeedsCheckError: See `OwnerBitmap.claim_range`.
        """
        self.owners = OwnerBitmap(self._clusters, self._name)
        self._marked_duplicates = 0
        self._dropped_twice_before_walk = self._dropped_twice
        self._marked_up_to = _BEFORE_FIRST_SLICE
        self._limit_error = None
        for first, count in self._dropped.runs():
            self.owners.claim_range(first, first + count)

    def mark(self, offset: int, clusters: NDArray[np.uint64]) -> None:
        """Mark the clusters to which the slice at file offset ``offset`` refers.

        The caller must mark the slices in ascending order of their file offsets.

        No error is raised, because the caller must also validate the entries of the slices that
        follow; `require_complete` raises it later.
        """
        self._marked_up_to = offset
        if self._limit_error is not None:
            return
        # Ignore clusters that were added to the file since the scan began.
        clusters = clusters[clusters < self.owners.clusters]
        try:
            # A cluster that had an owner when the scan began is not handed out again before the
            # scan ends.  So a second reference to it means that two owners claim the cluster.
            self._marked_duplicates += int(self.owners.claim(clusters).sum())
        except NeedsCheckError as error:
            self._limit_error = error

    def require_complete(self) -> None:
        """Raise NeedsCheckError if a cluster could not be marked since `restart`.

        A second owner of such a cluster may not have been found.
        """
        if self._limit_error is not None:
            raise self._limit_error

    def record_change(self, first: int, count: int) -> None:
        """Record that a run of clusters was handed out or freed; does nothing unless active."""
        if self.active:
            self.changed.add(first, count)

    def record_drop(self, first: int, count: int, dropped_by: int) -> None:
        """Record that a run of clusters lost its references; does nothing unless active.

        ``dropped_by`` is the file offset of the slice that held the references:

        - If the scan has reached this slice, this method marks nothing.  Either `mark` has seen the
          references, or they are newer, and then `changed` has their clusters already.
        - If not, the scan will not find the dropped references there.  So this method marks the
          clusters.  A cluster that is marked already has two owners, and counts as a duplicate.

        `restart` forgets these marks and counts.  So this method also records all clusters that
        have lost a reference since `begin`, which `restart` marks again, and counts the further
        references that these clusters have lost.

        No error is raised, because the caller has changed the table already and must be able to
        finish its change; `require_complete` raises it later.
        """
        if not self.active:
            return
        self.changed.add(first, count)
        last = min(first + count, self.owners.clusters)
        if first < last:
            self._dropped_twice += self._dropped.count_free(first, last - first)
            self._dropped.add(first, last - first)
            if dropped_by > self._marked_up_to:
                self._marked_duplicates += self.owners.owned(first, last - first).bit_count()
                try:
                    self.owners.claim_range(first, last)
                except NeedsCheckError as error:
                    self._limit_error = error

    def end(self) -> None:
        """Stop recording, and free the memory of the marks."""
        self.active = False
        self.owners = OwnerBitmap(0, self._name)
