"""Pretrain a Llama on a packed-token dataset.

    leyden train pretrain --config tiny --data.url DATASET --run NAME --nproc 2
    python -m recipes.pretrain --config tiny --data.url DATASET --run NAME    # one rank
    torchrun --standalone --nproc-per-node 2 -m recipes.pretrain -- --config tiny ...

(Without `--` torchrun takes `--run` for a short form of its own --run-path.)
The same command again goes on from the newest valid checkpoint of runs/NAME; it may change the
number of ranks, the strategy, max_steps, and how often to log, validate and save. Reads top to
bottom: Config, the module, run(), main(). Copy it to start a recipe of your own.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer

from dist.activation import check_activation_checkpointing, checkpoint_blocks
from dist.batch import Batch
from dist.compile import Compile, CompileName, check_compile
from dist.dataset import open_dataset
from dist.deepspeed_zero import gather_with
from dist.drain import StopFlag, stop_requests
from dist.errors import run_main
from dist.gradient_scaler import GradientScaler
from dist.guard import Guard, GuardConfig, check_guard
from dist.initialise import materialise
from dist.lightning_plugins import StopRun, quiet_lightning, take_over
from dist.loader import LoaderPlan, training_loader, validation_loader
from dist.loggers import LogConfig
from dist.mesh import (
    Layout,
    choose_device,
    data_axes,
    on_rank_zero,
    share_cores,
    start_process_group,
)  # fmt: skip
from dist.meter import MeterConfig, TokenFlops, token_flops
from dist.micro_batch import MicroBatch, check_micro_batch
from dist.micro_batch_callback import AutoMicroBatch
from dist.optim import OptimConfig, adamw, lr_schedule
from dist.order import OrderState, num_micro_batches
from dist.precision import Precision, PrecisionName, cast_parameters, check_precision
from dist.profiling import ProfileConfig
from dist.randomness import seed_micro_batch
from dist.ranks import Ranks
from dist.run_dir import RunDir
from dist.sharding import ParallelConfig, arrange, shard_fsdp
from dist.stages import rows_of_run
from dist.start import DataConfig, failure_recorded, start_run, summary_line
from dist.strategies import LeydenEnvironment, make_strategy
from dist.training import MAY_CHANGE, decide_numerics, end_of_run, main_of, run_callbacks
from dist.training_step import ValidationLoss, clip_and_judge, scaled_loss
from dist.watchdog import WatchdogConfig, watch_run
from recipes import llama


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a pretraining run is made of."""

    data: DataConfig = field(default_factory=DataConfig)
    """The dataset."""
    switch_data: str = ""
    """Go on with this version, derived from the run's by `leyden prep quarantine`: URL@DIGEST;
    with data.sources NAME=URL@DIGEST, several with commas between."""
    model: llama.ModelConfig = field(default_factory=llama.ModelConfig)
    """The model; its vocabulary and sequence length are the dataset's."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Sharding."""
    precision: PrecisionName = "auto"
    """auto (fp32 or bf16-mixed, by hardware), or one of them; bf16-true: parameters in bf16 too,
    under fsdp and with optim.stochastic_rounding; fp16-mixed: with a gradient scaler."""
    activation_checkpointing: str = "none"
    """What is recomputed in backward, for memory: none; full: each block; every-N: each N-th
    block; op-level: all but attention and every second matrix product."""
    compile: CompileName | Literal[False] = "off"
    """torch.compile: off, blocks (each decoder block), or model (the whole decoder; ddp only)."""
    global_batch: int = 32
    """Rows of one optimizer step over all ranks."""
    micro_batch: MicroBatch = 8
    """Rows that one rank computes at once; auto: the most that fit in memory, by trial steps."""
    max_steps: int = 1000
    """Optimizer steps in all, earlier attempts included."""
    max_epochs: int = 0
    """Passes over the training rows, instead of max_steps; 0: as max_steps says."""
    val_every_steps: int = 0
    """Steps between validations; 0: only at the end."""
    val_rows: int = 0
    """Rows of the validation split to use; 0: all."""
    save_every_steps: int = 100
    """Steps between checkpoints; 0: only at the end and when stopped."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 0
    """Checkpoints to keep beside them: those of lowest validation loss."""
    async_save: bool = True
    """Write checkpoints while training goes on; the memory of one more copy per rank."""
    max_failed_saves: int = 3
    """Failed saves in a row that end the run; fewer are warnings."""
    checkpoint_url: str = ""
    """Folder or fsspec URL for the checkpoints, in <run id>/; empty: RUN/checkpoints."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Non-finite values and spikes."""
    meter: MeterConfig = field(default_factory=MeterConfig)
    """Speed."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """Hangs."""
    log: LogConfig = field(default_factory=LogConfig)
    """Loggers."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Profiler."""
    seed: int = 0
    """Seeds the first weights, the order of the data and dropout."""
    run: str = ""
    """Name of the run (a folder in run_root), or the path of its folder."""
    run_root: str = "runs"
    """Where runs lie."""

    def __post_init__(self) -> None:
        strategy = self.parallel.strategy
        if self.compile is False:  # YAML reads a bare off so
            object.__setattr__(self, "compile", "off")
        check_activation_checkpointing(self.activation_checkpointing)
        check_precision(self.precision, strategy, self.optim.stochastic_rounding)
        check_compile(self.compile or "off", strategy, self.parallel.tp)
        check_micro_batch(self.micro_batch, strategy)
        check_guard(self.guard, strategy)


