"""dist/export_hf.py and dist/model_folder.py: whole folders or none, and nothing unseen in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.errors import ConfigError, DataRefused
from dist.export_hf import (
    SpecialTokens,
    build_empty,
    framed_tokenizer,
    plain,
    tokenizer_config,
    write_folder,
)
from dist.model_folder import LEYDEN_JSON, check_folder, find_model, read_record
from tests.make_dataset import flip_byte, tokenizer_json

SPECIAL = SpecialTokens(bos=None, eos=1, pad=2)


def small_model(tied: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
            max_position_embeddings=64, bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip


def write(folder: Path, **changes: Any) -> None:
    given = {"facts": {"step": 3, "run_id": "r-1", "data_digest": "d"}, "card": "# r\n"}
    write_folder(
        small_model(),
        folder,
        tokenizer_json=tokenizer_json(),
        special=SPECIAL,
        **{**given, **changes},
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "model"
    write(folder, max_shard_size="8KB")
    return folder


def test_folder_is_complete_and_readable_by_others(exported: Path) -> None:
    """A file that only its owner may read, or that leyden.json does not vouch for."""
    report = check_folder(exported)
    names = {path.name for path in exported.iterdir()}
    assert set(report.record["files"]) == names - {LEYDEN_JSON}
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert (exported / "tokenizer.json").read_bytes() == tokenizer_json()
    modes = {path.stat().st_mode & 0o777 for path in exported.iterdir()}
    probe = exported.parent / "probe"
    probe.touch()
    assert modes == {probe.stat().st_mode & 0o777}
    assert [path.name for path in exported.parent.iterdir() if ".tmp" in path.name] == []


def test_an_export_is_never_overwritten(exported: Path) -> None:
    """A second export into the same folder would mix the shards of two models."""
    before = (exported / LEYDEN_JSON).read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        write(exported)
    assert (exported / LEYDEN_JSON).read_bytes() == before


def test_two_exports_at_once_do_not_mix(exported: Path, tmp_path: Path) -> None:
    """The folder that appears while another export is being written must stay as it is."""
    folder = tmp_path / "model"
    model = small_model()
    save = model.save_pretrained

    def slow(path: Path, **options: Any) -> None:
        save(path, **options)
        shutil.copytree(exported, folder)

    model.save_pretrained = slow
    with pytest.raises(ConfigError, match="cannot take the export"):
        write_folder(
            model, folder, tokenizer_json=tokenizer_json(), special=SPECIAL, facts={}, card=""
        )
    check_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_is_left_of_a_failed_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a model under its final name would be loaded by whoever finds it."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dist.export_hf.write_record", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="max_shard_size '5 bananas'"):
        write(tmp_path / "model", max_shard_size="5 bananas")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: flip_byte(next(f.glob("*00001*.safetensors")), 700), "00001-of"),
        (lambda f: flip_byte(f / "config.json", 40), "config.json has another SHA-256"),
        (lambda f: (f / "README.md").write_text("# other\n"), "README.md has 8 bytes instead of 4"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "model.bin").touch(), "model.bin was not exported"),
        (lambda f: (f / "sub").mkdir(), "sub was not exported"),
        (lambda f: (f / LEYDEN_JSON).unlink(), "leyden.json is missing"),
        (lambda f: (f / LEYDEN_JSON).write_text("{"), "leyden.json is not JSON"),
        (
            lambda f: (f / LEYDEN_JSON).write_text(
                (f / LEYDEN_JSON).read_text().replace('"step": 3', '"step": 4')
            ),
            "leyden.json was changed",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_change_is_found_by_name(
    exported: Path, tmp_path: Path, damage: Any, said: str
) -> None:
    """A verification that looks at sizes only, or at listed files only."""
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    check_folder(folder)
    damage(folder)
    with pytest.raises(DataRefused) as caught:
        check_folder(folder)
    assert said in str(caught.value)


def test_a_newer_export_is_refused_by_version(exported: Path, tmp_path: Path) -> None:
    """A record of another layout, read as if it were ours."""
    record = json.loads((exported / LEYDEN_JSON).read_bytes())
    (tmp_path / LEYDEN_JSON).write_text(json.dumps({**record, "format_version": 2}))
    with pytest.raises(DataRefused, match="version 2"):
        read_record(tmp_path)


def test_empty_model_has_its_buffers_and_ties() -> None:
    """Rotary frequencies left without values, or an output matrix that is no longer the input's."""
    model, usual = build_empty(small_model), small_model()
    for (name, one), (_, other) in zip(model.named_buffers(), usual.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float(usual.lm_head.weight.detach().std()) > 0  # later models draw values as before


@pytest.mark.parametrize("adds", [False, True], ids=["plain", "adds eos"])
@pytest.mark.parametrize("bos", [None, 0])
def test_auto_tokenizer_frames_as_training_did(tmp_path: Path, bos: int | None, adds: bool) -> None:
    """A begin-of-text that training had and the exported tokenizer leaves out, or the reverse; and
    transformers' own Llama tokenizer in place of ours, which splits text in another way."""
    from transformers import AutoTokenizer

    from dist.tokenizer import TextTokenizer

    given = tokenizer_json()
    if adds:  # the file frames texts in a way of its own, which training ignored
        given = framed_tokenizer(given, SpecialTokens(bos=1, eos=None, pad=2))
    text = "def spark(jar):\n    return  jar + 'ü' "
    ids, _ = TextTokenizer(given).encode_batch([text])
    special = SpecialTokens(bos=bos, eos=1, pad=2)
    framed = framed_tokenizer(given, special)
    assert framed_tokenizer(framed, special) == framed
    assert (framed == given) == (bos is None and not adds)
    (tmp_path / "tokenizer.json").write_bytes(framed)
    config = tokenizer_config(given, special, 64)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(text)["input_ids"] == [*([] if bos is None else [bos]), *ids.tolist()]
    assert tokenizer.decode(ids.tolist()) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2)
    assert tokenizer.bos_token_id == bos
    padded = tokenizer(["a", text], padding=True)["input_ids"]
    assert padded[0][0] == 2 and len(padded[0]) == len(padded[1])


