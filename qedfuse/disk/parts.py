"""What an opened image consists of: built here, and tied together.

`Disk` is what the world sees of it, `Lifecycle` starts it and ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.disk.allocator import Allocator
from qedfuse.disk.chain import Chain
from qedfuse.disk.commit import Commit
from qedfuse.disk.compaction import Compaction
from qedfuse.disk.discard import Discards
from qedfuse.disk.flatten import Below
from qedfuse.disk.gate import Gate
from qedfuse.disk.grace import Grace
from qedfuse.disk.layer import QedLayer
from qedfuse.disk.liveheader import LiveHeader
from qedfuse.disk.moving import Mover
from qedfuse.disk.needcheck import NeedCheck
from qedfuse.disk.quarantine import Quarantine
from qedfuse.disk.reclaim import Reclaim
from qedfuse.disk.requests import Requests
from qedfuse.disk.resize import Resizing
from qedfuse.disk.savedlist import SavedList
from qedfuse.disk.scan import Scan
from qedfuse.disk.shortcut import Shortcut

if TYPE_CHECKING:
    from qedfuse.disk.layer import Layer
    from qedfuse.disk.options import OpenOptions
    from qedfuse.disk.tablecache import SliceStore
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header


class Parts:
    """The parts of one disk; each says in its module what it is for."""

    def __init__(
        self,
        file: HostFile,
        header: Header,
        bases: list[Layer],
        options: OpenOptions,
        store: SliceStore,
    ) -> None:
        """Build the parts, from those that need none to those that need the most."""
        self.file = file
        self.options = options
        self.store = store
        self.layer = QedLayer(file, header, store)
        layers = [self.layer, *bases]
        self.chain = Chain(
            layers,
            Below(layers, self.layer, store) if bases else None,
            lacks_base=header.has_backing and not bases,
        )
        self.live = LiveHeader(file, header)
        self.commit = Commit(file, self.layer.tables, options.commit_seconds)
        self.gate = Gate(file, self.live, self.commit)
        self.grace = Grace()
        self.allocator = Allocator(file, header, lambda: self.layer.missing_tables)
        self.quarantine = Quarantine(self.grace, self.allocator.make_map)
        self.reclaim = Reclaim(file, self.allocator, self.quarantine, self.commit)
        self.commit.reclaim = self.reclaim
        self.reclaim.before_change = self.gate.before_change
        self.scan = Scan(self.layer, self.allocator, self.reclaim)
        self.needcheck = NeedCheck(
            self.layer,
            self.live,
            self.commit,
            self.allocator,
            self.scan,
            options.needcheck_seconds,
        )
        self.requests = Requests(
            self.chain,
            self.layer,
            self.allocator,
            self.commit,
            self.needcheck,
            self.grace,
            options.cache_bytes // 2,
        )
        self.shortcut = Shortcut(
            self.chain, self.layer, self.commit, self.allocator, self.needcheck, self.requests
        )
        self.discards = Discards(
            self.chain, self.layer, self.requests, self.commit, self.needcheck, self.reclaim
        )
        self.saved_list = SavedList(
            self.layer,
            self.live,
            self.commit,
            self.allocator,
            self.reclaim,
            self.scan,
            options,
            self.gate.before_change,
        )
        self.gate.saved_list = self.saved_list
        mover = Mover(
            self.layer, self.allocator, self.requests, self.commit, self.needcheck, self.reclaim
        )
        self.compaction = Compaction(self.layer, self.allocator, mover, self.commit, self.reclaim)
        self.resizing = Resizing(
            self.chain,
            self.layer,
            self.requests,
            self.commit,
            self.live,
            self.allocator,
            self.discards,
            self.needcheck,
            self.reclaim,
        )
