"""lm-evaluation-harness on a run and on its export, with a task that lies in a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.errors import ConfigError, SetupError
from dist.model_folder import find_model
from recipes.chat import hf_tokenizer
from recipes.eval_tasks import check_tasks, tasks_table
from recipes.evaluate import Config, run_harness
from recipes.export import Config as ExportConfig
from recipes.export import run as export
from recipes.trained import load_model, open_trained
from tests.small_run import small_run

DOCUMENTS = [
    {"question": f"def spark{i}(jar):", "choices": [" return", " jar", "x"], "answer": i % 3}
    for i in range(6)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.json"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (folder / "jar.yaml").write_text(
        "task: jar_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {data}\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n'
    )
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    return folder


def expected_accuracy(place: Path) -> float:
    """The choice of the highest likelihood, by hand."""
    trained = open_trained(find_model(str(place)))
    model = load_model(trained, torch.device("cpu"), packed=False)
    tokenizer = hf_tokenizer(trained)
    right = 0
    for document in DOCUMENTS:
        prompt = tokenizer.encode(document["question"], add_special_tokens=False)
        scores = []
        for choice in document["choices"]:  # type: ignore[attr-defined]
            whole = tokenizer.encode(document["question"] + choice, add_special_tokens=False)
            ids = torch.tensor([whole])
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = logs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            scores.append(float(picked.sum()))
        right += int(scores.index(max(scores)) == document["answer"])
    return right / len(DOCUMENTS)


def test_a_run_and_its_export_score_as_by_hand(tasks: Path, tmp_path: Path) -> None:
    """The harness given packed attention, another tokenizer, or a model of random weights."""
    run = small_run("ddp")
    common: dict[str, Any] = {"tasks": "jar_choice", "tasks_folder": str(tasks), "device": "cpu"}
    of_run = run_harness(Config(model=str(run), **common))
    folder = export(ExportConfig(model=str(run), output=str(tmp_path / "out")))
    of_folder = run_harness(Config(model=str(folder), **common))
    assert of_run["tasks"]["jar_choice"]["acc"] == pytest.approx(expected_accuracy(run))
    assert of_folder["tasks"] == of_run["tasks"]
    assert json.loads((run / "eval_tasks.json").read_text())["tasks"] == of_run["tasks"]
    assert "jar_choice  acc" in tasks_table(of_run)


def test_bad_tasks_are_refused(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown task is a table of the harness's own; a missing package a traceback."""
    run = str(small_run("ddp"))
    with pytest.raises(ConfigError, match="jar_choice"):
        run_harness(Config(model=run, tasks="jar_choise", tasks_folder=str(tasks)))
    with pytest.raises(ConfigError, match="chat template"):
        run_harness(Config(model=run, tasks="jar_choice", tasks_folder=str(tasks), chat=True))
    with pytest.raises(ConfigError, match="empty"):
        check_tasks(" , ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="lm-eval"):
        check_tasks("arc_easy")
