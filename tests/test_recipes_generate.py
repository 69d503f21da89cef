"""recipes/generate.py: the text of a prompt does not depend on what else is generated."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.errors import ConfigError, DataRefused
from recipes import export, generate
from recipes.generate import Config, Generator, open_generator, run_file, run_interactive
from recipes.prompts import Shown, parse_memory, printable, prompts_of, read_prompts
from recipes.trained import parse_words
from tests.small_run import small_run

PROMPTS = ["def spark", "a", "return jar.store(spark) + 1", "\n    jar", "ü[1, 2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model."""
    output = str(tmp_path_factory.mktemp("exports") / "model")
    return export.run(export.Config(model=str(small_run("ddp")), output=output))


@pytest.fixture(scope="module")
def greedy() -> Generator:
    """The run's model; greedy texts of 20 tokens."""
    return open_generator(Config(model=str(small_run("ddp")), greedy=True, max_new_tokens=20))


def with_config(generator: Generator, **changes: Any) -> Generator:
    return Generator(generator.trained, generator.model, replace(generator.config, **changes))


def test_a_batch_gives_the_texts_that_each_prompt_gives(greedy: Generator) -> None:
    """Padding that is attended to, or positions that count it, change every shorter prompt."""
    together = greedy.batch(PROMPTS)
    alone = [greedy.batch([prompt])[0] for prompt in PROMPTS]
    assert together == alone
    assert len({text.text for text in together}) > 1, "a model that always says the same"
    assert all(text.tokens == 20 and text.stopped == "length" for text in together)


