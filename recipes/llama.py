"""A Hugging Face Llama built from a config, and the small root module that gives its loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist.attention import PACKED_ATTENTION, packed_info, register_packed_attention
from dist.compile import Compile, compile_blocks, compile_decoder
from dist.errors import ConfigError
from dist.hf_weights import HfWeights, check_config
from dist.initialise import Fill
from dist.loss import summed_loss
from dist.mesh import on_rank_zero
from dist.precision import Precision
from dist.tensor_parallel import check_divides, split_block, split_vocabulary, vocab_parallel_loss

# What a Llama computes by, and no shape shows.
_SAME_AS_INIT_FROM = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama; the vocabulary and the sequence length come from the dataset."""

    hidden_size: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Decoder blocks."""
    num_heads: int = 4
    """Query heads; must divide hidden_size."""
    num_kv_heads: int = 4
    """Key and value heads; must divide num_heads."""
    intermediate_size: int = 688
    """Width of the gated MLP."""
    tie_embeddings: bool = True
    """The output matrix is the input embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face rope parameters besides theta, such as Llama 3.1's; null for none."""
    max_position_embeddings: int = 131072
    """Longest context that the model's config claims."""
    norm_eps: float = 1e-5
    """Epsilon of the RMS norms."""
    init_std: float = 0.02
    """Standard deviation of the first weights."""
    init_from: str = ""
    """Local Hugging Face folder (config.json, safetensors) of the first weights; empty: random."""
    attention_dropout: float = 0.0
    """Share of attention weights dropped in training."""
    residual_dropout: float = 0.0
    """Share of what each attention and MLP adds to the residual stream dropped in training."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model: num_heads {self.num_heads} must divide hidden_size {self.hidden_size} and "
                f"be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        for name in ("attention_dropout", "residual_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(
                    f"model.{name} is {getattr(self, name)}; it must be at least 0 and below 1"
                )


def hf_config(config: ModelConfig, schema: dict[str, Any]) -> Any:
    """transformers.LlamaConfig of a model on a dataset's schema (vocabulary, bos and eos)."""
    from transformers import LlamaConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return LlamaConfig(
        vocab_size=schema["vocab_size"],
        bos_token_id=schema.get("bos_id"),
        eos_token_id=schema.get("eos_id"),
        pad_token_id=None,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.intermediate_size,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope | (config.rope_scaling or {}),
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init_std,
        attention_dropout=config.attention_dropout,
        use_cache=False,
        attn_implementation=PACKED_ATTENTION,
    )


class PackedDecoder(nn.Module):
    """The root that is sharded, around a transformers model of blocks `model.layers` under
    `lm_head`: its forward returns a loss sum, so that no parameter is used outside it (FSDP2
    gathers the output matrix only within its root's forward)."""

    def __init__(self, model: nn.Module, attention_dropout: float = 0.0) -> None:
        super().__init__()
        register_packed_attention()
        self.model: Any = model
        self._attention_dropout = attention_dropout
        self.autocast_dtype: torch.dtype | None = None
        self.compiled = False
        self.keeps_token_losses = False
        """Whether a forward leaves the loss of each token in `token_losses`."""
        self.token_losses: Tensor | None = None
        """(n * seq,) loss of each target of the last batch, where they are kept."""

    def forward(self, batch: Any) -> Tensor:
        """Sum of -log p(target) over the valid targets of a batch (dist.loader.Batch), nats."""
        tokens = batch.tokens.long()
        dtype = self.autocast_dtype or self.model.model.embed_tokens.weight.dtype
        autocast = self.autocast_dtype is not None
        dropout = self._attention_dropout if self.training else 0.0
        packed = packed_info(
            batch.doc_ids, batch.cu_seqlens, batch.max_len, dtype, dropout, stable=self.compiled
        )
        with torch.autocast(tokens.device.type, self.autocast_dtype, enabled=autocast):
            hidden = self.model.model(
                input_ids=tokens[:, :-1],
                position_ids=batch.position_ids,
                use_cache=False,
                packed=packed,
            ).last_hidden_state
            if self.keeps_token_losses:
                self.token_losses = hidden.new_zeros(hidden.shape[:2].numel(), dtype=torch.float32)
            split = isinstance(self.model.lm_head.weight, DTensor)  # by split_layers
            return (vocab_parallel_loss if split else summed_loss)(
                hidden.flatten(0, 1),
                self.model.lm_head.weight,
                tokens[:, 1:].flatten(),
                batch.valid.flatten(),
                losses_N=self.token_losses,
            )


