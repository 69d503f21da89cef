"""Which order a new run takes: global for local disks, windowed where random reads are slow.

Decided once, when a run begins, and frozen in its run.json and its order state: a run that goes on
keeps its order, wherever its data lies by then.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist.errors import ConfigError
from dist.storage import Storage
from dist.windowed import OrderMode, auto_lanes, auto_window, block_rows_of, check_lanes

MAX_LIVE = 1 << 30
"""No limit: auto_lanes and auto_window have their own."""
OrderName = Literal["auto", "global", "windowed"]

# f_type of statfs(2). Those of the kernel are in include/uapi/linux/magic.h and, of smb, in
# fs/smb/client/cifsfs.c; the others in their own sources.
NETWORK_FILE_SYSTEMS = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x00C36400: "CephFS",
    0x01021997: "9p",
    0x65735546: "FUSE",  # virtiofs has this number too (fs/fuse/inode.c), sshfs and s3fs as well
    0x5346414F: "AFS",
    0x0BD00BD0: "Lustre",  # lustre/include/uapi/linux/lustre/lustre_user.h, LL_SUPER_MAGIC
    0x47504653: "GPFS",  # "GPFS" in ASCII; coreutils src/stat.c
    0x19830326: "BeeGFS",  # client_module FhgfsOpsSuper.c, "fhgfs"; coreutils src/stat.c
    0xAAD7AAEA: "PanFS",  # coreutils src/stat.c
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
    0x013111A8: "IBRIX",  # coreutils src/stat.c
    0x20030528: "OrangeFS",
}


def network_file_system(path: Path) -> str:
    """Name of the network file system that a path lies on; '' for a local one."""
    # os.statvfs leaves f_type out. It is the first word of struct statfs, in C long on the
    # machines that we run on; the magic numbers have 32 bits.
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(1024)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        return ""  # who reads it next will say what is wrong
    word = int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], "little")
    return NETWORK_FILE_SYSTEMS.get(word & 0xFFFFFFFF, "")


def slow_place(storage: Storage) -> str:
    """Why random reads are slow at a storage; '' where they are not known to be."""
    path = storage.local_path("")
    if path is None:
        return f"{storage.url.partition('://')[0]}:// is remote"
    found = network_file_system(path)
    return f"it lies on {found}" if found else ""


def choose_mode(
    name: OrderName, lanes: int, window: int, *,
    tables: list[NDArray[np.int64]], storages: list[Storage], global_batch: int,
    room: int | None = None, nodes: int = 1,
) -> tuple[OrderMode, str]:  # fmt: skip
    """The order of a new run, and why. tables: row_start of each source, (shards + 1,).

    lanes, window: 0 for those that fit. room: shards of each source that the caches of all nodes
    may hold, None where nothing is cached; what `auto` chooses keeps its live shards in half of
    it (dist/open_shards.py; the rest is fetched ahead), but gives every node a lane. ConfigError
    for values that the order does not have, or that are given for the global order.
    """
    why = "data.order asks for it"
    if name == "auto":
        slow = next((reason for one in storages if (reason := slow_place(one))), "")
        name, why = ("windowed", slow) if slow else ("global", "the data lies on a local disk")
    if name == "global":
        if lanes or window:
            raise ConfigError(
                f"data.lanes {lanes} and data.window {window} are of the windowed order, and the "
                f"order is global ({why}); set data.order to windowed, or leave both at 0"
            )
        return OrderMode(), why
    fits = MAX_LIVE if room is None else room // 2
    if not lanes:
        lanes = auto_lanes(global_batch)
        while lanes // 2 >= nodes and lanes * 2 * (window or 2) > fits:
            lanes //= 2
    check_lanes(lanes, window or 1)
    window = window or max(2, min(auto_window(lanes), fits // (2 * lanes)))
    rows = min(block_rows_of(table, lanes, window) for table in tables)
    return OrderMode(mode="windowed", lanes=lanes, window=window, block_rows=rows), why


def room_text(mode: OrderMode, room: int | None) -> str:
    """A warning where the live shards of an order do not fit into the caches; '' otherwise."""
    live = 2 * mode.window * mode.lanes
    if mode.mode == "global" or room is None or live <= room // 2:
        return ""
    return (
        f"up to {live} shards of a source are live at once in this order, and half of the caches "
        f"of all nodes hold {room // 2}: shards may be fetched again and again; raise "
        "data.cache_gb, lower data.lanes or data.window, or write smaller shards"
    )


def check_mode(name: OrderName, lanes: int, window: int, mode: OrderMode, run: str) -> None:
    """Refuse, by name, an order that is asked for and is not the one that the run began with."""
    asked = {"order": "" if name == "auto" else name, "lanes": lanes, "window": window}
    began = {"order": mode.mode, "lanes": mode.lanes, "window": mode.window}
    wrong = [
        f"data.{key} was {began[key]}, is {value}"
        for key, value in asked.items()
        if value and value != began[key]
    ]
    if wrong:
        raise ConfigError(
            f"{run} keeps the order that it began with: {'; '.join(wrong)}. Leave it out, or start "
            "another run (another --run, or --fresh)"
        )


def spread_text(mode: OrderMode, table: NDArray[np.int64]) -> str:
    """A warning where unequal shards make the blocks small; '' otherwise."""
    if mode.mode == "global":
        return ""
    sizes: Any = np.diff(table)
    wanted = mode.window * float(sizes.mean()) / 2
    if len(sizes) <= 2 * mode.window or mode.block_rows >= wanted:
        return ""
    return (
        f"the smallest of {len(sizes)} shards have {int(sizes.min()):,} rows and the mean "
        f"{sizes.mean():,.0f}, so blocks have {mode.block_rows:,} rows only and neighbours are "
        "mixed less; raise data.window, or write shards of one size"
    )
