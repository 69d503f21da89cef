"""What all ranks must know of a step before they begin it."""

from __future__ import annotations

import torch
import torch.distributed

from dist.errors import describe
from dist.mesh import PeerFailed


class Agreement:
    """What all ranks must know of a step, by one int64 all-reduce in a thread."""

    def __init__(self, group: torch.distributed.ProcessGroup | None) -> None:
        self._group = group

    def step(self, targets: int, stop: bool, failure: BaseException | None) -> tuple[int, bool]:
        """(valid targets on all ranks, whether any rank wants to stop).

        Raises PeerFailed on the ranks that did not fail themselves, if one did.
        """
        if self._group is None:
            return targets, stop
        code = 0
        if failure is not None:
            said = describe(failure)
            code = said[1] if said else 1
        sums = torch.tensor([targets, int(stop), int(failure is not None), code])
        torch.distributed.all_reduce(sums, group=self._group)
        targets, stops, failures, codes = sums.tolist()
        if failures and failure is None:
            raise PeerFailed(f"{failures} other ranks could not read their data", codes // failures)
        return targets, stops > 0
