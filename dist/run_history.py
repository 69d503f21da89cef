"""Which attempt consumed which samples: a run's segments, and every sample's place in closed form.

order.jsonl holds one line a segment (a stretch of steps with one batch size and one number of
ranks), written when an attempt starts. Later segments replace what earlier ones did from their
first step on: those steps were rewound. consumed.jsonl tells how far the last one came.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist import strict_json
from dist.batch_layout import batch_places
from dist.errors import ConfigError, DataRefused
from dist.run_dir import RunDir
from dist.skips import Skips
from dist.windowed import OrderMode

I64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Steps from `step0` on, with one batch size on one number of data-parallel ranks."""

    step0: int
    t0: int
    """First sample of step0."""
    batch: int
    world_size: int
    """Data-parallel ranks."""
    micro_batch: int
    """Rows that one rank computes at once."""
    attempt: int
    seed: int
    data_digest: str
    skipped: tuple[tuple[int, int], ...] = ()
    """Ranges of the stream that rollbacks had left out when the segment began."""
    mode: OrderMode = OrderMode()
    """How rows are ordered."""
    stages: tuple[dict[str, Any], ...] = ()
    """Of a mixture, from the run's first to those planned then."""

    def t_of(self, step: int) -> int:
        """First sample of a step of this segment."""
        return self.t0 + (step - self.step0) * self.batch


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where samples are consumed; six (k,) arrays."""

    step: I64
    attempt: I64
    world_size: I64
    rank: I64
    micro: I64
    index: I64
    """Row of the micro-batch."""


@dataclass(frozen=True, kw_only=True)
class History:
    """The segments that count, by first step, and how far the run came."""

    segments: tuple[Segment, ...]
    """The last one may lie behind the planned end: how it would go on after whole epochs."""
    next_step: int
    """Steps completed, rewound ones left out."""
    planned_steps: int | None
    """Steps that the newest attempt's config plans; None if it is not known."""

    @property
    def known_steps(self) -> int:
        """Steps that are completed or planned."""
        return max(self.next_step, self.planned_steps or 0)

    @property
    def end_t(self) -> int:
        """One past the last sample that is consumed or planned."""
        return self.samples_of(self.known_steps - 1)[1] if self.known_steps else 0

    def segment_of(self, step: int) -> Segment:
        """The segment that a step belongs to."""
        first = [segment.step0 for segment in self.segments]
        return self.segments[max(int(np.searchsorted(first, step, side="right")) - 1, 0)]

    def samples_of(self, step: int) -> tuple[int, int]:
        """Samples [t0, t1) of a step; the last one before a segment may be short."""
        segment = self.segment_of(step)
        t0 = segment.t_of(step)
        later = [other.t0 for other in self.segments if other.step0 > step]
        return t0, min([t0 + segment.batch, *later])

    def places(self, t: I64, order: Any = None) -> Places:
        """Where samples t (k,) are consumed; samples past the plan as if the run went on.

        order: of the run, for one that lays its batches out in its own way.
        """
        t = np.asarray(t, np.int64)
        starts = np.array([segment.t0 for segment in self.segments])
        number = np.searchsorted(starts, t, side="right") - 1
        if t.size and number.min() < 0:
            raise ValueError(f"sample {t.min()} comes before the run's first, {starts[0]}")

        def of(name: str) -> I64:
            return np.array([getattr(one, name) for one in self.segments], np.int64)[number]

        steps, offset = np.divmod(t - of("t0"), of("batch"))
        # rows: of each sample's step, short where the next segment begins.
        next_start = np.append(starts[1:], np.iinfo(np.int64).max)[number]
        rows = np.minimum(of("batch"), next_start - (t - offset))
        world_size = of("world_size")
        if getattr(order, "lanes", 1) > 1:
            offset = _places_in_batch(order, t, t - offset, rows)
        # The rank whose span holds the offset: the last r with r * rows // world_size <= offset.
        rank = ((offset + 1) * world_size - 1) // rows
        micro_size = np.minimum(of("micro_batch"), -(-rows // world_size))
        micro, index = np.divmod(offset - rank * rows // world_size, micro_size)
        return Places(
            step=of("step0") + steps, attempt=of("attempt"), world_size=world_size,
            rank=rank, micro=micro, index=index,
        )  # fmt: skip


def _places_in_batch(order: Any, t: I64, t0: I64, rows: I64) -> I64:
    """Each sample's place in its batch [t0, t0 + rows), all (k,)."""
    places = np.empty_like(t)
    for first in np.unique(t0):
        here = t0 == first
        batch = batch_places(order, int(first), int(first + rows[here][0]))
        places[here] = batch[t[here] - first]
    return places


def find_run(name: str, run_root: str = "runs") -> RunDir:
    """The run of a name (runs/NAME) or a path; ConfigError lists the runs that there are."""
    path = Path(name) if "/" in name else Path(run_root) / name
    if (path / "run.json").is_file():
        return RunDir(path)
    if (Path(name) / "run.json").is_file():
        return RunDir(name)
    known = sorted(found.parent.name for found in Path(run_root).glob("*/run.json"))
    raise ConfigError(
        f"no run at {path} (it has no run.json); pass a run's name or its folder "
        f"(runs in {run_root}/: {', '.join(known) or 'none'})"
    )


def kept_segments(segments: list[Segment]) -> tuple[Segment, ...]:
    """Segments that still count, given in the order they began; DataRefused where samples jump."""
    kept: list[Segment] = []
    for segment in segments:
        while kept and kept[-1].step0 >= segment.step0:
            kept.pop()
        # The last step of an epoch's end is short if the run was to end there.
        if kept and not 0 <= kept[-1].t_of(segment.step0) - segment.t0 < kept[-1].batch:
            raise DataRefused(
                f"attempt {segment.attempt} starts step {segment.step0} at sample {segment.t0}, "
                f"where attempt {kept[-1].attempt} stands at {kept[-1].t_of(segment.step0)}: "
                "samples were skipped or repeated, or order.jsonl was edited"
            )
        kept.append(segment)
    return tuple(kept)


def read_segments(run: RunDir) -> list[Segment]:
    """All segments of a run, rewound ones too, in the order they began.

    Attempts without a line in order.jsonl (runs of older versions) get theirs from what they
    consumed.
    """
    identity = run.read_run()
    if identity is None:
        raise ConfigError(f"{run.path} has no run.json: it is not a run, or it never started")
    lines = run.read_lines("order.jsonl")
    have = {line["attempt"] for line in lines}
    for line in run.read_lines("consumed.jsonl"):
        if line["attempt"] not in have:
            have.add(line["attempt"])
            lines.append({"step0": line["step"], **_segment_facts(run, identity, line)})
    return sorted(
        (_segment(run, identity, line) for line in lines),
        key=lambda segment: (segment.attempt, segment.step0),
    )


def read_history(run: RunDir, num_rows: int = 0) -> History:
    """Read and cross-check order.jsonl and consumed.jsonl.

    num_rows: of the training split, for runs that were told to end after whole epochs. Raises
    ConfigError for a run that has not begun, DataRefused where the two files disagree.
    """
    segments = kept_segments(read_segments(run))
    if not segments:
        raise ConfigError(
            f"the run {run.path} has consumed nothing yet: no order.jsonl, no consumed.jsonl"
        )
    last = segments[-1]
    # The last line of a step counts; steps of the last segment were rewound before it began.
    counting = {
        line["step"]: line
        for line in run.read_lines("consumed.jsonl")
        if line["step"] < last.step0 or line["attempt"] == last.attempt
    }
    config = read_config(run)
    planned = config.get("max_steps")
    if config.get("max_epochs") and num_rows:
        # As dist.start counts: rows that are left out shorten the epochs.
        end_t = config["max_epochs"] * num_rows
        end_t -= Skips(last.skipped).left_out_before(end_t)
        planned = last.step0 + -(-(end_t - last.t0) // last.batch)
        if end_t > last.t0:
            segments = (*segments, replace(last, step0=planned, t0=end_t))
    history = History(
        segments=segments,
        next_step=max([last.step0, *(step + 1 for step in counting)]),
        planned_steps=planned,
    )
    for step, line in counting.items():
        t0, t1 = history.samples_of(step)
        short = step == history.next_step - 1 and t0 < line["t1"] <= t1
        if line["t0"] != t0 or (line["t1"] != t1 and not short):
            raise DataRefused(
                f"{run.path}: consumed.jsonl says that step {step} consumed samples "
                f"[{line['t0']}, {line['t1']}), order.jsonl says [{t0}, {t1}); one was edited"
            )
    return history


def read_config(run: RunDir, attempt: int | None = None) -> dict[str, Any]:
    """The resolved config of an attempt (None: the newest); {} where there is none."""
    import yaml

    folder = run.path if attempt is None else run.attempt_dir(attempt)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run that may be missing or torn: {} then."""
    try:
        record = strict_json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _segment(run: RunDir, identity: dict[str, Any], line: dict[str, Any]) -> Segment:
    micro_batch = line.get("micro_batch")
    if micro_batch is None:
        config = read_config(run, line["attempt"]) or identity.get("config", {})
        # Without either: the size that gives this many micro-batches.
        largest = -(-line["batch"] // line["world_size"])
        micro_batch = config.get("micro_batch") or -(-largest // line.get("accumulation", 1))
    return Segment(
        micro_batch=int(micro_batch),
        **{name: line[name] for name in ("step0", "t0", "batch", "world_size", "attempt")},
        **{name: line[name] for name in ("seed", "data_digest")},
        skipped=tuple((int(p0), int(p1)) for p0, p1 in line.get("skipped", ())),
        mode=OrderMode.of(line),
        stages=tuple(line.get("stages", ())),
    )


def _segment_facts(run: RunDir, identity: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    env = read_json(run.attempt_dir(line["attempt"]) / "env.json").get("environment", {})
    return {
        "t0": line["t0"], "batch": line["batch"], "attempt": line["attempt"],
        "world_size": int(env.get("WORLD_SIZE", 1)),
        "seed": identity["config"]["seed"], "data_digest": identity["data_digest"],
        **identity.get("order", {}),
    }  # fmt: skip
