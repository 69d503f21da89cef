"""From chats to a model that answers and stops: prep chat, finetune, generate --chat, export."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dist.errors import ConfigError
from recipes.chat import hf_tokenizer
from recipes.export import Config as ExportConfig
from recipes.export import run as export
from recipes.generate import Config, open_generator
from spark_jobs.chat import Config as PrepConfig
from spark_jobs.chat import run as prep
from tests.finetune_runs import play, write_base
from tests.run_ranks import run_ranks

PARTS = (("re", "un", "pre", "de", "co"), ("spark", "load", "store", "read", "jar", "sum"),
         ("er", "ed", "ing", "s", "ly"))  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and 140 chats about made-up functions; ten more are held out."""
    root = tmp_path_factory.mktemp("chat")
    words = [a + b + c for a in PARTS[0] for b in PARTS[1] for c in PARTS[2]]
    random.Random(0).shuffle(words)
    with open(root / "chats.jsonl", "w") as file:
        for word in words[:-10]:
            turns = [("user", f"def {word}(jar)"), ("assistant", f"Return jar {word[:2]}.")]
            messages = [{"role": role, "content": said} for role, said in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    (root / "held_out.json").write_text(json.dumps(words[-10:]))
    write_base(root / "base", hidden_size=64, intermediate_size=128)
    prep(
        PrepConfig(
            input=[str(root / "chats.jsonl")], tokenizer=str(root / "base"), template="leyden",
            output=str(root / "data"), max_length=64, validation_fraction=0.1,
        )
    )  # fmt: skip
    return root


@pytest.mark.spark
@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_held_out_prompts_end_by_themselves(place: Path, tmp_path: Path, method: str) -> None:
    """A mask that leaves the stop token out, a template that training and generation read
    differently, or an end that generation does not know: texts run on for ever."""
    changes = {
        "lora": {"method": method, "rank": 16, "alpha": 32.0}, "global_batch": 8, "micro_batch": 8,
        "max_steps": 100, "save_every_steps": 0, "log_every_steps": 50, "val_rows": 4,
    }  # fmt: skip
    run, url = tmp_path / "run", str(place / "data")
    assert run_ranks(play, 1, 200, url, str(place / "base"), [(str(run), "", changes)]) == [[0]]
    common = {"chat": True, "greedy": True, "max_new_tokens": 64}
    words = json.loads((place / "held_out.json").read_text())
    prompts = [f"def {word}(jar)" for word in words]
    texts = open_generator(Config(model=str(run), **common)).batch(prompts)
    assert sum(text.stopped == "eos" for text in texts) >= 9
    assert sum(text.text.startswith("Return jar ") for text in texts) >= 9
    # The exported model has the template with it, and says the same.
    whole = ExportConfig(model=str(run), output=str(tmp_path / "whole"), merge=method == "lora")
    folder = export(whole)
    assert (folder / "chat_template.jinja").is_file()
    again = open_generator(Config(model=str(folder), **common))
    assert [one.text for one in again.batch(prompts)] == [one.text for one in texts]
    from transformers import AutoTokenizer

    message = [{"role": "user", "content": prompts[0]}]
    ours = hf_tokenizer(again.trained)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template(message, tokenize=False) == ours.apply_chat_template(
        message, tokenize=False
    )


@pytest.mark.spark
@pytest.mark.timeout(300)
def test_a_model_without_a_template_cannot_chat(place: Path) -> None:
    """A prompt framed by nothing: the base would continue it as text."""
    with pytest.raises(ConfigError, match="chat template"):
        open_generator(Config(model=str(place / "base"), chat=True))
    with pytest.raises(ConfigError, match="--chat"):
        Config(model="x", system="Be brief.")
