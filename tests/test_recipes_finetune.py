"""Fine-tuning by the real recipe: every method under every strategy, resume, adapters elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist.errors import DataRefused
from dist.model_folder import find_model
from recipes.export import Config as ExportConfig
from recipes.export import run as export
from recipes.trained import load_run, open_trained
from tests.finetune_runs import play, write_base
from tests.make_dataset import write_dataset
from tests.run_ranks import RankFailed, run_ranks
from tests.strategy_runs import at_step, losses, tensors

ALL = bool(os.environ.get("LEYDEN_ALL_CELLS"))
METHODS = ("lora", "dora", "full")
# Name -> (ranks, config).
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"strategy": "ddp"}),
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp": (2, {"strategy": "fsdp"}),
    "ZeRO-3": (2, {"strategy": "deepspeed", "zero_stage": 3}),
    "hsdp": (4, {"strategy": "hsdp", "replicas": 2}),
}
# make test: checkpointing once a strategy and method, in turn; test-all: both for all.
CELLS = [
    (method, name, checkpointing)
    for m, method in enumerate(METHODS)
    for s, name in enumerate(STRATEGIES)
    for c, checkpointing in enumerate(("none", "full"))
    if ALL or ((m + s) % 2 == c and (name != "hsdp" or method == "lora"))
]
CELLS += [("lora", "one process", "compiled")] * ALL
REFERENCE = "one process", "none"


def folder_of(root: Path, *cell: str) -> Path:
    return root / "-".join(cell).replace(" ", "-")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finetune")
    write_dataset(root / "data", documents=40, num_train_shards=2)
    write_base(root / "base")
    return root


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """All cells: trained, and gone on with from step 3 of a copy."""
    worlds: dict[int, list[Any]] = {1: [], 2: [], 4: []}
    for cell in dict.fromkeys([*((m, *REFERENCE) for m in METHODS), *CELLS]):
        method, name, checkpointing = cell
        ranks, parallel = STRATEGIES[name]
        compiled = checkpointing == "compiled"
        changes = {
            "lora": {"method": method}, "parallel": parallel, "micro_batch": 4 // ranks,
            "activation_checkpointing": "none" if compiled else checkpointing,
            "compile": "blocks" if compiled else "off",
        }  # fmt: skip
        folder = folder_of(place, *cell)
        worlds[ranks].append((str(folder), "", changes))
        if cell in CELLS:
            worlds[ranks].append((f"{folder}-resumed", str(folder), changes))
    url, base = str(place / "data"), str(place / "base")
    for ranks, jobs in worlds.items():
        assert (
            run_ranks(play, ranks, 400 * (1 + 3 * ALL), url, base, jobs)
            == [[0] * len(jobs)] * ranks
        )
    return place


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_like_one_process(runs: Path, cell: tuple[str, str, str]) -> None:
    """Adapters drawn apart on ranks, magnitudes of a shard's rows only, a base gathered too late
    for DoRA, frozen gradients reduced: other losses or weights than one process has."""
    alone, folder = folder_of(runs, cell[0], *REFERENCE), folder_of(runs, *cell)
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    one, other = tensors(at_step(folder, 6)), tensors(at_step(alone, 6))
    assert one.keys() == other.keys()
    assert max(far(one[name], other[name]) for name in one if name.startswith("model.")) < 1e-4


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_interrupted_is_uninterrupted(runs: Path, cell: tuple[str, str, str]) -> None:
    """An adapter, a moment or the base that comes back otherwise than it was, by one bit."""
    folder = folder_of(runs, *cell)
    resumed = Path(f"{folder}-resumed")
    one, other = tensors(at_step(folder, 6)), tensors(at_step(resumed, 6))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert losses(resumed) == losses(folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_only_adapters_are_trained_and_saved(runs: Path, method: str) -> None:
    """A base that drifts, or that fills every checkpoint: 16 GB instead of 40 MB for 8B."""
    state = tensors(at_step(folder_of(runs, method, *REFERENCE), 6))
    names = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if method == "dora" else set())
    assert all(any(name in key for name in names) for key in state)
    trained = {key for key in state if key.startswith("model.")}
    assert len(trained) == 14 * len(names)  # seven linear layers in each of two blocks
    assert len(state) == 4 * len(trained)  # step and two moments of each, and of nothing else


@pytest.mark.timeout(900)
def test_frozen_parameters_stay_as_they_were(runs: Path) -> None:
    """A frozen weight with weight decay, or a cast there and back: base + adapter is another
    model than the one that was trained."""
    from safetensors.torch import load_file

    trained = open_trained(find_model(str(folder_of(runs, "lora", *REFERENCE))))
    base = load_file(runs / "base" / "model.safetensors")
    from recipes import tuned

    found = tuned.load_tuned(
        trained.checkpoint, trained.record, tuned.base_of(trained.place.path, trained.record),
        merged=False,
    )  # fmt: skip
    frozen = {n.replace(".base_layer.", "."): p for n, p in found.named_parameters()
              if not p.requires_grad}  # fmt: skip
    assert len(frozen) == len(base) - (1 if found.config.tie_word_embeddings else 0)
    assert all(torch.equal(parameter, base[name]) for name, parameter in frozen.items())


def logits(model: Any) -> torch.Tensor:
    rng = np.random.default_rng(3)
    ids = torch.from_numpy(rng.integers(3, 300, (2, 24)))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapter_loads_in_peft_and_merges(runs: Path, method: str, tmp_path: Path) -> None:
    """Names or a scale that peft reads otherwise: silently the base, or half the change. Base +
    adapter by peft, the merged folder by transformers and our own model are one model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (cell,) = [cell for cell in CELLS if cell[:2] == (method, "fsdp")][:1]
    run = folder_of(runs, *cell)
    adapter = export(ExportConfig(model=str(run), output=str(tmp_path / "adapter")))
    merged = export(ExportConfig(model=str(run), output=str(tmp_path / "merged"), merge=True))
    base = AutoModelForCausalLM.from_pretrained(runs / "base")
    plain = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, adapter))
    whole = logits(AutoModelForCausalLM.from_pretrained(merged))
    ours = load_run(open_trained(find_model(str(run))))
    ours.set_attn_implementation("sdpa")
    assert (theirs - plain).abs().max() > 1e-2
    assert torch.allclose(theirs, whole, atol=2e-5) and torch.allclose(whole, logits(ours))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(runs / "base")
    assert not (adapter / "model.safetensors").exists()