def _drop_residual(block: nn.Module, share: float) -> None:
    """Dropout on what a block's attention and MLP add; Hugging Face's Llama has none. Parameter
    names stay, and evaluation, export and generation are not touched."""
    if share == 0.0:
        return
    block.residual_dropout = nn.Dropout(share)
    block.residual_hooks = [
        part.register_forward_hook(lambda _, __, output: block.residual_dropout(output))
        for part in (block.self_attn.o_proj, block.mlp.down_proj)
    ]


def build(config: ModelConfig, schema: dict[str, Any]) -> PackedDecoder:
    """The model on the meta device: no memory, no values."""
    from transformers import LlamaForCausalLM

    register_packed_attention()
    with torch.device("meta"):
        net = PackedDecoder(LlamaForCausalLM(hf_config(config, schema)), config.attention_dropout)
    for block in blocks(net):
        _drop_residual(block, config.residual_dropout)
    return net


def blocks(model: PackedDecoder) -> Iterable[nn.Module]:
    """The decoder blocks: the units of checkpointing, compiling and sharding."""
    return model.model.model.layers


def split_layers(model: PackedDecoder, mesh: DeviceMesh) -> None:
    """Tensor parallelism over `mesh` (in place): heads, the MLP's width and the vocabulary are
    split, norms are not. Call it on the meta device, before anything else wraps a module.

    Attention dropout is refused: all ranks of a group draw the same numbers, which residual
    dropout needs, so head i of each rank would drop the same weights.
    """
    config = model.model.config
    check_divides(
        mesh.size(),
        {
            "model.num_heads": config.num_attention_heads,
            "model.num_kv_heads": config.num_key_value_heads,
            "model.intermediate_size": config.intermediate_size,
            "the dataset's vocabulary": config.vocab_size,
        },
    )
    if config.attention_dropout > 0.0:
        raise ConfigError(
            f"model.attention_dropout is {config.attention_dropout} under tensor parallelism: "
            "heads of different ranks would drop the same weights; set it to 0 "
            "(model.residual_dropout works), or use fsdp without parallel.tp"
        )
    for block in blocks(model):
        for hook in getattr(block, "residual_hooks", []):
            hook.remove()
        split_block(
            block,
            mesh,
            column=(
                *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                *("mlp.gate_proj", "mlp.up_proj"),
            ),
            row=("self_attn.o_proj", "mlp.down_proj"),
            inputs={"self_attn": "hidden_states", "mlp": None},
        )
        # Dropout goes on what the ranks have summed, so its hooks come after the plan's.
        if hasattr(block, "residual_dropout"):
            _drop_residual(block, block.residual_dropout.p)
    split_vocabulary(model.model.model.embed_tokens, model.model.lm_head, mesh)


def first_weights(model: PackedDecoder, config: ModelConfig) -> Fill | None:
    """What fills the parameters from `init_from`, checked; None for random weights."""
    if not config.init_from:
        return None
    from transformers import LlamaConfig

    folder = Path(config.init_from)

    def check() -> None:
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.init_from: {folder} has no config.json; give a local folder as "
                "save_pretrained or `leyden export` writes it"
            )
        theirs = LlamaConfig.from_pretrained(folder)
        check_config(folder, theirs, model.model.config, _SAME_AS_INIT_FROM)
        HfWeights(folder).check(model.model)

    on_rank_zero(check)
    weights = HfWeights(folder)
    return lambda name, parameter: weights.fill(name.removeprefix("model."), parameter)


def set_precision(model: PackedDecoder, precision: Precision, *, by_policy: bool) -> None:
    """16 bits by autocast, unless the sharding's policy owns the dtypes."""
    if not by_policy:
        model.autocast_dtype = precision.autocast_dtype


def compile_model(model: PackedDecoder, compiled: Compile) -> None:
    """Compile the blocks or the decoder as decided; after checkpointing, before sharding."""
    if compiled.name == "blocks":
        compile_blocks(blocks(model))
    elif compiled.name == "model":
        compile_decoder(model.model.model)
    model.compiled = compiled.name != "off"


def num_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
