"""Examples as training rows: masks, losses, order, resume and who-saw, packed and padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist.audit import open_run_data, read_pieces, replay, who_saw
from dist.batch import Batch
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.example_file import Example, ExampleShard
from dist.example_gather import gather_examples
from dist.examples import ExampleDataset, as_rows
from dist.loader import LoaderPlan, TokenLoader
from dist.order import Order, SequentialOrder
from dist.run_dir import RunDir
from dist.verify import verify_full, wrong_bytes
from tests.make_dataset import flip_byte, write_dataset
from tests.make_examples import MAX_LENGTH, write_examples
from tests.run_ranks import run_ranks
from tests.same_run import assert_same_run, last_attempts
from tests.test_dist_lightning_plugins import pretrain

WIDTH = 49
PACKINGS = ("packed", "padded")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_examples(tmp_path_factory.mktemp("data"))


def rows(dataset: Dataset, packing: str = "packed") -> ExampleDataset:
    made = as_rows(dataset, packing, WIDTH - 1)
    assert isinstance(made, ExampleDataset)
    return made


def examples(dataset: Dataset, split: str) -> dict[tuple[int, int], Example]:
    """(input, offset) -> example, read straight from the shards."""
    found = {}
    for entry in dataset.manifest.shards_of(split):
        shard = ExampleShard(dataset.shard_path(entry))
        for row in range(shard.num_rows):
            one = shard.read(row)
            found[one.input, one.offset] = one
    return found


def batches(
    dataset: Dataset, split: str = "train", micro_batch: int = 3, **plan: Any
) -> list[Batch]:
    table = dataset.split(split)
    order = SequentialOrder(table.num_rows) if split != "train" else Order(table.num_rows, 3)
    settings = LoaderPlan(
        **{"batch": 6, "micro_batch": micro_batch, "end_t": table.num_rows, **plan}
    )
    with TokenLoader(dataset, table, order, settings) as loader:
        return list(loader)


@pytest.mark.parametrize("packing", PACKINGS)
def test_masks_are_exactly_the_spans(dataset: Dataset, packing: str) -> None:
    """A mask moved by one, a target across two examples, a position that runs on, a token lost."""
    made = rows(dataset, packing)
    whole = examples(dataset, "train")
    shards = [ExampleShard(dataset.shard_path(one)) for one in dataset.manifest.shards_of("train")]
    table, seen, targets = made.split("train"), [], 0
    for batch in batches(made):
        assert batch.num_targets == int(batch.valid.sum())
        for i, row in enumerate(batch.rows.tolist()):
            if row < 0:
                assert not batch.valid[i].any()
                continue
            number, local = (int(one[0]) for one in table.locate(np.array([row])))
            expected = np.zeros(WIDTH, bool)
            positions, start = [], 0
            for example in table.packs[number].examples_of(local).tolist():
                origin = shards[number].origin(example)
                seen.append(origin)
                one = whole[origin]
                tokens = batch.tokens[i, start : start + len(one.tokens)]
                assert tokens.tolist() == one.tokens.tolist()
                for first, last in one.spans.tolist():
                    expected[start + first : start + last] = True
                positions += range(len(one.tokens))
                start += len(one.tokens)
            assert not batch.tokens[i, start:].any()
            assert batch.valid[i].tolist() == expected[1:].tolist()
            assert batch.position_ids[i, : min(start, WIDTH - 1)].tolist() == positions[: WIDTH - 1]
            targets += int(expected.sum())
    assert sorted(seen) == sorted(whole)
    assert targets == dataset.manifest.totals["train"]["targets"]


def test_a_row_too_long_is_refused_not_written_past_its_end(dataset: Dataset) -> None:
    """Examples are copied by address: past a row's end lie other rows, then another's memory."""
    split = rows(dataset).split("train")
    shard = split.open_shard(0, dataset.shard_path(split.shards[0]))
    every = np.arange(shard.num_rows)
    with pytest.raises(DataRefused, match=f"a row of {WIDTH - 10} tokens would get"):
        gather_examples([shard], np.zeros_like(every), every, WIDTH - 10)


def test_packed_rows_waste_less(dataset: Dataset) -> None:
    """Packing that packs nothing costs the run its padding."""
    packed, padded = rows(dataset, "packed").split("train"), rows(dataset, "padded").split("train")
    assert padded.num_rows == dataset.manifest.totals["train"]["rows"] == 80
    assert packed.num_rows < padded.num_rows / 2 and packed.padding < 0.2 < padded.padding


def losses(dataset: Dataset, split: str) -> tuple[float, int]:
    """Sum over all batches of a small Llama's loss, and of its targets, in fp64."""
    from recipes import llama
    from tests.test_dist_lightning_plugins import SMALL

    torch.manual_seed(0)
    net = llama.build(llama.ModelConfig(**SMALL), dataset.schema).to_empty(device="cpu").double()
    from dist.initialise import materialise

    materialise(net, torch.device("cpu"), 0, 0.1, None)
    with torch.no_grad():
        made = batches(dataset, split)
        return sum(float(net(b)) for b in made), sum(b.num_targets for b in made)


