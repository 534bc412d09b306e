"""The objects that an opened image consists of, built bottom up.

Callers use the objects only through `Disk`.  `Lifecycle` starts and stops them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.disk.datapath.discard import Discard
from qedfuse.disk.datapath.fastpath import FastPath
from qedfuse.disk.datapath.tablewriter import TableWriter
from qedfuse.disk.datapath.writepath import WritePath
from qedfuse.disk.datapath.zerofill import ZeroFill
from qedfuse.disk.lookup.chain import Chain
from qedfuse.disk.lookup.flattenedbacking import FlattenedBacking
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.maintenance.compaction import Compaction
from qedfuse.disk.maintenance.datacompaction import DataCompaction
from qedfuse.disk.maintenance.diskgrowth import DiskGrowth
from qedfuse.disk.maintenance.diskshrinking import DiskShrinking
from qedfuse.disk.maintenance.disksize import DiskSize
from qedfuse.disk.maintenance.mover import Mover
from qedfuse.disk.maintenance.tablecompaction import TableCompaction
from qedfuse.disk.space.allocator import Allocator
from qedfuse.disk.space.directreclaim import DirectReclaim
from qedfuse.disk.space.epochs import Epochs
from qedfuse.disk.space.filelength import FileLength
from qedfuse.disk.space.flusher import Flusher
from qedfuse.disk.space.freemap import FreeMap
from qedfuse.disk.space.marking import Marking
from qedfuse.disk.space.quarantine import Quarantine
from qedfuse.disk.space.reclaim import Reclaim
from qedfuse.disk.space.scan import Scan
from qedfuse.disk.space.spacemanager import SpaceManager
from qedfuse.disk.state.freelistwriter import DescriptorEraser
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
    """The objects of one disk; the module of each object describes it."""

    def __init__(
        self,
        file: HostFile,
        header: Header,
        bases: list[Layer],
        options: OpenOptions,
        store: SliceStore,
    ) -> None:
        """Build all objects for the image in ``file``; ``bases`` are its opened bases, if any.

        ``store`` is the cache of table slices that the whole chain shares.
        """
        self.file = file
        self.options = options
        self.store = store

        # Lookup
        self.layer = QedLayer(file, header, store)
        layers = [self.layer, *bases]
        self.chain = Chain(
            layers,
            FlattenedBacking(layers, self.layer, store) if bases else None,
            lacks_base=header.has_backing and not bases,
        )

        # Write-back
        #
        # `Quarantine`, `Marking` and `Allocator` have maps, which divide the clusters into blocks
        # (`FreeMap`).  The blocks of all maps must begin at the same clusters.  They do, because
        # each map gets this table size and this anchor.
        anchor = header.l1_end >> header.geometry.cluster_bits
        map_template = FreeMap(header.table_size, anchor)
        self.epochs = Epochs()
        self.quarantine = Quarantine(self.epochs, map_template)
        self.header_store = HeaderStore(file, header)
        self.writeback = MetadataWriteback(file, self.layer.tables, self.quarantine)
        eraser = DescriptorEraser(file, self.header_store, self.writeback)
        self.first_write_guard = FirstWriteGuard(
            file, self.header_store, self.writeback, [eraser.erase]
        )

        # Space
        marking = Marking(map_template, file.name)
        self.allocator = Allocator(
            header,
            header.geometry.floor(file.size()),
            lambda: self.layer.registry.missing_tables,
            marking,
        )
        self.length = FileLength(file, header.geometry, self.allocator)
        self.reclaim = Reclaim(
            file,
            self.length,
            self.allocator,
            self.quarantine,
            self.writeback,
            self.first_write_guard,
            marking,
        )
        self.flusher = Flusher(self.writeback, self.reclaim, options.commit_seconds)
        self.scan = Scan(self.layer, self.allocator, self.reclaim, marking)
        space = SpaceManager(
            file,
            self.allocator,
            self.length,
            DirectReclaim(
                self.allocator,
                self.quarantine,
                self.writeback,
                self.reclaim,
                self.flusher,
                self.scan,
            ),
        )

        # State in the header
        self.needcheck = NeedCheck(
            self.layer,
            self.header_store,
            self.writeback,
            self.flusher,
            self.length,
            self.scan,
            options.needcheck_seconds,
        )
        self.persistent_free_list = PersistentFreeList(
            self.layer,
            self.header_store,
            self.writeback,
            self.first_write_guard,
            eraser,
            self.allocator,
            self.reclaim,
            self.scan,
            options,
        )

        # Data path
        self.table_writer = TableWriter(
            self.layer, space, self.writeback, self.flusher, options.cache_bytes // 2
        )
        zero_fill = ZeroFill(file, self.writeback)
        self.write_path = WritePath(
            self.chain,
            self.layer,
            space,
            self.table_writer,
            self.writeback,
            self.needcheck,
            self.epochs,
            zero_fill,
        )
        self.fast_path = FastPath(
            self.chain,
            self.layer,
            self.writeback,
            space,
            self.needcheck,
            self.table_writer,
            self.write_path,
            zero_fill,
        )
        self.discard = Discard(
            self.chain,
            self.layer,
            self.table_writer,
            self.write_path,
            self.writeback,
            self.needcheck,
            self.reclaim,
        )

        # Maintenance
        mover = Mover(
            self.layer,
            self.allocator,
            space,
            self.table_writer,
            self.writeback,
            self.flusher,
            self.needcheck,
            self.reclaim,
        )
        data = DataCompaction(self.layer, self.allocator, mover, self.flusher)
        self.table_compaction = TableCompaction(self.layer, self.allocator, space, mover, data)
        self.compaction = Compaction(
            self.layer, self.allocator, self.table_compaction, data, self.flusher, self.reclaim
        )
        self.disk_size = DiskSize(self.layer, self.header_store, self.writeback, self.allocator)
        self.growth = DiskGrowth(
            self.chain,
            self.layer,
            self.disk_size,
            self.write_path,
            self.discard,
            self.writeback,
        )
        self.shrinking = DiskShrinking(
            self.chain,
            self.layer,
            self.disk_size,
            self.table_writer,
            self.write_path,
            self.discard,
            self.writeback,
            self.flusher,
            self.needcheck,
            self.reclaim,
        )

    @property
    def needs_scan_at_close(self) -> bool:
        """Whether a close has to complete the scan: for the quarantine, the list or NEED_CHECK."""
        needed = (
            self.quarantine.count
            or self.persistent_free_list.needs_scan
            or self.needcheck.needs_scan
        )
        return bool(needed) and not self.scan.finished.is_set()
