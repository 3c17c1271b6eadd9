"""One launch for a whole sequence, for devices whose thread blocks form clusters."""

from typing import Any

from xprnn.arrays import Params
from xprnn.cells import Cell

__all__ = ["NAME", "find", "forward"]

NAME = "CUDA persistent"


def find(cell: Cell, params: Params, shape: tuple[int, int], steps: Any, capability: tuple[int, int]) -> Any:
    """What `forward` needs to run this case, or one sentence that says why it can't.

    Args:
        cell: the cell.
        params: as in the scan; their dtype and the weight's shape (G*H, P) decide.
        shape: (T, N).
        steps: which rows take part when: `steps.lengths` is given where only they (and `steps.start`) decide that.
        capability: the device's, (9, 0) for a Hopper.
    """
    return f"no kernel for {cell.name}"


def forward(config: Any, *args: Any, **options: Any) -> Any:
    """See xprnn.scan.forward, which is the specification."""
    raise NotImplementedError(config)
