"""Text from a trained model: one prompt, a file of prompts, or a conversation with a terminal.

    leyden generate RUN|FOLDER --prompt "def main(" [--greedy] [--num_samples 3]
    leyden generate RUN|FOLDER --prompts prompts.jsonl --output texts.jsonl
    leyden generate RUN|FOLDER                                  # interactive
    leyden generate RUN|FOLDER --chat [--system TEXT] --prompt "What is a jar?"
    python -m recipes.generate RUN|FOLDER ...

A prompt is framed as a document began in training and ends where the model ends it (eos) or after
max_new_tokens. The model is a plain transformers one with standard attention and a KV cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dist.errors import ConfigError, DataRefused, run_main
from dist.local_files import create_exclusive
from dist.progress import Progress
from dist.tokenizer import TextTokenizer
from recipes.causal_lm import BaseConfig
from recipes.chat import chat_ids, hf_tokenizer, require_template
from recipes.prompts import Shown, parse_memory, printable, prompts_of
from recipes.trained import (
    DataRef,
    Trained,
    choose_device,
    load_model,
    load_spread,
    open_trained,
    parse_words,
    quiet,
    resolve,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model, which prompts, and how the next token is chosen."""

    model: str = ""
    """The run or the exported folder. Comes first, without --model."""
    prompt: str = ""
    """One prompt; the text is printed."""
    prompts: str = ""
    """File of prompts: .jsonl with a key "prompt" a line, else one prompt a line."""
    output: str = ""
    """With --prompts: JSONL file, which must not exist; empty: standard output. It appears whole at
    the end: a killed command leaves none, and the same command starts again with the first."""
    chat: bool = False
    """A prompt is a user's message: the model's chat template frames it."""
    system: str = ""
    """With --chat: the system message."""
    max_new_tokens: int = 128
    """Longest continuation."""
    temperature: float = 1.0
    """Below 1 sharper, above 1 flatter; 0 is --greedy."""
    top_k: int = 0
    """Choose among the k most probable tokens only; 0: all."""
    top_p: float = 1.0
    """Choose among the most probable tokens that make up this probability."""
    greedy: bool = False
    """Always the most probable token."""
    seed: int = 0
    """Seeds the choices: the same seed, prompts and batch_size give the same texts."""
    num_samples: int = 1
    """Texts for each prompt."""
    batch_size: int = 8
    """Prompts computed at once."""
    step: int = 0
    """Of a run: the optimizer step of the checkpoint to take; 0: the newest valid one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the weights; auto: as they are stored."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    device_map: str = ""
    """auto: spread an exported folder over all GPUs, then memory, then disk (accelerate)."""
    offload_folder: str = ""
    """With device_map: where layers lie that fit nowhere else."""
    max_memory: str = ""
    """With device_map: limits, as 0=20GiB,cpu=60GiB; empty: what is free."""
    data: DataRef = field(default_factory=DataRef)
    """Where a run's dataset is now, if it has moved; the tokenizer comes from there."""
    base: BaseConfig = field(default_factory=BaseConfig)
    """Where a fine-tuned run's base is now, if it has moved."""
    run_root: str = "runs"
    """Where runs lie."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "num_samples": self.num_samples >= 1,
            "batch_size": self.batch_size >= 1,
            "device_map": self.device_map in ("", "auto"),
        }
        for name, right in checks.items():
            if not right:
                raise ConfigError(f"{name} cannot be {getattr(self, name)!r}; see --help")
        if self.is_greedy and self.num_samples > 1:
            raise ConfigError("greedy texts are all the same: leave out --num_samples or --greedy")
        if self.output and not self.prompts:
            raise ConfigError("--output needs --prompts FILE")
        if self.system and not self.chat:
            raise ConfigError("--system needs --chat")
        if self.prompt and self.prompts:
            raise ConfigError("give --prompt or --prompts, not both")

    @property
    def is_greedy(self) -> bool:
        return self.greedy or self.temperature == 0


@dataclass(frozen=True)
class Text:
    """One continuation of a prompt; `stopped` is eos or length."""

    prompt: str
    text: str
    sample: int
    tokens: int
    stopped: str


class Generator:
    """A loaded model with its tokenizer."""

    def __init__(self, trained: Trained, model: Any, config: Config) -> None:
        self.trained, self.model, self.config = trained, model, config
        self.tokenizer = TextTokenizer(trained.tokenizer_json)
        self.chat_tokenizer = hf_tokenizer(trained) if config.chat else None
        self.ends = end_ids(model, trained.special.eos)
        device = model.get_input_embeddings().weight.device
        # Offloaded to disk: accelerate moves inputs itself.
        self.device = torch.device("cpu") if device.type == "meta" else device

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt, begun as documents were in training."""
        if self.chat_tokenizer is not None:
            return chat_ids(self.chat_tokenizer, prompt, self.config.system)
        ids, _ = self.tokenizer.encode_batch([prompt])
        bos = self.trained.special.bos
        return [*([] if bos is None else [bos]), *map(int, ids)]

    def settings(self) -> Any:
        """transformers' GenerationConfig; every value that its defaults would choose is set."""
        from transformers import GenerationConfig

        config, special = self.config, self.trained.special
        names = () if config.is_greedy else ("temperature", "top_k", "top_p")
        sampling = {name: getattr(config, name) for name in names}
        return GenerationConfig(
            do_sample=not config.is_greedy,
            **sampling,
            max_new_tokens=config.max_new_tokens,
            num_return_sequences=config.num_samples,
            bos_token_id=special.bos,
            eos_token_id=self.ends or None,
            pad_token_id=special.pad,
            use_cache=True,
        )

    def batch(self, prompts: list[str], streamer: Any = None) -> list[Text]:
        """Continue prompts at once, padded on the left, num_samples texts each, in order."""
        rows = [self.encode(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        self.check_length(longest)
        # ids, mask: (prompts, longest)
        ids = torch.full((len(rows), longest), self.trained.special.pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        out = self.model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=self.settings(),
            streamer=streamer,
        )
        texts = []
        for i, new in enumerate(out[:, longest:].tolist()):
            number, sample = divmod(i, self.config.num_samples)
            places = [at for at, token in enumerate(new) if token in self.ends]
            ended = bool(places)
            kept = new[: places[0]] if ended else new
            stopped = "eos" if ended else "length"
            text = self.tokenizer.decode(kept)
            texts.append(Text(prompts[number], text, sample, len(kept), stopped))
        return texts

    def check_length(self, prompt_tokens: int) -> None:
        """ConfigError beyond what the positions allow; a warning beyond what was trained."""
        total = prompt_tokens + self.config.max_new_tokens
        limit = int(self.model.config.max_position_embeddings)
        if total > limit:
            raise ConfigError(
                f"a prompt of {prompt_tokens} tokens and max_new_tokens "
                f"{self.config.max_new_tokens} exceed the model's {limit} positions"
            )
        if 0 < self.trained.seq_len < total:
            print(
                f"warning: up to {total} tokens, but the model was trained on rows of "
                f"{self.trained.seq_len}; what lies beyond is often poor",
                file=sys.stderr,
            )


def end_ids(model: Any, eos: int | None) -> list[int]:
    """Ids that end a text: the dataset's, and those that a published model says itself."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    said = said if isinstance(said, list) else [said]
    return list(dict.fromkeys(number for number in (eos, *said) if number is not None))


def open_generator(config: Config) -> Generator:
    """Find and load the model."""
    place = resolve(config.model, config.run_root)
    trained = open_trained(
        place, step=config.step, data_url=config.data.url, base_path=config.base.path
    )
    if config.chat:
        require_template(trained)
    size = TextTokenizer(trained.tokenizer_json).vocab_size
    if size > trained.vocab_size:
        raise DataRefused(
            f"{place.path}: its tokenizer has {size} tokens, its model {trained.vocab_size}: they "
            "do not belong together"
        )
    if not config.device_map:
        device = choose_device(config.device)
        model = load_model(trained, device, packed=False, dtype=config.dtype)
        return Generator(trained, model, config)
    if place.is_run:
        raise ConfigError(
            f"device_map works on exported folders: `leyden export {config.model}` first"
        )
    model = load_spread(
        trained,
        device_map=config.device_map,
        dtype=config.dtype,
        max_memory=parse_memory(config.max_memory),
        offload_folder=config.offload_folder,
    )
    return Generator(trained, model, config)


def run_file(generator: Generator, prompts: list[str]) -> None:
    """Continue all prompts of a file; the output appears when it is complete."""
    config = generator.config
    torch.manual_seed(config.seed)
    lines = []
    with Progress("generate", len(prompts), "prompts") as bar:
        for start in range(0, len(prompts), config.batch_size):
            part = prompts[start : start + config.batch_size]
            lines += [json.dumps(vars(text), ensure_ascii=False) for text in generator.batch(part)]
            bar.update(len(part))
    written = "".join(line + "\n" for line in lines)
    if not config.output:
        print(written, end="")
    elif not create_exclusive(config.output, written.encode()):
        raise ConfigError(f"{config.output} was made meanwhile; give another --output")


def run_prompt(generator: Generator) -> None:
    """Print the continuations of one prompt, each after the prompt itself."""
    config = generator.config
    torch.manual_seed(config.seed)
    for text in generator.batch([config.prompt]):
        if config.num_samples > 1:
            print(f"--- {text.sample + 1} of {config.num_samples}, ended by {text.stopped}")
        print(shown_text(generator, text))


def shown_text(generator: Generator, text: Text) -> str:
    """A continuation after its prompt; of a conversation the answer alone."""
    return printable(text.text if generator.config.chat else text.prompt + text.text)


def run_interactive(generator: Generator, ask: Callable[[str], str] = input) -> None:
    """Prompts from a terminal until Ctrl-D; Ctrl-C ends a text, not the program."""
    print(f"{generator.trained.name}: it continues what you type; Ctrl-D ends", file=sys.stderr)
    torch.manual_seed(generator.config.seed)
    while True:
        try:
            prompt = ask("> ")
        except EOFError:
            print()
            return
        if not prompt:
            continue
        shown = Shown(generator.tokenizer.decode, generator.trained.special.eos)
        try:
            single = generator.config.num_samples == 1
            for text in generator.batch([prompt], shown if single else None):
                if not single:
                    print(shown_text(generator, text))
        except KeyboardInterrupt:
            print(" [stopped]")
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)


def main() -> int:
    """Parse the command line and generate."""
    quiet()
    words = sys.argv[1:]
    config = parse_words(Config, words, verb="generate", description=__doc__ or "")
    if not config.prompt and any(word.partition("=")[0] == "--prompt" for word in words):
        raise ConfigError("the prompt is empty; give at least one character")
    if not (config.prompt or config.prompts or sys.stdin.isatty()):
        raise ConfigError("no prompt: pass --prompt TEXT or --prompts FILE, or use a terminal")
    prompts = prompts_of(config.prompts, config.output) if config.prompts else []
    generator = open_generator(config)
    if prompts:
        run_file(generator, prompts)
    elif config.prompt:
        run_prompt(generator)
    else:
        run_interactive(generator)
    return 0


if __name__ == "__main__":
    run_main(main)
