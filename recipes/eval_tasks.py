"""Tasks of lm-evaluation-harness on a trained model: `leyden eval RUN --tasks hellaswag,arc_easy`.

The harness is the field's own (github.com/EleutherAI/lm-evaluation-harness), an extra of this
package; it prompts, scores and averages. Here it is given the model and its tokenizer.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist.errors import ConfigError, SetupError
from recipes.chat import hf_tokenizer, require_template
from recipes.trained import Trained, load_model


def check_tasks(tasks: str) -> list[str]:
    """Names of `a,b`; SetupError where the harness is not installed."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("tasks is empty; name tasks of lm-evaluation-harness, as arc_easy,piqa")
    if importlib.util.find_spec("lm_eval") is None:
        raise SetupError(
            "--tasks needs lm-evaluation-harness: pip install 'leyden[eval]' (the package lm-eval)"
        )
    return names


def run_tasks(
    trained: Trained,
    device: torch.device,
    names: Sequence[str],
    *,
    folder: str = "",
    limit: int = 0,
    num_fewshot: int = -1,
    batch_size: int = 8,
    dtype: str = "auto",
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """Metrics by task. folder: of task YAMLs of your own; limit: examples a task, 0 for all;
    num_fewshot: -1 as the task says; chat: prompts through the tokenizer's chat template.

    Raises ConfigError for an unknown task, SetupError where a task's data cannot be loaded.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if folder and not Path(folder).is_dir():
        raise ConfigError(f"tasks_folder: {folder} is not a folder of task YAML files")
    manager = TaskManager(include_path=folder or None)
    known = manager.all_tasks
    unknown = sorted({*names} - {*known})
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"tasks: the harness knows no {unknown[0]!r}{hint} (`lm-eval ls tasks` lists them)"
        )
    if chat:
        require_template(trained)
    model = HFLM(
        pretrained=load_model(trained, device, packed=False, dtype=dtype),
        tokenizer=hf_tokenizer(trained),
        batch_size=batch_size,
        max_length=trained.seq_len or None,
    )
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            limit=limit or None,
            num_fewshot=None if num_fewshot < 0 else num_fewshot,
            apply_chat_template=chat,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (ConnectionError, FileNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise SetupError(f"the data of {', '.join(names)} cannot be loaded: {first}") from None
    assert found is not None
    return {
        task: {
            key.removesuffix(",none"): value
            for key, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for task, metrics in found["results"].items()
    }


def tasks_table(result: dict[str, Any]) -> str:
    """What is printed for people."""
    lines = [["task", "metric", "value", "stderr"]]
    for task, metrics in result["tasks"].items():
        for key, value in metrics.items():
            if "_stderr" in key or key in ("sample_len", "sample_count"):
                continue
            error = metrics.get(f"{key}_stderr")
            lines.append([task, key, f"{value:.4f}", "-" if error is None else f"{error:.4f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = [
        "  ".join((line[0].ljust(widths[0]), line[1].ljust(widths[1]),
                   line[2].rjust(widths[2]), line[3].rjust(widths[3])))
        for line in lines
    ]  # fmt: skip
    at = f" at step {result['step']}" if result["step"] >= 0 else ""
    text.append(f"{result['model']}{at}, lm-evaluation-harness {result['harness']}")
    return "\n".join(text)