def test_packed_padded_and_alone_have_one_loss(dataset: Dataset) -> None:
    """Attention that leaks into a neighbour example, or targets that differ by packing."""
    packed, padded = (losses(rows(dataset, one), "validation") for one in PACKINGS)
    exact = as_rows(dataset, "padded", MAX_LENGTH - 1)  # no padding for the longest
    assert packed[1] == padded[1] == dataset.manifest.totals["validation"]["targets"]
    assert packed[0] == pytest.approx(padded[0], rel=1e-6)
    assert losses(exact, "validation")[0] == pytest.approx(packed[0], rel=1e-6)


def test_an_untrained_token_has_no_gradient(dataset: Dataset) -> None:
    """A loss that counts prompts would still equal itself in every packing."""
    from dist.loss import summed_loss

    batch = batches(rows(dataset), "validation")[0]
    hidden = torch.randn(batch.valid.numel(), 8, requires_grad=True)
    targets = batch.tokens.long()[:, 1:].flatten()
    summed_loss(hidden, torch.randn(300, 8), targets, batch.valid.flatten()).backward()
    assert hidden.grad is not None
    touched = hidden.grad.abs().sum(1) > 0
    assert torch.equal(touched, batch.valid.flatten())


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_world_size_reads_the_same_rows_and_targets(dataset: Dataset, world_size: int) -> None:
    """Masks that go with the wrong row once a rank has fewer rows than another."""
    made = rows(dataset)
    alone = {row: b.valid[i] for b in batches(made) for i, row in enumerate(b.rows.tolist())}
    found: dict[int, torch.Tensor] = {}
    for rank in range(world_size):
        for b in batches(made, micro_batch=2, rank=rank, world_size=world_size):
            found |= {row: b.valid[i] for i, row in enumerate(b.rows.tolist())}
    assert found.keys() | {-1} == alone.keys() | {-1}
    assert all(torch.equal(found[row], alone[row]) for row in found if row >= 0)


def test_settings_that_do_not_fit_are_named(dataset: Dataset, tmp_path: Path) -> None:
    """An example cut or dropped in silence; packing keys on packed tokens that do nothing."""
    short = as_rows(dataset, "packed", 10)
    with pytest.raises(ConfigError, match=r"longer than data\.seq_len \+ 1 = 11 tokens.*has 24"):
        short.split("train")
    assert as_rows(dataset).schema["seq_len"] == MAX_LENGTH
    with pytest.raises(ConfigError, match=r"data\.packing 'tight'"):
        as_rows(dataset, "tight")
    tokens = write_dataset(tmp_path / "packed", seq_len=16)
    assert as_rows(tokens, "packed", 16) is tokens
    for settings in (("padded", 0), ("packed", 17)):
        with pytest.raises(ConfigError, match="are for datasets of examples"):
            as_rows(tokens, *settings)


