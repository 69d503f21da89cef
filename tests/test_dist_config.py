"""Configs: defaults < YAML < flags, and no key is ever ignored."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dist.config import config_digest, keys_of, parse_config, to_yaml
from dist.errors import ConfigError


@dataclass(kw_only=True)
class Optim:
    """How weights move."""

    lr: float = 1e-3
    """Peak learning rate."""


@dataclass(kw_only=True)
class Job:
    """A job."""

    input: list[str]
    """Files to read."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer."""
    max_steps: int = 10
    """Optimizer steps."""


def parse(*argv: str, configs: Path | None = None) -> Job:
    return parse_config(
        Job, list(argv), prog="job", description="A job.", configs=configs, prefix="job_"
    )


def test_flags_beat_files_beat_defaults(tmp_path: Path) -> None:
    """A default that wins over a file trains another model than the one written down."""
    (tmp_path / "job_small.yaml").write_text("input: [a]\noptim: {lr: 2.0}\nmax_steps: 5\n")
    expected = Job(input=["a"], optim=Optim(lr=2.0), max_steps=7)
    assert parse("--config", "small", "--max_steps", "7", configs=tmp_path) == expected
    path = str(tmp_path / "job_small.yaml")
    assert parse(f"--config={path}", "--max_steps=7") == expected
    assert parse("--config", path, "--optim.lr", "3").optim.lr == 3.0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--max_step", "3"], "unknown key 'max_step'; did you mean 'max_steps'"),
        (["--optim.lrr", "3"], "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        (["--lr", "3"], "unknown key 'lr'; did you mean 'optim.lr'"),
        (["--max_steps", "many"], "max_steps"),
        (["stray"], "stray"),
        (["--config", "huge"], r"no config 'huge': neither a file nor one of \['small'\]"),
        (["--config", "no/such.yaml"], "no config file no/such.yaml"),
    ],
)
def test_wrong_flags_are_refused_with_the_nearest(
    argv: list[str], said: str, tmp_path: Path
) -> None:
    """A typo that is ignored trains with the default: learning rate 2e-4 instead of 5e-5."""
    (tmp_path / "job_small.yaml").write_text("input: [a]\n")
    with pytest.raises(ConfigError, match=said):
        parse("--input", "a", *argv, configs=tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("input: [a]\nmax_step: 3\n", "did you mean 'max_steps'"),
        ("input: [a]\noptim: {lrr: 3}\n", "did you mean 'optim.lr'"),
        ("input: [a\nb: {", "parsing"),
        ("max_steps: 3\n", "input"),
    ],
)
def test_wrong_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    """The same typo in a file."""
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        parse("--config", str(tmp_path / "job.yaml"))


def test_a_list_can_be_given_bare_repeated_or_as_json() -> None:
    """`--input folder`, what everybody types first, must not fail on its type."""
    assert parse("--input", "a b").input == ["a b"]
    assert parse("--input", "a", "--input=b,c").input == ["a", "b,c"]
    assert parse("--input", '["a", "b"]').input == ["a", "b"]


def test_resolved_yaml_is_complete_and_reads_back(tmp_path: Path) -> None:
    """A stored config that lacks defaults changes meaning when they change."""
    job = Job(input=["a"], optim=Optim(lr=0.5))
    (tmp_path / "stored.yaml").write_text(to_yaml(job))
    assert parse("--config", str(tmp_path / "stored.yaml")) == job
    assert to_yaml(job) == "input:\n- a\noptim:\n  lr: 0.5\nmax_steps: 10\n"
    assert config_digest(job) != config_digest(Job(input=["a"]))
    assert keys_of(Job) == ["input", "optim", "optim.lr", "max_steps"]


def test_help_shows_the_fields_docs(capsys: pytest.CaptureFixture[str]) -> None:
    """Help without the docstrings under the fields is a list of names."""
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "Peak learning rate." in said and "default: 10" in said
