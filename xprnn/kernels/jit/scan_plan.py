"""Plans of the common case of a compiled scan: everything that depends only on shapes is computed once.

Applying a cell of fifty units to a hundred steps takes twenty microseconds. Allocating twenty arrays and reading their
addresses takes as long. A plan therefore allocates a few arenas instead, and a compiled function fills the kernel's
arguments (arguments.make_binder). Plans are for passes without mask and resets, with float x and C-contiguous arrays;
the backward plan is for one thread. Other passes are prepared by scan.py. The kernels are the same, and so are the
results, bit for bit.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array, Params
from xprnn.cells.cell import Cell
from xprnn.kernels.jit import compile_cache
from xprnn.kernels.jit.arguments import (
    Arena,
    PointerBinder,
    SavedForBackward,
    backward_workspace,
    forward_workspace,
    make_binder,
)
from xprnn.kernels.jit.forward_driver import KernelSources
from xprnn.kernels.jit.threads import RowRange, parallel_map, split_rows, thread_count
from xprnn.kernels.memory import contiguous
from xprnn.kernels.row_order import RowOrder
from xprnn.kernels.tape import State, StepMask, Tape

__all__ = ["ForwardPlan", "ForwardResult", "forward_plan", "planned_backward", "planned_forward"]

_PARAM_ARGUMENTS = {"weight_ih": "WI", "weight_hh": "WH", "bias_ih": "BI", "bias_hh": "BH"}
ScanShape = tuple[int, int, int, int, int]  # T, N, D, H, W


class ForwardResult(NamedTuple):
    """Memory of one forward pass of a plan."""

    plan: "ForwardPlan"
    x: Array
    param_arrays: tuple[Array, ...]  # in the order of plan.param_names
    # The output arena (y and the initial h), which outlives the tape if the caller keeps y; and the arena of the rest.
    memory: tuple[Array, Array]
    alignment_offsets: int  # elements that each arena skips: byte 0 the output arena, byte 1 the other

    @property
    def y(self) -> Array:
        """The output, (T, N, H)."""
        return self.plan.states(self, 0, 0 if self.plan.reverse else 1)

    def saved_for_backward(self) -> SavedForBackward:
        """Return the arrays of the tape as views."""
        plan = self.plan
        (T, N, _, H, W), (_, memory), base = plan.shape, self.memory, self.alignment_offsets >> 8 & 255
        ends = tuple(tuple(plan.states(self, k, i) for k in range(plan.num_states)) for i in (0, 1))
        before, after = ends[::-1] if plan.reverse else ends
        has_gates = plan.record_tape and "G" in plan.saved_arena.offsets
        gates = plan.saved_arena.view(memory, base, "G", (T, N, W)) if has_gates else None
        names = [name for name in plan.saved_arena.offsets if plan.record_tape and name[0] == "V"]
        extra_values = {name: plan.saved_arena.view(memory, base, name, (T, N, H)) for name in names}
        rows = RowOrder.from_step_mask((T, N), StepMask())
        return SavedForBackward(plan.sources, rows, self.x, gates, extra_values, before, after, self)


def _scalar_arguments(shape: ScanShape, item: int, reverse: bool) -> dict[str, int]:
    T, N, D, H, W = shape
    arguments = {"reverse": int(reverse), "gemm_address": compile_cache.gemm_kernel(item).address}
    return arguments | {"T": T, "N": N, "R": N, "D": D, "H": H, "W": W}


def _tape_layout(
    sources: KernelSources, num_states: int, shape: ScanShape, item: int, reverse: bool, record_tape: bool
) -> tuple[Arena, Arena, list[dict[str, int]]]:
    """Lay out the arrays of a tape.

    The states after and before each step share an array with an additional step. If no tape is recorded, the arrays
    that only backward reads have one step.

    Returns:
        The output arena, the arena of the other arrays, and the byte offsets of the kernel's arguments in each.
    """
    T, N, _, H, W = shape
    size, saved_steps = N * H, T if record_tape else 1
    output = Arena(item, {"M0": (T + 1) * size})
    sizes = {f"M{k}": (saved_steps + 1) * size for k in range(1, num_states)}
    sizes |= {name: saved_steps * size for name in sources.saved_buffers if name[0] == "V"}
    has_gates = record_tape and any(name[0] == "X" for name in sources.saved_buffers)
    rest = Arena(item, sizes | ({"G": T * N * W} if has_gates else {}))
    after, before = (0, size * item) if reverse else (size * item, 0)
    offsets = []
    for arena in (output, rest):
        arrays = {f"M{k}": at for k in range(num_states) if (at := arena.byte_offsets.get(f"M{k}")) is not None}
        states = {f"{c}{name[1:]}": at + d for name, at in arrays.items() for c, d in (("M", after), ("S", before))}
        offsets.append(arena.byte_offsets | states)
    return output, rest, offsets


def _is_plain_array(a: Array, dtype: Any) -> bool:
    return a.__class__ is np.ndarray and a.dtype == dtype and (flags := a.flags).c_contiguous and flags.aligned


# --- forward


class ForwardPlan:
    """Forward pass of a cell for one shape.

    Args:
        sources: the kernels of the cell.
        cell: the cell.
        param_names: names of the parameters: weights, biases, the cell's vectors.
        shape: (T, N, D, H, W), all >= 1.
        dtype: float32 or float64.
        reverse: process the steps from T-1 to 0.
        record_tape: save what backward needs.
    """

    def __init__(
        self,
        sources: KernelSources,
        cell: Cell,
        param_names: tuple[str, ...],
        shape: ScanShape,
        dtype: Any,
        reverse: bool,
        record_tape: bool,
    ) -> None:
        self.sources, self.cell, self.param_names, self.shape, self.dtype = sources, cell, param_names, shape, dtype
        self.reverse, self.record_tape, self.num_states = reverse, record_tape, len(cell.states)
        self.output_arena, self.saved_arena, self._tape_offsets = _tape_layout(
            sources, self.num_states, shape, dtype.itemsize, reverse, record_tape
        )
        self._num_weights = (shape[3] + shape[2]) * shape[4]
        self._kernel = compile_cache.compile_kernel(sources.forward)
        self._all_rows = (RowRange(0, shape[1]),)
        self._binders = dict[RowRange, tuple[PointerBinder, Arena]]()

    def _make_binder(self, row_range: RowRange) -> tuple[PointerBinder, Arena]:
        """Make the binder for a range of rows, and the layout of its workspace."""
        (T, N, D, H, W), item, record_tape = self.shape, self.dtype.itemsize, self.record_tape
        scalars, sizes = forward_workspace(self.sources, (T, row_range.size, D, H, W), item)
        missing_biases = {name: W for key, name in _PARAM_ARGUMENTS.items() if key not in self.param_names}
        sizes = missing_biases | sizes | ({} if record_tape else {"G": W})
        workspace = Arena(item, sizes, "Q" if missing_biases else "")
        step, row = N * H, row_range.start * item
        tape_offsets = [
            {name: at + row * (W if name == "G" else H) for name, at in offsets.items()}
            for offsets in self._tape_offsets
        ]
        scalars |= _scalar_arguments(self.shape, item, self.reverse) | {"R": row_range.size}
        scalars |= {"record_tape": int(record_tape), "saved_stride": step * record_tape}
        scalars |= {f"M{k}_stride": step if record_tape or k == 0 else 0 for k in range(self.num_states)}
        weights = [_PARAM_ARGUMENTS[name] for name in self.param_names if name in _PARAM_ARGUMENTS]
        vectors = [f"p{k}" for k in range(len(self.param_names) - len(weights))]
        array_offsets = [{f"C{k}": row * H} for k in range(self.num_states)] + [{"A": row * D}]
        array_offsets += [{name: 0} for name in (*weights, *vectors)]
        new_arenas = [(self.output_arena, tape_offsets[0]), (self.saved_arena, tape_offsets[1])]
        new_arenas += [(workspace, workspace.byte_offsets)]
        initial = [self._initial_state_offset(k) for k in range(self.num_states)]
        shapes = [(T, N, D), (W, D), (W, H), *[(W,)] * (len(weights) - 2), *[(H,)] * len(vectors)]
        names, bits = self.sources.forward_arguments, 8 * item
        return make_binder(names, scalars, new_arenas, array_offsets, 0, initial, shapes, bits, (N, H)), workspace

    def _initial_state_offset(self, k: int) -> int:
        """Return the element of its arena where the initial state k starts."""
        T, N, _, H, _ = self.shape
        start = self.saved_arena.offsets[f"M{k}"] if k else 0
        return start + ((T if self.record_tape or not k else 1) * N * H if self.reverse else 0)

    def states(self, result: ForwardResult, k: int, start: int) -> Array:
        """Return state k at T steps, from entry `start` (0 or 1) of its array of T + 1 steps."""
        T, N, _, H, _ = self.shape
        step, length = N * H, T if self.record_tape or not k else 1
        base = start * step + (
            self.saved_arena.offsets[f"M{k}"] + (result.alignment_offsets >> 8 & 255)
            if k
            else result.alignment_offsets & 255
        )
        return result.memory[k > 0][base : base + length * step].reshape(length, N, H)

    def __call__(
        self, x: Array, param_arrays: tuple[Array, ...], initial_states: Sequence[Array], final_states: Sequence[Array]
    ) -> ForwardResult | None:
        """Run the pass. The caller excludes subclasses of ndarray such as masked arrays.

        Args:
            x: (T, N, D).
            param_arrays: in the order of param_names.
            initial_states: (1, N, H) each.
            final_states: (1, N, H) each, overwritten with the states after the last step.

        Returns:
            The result, or None if an array has another shape than the plan.

        Raises:
            TypeError: an array has another dtype, or is not C-contiguous.
        """
        (T, N, *_), dtype = self.shape, self.dtype
        output, rest = np.empty(self.output_arena.size, dtype), np.empty(self.saved_arena.size, dtype)
        pairs = [a for pair in zip(final_states, initial_states, strict=True) for a in pair]
        row_ranges = (
            split_rows(RowOrder.from_step_mask((T, N), StepMask()), T, N, self._num_weights)
            if self.is_threaded()
            else self._all_rows
        )
        arguments, workspaces, alignment = [], [], 0
        for row_range in row_ranges:
            if row_range not in self._binders:
                self._binders[row_range] = self._make_binder(row_range)
            binder, arena = self._binders[row_range]
            table, workspace = np.empty(binder.num_arguments, np.int64), np.empty(arena.size, dtype)
            alignment = binder.bind(
                binder.pointer_sources,
                binder.expected_sizes,
                table,
                output,
                rest,
                workspace,
                *pairs,
                x,
                *param_arrays,
            )
            if alignment < 0:
                return None
            arguments.append(table)
            workspaces.append(workspace)
        parallel_map(self._kernel, arguments)
        return ForwardResult(self, x, param_arrays, (output, rest), alignment)

    def is_threaded(self) -> bool:
        """Return True if the pass runs on several threads."""
        return thread_count(*self.shape[:2], self._num_weights) > 0

    @cached_property
    def backward_plan(self) -> "BackwardPlan":
        """The plan of the adjoint."""
        return BackwardPlan(self)


@lru_cache(maxsize=1024)
def forward_plan(
    sources: KernelSources,
    cell: Cell,
    param_names: tuple[str, ...],
    shape: ScanShape,
    dtype: Any,
    reverse: bool,
    record_tape: bool,
) -> ForwardPlan:
    """Return the cached plan for these arguments of ForwardPlan."""
    return ForwardPlan(sources, cell, param_names, shape, dtype, reverse, record_tape)


def planned_forward(
    sources: KernelSources,
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    step_mask: StepMask,
    reverse: bool,
    record_tape: bool,
) -> tuple[SavedForBackward, State] | None:
    """Run a forward pass by a plan.

    Returns:
        The saved arrays and the states after the last step, or None if no plan fits.
    """
    u, initial = params["weight_hh"], [s[None] for s in state]
    dtype, (W, H) = u.dtype, u.shape
    if step_mask.active is not None or step_mask.reset is not None or "weight_hr" in params or not x.size:
        return None
    initial = [s if _is_plain_array(s, dtype) else np.array(s, dtype, order="C") for s in initial]
    if not all(_is_plain_array(a, dtype) for a in (x, *params.values())):
        return None
    names = tuple(name for name in (*_PARAM_ARGUMENTS, *cell.vectors) if name in params)
    plan = forward_plan(sources, cell, names, (*x.shape, H, W), dtype, reverse, record_tape)
    finals = np.empty((len(state), 1, x.shape[1], H), dtype)
    result = plan(x, tuple(params[name] for name in names), initial, list(finals))
    return None if result is None else (result.saved_for_backward(), tuple(f[0] for f in finals))


# --- backward


class BackwardPlan:
    """Adjoint of a `ForwardPlan` that records a tape, for one thread."""

    def __init__(self, forward_plan: ForwardPlan) -> None:
        self.forward_plan, sources, item = forward_plan, forward_plan.sources, forward_plan.dtype.itemsize
        (T, N, D, H, W), vectors = forward_plan.shape, forward_plan.cell.vectors
        self._kernel = compile_cache.compile_kernel(sources.backward)
        self._num_biases = len(forward_plan.param_names) - 2 - len(vectors)
        states, step = range(forward_plan.num_states), N * H
        _, _, tape_offsets = _tape_layout(
            sources, forward_plan.num_states, forward_plan.shape, item, forward_plan.reverse, True
        )
        scalars, sizes = backward_workspace(sources, forward_plan.shape, item)
        sums = {"SI": W, "SH": W} | dict.fromkeys((f"D{k}" for k in states), step)
        sums |= dict.fromkeys((f"P{k}" for k in range(len(vectors))), step)
        self.dx_arena = Arena(item, {"DX": T * N * D})
        self.gradient_arena = Arena(item, sums | {"GI": W * D, "GU": W * H}, "GI")
        zeroed = {"zero_row": H, "B": sizes.pop("B"), "O": sizes.pop("O")}
        self.workspace_arena = Arena(item, zeroed | sizes, "Q")
        scalars |= _scalar_arguments(forward_plan.shape, item, forward_plan.reverse)
        scalars |= {"I0_step_stride": step, "I0_row_stride": H}
        gradient_offsets = self.gradient_arena.byte_offsets
        zero_row = {f"I{k}": self.workspace_arena.byte_offsets["zero_row"] for k in states[1:]}
        new_arenas = [
            (self.dx_arena, self.dx_arena.byte_offsets),
            (self.gradient_arena, gradient_offsets | {"R0": gradient_offsets["D0"]}),
            (self.workspace_arena, self.workspace_arena.byte_offsets | zero_row),
        ]
        names = ("I0", "A", "WI", "WH", *(f"p{k}" for k in range(len(vectors))))
        shapes = [(T, N, H), (T, N, D), (W, D), (W, H), *[(H,)] * len(vectors)]
        array_offsets = [*tape_offsets, *({name: 0} for name in names)]
        self.binder = make_binder(
            sources.backward_arguments, scalars, new_arenas, array_offsets, 2, (), shapes, 8 * item
        )
        views: dict[str, tuple[str, tuple[int, ...]]] = {"weight_ih": ("GI", (W, D)), "weight_hh": ("GU", (W, H))}
        views |= {"bias_ih": ("SI", (W,)), "bias_hh": ("SI" if sources.dx_is_dh else "SH", (W,))}
        views |= {name: (f"P{k}", (N, H)) for k, name in enumerate(vectors)}
        self._gradient_views = [views[name] for name in forward_plan.param_names]

    def __call__(
        self, result: ForwardResult, dy: Array, dstate: Sequence[Array | None]
    ) -> tuple[Array, State, list[Array]] | None:
        """Run the adjoint.

        Args:
            result: of the forward plan.
            dy: (T, N, H), the cotangent of y.
            dstate: (1, N, H) each, cotangents of the final states; None for zero.

        Returns:
            The cotangents of x, of the initial states (1, N, H), and of the parameters in the order of param_names;
            None if an array has another shape than the plan.

        Raises:
            TypeError: an array has another dtype, or is not C-contiguous.
        """
        plan, binder, num_biases = self.forward_plan, self.binder, self._num_biases
        (T, N, D, H, _), dtype = plan.shape, plan.dtype
        dx, sums, workspace = (
            np.empty(self.dx_arena.size, dtype),
            np.empty(self.gradient_arena.size, dtype),
            np.empty(self.workspace_arena.size, dtype),
        )
        arguments, (w, u, *others) = np.empty(binder.num_arguments, np.int64), result.param_arrays
        arrays = (*result.memory, dy, result.x, w, u, *others[num_biases:])
        alignment = binder.bind(binder.pointer_sources, binder.expected_sizes, arguments, dx, sums, workspace, *arrays)
        if alignment < 0:
            return None
        base, view = alignment >> 8 & 255, self.gradient_arena.view
        ds = tuple([view(sums, base, f"D{k}", (1, N, H)) for k in range(plan.num_states)])
        for running, final in zip(ds, dstate, strict=True):
            if final is not None:
                running[...] = final
        self._kernel(arguments)
        grads = [view(sums, base, *shaped) for shaped in self._gradient_views]
        if num_biases == 2 and plan.sources.dx_is_dh:
            grads[3] = grads[2].copy()
        for k in range(2 + num_biases, len(grads)):
            grads[k] = np.add.reduce(grads[k], axis=0)
        return self.dx_arena.view(dx, alignment & 255, "DX", (T, N, D)), ds, grads


def planned_backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None]
) -> tuple[Array, State, Params] | None:
    """Run the adjoint of a pass by a plan.

    Returns:
        The cotangents of x, of the initial states, and of the parameters; None if no plan fits.
    """
    result: ForwardResult | None = tape.saved.result
    if (
        result is None
        or dy is None
        or result.plan.is_threaded()
        or not _is_plain_array(dy := contiguous(dy), result.plan.dtype)
    ):
        return None
    gradients = result.plan.backward_plan(result, dy, dstate)
    if gradients is None:
        return None
    dx, ds, arrays = gradients
    grads = dict(zip(result.plan.param_names, arrays, strict=True))
    return dx, tuple(s[0] for s in ds), {name: grads[name] for name in tape.params}