@pytest.mark.timeout(900)
def test_goes_on_from_an_adapter(runs: Path, tmp_path: Path) -> None:
    """lora.init_from that starts anew, or takes an adapter of another base or rank."""
    run = folder_of(runs, "lora", *REFERENCE)
    adapter = export(ExportConfig(model=str(run), output=str(tmp_path / "adapter")))
    url = str(runs / "data")
    more = {"lora": {"init_from": str(adapter)}, "micro_batch": 4}
    jobs = [(str(tmp_path / "more"), "", more)]
    assert run_ranks(play, 1, 240, url, str(runs / "base"), jobs) == [[0]]
    assert losses(tmp_path / "more")[0] < losses(run)[0] - 0.05
    for base, lora, said in (
        (write_base(tmp_path / "other", seed=5), {}, "another base"),
        (runs / "base", {"rank": 8}, "r is 4 there, 8 here"),
        (runs / "base", {"method": "dora"}, "use_dora"),
        (runs / "base", {"target_modules": ["q_proj", "gate_proj"], "alpha": 4.0}, "lora_alpha"),
    ):
        changes = {"lora": {"init_from": str(adapter), **lora}}
        jobs = [(str(tmp_path / f"bad-{said[:3]}"), "", changes)]
        with pytest.raises(RankFailed, match=said):
            run_ranks(play, 1, 240, url, str(base), jobs)


@pytest.mark.timeout(300)
def test_refuses_to_resume_on_another_base(place: Path, tmp_path: Path) -> None:
    """Adapters of one base put on another: a model that nobody trained."""
    url = str(place / "data")
    base = write_base(tmp_path / "base")
    quick = {"max_steps": 2, "save_every_steps": 1}
    assert run_ranks(play, 1, 240, url, str(base), [(str(tmp_path / "run"), "", quick)]) == [[0]]
    write_base(base, seed=7)
    more = [(str(tmp_path / "run"), "", {**quick, "max_steps": 3})]
    with pytest.raises(RankFailed, match="base digest"):
        run_ranks(play, 1, 240, url, str(base), more)
    with pytest.raises(DataRefused, match="another model"):
        export(ExportConfig(model=str(tmp_path / "run"), output=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": {"target_modules": ["q_porj"]}}, "'q_proj'"),
        ({"lora": {"modules_to_save": ["lm_haed"]}}, "'lm_head'"),
        ({"lora": {"rank": 0}}, "at least 1"),
        ({"lora": {"method": "lore"}}, "lora, dora, qlora, full"),
        ({"parallel": {"strategy": "tp"}}, "tensor parallelism"),
        ({"lora": {"method": "qlora"}}, "GPU"),
        ({"lora": {"method": "qlora"}, "parallel": {"strategy": "fsdp"}}, "sharded"),
    ],
)
def test_bad_settings_are_refused(
    place: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """A typo that adapts nothing; a method that this machine or strategy cannot do."""
    jobs = [(str(tmp_path / "run"), "", changes)]
    with pytest.raises(RankFailed, match=said):
        run_ranks(play, 1, 240, str(place / "data"), str(place / "base"), jobs)
    assert not (tmp_path / "run" / "run.json").exists(), "refused before anything is taken"


def test_nan_weights_are_refused(place: Path, tmp_path: Path) -> None:
    """A damaged base trains for a day before anyone looks at the loss."""
    from safetensors.torch import load_file, save_file

    base = write_base(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RankFailed, match=r"model\.norm\.weight holds NaN"):
        run_ranks(play, 1, 240, str(place / "data"), str(base), [(str(tmp_path / "run"), "", {})])
