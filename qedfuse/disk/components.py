"""What an opened image consists of: built here, and tied together.

`Disk` is what the world sees of it, `Lifecycle` starts it and ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.disk.datapath.discard import Discard
from qedfuse.disk.datapath.fastpath import FastPath
from qedfuse.disk.datapath.writepath import WritePath
from qedfuse.disk.lookup.chain import Chain
from qedfuse.disk.lookup.flattenedbacking import FlattenedBacking
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.maintenance.compaction import Compaction
from qedfuse.disk.maintenance.mover import Mover
from qedfuse.disk.maintenance.resize import Resize
from qedfuse.disk.space.allocator import Allocator
from qedfuse.disk.space.epochs import Epochs
from qedfuse.disk.space.quarantine import Quarantine
from qedfuse.disk.space.reclaim import Reclaim
from qedfuse.disk.space.scan import Scan
from qedfuse.disk.state.needcheck import NeedCheck
from qedfuse.disk.state.persistentfreelist import PersistentFreeList
from qedfuse.disk.writeback.firstwrite import FirstWriteGuard
from qedfuse.disk.writeback.headerstore import HeaderStore
from qedfuse.disk.writeback.metadata import MetadataWriteback

if TYPE_CHECKING:
    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.lookup.tablecache import SliceStore
    from qedfuse.disk.options import OpenOptions
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header


class Components:
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
            FlattenedBacking(layers, self.layer, store) if bases else None,
            lacks_base=header.has_backing and not bases,
        )
        self.header_store = HeaderStore(file, header)
        self.writeback = MetadataWriteback(file, self.layer.tables, options.commit_seconds)
        self.first_write_guard = FirstWriteGuard(file, self.header_store, self.writeback)
        self.epochs = Epochs()
        self.allocator = Allocator(file, header, lambda: self.layer.registry.missing_tables)
        self.quarantine = Quarantine(self.epochs, self.allocator.make_map)
        self.reclaim = Reclaim(file, self.allocator, self.quarantine, self.writeback)
        self.writeback.reclaim = self.reclaim
        self.reclaim.prepare_write = self.first_write_guard.prepare_write
        self.scan = Scan(self.layer, self.allocator, self.reclaim)
        self.needcheck = NeedCheck(
            self.layer,
            self.header_store,
            self.writeback,
            self.allocator,
            self.scan,
            options.needcheck_seconds,
        )
        self.write_path = WritePath(
            self.chain,
            self.layer,
            self.allocator,
            self.writeback,
            self.needcheck,
            self.epochs,
            options.cache_bytes // 2,
        )
        self.fast_path = FastPath(
            self.chain, self.layer, self.writeback, self.allocator, self.needcheck, self.write_path
        )
        self.discard = Discard(
            self.chain, self.layer, self.write_path, self.writeback, self.needcheck, self.reclaim
        )
        self.persistent_free_list = PersistentFreeList(
            self.layer,
            self.header_store,
            self.writeback,
            self.allocator,
            self.reclaim,
            self.scan,
            options,
            self.first_write_guard.prepare_write,
        )
        self.first_write_guard.persistent_free_list = self.persistent_free_list
        mover = Mover(
            self.layer,
            self.allocator,
            self.write_path,
            self.writeback,
            self.needcheck,
            self.reclaim,
        )
        self.compaction = Compaction(
            self.layer, self.allocator, mover, self.writeback, self.reclaim
        )
        self.resize = Resize(
            self.chain,
            self.layer,
            self.write_path,
            self.writeback,
            self.header_store,
            self.allocator,
            self.discard,
            self.needcheck,
            self.reclaim,
        )