def test_the_cache_changes_nothing_and_is_used(
    greedy: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache each token costs the whole text again; with a wrong one it is another."""
    lengths: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    hook = greedy.model.register_forward_pre_hook(count, with_kwargs=True)
    cached = greedy.batch(PROMPTS[:2])
    assert set(lengths[1:]) == {1} and len(lengths) == 20
    settings = greedy.settings()
    settings.use_cache = False
    monkeypatch.setattr(Generator, "settings", lambda self: settings)
    lengths.clear()
    assert greedy.batch(PROMPTS[:2]) == cached
    assert lengths == list(range(lengths[0], lengths[0] + 20))
    hook.remove()


def test_it_stops_at_eos_each_text_by_itself(greedy: Generator) -> None:
    """A text that runs on after its end, or a batch that ends with its first text."""
    texts, model = greedy.batch(PROMPTS), greedy.model
    news = []
    for prompt in PROMPTS:  # bytes need not survive decoding: the ids come from the model itself
        ids = torch.tensor([greedy.encode(prompt)])
        out = model.generate(ids, generation_config=greedy.settings())
        news.append(out[0, ids.shape[1] :].tolist())
    at, number, end = max((new.index(t), i, t) for i, new in enumerate(news) for t in new)
    assert at > 0
    special = replace(greedy.trained.special, eos=end)
    ended = Generator(replace(greedy.trained, special=special), model, greedy.config)
    (text,) = ended.batch([PROMPTS[number]])
    assert (text.stopped, text.tokens) == ("eos", at)
    assert text.text == greedy.tokenizer.decode(news[number][:at])
    for new, one, whole in zip(news, ended.batch(PROMPTS), texts, strict=True):
        length = new.index(end) if end in new else 20
        assert (one.tokens, one.stopped) == (length, "eos" if end in new else "length")
        assert whole.text.startswith(one.text.rstrip("\ufffd"))


def test_folder_and_run_say_the_same(greedy: Generator, folder: Path) -> None:
    """An export whose generation settings, positions or tokenizer are not the run's."""
    exported = open_generator(replace(greedy.config, model=str(folder)))
    assert exported.batch(PROMPTS) == greedy.batch(PROMPTS)


def test_a_model_on_disk_says_the_same(greedy: Generator, folder: Path, tmp_path: Path) -> None:
    """Layers that fit in no memory are read from disk when they are used."""
    config = replace(
        greedy.config, model=str(folder), device_map="auto", max_memory="cpu=60KB",
        offload_folder=str(tmp_path / "offload"), max_new_tokens=5,
    )  # fmt: skip
    spread = open_generator(config)
    assert "disk" in spread.model.hf_device_map.values()
    expected = with_config(greedy, max_new_tokens=5).batch(PROMPTS[:2])
    assert spread.batch(PROMPTS[:2]) == expected
    with pytest.raises(ConfigError, match=r"`leyden export .*` first"):
        open_generator(replace(config, model=str(small_run("ddp"))))


def test_sampling_obeys_its_options(greedy: Generator) -> None:
    """transformers' own defaults (top_k 50) in place of what was asked for, or a seed unused."""
    greedy = with_config(greedy, max_new_tokens=8)
    sampled = with_config(greedy, greedy=False, num_samples=4, top_k=0)

    def texts(generator: Generator, seed: int) -> list[str]:
        torch.manual_seed(seed)
        return [text.text for text in generator.batch(PROMPTS[:2])]

    first = texts(sampled, 1)
    assert len(set(first)) == 8 and texts(sampled, 1) == first != texts(sampled, 2)
    settings = sampled.settings()
    assert (settings.top_k, settings.top_p, settings.temperature) == (0, 1.0, 1.0)
    expected = [text.text for text in greedy.batch(PROMPTS[:2]) for _ in range(4)]
    assert texts(with_config(sampled, top_k=1), 3) == expected
    assert texts(with_config(sampled, top_p=1e-6), 3) == expected
    assert texts(with_config(sampled, temperature=1e-4), 3) == expected
    assert with_config(greedy, greedy=False, temperature=0.0).batch(PROMPTS) == greedy.batch(
        PROMPTS
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": -1.0}, "temperature cannot be -1.0"),
        ({"top_p": 0.0}, "top_p cannot be 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens cannot be 0"),
        ({"greedy": True, "num_samples": 2}, "greedy texts are all the same"),
        ({"output": "x"}, "--output needs --prompts"),
        ({"prompt": "x", "prompts": "y"}, "not both"),
        ({"device_map": "balanced"}, "device_map cannot be 'balanced'"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    """Found out by a traceback after minutes of loading."""
    with pytest.raises(ConfigError, match=said):
        Config(**changes)


def test_too_long_a_text_is_refused_or_warned_about(
    greedy: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Positions beyond the model's give noise, or an index error on a GPU."""
    with pytest.raises(ConfigError, match="exceed the model's 512 positions"):
        with_config(greedy, max_new_tokens=512).batch(["a"])
    with_config(greedy, max_new_tokens=40).batch(["a"])
    assert "trained on rows of 32" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(
    greedy: Generator, folder: Path, tmp_path: Path
) -> None:
    """Ids beyond the vocabulary crash in the middle of a batch."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(DataRefused, match="do not belong together"):
        open_generator(Config(model=str(other)))


def test_files_of_prompts(greedy: Generator, tmp_path: Path) -> None:
    """Lines lost or out of order, prompts cut at odd line separators, an output overwritten."""
    prompts = ["def spark", "a\u2028b", "- x", "line\nbreak", "jar"]
    source, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    source.write_text("\n".join(lines) + "\n")
    assert read_prompts(source) == prompts
    config = replace(greedy.config, prompts=str(source), output=str(output), batch_size=2)
    run_file(Generator(greedy.trained, greedy.model, config), prompts_of(str(source), str(output)))
    records = [json.loads(line) for line in output.read_text().split("\n") if line]
    assert [record["prompt"] for record in records] == prompts
    assert [record["text"] for record in records] == [t.text for t in greedy.batch(prompts)]
    with pytest.raises(ConfigError, match="out.jsonl exists"):
        prompts_of(str(source), str(output))
    (tmp_path / "p.txt").write_text("one\ntwo")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    for text in ("", "one\n\ntwo", "\n"):
        (tmp_path / "p.txt").write_text(text)
        with pytest.raises(ConfigError, match=r"p\.txt:\d has no prompt"):
            read_prompts(tmp_path / "p.txt")
    source.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(ConfigError, match=r"p\.jsonl:2 has no prompt"):
        read_prompts(source)


def test_conversation(greedy: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty line or a prompt that is too long must not end it; the end of input must."""
    said = iter(["def spark", "", "jar " * 600, "a"])

    def ask(_: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    run_interactive(greedy, ask)
    captured = capsys.readouterr()
    first, last = (text.text for text in greedy.batch(["def spark", "a"]))
    assert captured.out == f"{printable(first)}\n{printable(last)}\n\n"
    assert "exceed the model's 512 positions" in captured.err


def test_shown_text_is_whole_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of an umlaut printed as a replacement sign, and never mended."""
    pieces = {1: b"a", 2: b"\xc3", 3: b"\xbc", 4: b"\x1b", 5: b"\xff"}

    def decode(ids: list[int]) -> str:
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    shown = Shown(decode, eos=9)
    for value in ([7, 7, 7], [1], [2], [3], [4], [5], [9]):
        shown.put(torch.tensor(value))
    shown.end()
    assert capsys.readouterr().out == "aü\\x1b\ufffd\n"


@pytest.mark.parametrize(
    "prompt", ["[1, 2", "null", "1.0", "{a: b}", "--x=y", "@f", " ", "a\nb", "true"]
)
def test_prompts_arrive_as_they_were_typed(prompt: str) -> None:
    """A config parser that reads a prompt as YAML."""
    config = parse_words(
        Config, ["some/run", f"--prompt={prompt}", "--greedy"], verb="generate", description=""
    )
    assert (config.model, config.prompt, config.greedy) == ("some/run", prompt, True)


def test_memory_limits() -> None:
    """`cuda:0=20GiB`, which accelerate ignores."""
    assert parse_memory("0=20GiB, cpu=60GiB") == {0: "20GiB", "cpu": "60GiB"}
    assert parse_memory("") is None
    for text in ("20GiB", "cuda:0=2GiB", "cpu="):
        with pytest.raises(ConfigError, match="is not as 0=20GiB"):
            parse_memory(text)


def test_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty prompt that starts a conversation, or samples that nobody can tell apart."""
    words = ["generate", str(folder), "--max_new_tokens", "4"]
    monkeypatch.setattr("sys.argv", [*words, "--prompt", "jar", "--num_samples", "2"])
    assert generate.main() == 0
    out = capsys.readouterr().out
    assert out.count("\njar") == 2 and "--- 2 of 2, ended by" in out
    monkeypatch.setattr("sys.argv", [*words, "--prompt", ""])
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate.main()
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match="no prompt: pass --prompt"):
        generate.main()
