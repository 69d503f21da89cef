"""Fine-tune a published decoder with LoRA, DoRA, QLoRA, or all of its weights.

    leyden train finetune --base.path FOLDER --data.url DATASET --run NAME --nproc 2
    python -m recipes.finetune --base.path FOLDER --data.url DATASET --run NAME    # one rank
    torchrun --standalone --nproc-per-node 2 -m recipes.finetune -- --base.path ...

The dataset is what `leyden prep chat` (or `prep text`) wrote with the base's own tokenizer. The
same command again goes on from the newest valid checkpoint, which holds the adapters and their
optimizer only. `leyden export NAME` writes a peft adapter folder, with --merge a whole model.
Reads top to bottom: Config, the module, run(), main(). Copy it to start a recipe of your own.
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

from dist import training
from dist.activation import check_activation_checkpointing, checkpoint_blocks
from dist.adapter_file import read_adapter
from dist.batch import Batch
from dist.compile import Compile, CompileName, check_compile
from dist.dataset import open_dataset
from dist.deepspeed_zero import gather_with
from dist.drain import StopFlag, stop_requests
from dist.errors import run_main
from dist.gradient_scaler import GradientScaler
from dist.guard import Guard, GuardConfig, check_guard
from dist.hf_weights import HfWeights
from dist.initialise import materialise
from dist.lightning_plugins import StopRun, quiet_lightning, take_over
from dist.loader import LoaderPlan, training_loader, validation_loader
from dist.loggers import LogConfig
from dist.lora import (
    LoraConfig,
    add_adapters,
    cast_frozen,
    check_lora,
    dora_layers,
    fill_trained,
    filling,
    load_in_4bit,
)
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
from dist.training import decide_numerics, end_of_run, main_of, run_callbacks
from dist.training_step import ValidationLoss, clip_and_judge, scaled_loss
from dist.watchdog import WatchdogConfig, watch_run
from recipes import causal_lm

# The base may move: its digest decides.
MAY_CHANGE = ("base.path", *training.MAY_CHANGE)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a fine-tuning run is made of."""

    data: DataConfig = field(default_factory=DataConfig)
    """The dataset."""
    switch_data: str = ""
    """Go on with this version, derived from the run's by `leyden prep quarantine`: URL@DIGEST;
    with data.sources NAME=URL@DIGEST, several with commas between."""
    base: causal_lm.BaseConfig = field(default_factory=causal_lm.BaseConfig)
    """The model to start from."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """What is trained."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4, weight_decay=0.0))
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
        check_lora(self.lora, strategy, self.parallel.tp)


