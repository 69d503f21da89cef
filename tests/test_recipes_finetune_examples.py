"""After a fine-tuning run on examples: eval by source, report, plan, a base that has moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.dataset import open_dataset
from dist.errors import ConfigError, DataRefused
from dist.run_dir import RunDir
from recipes import evaluate, export, generate
from recipes import plan as plan_recipe
from recipes.causal_lm import BaseConfig
from tests.finetune_runs import play, write_base
from tests.make_examples import write_examples
from tests.run_ranks import RankFailed, run_ranks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of three sources, a base, and a run of both."""
    root = tmp_path_factory.mktemp("examples")
    write_examples(root / "data")
    write_base(root / "base")
    quick = {"max_steps": 3, "lora": {"modules_to_save": ["lm_head"]}, "val_rows": 0}
    jobs = [(str(root / "run"), "", quick)]
    assert run_ranks(play, 1, 240, str(root / "data"), str(root / "base"), jobs) == [[0]]
    return root


def test_losses_by_source_are_parts_of_the_runs_own(place: Path) -> None:
    """Targets given to another source than the example's own, masked ones counted, rows that are
    padding: the parts would not make up the run's validation loss."""
    found = evaluate.run(evaluate.Config(model=str(place / "run")))
    outcome = RunDir(place / "run").read_outcome() or {}
    assert found["loss"] == pytest.approx(outcome["validation_loss"], rel=1e-6)
    dataset = open_dataset(str(place / "data"))
    assert found["targets"] == dataset.manifest.totals["validation"]["targets"]
    from dist.example_file import ExampleShard

    expected: dict[str, int] = {}
    for entry in dataset.manifest.shards_of("validation"):
        shard = ExampleShard(dataset.shard_path(entry))
        for row in range(shard.num_rows):
            one = shard.read(row)
            name = f"input-{one.input}"
            expected[name] = expected.get(name, 0) + one.num_targets
    assert {one["source"]: one["targets"] for one in found["sources"]} == expected
    total = sum(one["loss"] * one["targets"] for one in found["sources"])
    assert total / found["targets"] == pytest.approx(found["loss"], rel=1e-6)
    assert "input-1" in evaluate.table(found)


def test_a_base_that_moved_is_named_and_taken(place: Path, tmp_path: Path) -> None:
    """A hint to pass an option that the command has not; another model under the old adapters."""
    model = str(place / "run")
    quick: dict[str, Any] = {"greedy": True, "max_new_tokens": 3}
    before = evaluate.run(evaluate.Config(model=model))["loss"]
    text = generate.open_generator(generate.Config(model=model, **quick)).batch(["a"])
    base = BaseConfig(path=str(tmp_path / "moved"))
    (place / "base").rename(base.path)
    try:
        with pytest.raises(ConfigError, match=r"if it was moved, pass --base\.path FOLDER"):
            evaluate.run(evaluate.Config(model=model))
        assert evaluate.run(evaluate.Config(model=model, base=base))["loss"] == before
        config = generate.Config(model=model, base=base, **quick)
        assert generate.open_generator(config).batch(["a"]) == text
        other = BaseConfig(path=str(write_base(tmp_path / "other", seed=3)))
        with pytest.raises(DataRefused, match="is another model"):
            evaluate.run(evaluate.Config(model=model, base=other))
    finally:
        Path(base.path).rename(place / "base")


def test_an_adapter_alone_is_no_model(place: Path, tmp_path: Path) -> None:
    """A traceback for a missing config.json, or the base evaluated in its place."""
    folder = tmp_path / "adapter"
    export.run(export.Config(model=str(place / "run"), output=str(folder)))
    with pytest.raises(ConfigError, match="is an adapter alone.*--merge"):
        evaluate.run(evaluate.Config(model=str(folder)))


def test_report_and_plan_of_examples(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verbs that were written for packed text, on examples with masks."""
    from dist.report_facts import read_facts

    facts = read_facts(RunDir(place / "run"))
    rows = facts.data.split("train").num_rows if facts.data else 0
    assert (facts.next_step, facts.samples, facts.problems) == (3, 24, [])
    assert facts.tokens == 24 * 24 and facts.epochs == pytest.approx(24 / rows)
    words = ["finetune", "--base.path", str(place / "base"), "--data.url", str(place / "data")]
    assert plan_recipe.main([*words, "--ranks", "2", "--micro_batch", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_shards_of_another_tokenizer_end_before_training(place: Path, tmp_path: Path) -> None:
    """Ids of one vocabulary trained into the embeddings of another."""
    write_examples(tmp_path / "data", vocab_size=280)
    jobs = [(str(tmp_path / "run"), "", {})]
    with pytest.raises(RankFailed, match="was made with another tokenizer"):
        run_ranks(play, 1, 240, str(tmp_path / "data"), str(place / "base"), jobs)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_adapters_go_on_with_the_modules_saved_beside_them(place: Path, tmp_path: Path) -> None:
    """lora.init_from that takes the adapters and leaves the trained output matrix behind."""
    from safetensors.torch import load_file

    folder = tmp_path / "adapter"
    export.run(export.Config(model=str(place / "run"), output=str(folder)))
    saved = load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    base = load_file(place / "base" / "model.safetensors")["lm_head.weight"]
    assert not torch.equal(saved, base)
    lora = {"modules_to_save": ["lm_head"], "init_from": str(folder)}
    # At this learning rate a step moves nothing.
    again = {"max_steps": 1, "lora": lora, "val_rows": 0, "optim": {"lr": 1e-12}}
    jobs = [(str(tmp_path / "again"), "", again)]
    url = str(place / "data")
    assert run_ranks(play, 1, 240, url, str(place / "base"), jobs) == [[0]]
    end = RunDir(place / "run").read_outcome() or {}
    went_on = RunDir(tmp_path / "again").read_outcome() or {}
    assert went_on["validation_loss"] == pytest.approx(end["validation_loss"], rel=1e-5)