def test_padding_is_found_or_borrowed() -> None:
    """No pad token: a batch of prompts could not be padded at all."""
    assert SpecialTokens.of(tokenizer_json(), None, 1).pad == 2
    without = tokenizer_json().replace(b"<|pad|>", b"<|other|>")
    assert SpecialTokens.of(without, 0, 1).pad == 1
    assert SpecialTokens.of(without, 5, None).pad == 5
    assert SpecialTokens.of(without, None, None).pad == 0


def test_json_holds_no_nan() -> None:
    """NaN is no JSON: the Hub and most readers refuse the file."""
    assert plain({"a": [float("nan"), 1.5, (2, float("inf"))]}) == {"a": [None, 1.5, [2, None]]}


def test_models_are_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`leyden eval first` that takes a folder called first for the run, or an unhelpful error."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/first/run.json", "first/config.json", "model/config.json", "runs/odd/x"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    assert find_model("first").path == Path("runs/first") and find_model("first").is_run
    assert find_model("./first").path == Path("first") and not find_model("./first").is_run
    assert find_model("model").kind == "folder"
    assert find_model("runs/first").is_run
    with pytest.raises(ConfigError, match=r"did you mean 'first'\? \(runs in runs: first\)"):
        find_model("frist")
    with pytest.raises(ConfigError, match="is an exported model already"):
        find_model("model", only_run=True)
    with pytest.raises(ConfigError, match="runs/odd is neither a run that has started"):
        find_model("odd")
    with pytest.raises(ConfigError, match="elsewhere holds no runs"):
        find_model("x", "elsewhere")
