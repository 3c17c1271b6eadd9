"""Calls of a recurrent layer on plain NumPy arrays: a cache of plans, filled by the checked path.

A plan runs the compiled kernel for one class, dtype and shape of x. The checked path (engine/stack.py) validates every
argument, makes the plan, and runs it. A later call with the same key runs the plan at once. It checks only what the key
does not say: that every array is a plain ndarray, and in the kernel its shape. If one does not fit, the plan returns
None, and the checked path raises the error.

A plan holds names and sizes of a layer, but no array of a caller. It sees parameters that were replaced or overwritten
since the last call, and threads may share a layer.
"""

from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple, cast

import numpy as np

from xprnn.arrays.namespace import Array, Namespace, Params, namespace
from xprnn.engine import stack, state_layout
from xprnn.engine.checkpointing import DirectionStack, DirectionStackTape
from xprnn.engine.layer import FastStep, RecurrentLayer, Steppable
from xprnn.engine.stack import StackTape
from xprnn.engine.step_calls import make_recurrent_step
from xprnn.kernels import config
from xprnn.kernels.jit.kernel import NAME, ScanKernel, scan_kernel
from xprnn.kernels.jit.scan import ForwardResult, check_status, run_backward, run_forward
from xprnn.kernels.jit.threads import max_threads, parallel_map, worth_threading
from xprnn.kernels.row_order import RowOrder
from xprnn.kernels.tape import Gradients, State, StepMask, Tape

__all__ = ["CachedCalls", "KernelTape", "LayerCalls"]

_MAX_PLANS = 256  # entries of one cache, which is cleared when it is full
_MIN_DIRECTION_WORK = 1 << 22  # multiply-adds of a direction from which the two directions run on two threads
Key = tuple[Any, ...]


class KernelTape(StackTape):
    """A StackTape of compiled scans. Its generic form is built at the first access; `backward` does not need it."""

    initial_state: tuple[Array, ...]
    results: list[ForwardResult]  # of each layer and direction
    step_mask: StepMask

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields, dropout_masks=[])  # the constructor of a frozen dataclass makes a call for each field

    @cached_property
    def xp(self) -> Namespace:
        """The namespace of NumPy."""
        return namespace(self.x)

    @cached_property
    def direction_stacks(self) -> list[tuple[DirectionStack, DirectionStackTape]]:
        """The stacks of layers and their tapes, built from the results of the kernels."""
        layer, mask = self.layer, self.step_mask
        by_layer = state_layout.params_by_layer(layer, self.params)
        initial = state_layout.unpack("tape", layer, self.xp, self.params, self.x.shape[1], self.packed_state)
        groups = [[i] for i in range(len(by_layer))] if layer.bidirectional else [list(range(len(by_layer)))]
        pairs = []
        for group in groups:
            reverse = layer.reverse or (layer.bidirectional and group[0] % 2 == 1)
            tapes = [self._scan_tape(i, by_layer[i], initial[i], reverse) for i in group]
            states = [initial[i] for i in group]
            stack = DirectionStack(
                self.xp, layer.resolved_cell, [by_layer[i] for i in group], reverse, layer.dropout, layer.sparse
            )
            segments = [(0, self.x.shape[0])]
            record = DirectionStackTape(self.x, states, mask, segments, [states], [], tapes, [None] * len(tapes))
            pairs.append((stack, record))
        return pairs

    def _scan_tape(self, i: int, params: Params, initial: State, reverse: bool) -> Tape:
        from xprnn.kernels.jit import scan

        result, cell = self.results[i], self.layer.resolved_cell
        return Tape(
            scan.backward, np, cell, params, result.x, initial, initial, self.step_mask, reverse, result.states,
            result, NAME, self.layer.sparse,
        )  # fmt: skip

    @property
    def packed_state(self) -> Any:
        """The initial state as the caller passed it, or None."""
        if self.uses_default_state:
            return None
        return self.initial_state if len(self.initial_state) > 1 else self.initial_state[0]


class _Plan(NamedTuple):
    """The sizes and compiled functions of the calls with one key."""

    kernel: ScanKernel
    integer: bool  # x holds class numbers
    state_shapes: tuple[tuple[int, ...], ...]  # (L*directions, N, .) of each of the cell's states
    output_shape: tuple[int, int, int]  # (T+1, N, P)
    tape_size: int
    entry: Any  # bind.plain_forward
    is_plain: bool  # one direction, no lengths, no projection, and too small for several threads