class Finetune(LightningModule):
    """The model as Lightning sees it; what is sharded is `net`, what is saved its trained part."""

    def __init__(
        self, config: Config, base: causal_lm.Base, seq_len: int, precision: Precision,
        compiled: Compile, layout: Layout, guard: Guard,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.base, self.seq_len = config, base, seq_len
        self.precision, self.compiled = precision, compiled
        self.layout, self.guard = layout, guard
        self.hf_config = causal_lm.hf_config(base.folder)
        self.scaler: GradientScaler | None = None
        self.grad_norm: Any = 0.0
        self.validation: tuple[float | None, int] = (None, 0)
        self.net: Any = None
        """The root module that is sharded and saved; made in configure_model."""

    def configure_model(self) -> None:
        if self.net is not None:
            return
        lora, strategy = self.config.lora, self.config.parallel.strategy
        device = self.trainer.strategy.root_device
        if lora.method == "qlora":
            HfWeights(self.base.folder).check_values()
            dtype = self.precision.compute_dtype
            in_4bit = load_in_4bit(self.base.folder, device, dtype)
            net = causal_lm.PackedDecoder(in_4bit)
        else:
            net = causal_lm.build(self.hf_config)
        add_adapters(net.model, lora)
        if lora.method == "full":
            cast_parameters(net, self.precision.param_dtype)
        elif strategy != "deepspeed":  # DeepSpeed sees fp32
            cast_frozen(net, self.precision.compute_dtype)
        checkpoint_blocks(causal_lm.blocks(net), self.config.activation_checkpointing)
        causal_lm.compile_model(net, self.compiled)
        sharded = strategy in ("fsdp", "hsdp")
        if sharded:
            shard_fsdp(net, causal_lm.blocks(net), data_axes(self.device_mesh), self.precision)
        causal_lm.set_precision(net, self.precision, by_policy=sharded)
        net.keeps_token_losses = bool(self.config.data.sources)  # for the losses by source
        adapter = None
        if lora.init_from:
            adapter = read_adapter(Path(lora.init_from), net.model, lora, self.base.digest)
        fill_base = None if lora.method == "qlora" else HfWeights(self.base.folder).fill
        fill = filling(net.model, fill_base, self.config.seed, adapter)
        if lora.method == "qlora":  # the base has its values
            fill_trained(net.model, fill)
        else:
            by_name = lambda name, p: fill(name.removeprefix("model."), p)  # noqa: E731
            materialise(net, device, self.config.seed, 0.0, by_name)
        if self.precision.needs_scaler:
            net.gradient_scaler = self.scaler = GradientScaler(device)  # saved with the model
        if strategy == "deepspeed":
            gather_with(net, net.model.lm_head.weight)
            for module, parameter in dora_layers(net):
                gather_with(module, parameter)
        self.net = net

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        coordinate = self.layout.dp_rank
        seed_micro_batch(self.config.seed, batch.step, batch.micro, coordinate, self.device)
        return scaled_loss(self, batch, self.net(batch), self.trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        clip_and_judge(self, optimizer, self.device)

    def token_flops(self) -> TokenFlops:
        """FLOPs a token, for the meter."""
        shape = self.hf_config
        head_dim = getattr(shape, "head_dim", None) or (
            shape.hidden_size // shape.num_attention_heads
        )
        return token_flops(
            self.net.named_parameters(), num_layers=shape.num_hidden_layers,
            width=shape.num_attention_heads * head_dim, seq_len=self.seq_len,
            tied=shape.tie_word_embeddings,
        )  # fmt: skip

    def on_validation_epoch_start(self) -> None:
        self._validation = ValidationLoss(self.device, self.layout.counts)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._validation.add(self.net(batch), batch)

    def on_validation_epoch_end(self) -> None:
        self.validation = self._validation.mean(self.trainer.world_size)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = adamw(self.net.named_parameters(), self.config.optim, self.config.seed)
        tokens_per_step = self.config.global_batch * self.seq_len
        factor = lr_schedule(self.config.optim, self.config.max_steps, tokens_per_step)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        by_step = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": by_step}


def module_to_plan(config: Config, schema: dict[str, Any], precision: Precision) -> Finetune:
    """What `leyden plan` takes through one step on pretended ranks; config.json is enough."""
    guard = Guard(GuardConfig(policy="off"), torch.device("cpu"), world_size=1)
    base = causal_lm.Base(
        folder=causal_lm.resolve_base(config.base.path, weights=False), name="", digest=""
    )
    return Finetune(
        config, base, schema["seq_len"], precision, Compile(name="off"), Layout(rank=0), guard
    )


def run(config: Config, ranks: Ranks, stack: ExitStack) -> int:
    """Train on this rank of the world; returns the exit code."""
    quiet_lightning()
    device = choose_device(ranks)
    share_cores(ranks, device)
    layout = arrange(config.parallel, ranks)
    start_process_group(ranks, device, config.parallel.start_timeout_s)
    stop = StopFlag()
    stop.install()
    name = config.run or f"finetune-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(name) if "/" in name else Path(config.run_root) / name
    run = on_rank_zero(lambda: RunDir.open(folder))
    base = causal_lm.find_base(config.base)
    on_rank_zero(lambda: causal_lm.check_adapters(base, config.lora))
    start = on_rank_zero(
        lambda: start_run(
            run, config, recipe="finetune", may_change=MAY_CHANGE, stack=stack,
            facts={"base_digest": base.digest},
        )
    )  # fmt: skip
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
        on_rank_zero(lambda: causal_lm.check_data(base, dataset))
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
        module = Finetune(
            config, base, schema["seq_len"], numeric.precision, numeric.compiled, layout, guard
        )
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
            print(f"base {base.name} ({base.digest[:12]}), {config.lora}", file=sys.stderr)
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
        prog="python -m recipes.finetune",
        description="Fine-tune a published decoder with LoRA, DoRA, QLoRA or all of its weights.",
        configs=Path(__file__).parent / "configs",
        prefix="finetune_",
    )


if __name__ == "__main__":
    run_main(main)
