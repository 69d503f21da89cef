"""Keep a rank of a test to one thread."""

from __future__ import annotations

import os
from typing import Any


def one_thread() -> None:
    """Call in a rank's own process: two threads that wait for each other on busy cores make a
    step of these small models ten times slower."""
    import recipes.pretrain

    os.environ["OMP_NUM_THREADS"] = "1"

    def leave_them(*_: Any) -> None:
        """Lightning and share_cores would set the number again."""

    recipes.pretrain.share_cores = leave_them