class Pretrain(LightningModule):
    """The model as Lightning sees it; what is sharded and saved is `net`."""

    def __init__(
        self, config: Config, schema: dict[str, Any], precision: Precision, compiled: Compile,
        layout: Layout, guard: Guard,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.schema, self.precision = config, schema, precision
        self.compiled, self.layout, self.guard = compiled, layout, guard
        self.scaler: GradientScaler | None = None
        self.grad_norm: Any = 0.0
        self.validation: tuple[float | None, int] = (None, 0)
        self.net: Any = None
        """The root module that is sharded and saved; made in configure_model."""

    def configure_model(self) -> None:
        if self.net is not None:
            return
        net = llama.build(self.config.model, self.schema)
        if self.layout.tp > 1:
            llama.split_layers(net, self.device_mesh["tp"])
        cast_parameters(net, self.precision.param_dtype)
        checkpoint_blocks(llama.blocks(net), self.config.activation_checkpointing)
        llama.compile_model(net, self.compiled)
        sharded = self.config.parallel.strategy in ("fsdp", "hsdp")
        if sharded:
            shard_fsdp(net, llama.blocks(net), data_axes(self.device_mesh), self.precision)
        llama.set_precision(net, self.precision, by_policy=sharded)
        net.keeps_token_losses = bool(self.config.data.sources)  # for the losses by source
        device = self.trainer.strategy.root_device
        fill = llama.first_weights(net, self.config.model)
        materialise(net, device, self.config.seed, self.config.model.init_std, fill)
        if self.precision.needs_scaler:
            net.gradient_scaler = self.scaler = GradientScaler(device)  # saved with the model
        if self.config.parallel.strategy == "deepspeed":
            gather_with(net, net.model.lm_head.weight)
        self.net = net

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        coordinate = self.layout.dp_rank
        seed_micro_batch(self.config.seed, batch.step, batch.micro, coordinate, self.device)
        return scaled_loss(self, batch, self.net(batch), self.trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        clip_and_judge(self, optimizer, self.device)

    def token_flops(self) -> TokenFlops:
        """FLOPs a token, for the meter."""
        model = self.config.model
        return token_flops(
            self.net.named_parameters(), num_layers=model.num_layers, width=model.hidden_size,
            seq_len=self.schema["seq_len"], tied=model.tie_embeddings,
        )  # fmt: skip

    def on_validation_epoch_start(self) -> None:
        self._validation = ValidationLoss(self.device, self.layout.counts)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._validation.add(self.net(batch), batch)

    def on_validation_epoch_end(self) -> None:
        self.validation = self._validation.mean(self.trainer.world_size)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = adamw(self.net.named_parameters(), self.config.optim, self.config.seed)
        tokens_per_step = self.config.global_batch * self.schema["seq_len"]
        factor = lr_schedule(self.config.optim, self.config.max_steps, tokens_per_step)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        by_step = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": by_step}


def module_to_plan(config: Config, schema: dict[str, Any], precision: Precision) -> Pretrain:
    """What `leyden plan` takes through one step on pretended ranks."""
    guard = Guard(GuardConfig(policy="off"), torch.device("cpu"), world_size=1)
    return Pretrain(config, schema, precision, Compile(name="off"), Layout(rank=0), guard)


def run(config: Config, ranks: Ranks, stack: ExitStack) -> int:
    """Train on this rank of the world; returns the exit code."""
    quiet_lightning()
    device = choose_device(ranks)
    share_cores(ranks, device)
    layout = arrange(config.parallel, ranks)
    start_process_group(ranks, device, config.parallel.start_timeout_s)
    stop = StopFlag()
    stop.install()
    name = config.run or f"pretrain-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(name) if "/" in name else Path(config.run_root) / name
    run = on_rank_zero(lambda: RunDir.open(folder))
    start = on_rank_zero(
        lambda: start_run(run, config, recipe="pretrain", may_change=MAY_CHANGE, stack=stack)
    )
    if start.outcome is not None:
        if ranks.is_first:
            print(f"{run.path} is done: {summary_line(start.outcome)}")
        return 0
    config = replace(config, max_steps=start.max_steps)  # those of max_epochs, if given
    watchdog = watch_run(run, start.attempt, config.watchdog, ranks, stack)
    with failure_recorded(run, start.attempt, ranks):
        # Data: from the sample where the run stands.
        opened = open_dataset(start.data, config.data.cache())
        dataset = rows_of_run(run, opened, config.data)
        schema = dataset.schema
        state = OrderState(
            data_digest=dataset.data_digest, seed=config.seed, batch=config.global_batch
        )
        if start.record is not None:
            state = OrderState.from_dict(start.record["order"])
        auto = AutoMicroBatch(run, config, schema, ranks, device)
        state = replace(state, skipped=start.skipped, **start.order)
        plan = LoaderPlan(
            batch=config.global_batch,
            micro_batch=auto.rows or 1,  # 1 until the trial has found it
            rank=layout.dp_rank,
            world_size=layout.dp_size,
            counts=layout.counts,
            start_step=state.step,
            start_t=state.t,
            end_step=config.max_steps,
            end_t=start.end_t,
        )
        requests = stop_requests(stop, run.path, is_first=ranks.is_first)
        loader = training_loader(
            dataset, config.seed, plan, run.path, stack, requests, start.skipped, start.removed,
            state,
        )  # fmt: skip
        validation = validation_loader(dataset, plan, config.val_rows, run.path, stack)
        # Model and trainer.
        numeric = decide_numerics(config, device)
        guard = Guard(config.guard, device, world_size=ranks.world_size, counts=layout.counts)
        module = Pretrain(config, schema, numeric.precision, numeric.compiled, layout, guard)
        auto.loaders = [loader] if validation is None else [loader, validation]
        recorder, callbacks = run_callbacks(
            run, start, config, ranks, stack, dataset=dataset, loader=loader, state=state,
            guard=guard, numeric=numeric, device=device, may_change=MAY_CHANGE, watchdog=watchdog,
        )  # fmt: skip
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=ranks.local_world_size,
            num_nodes=ranks.world_size // ranks.local_world_size,
            strategy=make_strategy(config.parallel, layout, clip_norm=config.optim.clip_norm),
            plugins=[LeydenEnvironment(ranks)],
            callbacks=[auto, *callbacks],
            max_steps=config.max_steps,
            accumulate_grad_batches=num_micro_batches(
                config.global_batch, layout.dp_size, plan.micro_batch
            ),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            inference_mode=False,  # FSDP2 gathers parameters in validation too
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        take_over(trainer, state.step, config.val_every_steps)
        if ranks.is_first:
            at = f", from step {state.step} ({start.checkpoint.name})" if start.checkpoint else ""
            where = f"{config.parallel} on {ranks.world_size} ranks, {device.type}"
            print(f"run {run.path}{at}: {where}, {numeric.precision}", file=sys.stderr)
            print(f"attention: {numeric.attention}; compile: {numeric.compiled}", file=sys.stderr)
        started = time.monotonic()
        try:
            trainer.fit(module, loader, validation)
        except StopRun:
            pass
        return end_of_run(
            run, start, config, ranks, recorder, module, trainer, stop,
            precision=numeric.precision, seconds=time.monotonic() - started,
        )  # fmt: skip


def main() -> int:
    """Parse the command line and train."""
    return main_of(
        Config,
        run,
        prog="python -m recipes.pretrain",
        description="Pretrain a Llama on a packed-token dataset.",
        configs=Path(__file__).parent / "configs",
        prefix="pretrain_",
    )


if __name__ == "__main__":
    run_main(main)
