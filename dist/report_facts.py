"""What a run's files say, put together for its report: status, attempts, goodput, lineage.

Files may be missing or torn (a run that was killed, or that still trains); then the fact is
None and the report says so.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from dist.dataset import Dataset, MixedDataset
from dist.errors import LeydenError
from dist.lease import holder_gone
from dist.mixed_order import MixedOrder
from dist.run_dir import RunDir
from dist.run_history import (
    History,
    Segment,
    read_config,
    read_history,
    read_json,
    read_segments,
)

DATA_BOUND_SHARE = 0.05
Line = dict[str, Any]


@dataclass(kw_only=True)
class Attempt:
    """One start of the run. Steps are ranges [first, end); times are in seconds."""

    number: int
    status: str
    env: Line
    outcome: Line
    segment: Segment | None
    end_step: int
    """One past the last step it did."""
    useful_steps: int
    lost_steps: int
    """Done, and then rewound by a later attempt."""
    useful_s: float
    lost_s: float
    startup_s: float | None
    """From when it took the run to its first step."""
    saves_s: float
    """Time that training stood still for checkpoints."""
    validation_s: float
    """0 where it was not logged."""
    wall_s: float | None
    config: Line

    @property
    def rest_s(self) -> float | None:
        """What nothing accounts for."""
        if self.wall_s is None:
            return None
        known = self.useful_s + self.lost_s + self.saves_s + self.validation_s
        return max(0.0, self.wall_s - known - (self.startup_s or 0.0))

    @property
    def first_step(self) -> int:
        return self.segment.step0 if self.segment else 0

    @property
    def rewound(self) -> tuple[int, int] | None:
        """Its steps [from, to) that were done again by a later attempt."""
        return (self.end_step - self.lost_steps, self.end_step) if self.lost_steps else None


@dataclass(kw_only=True)
class Facts:
    """Everything that the report shows."""

    name: str
    path: str
    status: str
    identity: Line
    config: Line
    config_yaml: str
    attempts: list[Attempt]
    metrics: list[Line]
    next_step: int
    planned_steps: int | None
    samples: int
    tokens: int | None
    """Inputs consumed, rewound steps left out; None if the dataset is gone."""
    epochs: float | None
    baselines: dict[str, float]
    by_source: list[tuple[str, int, float]]
    versions: dict[str, str]
    """Of each source of a mixture: the version it began with, and the one it is on."""
    """(name, rows consumed, epochs) of each source of a mixture."""
    data: Dataset | None
    data_problem: str
    provenance: Line
    problems: list[str] = field(default_factory=list)
    """What does not fit together."""

    def last(self, key: str) -> float | None:
        """The newest finite value of a metric in the steps that count."""
        for line in reversed(self.metrics):
            value = line.get(key)
            if not line["rewound"] and isinstance(value, (int, float)) and math.isfinite(value):
                return float(value)
        return None

    @property
    def outcome(self) -> Line:
        return self.attempts[-1].outcome if self.attempts else {}

    @property
    def tokens_per_s(self) -> float | None:
        """Over all logged steps that count, validation and saves left out."""
        lines = [x for x in self.metrics if x.get("tokens_per_s") and not x["rewound"]]
        seconds = sum(line["seconds"] for line in lines)
        done = sum(line["tokens_per_s"] * line["seconds"] for line in lines)
        return done / seconds if seconds else None

    @property
    def data_wait_share(self) -> float | None:
        """Part of the step time that waited for data."""
        lines = [x for x in self.metrics if "data_wait_s" in x and not x["rewound"]]
        seconds = sum(line["seconds"] for line in lines)
        return sum(x["data_wait_s"] * x["steps"] for x in lines) / seconds if seconds else None

    @property
    def goodput(self) -> float | None:
        """Part of all attempts' time that went into steps that count; None if a time is unknown."""
        wall = [attempt.wall_s for attempt in self.attempts]
        known = [seconds for seconds in wall if seconds is not None]
        if not known or len(known) < len(wall) or sum(known) <= 0:
            return None
        return min(1.0, sum(attempt.useful_s for attempt in self.attempts) / sum(known))


def read_facts(run: RunDir) -> Facts:
    """Read a run's folder; only a folder that is no run at all is an error (ConfigError)."""
    segments = read_segments(run)
    identity = run.read_run() or {}
    data, problem, provenance = _open_data(run)
    problems = []
    num_rows = data.split("train").num_rows if data else 0
    next_step, planned, samples = 0, read_config(run).get("max_steps"), 0
    by_source: list[tuple[str, int, float]] = []
    try:
        history = read_history(run, num_rows)
        next_step, planned = history.next_step, history.planned_steps
        samples = history.samples_of(next_step - 1)[1] if next_step else 0
        by_source = _by_source(data, history, samples)
    except LeydenError as error:
        if segments:
            problems.append(str(error))
    metrics = _metrics(run, segments)
    attempts = _attempts(run, segments, metrics)
    config_file = run.path / "config.yaml"
    return Facts(
        name=run.path.resolve().name, path=str(run.path.resolve()),
        status=attempts[-1].status if attempts else "never started",
        identity=identity, config=read_config(run),
        config_yaml=config_file.read_text(errors="replace") if config_file.is_file() else "",
        attempts=attempts, metrics=metrics, next_step=next_step, planned_steps=planned,
        samples=samples,
        tokens=samples * int(data.schema["seq_len"]) if data else None,
        epochs=samples / num_rows if num_rows and not by_source else None, by_source=by_source,
        versions=_versions(run, identity) if by_source else {},
        baselines=_baselines(run), data=data, data_problem=problem, provenance=provenance,
        problems=problems,
    )  # fmt: skip


