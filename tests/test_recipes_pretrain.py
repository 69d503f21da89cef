"""recipes/pretrain.py: one result on any ranks, across a stop, from any of its three starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from dist import training
from dist.checkpoint import find_checkpoint
from dist.config import parse_config, to_yaml
from dist.dataset import Dataset
from dist.errors import ConfigError, DataRefused
from recipes import llama, pretrain
from tests.make_dataset import flip_byte, write_dataset
from tests.run_ranks import RankFailed, run_ranks
from tests.test_dist_lightning_plugins import call, lines
from tests.test_dist_lightning_plugins import pretrain as pretrain_small

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "recipes" / "configs"
# Parameters on the vocabulary that each shape is known for.
KNOWN = {
    "tiny": (4096, 4_213_000),
    "124m": (50257, 123_550_000),
    "1b": (128256, 1_235_814_400),
    "8b": (128256, 8_030_261_248),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


@pytest.fixture(scope="module")
def alone(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert run_ranks(call, 1, 240, dataset.storage.url, folder, {"micro_batch": 8}) == [0]
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder, "metrics.jsonl") if "loss" in line]


def outcome(folder: Path) -> dict[str, Any]:
    import json

    return dict(json.loads((folder / "outcome.json").read_text()))


@pytest.mark.parametrize(("strategy", "world_size"), [("fsdp", 2), ("ddp", 2), ("fsdp", 3)])
def test_ranks_and_strategies_train_like_one_process(
    dataset: Dataset, alone: Path, tmp_path: Path, strategy: str, world_size: int
) -> None:
    """Other rows, another normalisation, unequal first weights: the losses would part."""
    folder = tmp_path / "run"
    codes = run_ranks(call, world_size, 240, dataset.storage.url, folder, {"strategy": strategy})
    assert codes == [0] * world_size
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    one, other = outcome(folder), outcome(alone)
    assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-5)
    assert one["validation_targets"] == dataset.manifest.totals["validation"]["targets"]
    assert (one["status"], one["step"], one["tokens"]) == ("completed", 6, 6 * 8 * 16)
    targets = [line["targets"] for line in lines(folder, "consumed.jsonl")]
    assert targets == [line["targets"] for line in lines(alone, "consumed.jsonl")]


def stopped_at(url: str, folder: Path, changes: dict[str, Any], when: int) -> int:
    """Rank 1 gets a SIGTERM before it computes micro-batch `when`."""
    step = pretrain.Pretrain.training_step
    if torch.distributed.get_rank() == 1:

        def signalled(self: Any, batch: Any, batch_idx: int) -> Any:
            if batch_idx == when:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch, batch_idx)

        pretrain.Pretrain.training_step = signalled  # type: ignore[method-assign]
    return pretrain_small(url, str(folder), **changes)


def weights(folder: Path) -> dict[str, bytes]:
    found, _ = find_checkpoint(folder / "checkpoints")
    assert found is not None
    return {p.name: p.read_bytes() for p in found.glob("*.distcp")}


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    dataset: Dataset, tmp_path: Path
) -> None:
    """A repeated or skipped sample, lost moments or a shifted schedule would show in a bit."""
    url, changes = dataset.storage.url, {"max_steps": 20}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_ranks(call, 2, 240, url, whole, changes)
    assert run_ranks(stopped_at, 2, 240, url, cut, changes, 6) == [75, 75]
    stopped = outcome(cut)
    assert stopped["status"] == "stopped" and 3 < stopped["step"] < 20
    assert run_ranks(call, 2, 240, url, cut, changes) == [0, 0]
    assert losses(cut) == losses(whole)
    one, other = weights(cut), weights(whole)
    assert one.keys() == other.keys() and all(one[name] == other[name] for name in one)
    # And once more, by one rank: nothing is left to do, also if the kill came before the outcome.
    final = outcome(cut)
    (cut / "outcome.json").unlink()
    assert run_ranks(call, 1, 240, url, cut, changes) == [0]
    assert outcome(cut)["validation_loss"] == final["validation_loss"]
    assert run_ranks(call, 1, 240, url, cut, changes) == [0]
    assert len(lines(cut, "consumed.jsonl")) == 20


def refused(url: str, folder: Path, changes: dict[str, Any]) -> tuple[str, int, str]:
    try:
        pretrain_small(url, str(folder), **changes)
    except Exception as error:
        return type(error).__name__, getattr(error, "exit_code", -1), str(error)
    return "", 0, ""


def test_another_run_is_refused_once_and_by_name(
    dataset: Dataset, alone: Path, tmp_path: Path
) -> None:
    """Another learning rate or dataset resumed into a run ruins it in silence; and an error
    reported by every rank buries its text."""
    url = dataset.storage.url
    zero, one = run_ranks(refused, 2, 240, url, alone, {"seed": 4, "max_steps": 9})
    assert zero[:2] == ("ConfigError", 2) and "seed was 0, is 4" in zero[2]
    assert one[:2] == ("PeerFailed", 2)
    other = write_dataset(tmp_path / "other", seed=9, with_tokenizer=False).storage.url
    zero, one = run_ranks(refused, 2, 240, other, alone, {"max_steps": 9})
    assert zero[:2] == ("DataRefused", 3) and dataset.storage.url in zero[2]
    assert one[:2] == ("PeerFailed", 3)


def test_a_flipped_byte_is_refused_before_and_during_training(tmp_path: Path) -> None:
    """verify=full must find it first; otherwise the shard must not be used when its turn comes,
    and no rank may wait for the one that found it."""
    dataset = write_dataset(tmp_path / "d", with_tokenizer=False)
    shard = dataset.split("train").shards[1]
    flip_byte(dataset.shard_path(shard), 999)
    from dist.start import DataConfig

    for verify in ("full", "ahead"):
        folder = tmp_path / verify
        changes = {"data": DataConfig(url=dataset.storage.url, verify=verify)}  # type: ignore[arg-type]
        zero, one = run_ranks(refused, 2, 240, "", folder, changes)
        assert {zero[1], one[1]} == {3}
        assert shard.xxh3_128 in zero[2] + one[2]
        if verify == "ahead":
            assert outcome(folder)["status"] == "data_refused"


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_shipped_config_resolves_as_it_did(name: str) -> None:
    """A default that moves changes every shipped config unseen. Rewrite the golden file with
    LEYDEN_UPDATE_GOLDEN=1 if it was meant."""
    config = parse_config(
        pretrain.Config, ["--config", name], prog="t", description="", configs=CONFIGS,
        prefix="pretrain_",
    )  # fmt: skip
    golden = ROOT / "tests" / "golden" / f"config_pretrain_{name}.yaml"
    if os.environ.get("LEYDEN_UPDATE_GOLDEN"):
        golden.write_text(to_yaml(config))
    assert to_yaml(config) == golden.read_text()
    vocab_size, expected = KNOWN[name]
    schema = {"vocab_size": vocab_size, "bos_id": None, "eos_id": None}
    found = llama.num_parameters(llama.build(config.model, schema))
    assert found == pytest.approx(expected, rel=1e-3)


def test_shipped_configs_hold_only_differences() -> None:
    """A default repeated in YAML drifts from the one in code."""
    import yaml

    default = yaml.safe_load(to_yaml(pretrain.Config()))
    for path in CONFIGS.glob("pretrain_*.yaml"):
        for key, value in yaml.safe_load(path.read_text()).items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            for sub, given in inner:
                usual = default[key][sub] if sub else default[key]
                assert given != usual, f"{path.name}: {key}.{sub} is the default"


def command(*words: str, ranks: int = 0) -> Any:
    start = [sys.executable, "-m"]
    if ranks:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    words = (*start, "recipes.pretrain", *(["--"] if ranks else []), *words)
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_plain_python_is_quiet_and_says_what_it_did(dataset: Dataset, tmp_path: Path) -> None:
    """Banners, tips and warnings hide the few lines that matter."""
    done = command(
        "--config", "tiny", "--data.url", dataset.storage.url, "--run", str(tmp_path / "r"),
        "--max_steps", "2", "--model.hidden_size", "32", "--model.intermediate_size", "48",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "completed: step 2/2" in done.stdout
    for word in ("litlogger", "GPU available", "Warning", "warn", "TPU"):
        assert word not in done.stderr + done.stdout


def test_torchrun_reports_a_bad_key_once_with_the_nearest(dataset: Dataset) -> None:
    """Two ranks printing the same error, or a traceback, would bury it."""
    done = command("--config", "tiny", "--data.uri", dataset.storage.url, ranks=2)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "data.url" in said[0]
    assert "recipes/pretrain.py" not in done.stderr  # no traceback of ours


def test_rank_0_says_first_what_is_wrong_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exit code without a word: on a busy machine rank 1 refused the config and left, and its
    launcher ended rank 0 before that had read it. Seen with a load of ten."""
    waited: list[float] = []
    monkeypatch.setattr(training.time, "sleep", waited.append)
    monkeypatch.setattr(training, "die_with_launcher", lambda: None)
    monkeypatch.setattr(sys, "argv", ["pretrain", "--max_stps", "3"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank, expected in (("0", []), ("1", [training.FIRST_SPEAKS_WITHIN_S])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(ConfigError, match="max_stps"):
            pretrain.main()
        assert waited == expected


def test_errors_raised_in_process_keep_their_kind(tmp_path: Path) -> None:
    """Without a dataset URL, or with a folder that is none, the user made the mistake."""
    with pytest.raises(RankFailed, match=ConfigError.__name__):
        run_ranks(call, 1, 240, "", tmp_path / "a", {})
    with pytest.raises(RankFailed, match="no dataset at"):
        run_ranks(call, 1, 240, str(tmp_path), tmp_path / "b", {})
    assert issubclass(DataRefused, ValueError)