class LayerCalls:
    """The plans of one recurrent layer. `forward` and `backward` return None where no plan applies."""

    def __init__(self, layer: RecurrentLayer) -> None:
        self.layer, cell = layer, layer.resolved_cell
        self.has_plans = isinstance(layer.hidden_size, int)
        self.plans: dict[Key, _Plan] = {}
        shapes, by_scan = state_layout.parameter_names(layer)
        self.count, self.scan_names = len(shapes), state_layout.scan_parameter_order(layer)
        self.names = [tuple(names[short] for short in self.scan_names) for names in by_scan]
        self.getters = [itemgetter(*names) for names in self.names]
        self.num_states, self.num_directions = len(cell.states), layer.num_directions
        initial = [f"initial_{name}" for name in cell.states] if layer.learned_state and self.has_plans else []
        self.initial_shapes = {name: shapes[name] for name in initial}
        self.first_weights = [(names[0], shapes[names[0]]) for names in self.names[: self.num_directions]]

    def key(self, x: Array, lengths: Any) -> Key:
        """Return the key of a call."""
        return x.__class__, x.dtype, x.shape, lengths is None, config.jit_enabled(), config.is_reference_only()

    def add_plan(self, params: Params, x: Array, lengths: Any) -> bool:
        """Make the plan of a call that the checked path has validated; return False if no kernel applies."""
        if (
            not self.has_plans
            or x.__class__ is not np.ndarray
            or config.is_reference_only()
            or not config.jit_enabled()
        ):
            return False
        layer, dtype = self.layer, params[self.names[0][1]].dtype
        kernel = scan_kernel(layer.resolved_cell, dtype, layer.projection_size > 0)
        if isinstance(kernel, str):
            return False
        (T, N), H = x.shape[:2] if not layer.batch_first else x.shape[1::-1], layer.hidden_sizes[0]
        P, integer, W = layer.projection_size or H, x.dtype.kind != "f", kernel.cell.gates * H
        is_plain = lengths is None and self.num_directions == 1 and not kernel.projected
        is_plain = is_plain and not worth_threading(T, N, W * (P + max(layer.input_size, H)))
        shapes = tuple((len(self.names), N, H if k else P) for k in range(self.num_states))
        tape_size = kernel.tape_size((T, N, H, P), False)
        if len(self.plans) >= _MAX_PLANS:
            self.plans.clear()
        entry = kernel.entry("plain_forward", integer)
        self.plans[self.key(x, lengths)] = _Plan(kernel, integer, shapes, (T + 1, N, P), tape_size, entry, is_plain)
        return True

    # --- forward

    def forward(
        self, params: Params, x: Array, state: Any, lengths: Any = None, *, record_tape: bool
    ) -> tuple[Array, Any, KernelTape | None] | None:
        """Run the layer: y, the final state, and the tape or None."""
        plan = self.plans.get(self.key(x, lengths)) if x.__class__ is np.ndarray else None
        if plan is None or params.__class__ is not dict or len(params) != self.count:
            return None
        layer = self.layer
        time_major = x.swapaxes(0, 1) if layer.batch_first else x
        initial, arrays = self._initial_state(plan, params, state), self._parameters(plan, params)
        if initial is None or arrays is None:
            return None
        mask, x = StepMask(), time_major.astype(np.int64, copy=False) if plan.integer else time_major
        try:
            if plan.is_plain:
                y, final, results = self._run_plain(plan, x, arrays, initial, record_tape)
            else:
                if lengths is not None:
                    length_mask = _length_mask(x, lengths)
                    if length_mask is None:
                        return None
                    mask = length_mask
                y, final, results = self._run_masked(plan, x, arrays, initial, mask, record_tape)
        except (TypeError, ValueError):  # numba: an array of another dtype or number of axes; scan: of another shape
            return None
        packed = final if self.num_states > 1 else final[0]
        y = y.swapaxes(0, 1) if layer.batch_first else y
        if not record_tape:
            return y, packed, None
        y.flags.writeable = False  # y may share memory with the tape
        tape = KernelTape(
            layer=layer, params=params, x=time_major, y=y, uses_default_state=state is None, step_mask=mask,
            initial_state=initial, results=results,
        )  # fmt: skip
        return y, packed, tape

    def _parameters(self, plan: _Plan, params: Params) -> list[Any] | None:
        """Return the arguments of scan.run_forward for every layer and direction; None if an array is not plain."""
        kernel, bias, ndarray, result = plan.kernel, self.layer.bias, np.ndarray, []
        try:
            for getter in self.getters:
                arrays = getter(params)
                for a in arrays:
                    if a.__class__ is not ndarray:
                        return None
                last = len(arrays) - kernel.projected
                weights = arrays[:4] if bias else (*arrays[:2], *(kernel.zeros(len(arrays[1])),) * 2)
                weight_hr = arrays[-1] if kernel.projected else kernel.no_matrix
                vectors = kernel.vectors_tuple(arrays[4 if bias else 2 : last])
                result.append((weights, vectors, weight_hr))
            if plan.integer:  # x does not say how many classes there are
                for name, shape in self.first_weights:
                    if params[name].shape != shape:
                        return None
        except KeyError:  # a parameter is missing
            return None
        return result

    def _initial_state(self, plan: _Plan, params: Params, state: Any) -> State | None:
        """Return the initial states, (L*directions, N, .) each; None if an array does not fit."""
        dtype, shapes = plan.kernel.dtype, plan.state_shapes
        learned: list[Any] = [params.get(name) for name in self.initial_shapes]
        for value, expected in zip(learned, self.initial_shapes.values(), strict=True):
            if value.__class__ is not np.ndarray or value.dtype != dtype or value.shape != expected:
                return None
        if state is None and learned:
            return tuple(np.broadcast_to(a[:, None], s) for a, s in zip(learned, shapes, strict=True))
        if state is None:
            return tuple([np.zeros(shape, dtype) for shape in shapes])
        states = (state,) if self.num_states == 1 else state
        if states.__class__ not in (tuple, list) or len(states) != self.num_states:
            return None
        for a, shape in zip(states, shapes, strict=True):
            if a.__class__ is not np.ndarray or a.dtype != dtype or a.shape != shape:
                return None
        return tuple(states)

    def _run_plain(
        self, plan: _Plan, x: Array, arrays: list[Any], initial: State, record_tape: bool
    ) -> tuple[Array, State, list[Any]]:
        """Run the layers of one direction, without masks, on one thread."""
        kernel, reverse, dtype, empty = plan.kernel, self.layer.reverse, plan.kernel.dtype, np.empty
        final = tuple([empty(shape, dtype) for shape in plan.state_shapes])
        template, results, saved = kernel.template(reverse, record_tape), list[Any](), kernel.no_vector
        entry, starts, ends = plan.entry, kernel.states_tuple(initial), kernel.states_tuple(final)
        for k, (weights, vectors, weight_hr) in enumerate(arrays):
            output = empty(plan.output_shape, dtype)
            if record_tape:
                saved = empty(plan.tape_size, dtype)
            check_status(entry(template, k, x, *weights, vectors, starts, output, saved, ends))
            if record_tape:
                results.append(ForwardResult(kernel, None, x, weights, vectors, weight_hr, output, saved, reverse))
            x = output[:-1] if reverse else output[1:]
            entry = kernel.entry("plain_forward", False) if plan.integer else entry
        return x, final, results

    def _run_masked(
        self, plan: _Plan, x: Array, arrays: list[Any], initial: State, mask: StepMask, record_tape: bool
    ) -> tuple[Array, State, list[Any]]:
        """Run all layers and directions; rows that are shorter than T are sorted by length, and padding is ignored."""
        rows = None
        if mask.active is not None:
            rows = RowOrder.from_step_mask(x.shape[:2], mask)
            x = np.where(mask.active if plan.integer else mask.active[..., None], x, 0)
            x, initial = rows.sort(x, 1), tuple(rows.sort(s, 1) for s in initial)
        final, results = tuple(np.empty(s.shape, plan.kernel.dtype) for s in initial), list[Any]()
        for first in range(0, len(arrays), self.num_directions):
            x, layer_results = self._run_layer(plan.kernel, x, arrays, initial, final, rows, first, record_tape)
            results += layer_results
        if rows is None:
            return x, final, results
        return rows.unsort(x, 1), tuple(rows.unsort(s, 1) for s in final), results

    def _run_layer(
        self, kernel: ScanKernel, x: Array, arrays: list[Any], initial: State, final: State, rows: RowOrder | None,
        first: int, record_tape: bool,
    ) -> tuple[Array, list[Any]]:  # fmt: skip
        """Run the directions of one layer, on two threads if that is faster; return y and the results."""
        width, y = final[0].shape[2], None
        if self.num_directions == 2:
            y = np.empty((*x.shape[:2], 2 * width), kernel.dtype)

        def run(d: int) -> Any:
            target = None if y is None else y[:, :, d * width : (d + 1) * width]
            reverse = self.layer.reverse or d == 1
            return run_forward(
                kernel, x, arrays[first + d], initial, final, rows, initial, first + d, reverse, record_tape, target
            )

        directions, (T, N), (W, P) = list(range(self.num_directions)), x.shape[:2], arrays[first][0][1].shape
        work = T * N * W * (P + (x.shape[2] if x.ndim == 3 else 0))
        if y is not None and N < 16 and work >= _MIN_DIRECTION_WORK and max_threads() > 1:
            outputs = parallel_map(run, directions)
        else:
            outputs = [run(d) for d in directions]
        return outputs[0][0] if y is None else y, [result for _, result in outputs]

    # --- backward

    def backward(self, tape: Any, dy: Any, dstate: Any, dstates: Any) -> Gradients | None:
        """The adjoint of `forward`."""
        if tape.__class__ is not KernelTape or tape.layer is not self.layer or dstates is not None:
            return None
        kernel, rows = tape.results[0].kernel, tape.results[0].row_order
        if dy.__class__ is not np.ndarray or dy.dtype != kernel.dtype or dy.shape != tape.y.shape:
            return None
        final: Any = (None,) * self.num_states
        if dstate is not None:
            final = (dstate,) if self.num_states == 1 else dstate
            if final.__class__ not in (tuple, list) or len(final) != self.num_states:
                return None
            for d, a in zip(final, tape.initial_state, strict=True):
                shape = a.shape
                if d is not None and (d.__class__ is not np.ndarray or d.dtype != kernel.dtype or d.shape != shape):
                    return None
        d = dy.swapaxes(0, 1) if self.layer.batch_first else dy
        if rows is not None and rows.active is not None:
            d = np.where(rows.active[..., None], rows.sort(d, 1), 0)
            final = tuple(None if a is None else rows.sort(a, 1) for a in final)
        dx, dinitial, grads = self._run_layers_backward(tape, d, final)
        if rows is not None:
            dx = None if dx is None else rows.unsort(dx, 1)
            dinitial = tuple(rows.unsort(a, 1) for a in dinitial)
        packed = dinitial if self.num_states > 1 else dinitial[0]
        grads |= state_layout.learned_state_gradients(self.layer, tape.xp, packed, tape.uses_default_state)
        dx = dx.swapaxes(0, 1) if dx is not None and self.layer.batch_first else dx
        return Gradients(dx, packed, {name: grads[name] for name in tape.params})

    def _run_layers_backward(self, tape: KernelTape, dy: Array, final: Sequence[Any]) -> tuple[Any, State, Params]:
        """Run the adjoint of all layers and directions in reverse order."""
        results, directions, num_states = tape.results, self.num_directions, self.num_states
        kernel, others = results[0].kernel, [None] * (num_states - 1)
        dinitial = tuple([np.empty(s.shape, kernel.dtype) for s in tape.initial_state])
        grads: Params = {}
        d: Any = dy
        for first in range(len(results) - directions, -1, -directions):
            dx: Any = None
            for direction in range(directions):
                i, result = first + direction, results[first + direction]
                width = result.output.shape[2]
                injected = [d if directions == 1 else d[:, :, direction * width : (direction + 1) * width], *others]
                dx, scan_grads, _ = run_backward(result, injected, final, dinitial, i, self.layer.sparse, dx)
                for name, short in zip(self.names[i], self.scan_names, strict=True):
                    grads[name] = scan_grads[short]
            d = dx
        return d, dinitial, grads


