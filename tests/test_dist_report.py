"""dist/report.py: what the page says is what the run's files hold, and a browser shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist.lease import Lease
from dist.local_files import LocalStore
from dist.report import html_of, write_report
from dist.report_facts import config_changes, read_facts, verdict
from dist.run_dir import RunDir
from dist.svg_chart import (
    Chart,
    Series,
    downsample,
    draw,
    log_ticks,
    nice_ticks,
    number,
    tick_labels,
)
from tests.make_dataset import write_dataset

HOSTILE = "a<script>alert('1')</script>&\"b"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
finite = st.floats(-1e9, 1e9, allow_nan=False)


@given(finite, st.floats(1e-9, 1e9), st.integers(2, 10), st.booleans())
def test_ticks_are_round_inside_and_told_apart(
    low: float, span: float, count: int, whole: bool
) -> None:
    """A tick outside of the axis, or two ticks with one label."""
    high = low + span
    if not high > low or span < abs(low) * 1e-6:
        return
    ticks = nice_ticks(low, high, count, whole=whole)
    room = 1e-6 * max(span, abs(low), abs(high), whole)
    assert all(low - room <= tick <= high + room for tick in ticks)
    assert len(ticks) <= 2 * count + 2
    gaps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert all(math.isclose(gap, gaps[0], rel_tol=1e-3) for gap in gaps)
    assert not whole or all(tick == round(tick) for tick in ticks)
    if span > 1e-3 * max(abs(low), abs(high)):
        labels = tick_labels(ticks)
        assert len(set(labels)) == len(labels), labels


def test_ticks_and_labels_by_example() -> None:
    """`0.30000000000000004`, `3e+05`, or 2.5 shown as 2."""
    assert tick_labels(nice_ticks(0, 1)) == ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert tick_labels(nice_ticks(5.8, 8, 4)) == ["6", "7", "8"]
    assert tick_labels(nice_ticks(0, 10, 4)) == ["0", "2.5", "5.0", "7.5", "10.0"]
    assert tick_labels(nice_ticks(0, 25_000)) == ["0", "5k", "10k", "15k", "20k", "25k"]
    assert tick_labels(nice_ticks(0, 4e-3, 4)) == ["0", "1e-3", "2e-3", "3e-3", "4e-3"]
    assert log_ticks(0.5, 2000) == [1.0, 10.0, 100.0, 1000.0]
    assert tick_labels(log_ticks(0.5, 20_000)) == ["1", "10", "100", "1,000", "10k"]
    assert nice_ticks(3, 3) == [3]
    assert [number(x) for x in (0, 12.3456, 2628.4, 4e6)] == ["0", "12.35", "2,628", "4M"]


@given(st.lists(finite | st.just(math.nan), min_size=1, max_size=300), st.integers(1, 20))
def test_downsampling_keeps_the_extremes(values: list[float], buckets: int) -> None:
    """A spike of one step that a mean, or every n-th point, hides; a point that never was."""
    points = [(float(i), y) for i, y in enumerate(values)]
    kept = downsample(points, buckets)
    assert len(kept) <= 2 * buckets + 2
    places = [int(x) for x, _ in kept]
    assert places == sorted(set(places)) and all(kept[i] is points[p] for i, p in enumerate(places))
    assert kept[0] is points[0] and kept[-1] is points[-1]
    real = [y for y in values if math.isfinite(y)]
    if real:
        shown = [y for _, y in kept if math.isfinite(y)]
        assert (min(shown), max(shown)) == (min(real), max(real))


def chart_of(*series: Series, **more: Any) -> Chart:
    return Chart(title="t", unit="u", series=list(series), **{"bands": [], "levels": [], **more})


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 2.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(0.0, -5.0), (1.0, math.nan), (2.0, math.inf), (3.0, 4.0)],
        [(float(i), 1e9 if i == 5 else 1e-6) for i in range(3000)],
    ],
)
def test_a_chart_is_well_formed_and_in_its_box(points: list[tuple[float, float]]) -> None:
    """One point, equal values, gaps, a huge spike: a division by 0, `nan` in a path, a line that
    leaves the picture."""
    dots = Series(name=HOSTILE, points=points[:2], style="dots", color=7)
    chart = chart_of(
        Series(name=HOSTILE, points=points),
        dots,
        bands=[(0.0, 1.0, HOSTILE)],
        levels=[(1, HOSTILE)],
    )
    text = draw(chart, width=400, height=200)
    for element in ET.fromstring(text).iter():
        drawn = " ".join(v for k, v in element.attrib.items() if k in ("d", "x", "y", "width"))
        assert "nan" not in drawn and "inf" not in drawn
    assert "<script" not in text
    for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", text):
        assert 0 <= float(x) <= 400 and 0 <= float(y) <= 200
    assert len(text) < 60_000
    assert "No values" in draw(chart_of(Series(name="x", points=[(1.0, math.nan)])))


def test_one_spike_does_not_flatten_the_rest() -> None:
    """A gradient norm of 1e4 once makes a linear axis useless: the axis becomes logarithmic."""
    values = [(float(i), 1e4 if i == 50 else 1.0 + i / 100) for i in range(100)]
    text = draw(chart_of(Series(name="x", points=values)))
    for label in (">1<", ">10<", ">100<", ">1,000<"):
        assert label in text


def make_run(folder: Path, url: str, digest: str) -> RunDir:
    """Attempt 0 did steps 0 to 29 and was killed; attempt 1 went on at 20 and did 40 in all.

    A step takes 2 s; processes start 10 s before their first step; a save stops them for 1 s.
    """
    run = RunDir.open(folder)
    config = {"max_steps": 40, "seed": 0, "global_batch": 4, "micro_batch": 2}
    identity = {"data": f"{url}@{digest}", "data_digest": digest, "config": config}
    run.write_run({**identity, "recipe": "pretrain"}, json.dumps(config))
    for attempt, first, last, micro in ((0, 0, 30, 2), (1, 20, 40, 4)):
        run.new_attempt(json.dumps({**config, "micro_batch": micro}))
        start = 1000.0 + 100 * attempt
        env = {"time": start, "host": HOSTILE, "argv": ["x.py", HOSTILE], "environment": {}}
        (run.attempt_dir(attempt) / "env.json").write_text(json.dumps(env))
        facts = {"batch": 4, "world_size": 2, "accumulation": 1, "seed": 0, "data_digest": digest}
        line = {"step0": first, "t0": 4 * first, "micro_batch": micro, "attempt": attempt}
        run.append("order.jsonl", {**facts, **line})
        for step in range(first, last):
            now = start + 12 + 2 * (step - first)
            span = {"t0": 4 * step, "t1": 4 * step + 4, "batch": 4, "targets": 60}
            run.append("consumed.jsonl", {"step": step, **span, "attempt": attempt, "time": now})
            if step % 4 == 3:
                values = {"loss": 8 - step / 10, "lr": 1e-3, "grad_norm": 1.0, "step_s": 2.0}
                more = {"tokens_per_s": 32.0, "data_wait_s": 0.2, "peak_memory_mib": 2048.0}
                run.append(
                    "metrics.jsonl", {"step": step + 1, **values, **more, "attempt": attempt}
                )
    run.append("ledger.jsonl", {"event": "save", "stall_s": 1.0, "attempt": 1})
    run.append("metrics.jsonl", {"step": 40, "validation_loss": 4.5, "attempt": 1})
    (run.path / "baselines.json").write_text('{"unigram": 5.25, "bigram": 4.0, "targets": 9}')
    run.write_outcome(1, "completed", step=40, params=1_500_000)
    outcome = run.attempt_dir(1) / "outcome.json"
    outcome.write_text(json.dumps({**json.loads(outcome.read_text()), "time": 1160.0}))
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    dataset = write_dataset(tmp_path / "data", documents=12, with_tokenizer=False)
    return make_run(tmp_path / "run", dataset.storage.url, dataset.data_digest)


def test_goodput_is_useful_over_all(run: RunDir) -> None:
    """Lost steps, or the time before the first step, counted as work."""
    facts = read_facts(run)
    first, second = facts.attempts
    assert (first.status, second.status) == ("killed", "completed")
    assert (first.useful_steps, first.lost_steps, first.rewound) == (20, 10, (20, 30))
    assert (second.useful_steps, second.lost_steps, second.first_step) == (20, 0, 20)
    assert (first.useful_s, first.lost_s) == pytest.approx((40, 20))
    assert (first.startup_s, second.startup_s) == pytest.approx((10, 10))
    # The killed one ended with its last step, at 1000 + 12 + 58; the other by its outcome.
    assert (first.wall_s, second.wall_s) == pytest.approx((70, 60))
    assert (second.saves_s, second.rest_s) == pytest.approx((1, 9))
    assert facts.goodput == pytest.approx((40 + 40) / (70 + 60))
    assert facts.data_wait_share == pytest.approx(0.1)
    assert facts.tokens_per_s == pytest.approx(32)
    assert (facts.next_step, facts.planned_steps, facts.samples) == (40, 40, 160)
    assert config_changes(facts.attempts) == ["attempt 1: micro_batch 2 -> 4"]
    assert verdict(facts) == (
        "Completed 40 of 40 steps; validation loss 4.500 nats/token, 0.750 below the unigram "
        "baseline; data-bound (10 % of the step time waits for data); 10 steps were lost and done "
        "again."
    )


def test_status_without_an_outcome(run: RunDir) -> None:
    """A run that trains called dead, or a dead one called alive."""
    for path in run.path.rglob("outcome.json"):
        path.unlink()
    assert read_facts(run).status == "killed"
    with Lease(LocalStore(run.path), "lease.json", what="run", attempt=1):
        facts = read_facts(run)
        assert facts.status == "running" and verdict(facts).startswith("Training: 40 of 40 steps")


def test_a_run_of_torn_files_is_still_reported(run: RunDir) -> None:
    """A report that fails exactly when something went wrong."""
    shutil.rmtree(run.path.parent / "data")
    (run.attempt_dir(0) / "env.json").write_text("{")
    (run.path / "outcome.json").unlink()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": NaN, "attempt": 1}\n{"step": 4')
    page = html_of(read_facts(run))
    assert "the loss is not finite at step 41" in page and "1 values are not finite" in page
    assert "not opened" in page
    (run.path / "consumed.jsonl").unlink()
    (run.path / "order.jsonl").unlink()
    (run.path / "metrics.jsonl").unlink()
    assert "metrics.jsonl holds nothing yet" in html_of(read_facts(run))


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_asks_nobody_and_runs_nothing(run: RunDir) -> None:
    """A host, an argument or a run whose name is HTML; a font or a script from elsewhere."""
    hostile = run.path.with_name(HOSTILE.replace("/", "|"))
    shutil.copytree(run.path, hostile)
    path, _ = write_report(RunDir(hostile))
    text = path.read_text()
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "a"} & {*page.tags}
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "onload", "onclick"}
    assert not re.search(r"url\(|@import|https?://", text)
    said = " ".join(page.words)
    assert hostile.name in said and said.count(HOSTILE) >= 2
    assert page.tags.count("svg") > 6
    for words in ("Gradient norm", "Peak memory mib", "Learning rate", "attempt 1", "unigram 5.25"):
        assert words in said, words
    assert "dashed" in text and 'class="band"' in text


def browse(page: Path, folder: Path, width: int, dark: bool) -> tuple[bytes, list[str]]:
    """Screenshot of a page and what the console said."""
    folder.mkdir()
    picture = folder / "page.png"
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},1600", f"--blink-settings=preferredColorScheme={1 - dark}",
            "--enable-logging=stderr", f"--screenshot={picture}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert picture.is_file(), done.stderr
    return picture.read_bytes(), [x for x in done.stderr.splitlines() if "CONSOLE" in x]


def varied_lines(png: bytes) -> float:
    """Share of a picture's lines that show something: filtered lines of one colour are zeros."""
    width, height, depth, kind = (int.from_bytes(png[a:b], "big") for a, b in
                                  ((16, 20), (20, 24), (24, 25), (25, 26)))  # fmt: skip
    assert depth == 8
    data, at = b"", 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += size + 12
    raw, stride = zlib.decompress(data), 1 + width * {2: 3, 6: 4}[kind]
    lines = [raw[i * stride + 1 : (i + 1) * stride] for i in range(height)]
    return sum(len({*line}) > 8 for line in lines) / height


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)")
def test_a_browser_shows_it_without_a_complaint(run: RunDir, tmp_path: Path) -> None:
    """A blank page, or one whose style its own policy forbids. That the check can fail is seen on
    a page that breaks the policy, and on an empty one."""
    path, _ = write_report(run)
    for number_, (width, dark) in enumerate(((1200, False), (400, True))):
        png, console = browse(path, tmp_path / str(number_), width, dark)
        assert console == []
        assert varied_lines(png) > 0.3
    broken = tmp_path / "broken.html"
    head = path.read_text().partition("<style>")[0]
    broken.write_text(head + "</head><body><script>alert(1)</script></body></html>")
    png, console = browse(broken, tmp_path / "broken", 400, False)
    assert console and varied_lines(png) < 0.05
