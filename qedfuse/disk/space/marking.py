"""What the scan for free clusters has marked as used, and what changes while it runs.

The scan reads the tables while requests change them, as a concurrent garbage collector
marks objects while the program runs; the methods that note changes are its *write
barrier*.  A cluster that is handed out, put into quarantine or given back during the scan
is recorded, and what the scan reads about it does not count.  So the scan finds only
clusters that no entry referred to at its beginning and that were not touched since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.disk.space.ownerbitmap import OwnerBitmap

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qedfuse.disk.space.freemap import FreeMap

_BEFORE_FIRST_SLICE: Final = -1
"""Less than the file offset of any slice."""


class Marking:
    """The marks of one scan of one image.

    Attributes:
        active: Whether changes are recorded.
        changed: Clusters whose state has changed since `begin`.
        owners: Clusters that an entry, or the image's own structures, refer to.
        duplicates: References that were found to clusters with another owner.
    """

    def __init__(self, empty: FreeMap, name: str) -> None:
        """Mark nothing yet; ``empty`` is a map of the file's clusters, ``name`` the file's."""
        self._name = name
        self.active = False
        self.changed = empty.empty_like()
        self.owners = OwnerBitmap(0, name)
        self.duplicates = 0
        self._dropped = empty.empty_like()
        self._marked_up_to = _BEFORE_FIRST_SLICE
        self._clusters = 0

    def begin(self, clusters: int) -> None:
        """Start recording changes of a file that has ``clusters`` clusters."""
        self.active = True
        self._clusters = clusters
        self.owners = OwnerBitmap(clusters, self._name)

    def restart(self) -> None:
        """Remove all marks before the tables are walked from the beginning, again or first.

        Clusters that lost a reference since `begin` are marked: the tables do not show it
        any more.
        """
        self.owners = OwnerBitmap(self._clusters, self._name)
        self._marked_up_to = _BEFORE_FIRST_SLICE
        for first, count in self._dropped.runs():
            self.owners.claim_range(first, first + count)

    def mark(self, offset: int, clusters: NDArray[np.uint64]) -> None:
        """Mark the clusters that the slice at a file offset refers to.

        Slices are marked in ascending order.
        """
        # Clusters that the file did not have at the beginning are handed out later, so
        # they say nothing about its beginning.
        clusters = clusters[clusters < self.owners.clusters]
        # No cluster that had an owner at the beginning is handed out again before the end
        # of the scan, so a second reference is a second owner.
        self.duplicates += int(self.owners.claim(clusters).sum())
        self._marked_up_to = offset

    def record_change(self, first: int, count: int) -> None:
        """Record that a run of clusters changes its state."""
        if self.active:
            self.changed.add(first, count)

    def record_drop(self, first: int, count: int, dropped_by: int) -> None:
        """Record that the slice at file offset ``dropped_by`` drops a run of clusters.

        If the slice has not been marked yet, the walk will not find the dropped references
        in it.  So they are marked here, and a cluster that is marked or dropped already has
        two owners.
        """
        if not self.active:
            return
        self.changed.add(first, count)
        last = min(first + count, self.owners.clusters)
        if first < last:
            self.duplicates += self._dropped.count_free(first, last - first)
            self._dropped.add(first, last - first)
            if dropped_by > self._marked_up_to:
                self.duplicates += self.owners.owned(first, last - first).bit_count()
                self.owners.claim_range(first, last)

    def end(self) -> None:
        """Stop recording, and free the memory of the marks."""
        self.active = False
        self.owners = OwnerBitmap(0, self._name)
