"""dist/stochastic_adamw.py: bf16 parameters that learn from updates too small for bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dist.checkpoint import find_checkpoint
from dist.mesh import data_mesh
from dist.optim import OptimConfig, adamw
from dist.stochastic_adamw import StochasticAdamW, hashed_bits, round_stochastically
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks

SMALL_STEPS = OptimConfig(lr=1e-4, weight_decay=0.0, beta1=0.0, beta2=0.0, stochastic_rounding=True)


def test_rounding_keeps_the_expected_value_and_what_bf16_holds() -> None:
    """A biased rounding drifts all weights one way; exact values must not move at all."""
    place = torch.arange(200_000, dtype=torch.int32)
    bits = hashed_bits(place, torch.tensor(3.0), key=12345)
    assert int(bits.min()) >= 0 and int(bits.max()) < 2**16
    for value in (1.001, -3.14159e-5, 7.7e8):
        wide = torch.full((200_000,), value)
        rounded = round_stochastically(wide, bits).float()
        assert len(rounded.unique()) == 2
        spacing = (rounded.max() - rounded.min()).item()
        # 5 standard deviations of the mean.
        assert abs(rounded.double().mean().item() - wide[0].double().item()) < 0.006 * spacing
    exact = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(round_stochastically(exact.float(), bits[:1000]), exact)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    got = round_stochastically(odd, bits[:5]).float()
    torch.testing.assert_close(got, odd, equal_nan=True)


def moved(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, steps: int) -> float:
    before = parameter.detach().float().mean().item()
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return parameter.detach().float().mean().item() - before


def test_updates_that_plain_bf16_adamw_loses_add_up() -> None:
    """At 1.0 bf16 steps by 0.0078: an update of 1e-4 vanishes every time under torch's AdamW."""
    plain = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    torch_adamw = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0, betas=(0.0, 0.0))
    assert moved(torch_adamw, plain, 100) == 0.0
    ours = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = adamw([("w", ours)], SMALL_STEPS)
    assert moved(optimizer, ours, 100) == pytest.approx(-0.01, rel=0.05)
    assert {t.dtype for t in optimizer.state[ours].values()} == {torch.float32}


def test_fp32_parameters_follow_torch_adamw() -> None:
    """Without rounding it is AdamW: a wrong bias correction or decay would show."""
    torch.manual_seed(0)
    start, grads = torch.randn(5, 7), torch.randn(6, 5, 7)
    options = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([{"params": [one], "weight_decay": 0.1}], **options)  # type: ignore[arg-type]
    ours = StochasticAdamW(
        [{"params": [other], "weight_decay": 0.1}],
        state_dtype=torch.float32,
        seed=0,
        **options,  # type: ignore[arg-type]
    )
    for grad in grads:
        one.grad, other.grad = grad.clone(), grad.clone()
        theirs.step()
        ours.step()
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_bf16_moments_stay_near_fp32_ones() -> None:
    """Moments rounded to nearest at beta 0.999 stop following the gradient."""
    torch.manual_seed(0)
    weights = {}
    for dtype in ("fp32", "bf16"):
        parameter = nn.Parameter(torch.zeros(128, 128))
        config = OptimConfig(lr=1e-3, beta2=0.999, weight_decay=0.0, state_dtype=dtype)  # type: ignore[arg-type]
        optimizer = adamw([("w", parameter)], config)
        generator = torch.Generator().manual_seed(1)
        for _ in range(50):
            parameter.grad = 1.0 + torch.randn(128, 128, generator=generator)
            optimizer.step()
        weights[dtype] = parameter.detach()
    mean = {dtype: weight.mean().item() for dtype, weight in weights.items()}
    assert mean["bf16"] == pytest.approx(mean["fp32"], rel=2e-3)


def test_a_step_with_found_inf_changes_nothing() -> None:
    """A guard or a gradient scaler relies on it; NaN moments would never heal."""
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = adamw([("w", parameter)], SMALL_STEPS)
    parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert parameter.eq(1).all()
    state = optimizer.state[parameter]
    assert state["step"] == 0 and all(state[k].eq(0).all() for k in ("exp_avg", "exp_avg_sq"))


def sharded_steps(dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    full = torch.randn(7, 6, generator=generator).to(torch.bfloat16)
    grad = torch.randn(7, 6, generator=generator).to(torch.bfloat16)
    mesh = data_mesh(torch.device("cpu"))
    parameter = nn.Parameter(distribute_tensor(full, mesh, [Shard(dim)]))
    optimizer = adamw([("w", parameter)], SMALL_STEPS)
    for _ in range(5):
        parameter.grad = distribute_tensor(grad, mesh, [Shard(dim)])
        optimizer.step()
    assert isinstance(parameter, DTensor)
    return parameter.full_tensor().detach()


@pytest.mark.parametrize("dim", [0, 1])
def test_any_sharding_rounds_alike(dim: int) -> None:
    """Noise by rank would make a resumed run on other ranks, or two replicas, another model."""
    alone = run_ranks(sharded_steps, 1, 240, dim)[0]
    for world_size in (2, 3):
        for found in run_ranks(sharded_steps, world_size, 240, dim):
            assert torch.equal(found, alone)


def train(url: str, folder: str, precision: str, max_steps: int) -> int:
    from tests.test_dist_lightning_plugins import pretrain

    rounding = precision == "bf16-true"
    optim = OptimConfig(lr=1e-2, schedule="constant", warmup_steps=2, stochastic_rounding=rounding)
    return pretrain(url, folder, precision=precision, optim=optim, max_steps=max_steps)


def saved(folder: Path) -> dict[str, bytes]:
    found, _ = find_checkpoint(folder / "checkpoints")
    assert found is not None
    return {path.name: path.read_bytes() for path in found.glob("*.distcp")}


@pytest.mark.parametrize("precision", ["bf16-true", "fp16-mixed"])
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path: Path, precision: str) -> None:
    """Noise that depends on the attempt, moments cast on the way through a checkpoint, or a scale
    that starts anew would show in a bit."""
    url = write_dataset(tmp_path / "data", with_tokenizer=False).storage.url
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_ranks(train, 2, 240, url, str(whole), precision, 4) == [0, 0]
    for max_steps in (2, 4):
        assert run_ranks(train, 2, 240, url, str(cut), precision, max_steps) == [0, 0]
    assert saved(whole) == saved(cut)


def test_a_run_with_it_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """A place in the full parameter that is read from a tensor: fake ones hold no numbers."""
    from recipes.plan import main

    words = ["pretrain", "--config", "tiny", "--vocab_size", "512", "--seq_len", "64", "--json"]
    words += ["--precision", "bf16-true", "--parallel.strategy", "fsdp", "--ranks", "2"]
    assert main([*words, "--optim.stochastic_rounding", "true"]) == 0
    assert '"precision": "bf16-true"' in capsys.readouterr().out
