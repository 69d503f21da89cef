"""Reads of tensors by the host, counted by step: each would make a GPU's queue run empty.

On a CPU nothing waits, so nothing is slow; what is counted is the same calls. Python's (item,
tolist, bool, float, numpy, cpu) are seen by a function mode, those inside torch's own code
(_local_scalar_dense, nonzero) by a dispatch mode. Both see the thread that trains alone.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist.batch import Batch

READS = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"),
    *("__contains__", "nonzero", "masked_select", "argwhere", "unique", "equal", "allclose"),
}
# aten::equal and masked indexing read a size or a verdict; is_nonzero and item are the first.
ATEN_READS = {
    *("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"),
    *("aten::equal", "aten::item", "aten::_unique2", "aten::repeat_interleave.Tensor"),
}
ROOT = str(Path(__file__).resolve().parent.parent)


class HostReads(Callback):
    """Counts while training goes on; `found` holds (step, name, place in our code)."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str, str]] = []
        self.steps: list[int] = []
        self._step = -1
        self._modes: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._modes = [_Functions(self._saw), _Operators(self._saw)]
        for mode in self._modes:
            mode.__enter__()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._step = batch.step
        if batch.micro == 0:
            self.steps.append(batch.step)

    def close(self) -> None:
        """Count no more; the modes must not outlive the run."""
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)
        self._modes = []

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.close()

    def _saw(self, name: str) -> None:
        ours = [
            f"{Path(frame.filename).relative_to(ROOT)}:{frame.name}"
            for frame in traceback.extract_stack()
            if frame.filename.startswith(ROOT) and ".venv" not in frame.filename
            and "host_reads" not in frame.filename
        ]  # fmt: skip
        self.found.append((self._step, name, ours[-1] if ours else "?"))


class _Functions(TorchFunctionMode):
    def __init__(self, saw: Any) -> None:
        super().__init__()
        self._saw = saw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self._saw(name)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, saw: Any) -> None:
        super().__init__()
        self._saw = saw

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ATEN_READS or str(func) in ATEN_READS:
            self._saw(func._schema.name)
        return func(*args, **(kwargs or {}))