def _by_source(
    data: Dataset | None, history: History, samples: int
) -> list[tuple[str, int, float]]:
    from dist.audit import order_of_segment

    last = history.segments[-1]
    if not isinstance(data, MixedDataset) or not last.stages:
        return []
    order = order_of_segment(data, last)
    mixed: MixedOrder = order.stream
    end = int(order.skips.to_stream(np.array([samples]))[0])
    begun = mixed.own_counts(end)
    gone = [np.arange(p0, min(p1, end)) for p0, p1 in order.skips.ranges if p0 < end]
    rolled_back = np.bincount(
        mixed.own_places(np.concatenate([np.empty(0, np.int64), *gone]))[0], minlength=len(begun)
    )
    # Removed rows make epochs shorter: how far a source is, its own stream says.
    return [
        (name, count - int(rolled_back[s]), mixed.own_position(s, count) / mixed.stream_rows(s))
        for s, (name, count) in enumerate(zip(data.names, begun, strict=False))
    ]


def _versions(run: RunDir, identity: Line) -> dict[str, str]:
    from dist.source_versions import MIXTURE, first_reference, known_sources, removed_of

    lines = run.read_lines(MIXTURE)
    gone = removed_of(lines[-1]["stages"]) if lines else {}
    found = {}
    for number, one in enumerate(known_sources(run, identity)):
        found[one["name"]] = first_reference(one)
        if "first" in one:
            found[one["name"]] += f", then {one['data']} without {len(gone[number]):,} of its rows"
    return found


def verdict(facts: Facts) -> str:
    """One sentence on how the run stands."""
    total = f" of {facts.planned_steps:,}" if facts.planned_steps else ""
    done = f"{facts.next_step:,}{total} steps"
    error = str(facts.outcome.get("error") or "").strip().partition("\n")[0]
    start = {
        "completed": f"Completed {done}",
        "stopped": f"Stopped on request after {done}; the same command goes on",
        "running": f"Training: {done}",
        "killed": f"Ended without a word after {done}, as a kill does; the same command goes on",
        "failed": f"Failed after {done}: {error or 'no reason was recorded'}",
        "data_refused": f"Refused its data after {done}: {error}",
    }.get(facts.status, f"{facts.status.replace('_', ' ').capitalize()} after {done}")
    parts = [start]
    loss = facts.last("validation_loss")
    if loss is not None:
        parts.append(f"validation loss {loss:.3f} nats/token{_against(facts, loss)}")
    elif (train := facts.last("loss")) is not None:
        parts.append(f"train loss {train:.3f} nats/token")
    odd = [x for x in facts.metrics if not math.isfinite(x.get("loss", 0.0) or 0.0)]
    if odd:
        parts.append(f"the loss is not finite at step {odd[0]['step']:,}")
    share = facts.data_wait_share
    if share is not None:
        bound = "data-bound" if share > DATA_BOUND_SHARE else "not data-bound"
        parts.append(f"{bound} ({percent(share)} of the step time waits for data)")
    lost = sum(attempt.lost_steps for attempt in facts.attempts)
    if lost:
        parts.append(f"{lost:,} steps were lost and done again")
    return "; ".join(parts) + "."


def percent(share: float) -> str:
    """A share for people: 0.1 %, 4.2 %, 97 %."""
    return f"{100 * share:.1f} %" if 100 * share < 9.95 else f"{100 * share:.0f} %"


def _against(facts: Facts, loss: float) -> str:
    unigram = facts.baselines.get("unigram")
    if unigram is None:
        return ""
    side = "below" if loss < unigram else "above"
    return f", {abs(unigram - loss):.3f} {side} the unigram baseline"


def _open_data(run: RunDir) -> tuple[Dataset | None, str, Line]:
    from dist.audit import open_run_data

    try:
        data = open_run_data(run)
        data.manifest.shards_of("train")
        return data, "", data.read_provenance() or {}
    except (LeydenError, OSError) as error:
        return None, str(error), {}


def _baselines(run: RunDir) -> dict[str, float]:
    record = read_json(run.path / "baselines.json")
    return {name: float(record[name]) for name in ("unigram", "bigram") if name in record}