def test_damage_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    """Verification that knows packed tokens only would pass damaged examples, or raise."""
    copy = write_examples(tmp_path / "copy")
    assert copy.data_digest == dataset.data_digest
    verify_full(copy, progress=False)
    shard = copy.manifest.shards[0]
    path = copy.shard_path(shard)
    flip_byte(path, path.read_bytes().index(ExampleShard(path).example_tokens(20).tobytes()))
    assert "record batches [2]" in wrong_bytes(copy.shard_path(shard), shard)
    with pytest.raises(DataRefused, match="1 of 3 shards are damaged"):
        verify_full(copy, progress=False)


def train(url: str, folder: str, changes: dict[str, Any]) -> int:
    from dist.optim import OptimConfig
    from dist.start import DataConfig

    settings = {"packing": "packed", "seq_len": WIDTH - 1, **changes.pop("data", {})}
    # Constant: a run that is told to stop early must not cool down early.
    changes["optim"] = OptimConfig(lr=1e-2, warmup_steps=2, schedule="constant")
    return pretrain(url, folder, data=DataConfig(url=url, **settings), **changes)


def test_training_resumes_bit_for_bit_and_its_rows_are_known(
    dataset: Dataset, tmp_path: Path
) -> None:
    """The pack index must be the same at resume: rows, masks and normalisation of the first run.
    Then who-saw answers for an example, and another packing is refused by name."""
    url = dataset.storage.url
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = {"strategy": "ddp", "micro_batch": 4, "save_every_steps": 3}
    assert run_ranks(train, 2, 240, url, str(whole), dict(common)) == [0, 0]
    assert run_ranks(train, 2, 240, url, str(cut), {**common, "max_steps": 3}) == [0, 0]
    assert run_ranks(train, 2, 240, url, str(cut), dict(common)) == [0, 0]
    assert_same_run(cut, whole)
    with pytest.raises(Exception, match=r"seq_len|packing"):
        run_ranks(train, 2, 240, url, str(cut), {**common, "max_steps": 9, "data": {"seq_len": 60}})
    # Which step trained on an example: by its source's key.
    run = RunDir(cut)
    made = open_run_data(run)
    assert isinstance(made, ExampleDataset)
    one = next(iter(examples(dataset, "train").values()))
    answer = who_saw(run, f"input-{one.input}@{one.offset}", progress=False)
    assert len(answer.rows) == 1 and answer.sightings
    pieces = read_pieces(made, answer.rows, text=True)[0]
    assert (one.input, one.offset, len(one.tokens)) in [
        (p.input, p.offset, p.tokens) for p in pieces
    ]
    assert len(pieces) > 1 and all(piece.text for piece in pieces)
    sighting = next(s for s in answer.sightings if s.consumed)
    again = replay(run, sighting.step)
    assert (answer.rows[0].row, sighting.t) in [(row.row, row.t) for row in again.rows]
    # Trained tokens, not all of them, normalise a step.
    loader = batches(made, batch=8, end_t=None, end_step=6)
    per_step = [sum(b.num_targets for b in loader if b.step == step) for step in range(6)]
    seed = run.read_run()
    assert seed is not None and sum(per_step) < 6 * 8 * (WIDTH - 1)
    order = Order(made.split("train").num_rows, seed["config"]["seed"])
    table = made.split("train")
    with TokenLoader(made, table, order, LoaderPlan(batch=8, micro_batch=8, end_step=6)) as exact:
        expected = [batch.num_targets for batch in exact]
    assert [line[1] for line in last_attempts(cut, "consumed.jsonl", "targets")] == expected


def test_keys_of_records_name_their_rows(dataset: Dataset) -> None:
    """SHARD:ROW counts examples of the file, SPLIT:ROW rows of the order."""
    from dist.lineage import rows_of_key

    made = rows(dataset)
    entry = made.split("train").shards[1]
    found = rows_of_key(made, f"{entry.name[:12]}:7", progress=False)[0]
    table = made.split("train")
    assert table.packs[1].examples_of(found.row_in_shard).tolist().count(7) == 1
    assert found.row == int(table.row_start[1]) + found.row_in_shard
    whole = rows_of_key(made, "input-1", progress=False)
    assert {ref.split for ref in whole} == {"train", "validation"}
    assert open_dataset(dataset.storage.url).data_digest == made.data_digest
