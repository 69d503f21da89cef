"""The order that a run began with, for everyone who asks for a row of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.dataset import Dataset, MixedDataset
from dist.examples import rows_as_trained
from dist.mixed_order import MixedOrder
from dist.mixture import Mixture
from dist.order_choice import check_mode, choose_mode, room_text, spread_text
from dist.ranks import Ranks
from dist.run_dir import RunDir
from dist.source_versions import first_tables, removals_of
from dist.stages import DerivedOrder, first_dataset
from dist.thinned_order import ThinnedOrder
from dist.windowed import OrderMode, make_order


def order_of_start(
    run: RunDir, identity: dict[str, Any] | None, config: Any, dataset: Dataset
) -> OrderMode:
    """The order of a run that begins (identity None), or goes on. On rank 0 alone.

    Raises ConfigError where another one is asked for than the run began with.
    """
    data = config.data
    ranks = Ranks.from_environment()
    nodes = max(1, ranks.world_size // ranks.local_world_size)
    room = cache_room(dataset, nodes)
    if identity is not None:
        mode = OrderMode.of(identity.get("order", {}))
        check_mode(data.order, data.lanes, data.window, mode, f"the run {run.path}")
        why = "as the run began"
    else:
        tables = [one.split("train").row_start for one in dataset.sources]
        mode, why = choose_mode(
            data.order, data.lanes, data.window, tables=tables,
            storages=[one.storage for one in dataset.sources], global_batch=config.global_batch,
            room=room, nodes=nodes,
        )  # fmt: skip
        for table in tables:
            if warning := spread_text(mode, table):
                print(f"warning: {warning}", file=sys.stderr)
    if warning := room_text(mode, room):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"order: {mode} ({why})", file=sys.stderr)
    return mode


def cache_room(dataset: Dataset, nodes: int) -> int | None:
    """Shards of each source that the caches of all nodes hold together, if each node has this
    one's; the mean shard counts. None for data that is not cached."""
    remote = next((one for one in dataset.sources if one.is_remote), None)
    if remote is None:
        return None
    shards = [shard for one in dataset.sources for shard in one.manifest.shards_of("train")]
    mean_bytes = sum(shard.bytes for shard in shards) / max(1, len(shards))
    held = nodes * remote.cache.folder.limit_bytes / max(1.0, mean_bytes)
    return int(held / len(dataset.sources))


def first_order(run: RunDir, dataset: Dataset, seed: int, state: Any, num_removed: int) -> Any:
    """The order over the rows of the run's first dataset.

    dataset: what the run trains on now, derived from the first one without `num_removed` rows;
    state: an OrderState or OrderMode, None for the global order.
    """
    mode = OrderMode() if state is None else OrderMode.of(state)
    if stages := list(getattr(state, "stages", ())):
        assert isinstance(dataset, MixedDataset), "stages are of several sources"
        tables = first_tables(run, run.read_run(), dataset)
        return mixed_order(tables, seed, mode, stages, derived=True)
    return make_order(_first_rows(run, dataset, mode, num_removed), seed, mode)


def mixed_order(
    tables: Sequence[NDArray[np.int64]], seed: int, mode: OrderMode, stages: list[dict[str, Any]],
    *, derived: bool = False,
) -> MixedOrder:  # fmt: skip
    """The order of a mixture; sources that the stages do not know are of later ones.

    tables: row_start of the first version of each source. derived: rows are numbered as in the
    versions of now, without removed ones, which must not come any more; else as in the first.
    """
    mixture, removals, orders = Mixture(stages), removals_of(stages), []
    for number, table in enumerate(tables[: mixture.num_sources]):
        own = mode
        if mode.mode != "global":
            own = replace(mode, block_rows=stages[-1]["blocks"][number])
        order = make_order(table, seed, own, number)
        if number in removals:
            order = ThinnedOrder(order, removals[number])
            if derived:
                order = DerivedOrder(order, order.removed.tolist())
        orders.append(order)
    return MixedOrder(mixture, orders, max(mode.lanes, 1))


def _first_rows(
    run: RunDir, dataset: Dataset, mode: OrderMode, num_removed: int
) -> NDArray[np.int64]:
    """row_start of the first dataset; for the global order only its last entry is right."""
    table = dataset.split("train").row_start
    if not num_removed:
        return table
    if mode.mode == "global":
        return np.array([0, table[-1] + num_removed])
    identity = run.read_run()
    assert identity is not None, "rows are removed from a run that there is"
    first = first_dataset(run, identity, dataset.storage.url)
    return rows_as_trained(first, identity.get("config") or {}).split("train").row_start
