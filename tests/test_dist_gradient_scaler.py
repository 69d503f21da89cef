"""dist/gradient_scaler.py: small gradients survive, overflowed steps do not count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn

from dist.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from dist.dataset import Dataset
from dist.gradient_scaler import BACKOFF, FIRST_SCALE, GradientScaler
from dist.optim import OptimConfig, adamw
from dist.precision import Precision
from dist.sharding import clip_grad_norm
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


def test_overflow_skips_and_halves_and_the_next_step_goes() -> None:
    """An inf that reached AdamW's moments would stay there for ever."""
    parameter, scaler = nn.Parameter(torch.ones(3, 3)), GradientScaler(CPU)
    optimizer = adamw([("w", parameter)], OptimConfig(weight_decay=0.0))
    before = parameter.detach().clone()
    for grad, scale in ((torch.inf, FIRST_SCALE * BACKOFF), (3.0, FIRST_SCALE * BACKOFF)):
        parameter.grad = torch.full_like(parameter, grad) * scaler.scale
        scaler.unscale([parameter])
        norm = clip_grad_norm([parameter], 1.0)
        scaler.skip(optimizer, norm)
        optimizer.step()
        assert scaler.scale.item() == scale
        assert torch.equal(parameter, before) == (grad == torch.inf)
    assert norm.item() == pytest.approx(9.0)
    assert parameter.isfinite().all() and optimizer.state[parameter]["exp_avg"].isfinite().all()


def small_gradient(scaled: bool) -> float:
    """A gradient of 1e-9 through an fp16 product."""
    scaler = GradientScaler(CPU)
    weight = nn.Parameter(torch.ones(1, 1))
    with torch.autocast("cpu", torch.float16):
        loss = (torch.ones(1, 1) @ weight).float().sum() * 1e-9
    (loss * scaler.scale if scaled else loss).backward()
    if scaled:
        scaler.unscale([weight])
    assert weight.grad is not None
    return weight.grad.item()


def test_gradients_below_fp16_survive_by_scaling() -> None:
    """Without the scale fp16 gives 0: parts of the model would not train, in silence."""
    assert small_gradient(scaled=False) == 0.0
    assert small_gradient(scaled=True) == pytest.approx(1e-9, rel=1e-2)


def two_steps(
    url: str, folder: str, strategy: str, overflows: bool
) -> tuple[float, int, list[Any]]:
    """Two steps of the recipe; in the first one rank 1 gets an infinite gradient."""
    from recipes import pretrain as recipe
    from tests.test_dist_lightning_plugins import pretrain

    seen: list[Any] = []
    step = recipe.Pretrain.training_step

    def spoiled(self: Any, batch: Any, batch_idx: int) -> Any:
        out = step(self, batch, batch_idx)
        seen.append(self)
        if overflows and batch.step == 0 and self.global_rank == 1:
            out["loss"] = out["loss"] * torch.inf
        return out

    recipe.Pretrain.training_step = spoiled  # type: ignore[method-assign]
    code = pretrain(
        url, folder, strategy=strategy, precision="fp16-mixed", max_steps=2, save_every_steps=2
    )
    assert code == 0
    module = seen[-1]
    total = sum(float(p.detach().double().sum()) for p in module.net.parameters())
    state = next(iter(module.trainer.optimizers[0].state.values()))
    return total, int(state["step"]), [float(module.scaler.scale)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_overflows_and_all_skip(dataset: Dataset, tmp_path: Path, strategy: str) -> None:
    """A rank that skips alone leaves the others with another model; and the recipe must train
    in fp16 on each strategy."""
    url = dataset.storage.url
    for overflows, steps in ((True, 1), (False, 2)):
        folder = tmp_path / f"{overflows}"
        found = run_ranks(two_steps, 2, 240, url, str(folder), strategy, overflows)
        scale = FIRST_SCALE * BACKOFF if overflows else FIRST_SCALE
        for total, number, scales in found:
            assert (number, scales) == (steps, [scale]) and total == total
        checkpoint, _ = find_checkpoint(folder / "checkpoints")
        assert checkpoint is not None


def test_the_scale_is_resumed(tmp_path: Path) -> None:
    """A resumed run at the first scale again would skip its first steps."""
    assert Precision(name="fp16-mixed", reason="").needs_scaler
    found = []
    for scale in (4096.0, FIRST_SCALE):
        net = nn.Module()
        net.weight = nn.Parameter(torch.ones(2, 2))
        net.gradient_scaler = GradientScaler(CPU)
        optimizer = adamw(net.named_parameters(), OptimConfig())
        if scale == 4096.0:
            net.gradient_scaler.scale.fill_(scale)
            net.weight.grad = torch.ones(2, 2)
            optimizer.step()
            save_checkpoint(tmp_path / "step-1-a0", net, optimizer, {})
        else:
            load_checkpoint(tmp_path / "step-1-a0", net, optimizer)
        found.append(net.gradient_scaler.scale.item())
    assert found == [4096.0, 4096.0]
