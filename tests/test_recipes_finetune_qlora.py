"""QLoRA's code path on bitsandbytes' CPU kernels, which the product refuses: they are for tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.model_folder import find_model
from recipes import tuned
from recipes.export import Config as ExportConfig
from recipes.export import run as export
from recipes.trained import open_trained
from tests.finetune_runs import play, write_base
from tests.make_dataset import write_dataset
from tests.run_ranks import RankFailed, run_ranks
from tests.strategy_runs import at_step, losses, tensors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
SHAPE = {"hidden_size": 64, "intermediate_size": 128}  # NF4 works on blocks of 64


def play_unrefused(url: str, base: str, jobs: list[tuple[str, str, dict[str, Any]]]) -> list[int]:
    """play() without the look for a GPU."""
    from recipes import finetune

    finetune.check_lora = lambda *_: None  # type: ignore[assignment]
    return play(url, base, jobs)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qlora")
    write_dataset(root / "data", documents=40, num_train_shards=2)
    write_base(root / "base", **SHAPE)
    return root


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_trains_resumes_and_exports(place: Path, tmp_path: Path, ranks: int) -> None:
    """A base that is not in 4 bits, adapters that are; a checkpoint that holds the base, or one
    that does not load; an adapter that peft reads otherwise."""
    qlora = {"lora": {"method": "qlora"}, "micro_batch": 4 // ranks, "precision": "fp32"}
    lora = {**qlora, "lora": {"method": "lora"}}
    run, again, plain = tmp_path / "run", tmp_path / "again", tmp_path / "plain"
    jobs = [(str(run), "", qlora), (str(again), str(run), qlora), (str(plain), "", lora)]
    url, base = str(place / "data"), str(place / "base")
    assert run_ranks(play_unrefused, ranks, 300, url, base, jobs) == [[0, 0, 0]] * ranks
    # Quantised: near to what the base itself gives, and not the same.
    assert losses(run) == pytest.approx(losses(plain), rel=0.05)
    assert losses(run) != pytest.approx(losses(plain), rel=1e-5)
    one, other = tensors(at_step(run, 6)), tensors(at_step(again, 6))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    weights = {name: value for name, value in one.items() if name.startswith("model.")}
    assert len(weights) == 2 * 14 and len(one) == 4 * len(weights)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    adapter = export(ExportConfig(model=str(run), output=str(tmp_path / "adapter")))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place / "base"), adapter
    )
    trained = open_trained(find_model(str(run)))
    ours = tuned.load_tuned(trained.checkpoint, trained.record, tuned.base_of(run, trained.record))
    ours.set_attn_implementation("sdpa")
    ids = torch.arange(3, 51).view(2, 24)
    with torch.no_grad():
        assert torch.allclose(
            theirs.eval()(input_ids=ids).logits, ours.eval()(input_ids=ids).logits, atol=2e-5
        )


@pytest.mark.timeout(300)
def test_saved_modules_are_trained_in_fp32(place: Path, tmp_path: Path) -> None:
    """An output matrix that is trained in the dtype of the frozen base loses its updates; NaN in
    the base, which from_pretrained takes."""
    from safetensors.torch import load_file, save_file

    changes = {
        "lora": {"method": "qlora", "modules_to_save": ["lm_head"]}, "precision": "bf16-mixed",
        "max_steps": 3, "activation_checkpointing": "full",
    }  # fmt: skip
    url, run = str(place / "data"), tmp_path / "run"
    jobs = [(str(run), "", changes)]
    assert run_ranks(play_unrefused, 1, 200, url, str(place / "base"), jobs) == [[0]]
    assert tensors(at_step(run, 3))["model.model.lm_head.weight"].dtype == torch.float32
    base = write_base(tmp_path / "base", **SHAPE)
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RankFailed, match=r"model\.norm\.weight holds NaN"):
        run_ranks(play_unrefused, 1, 200, url, str(base), [(str(tmp_path / "bad"), "", changes)])