def _rewound_from(segments: list[Segment], attempt: int) -> float:
    """The first step of an attempt that a later one did again; infinity if none."""
    later = [s.step0 for s in segments if s.attempt > attempt]
    return min(later, default=math.inf)


def _metrics(run: RunDir, segments: list[Segment]) -> list[Line]:
    """Lines of metrics.jsonl with what they cover: `steps`, `seconds`, `rewound`, `attempt`."""
    reached = {segment.attempt: segment.step0 for segment in reversed(segments)}
    lines = []
    for line in run.read_lines("metrics.jsonl"):
        if not isinstance(line.get("step"), int):
            continue
        attempt = line.get("attempt", 0)
        steps = 0
        if "step_s" in line:
            steps = max(line["step"] - reached.get(attempt, 0), 0)
            reached[attempt] = line["step"]
        # Metrics are of steps completed: step n was done before step number n begins.
        rewound = line["step"] > _rewound_from(segments, attempt)
        seconds = steps * float(line.get("step_s", 0.0))
        facts = {"attempt": attempt, "steps": steps, "seconds": seconds, "rewound": rewound}
        lines.append({**line, **facts})
    return lines


def _attempts(run: RunDir, segments: list[Segment], metrics: list[Line]) -> list[Attempt]:
    folder = run.path / "attempts"
    found = [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder.is_dir() else []
    consumed: dict[int, list[Line]] = {}
    for line in run.read_lines("consumed.jsonl"):
        consumed.setdefault(line["attempt"], []).append(line)
    saves = run.read_lines("ledger.jsonl")
    return [
        _attempt(
            run, number, segments, [x for x in metrics if x["attempt"] == number],
            consumed.get(number, []), [x for x in saves if x.get("attempt") == number],
            newest=number == max(found),
        )
        for number in sorted(found)
    ]  # fmt: skip


def _attempt(
    run: RunDir, number: int, segments: list[Segment], metrics: list[Line],
    consumed: list[Line], ledger: list[Line], *, newest: bool,
) -> Attempt:  # fmt: skip
    folder = run.attempt_dir(number)
    env, outcome = read_json(folder / "env.json"), read_json(folder / "outcome.json")
    segment = next((one for one in segments if one.attempt == number), None)
    first = segment.step0 if segment else 0
    end = max((line["step"] + 1 for line in consumed), default=first)
    useful = max(0, int(min(end, _rewound_from(segments, number))) - first)
    useful_s, lost_s = _step_seconds([x for x in metrics if x["steps"]], first, end, first + useful)
    times = [line["time"] for line in consumed if isinstance(line.get("time"), (int, float))]
    # Without an outcome (a kill) the last step's time is the end, if it was logged.
    started, ended = env.get("time"), outcome.get("time") or (times[-1] if times else None)
    startup_s = None
    if times and started:
        # The first line is written when the first step has been done.
        first_s = (useful_s + lost_s) / max(end - first, 1)
        startup_s = max(0.0, times[0] - started - first_s)
    return Attempt(
        number=number, status=_status(run, outcome, newest), env=env, outcome=outcome,
        segment=segment, end_step=end, useful_steps=useful, lost_steps=end - first - useful,
        useful_s=useful_s, lost_s=lost_s, startup_s=startup_s,
        saves_s=sum(float(x.get("stall_s", 0.0)) for x in ledger),
        validation_s=sum(float(x.get("validation_s", 0.0)) for x in metrics),
        wall_s=max(0.0, ended - started) if ended and started else None,
        config=read_config(run, number),
    )  # fmt: skip


def _step_seconds(lines: list[Line], first: int, end: int, border: int) -> tuple[float, float]:
    """Seconds in steps [first, border) and [border, end), by the logged means of step time.

    Steps after the last log (a kill came first) count as its mean.
    """
    useful = lost = 0.0
    windows = [*((line["step"] - line["steps"], line["step"], line["step_s"]) for line in lines)]
    if lines and end > lines[-1]["step"]:
        windows.append((lines[-1]["step"], end, lines[-1]["step_s"]))
    for start, stop, step_s in windows:
        useful += step_s * max(0, min(stop, border) - start)
        lost += step_s * max(0, stop - max(start, border))
    return useful, lost


def _status(run: RunDir, outcome: Line, newest: bool) -> str:
    if outcome:
        return str(outcome.get("status", "unknown"))
    lease = read_json(run.path / "lease.json")
    return "running" if newest and lease and not holder_gone(lease, time.time()) else "killed"


def flat(config: Line, prefix: str = "") -> Line:
    """A nested config with dotted names."""
    found: Line = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def config_changes(attempts: list[Attempt]) -> list[str]:
    """What each attempt was started with that the one before was not."""
    changes = []
    for before, after in pairwise(attempts):
        old, new = flat(before.config), flat(after.config)
        if old and new:
            changes += [
                f"attempt {after.number}: {key} {old.get(key)!r} -> {new.get(key)!r}"
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            ]
    return changes