def _length_mask(x: Array, lengths: Any) -> StepMask | None:
    """Return the mask of time-major x and lengths; None if lengths are not integers (N,) in 0..T."""
    if lengths.__class__ in (list, tuple):
        lengths = np.asarray(lengths)
    T, N = x.shape[:2]
    if lengths.__class__ is not np.ndarray or lengths.dtype.kind not in "iu" or lengths.shape != (N,):
        return None
    if lengths.size and (lengths.min() < 0 or lengths.max() > T):
        return None
    return StepMask(np.arange(T)[:, None] < lengths[None, :], None, lengths)


class CachedCalls(Steppable):
    """Base class of recurrent layers that holds their plans, made at the first call."""

    def make_fast_step(self, prefix: str, count: int) -> FastStep | None:
        """Build the fast step for parameters `prefix + name` in a dict of `count` arrays; None if there is none."""
        return make_recurrent_step(cast(RecurrentLayer, self), prefix, count)

    @cached_property
    def _calls(self) -> LayerCalls:
        return LayerCalls(cast(RecurrentLayer, self))

    def _run(
        self, params: Params, x: Array, state: Any, *, record_tape: bool, lengths: Any, **options: Any
    ) -> tuple[Array, Any, StackTape | None]:
        """Run forward: by a plan if the cache has one for this call, else by the checked path, which makes it."""
        plans = self._calls if all(option is None for option in options.values()) else None
        if plans is not None:
            result = plans.forward(params, x, state, lengths, record_tape=record_tape)
            if result is not None:
                return result
        layer = cast(RecurrentLayer, self)
        return stack.forward(layer, params, x, state, record_tape=record_tape, lengths=lengths, plans=plans, **options)
