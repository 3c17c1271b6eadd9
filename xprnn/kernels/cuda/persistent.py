"""One launch for a whole sequence, for devices whose thread blocks form clusters (compute capability 9.0 and up).

The kernels and the partition they work on are drawn in persistent.cu; here it is decided which of their configurations
runs a case, and what stands around them: one GEMM for the projection before, one for each weight's gradient after.
Only float32, and only the standard cells, for which persistent_cells.cu has the maths of cells.py once more.
"""

from functools import cache, lru_cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from xprnn import cells
from xprnn.affine import affine, affine_back, flat
from xprnn.arrays import Array, Namespace, Params, device_of
from xprnn.cells import Cell
from xprnn.tape import State, Steps, Tape

__all__ = ["NAME", "Config", "backward", "configurations", "find", "forward", "source"]

NAME = "CUDA persistent"
KERNELS = ("xp_forward", "xp_backward")
GATES = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}

# cell: units: (blocks of a cluster, threads of a block, {rows of a cluster: chunks in registers, forward and backward}).
# tests/test_persistent_compile.py holds the compiler to these: a row that does not fit spills, and the test fails.
_ELMAN = {
    64: (1, 256, {1: (1, 1), 2: (1, 1), 4: (1, 1)}),
    128: (1, 512, {1: (1, 1), 2: (1, 1), 4: (1, 1)}),
    256: (4, 256, {1: (2, 2), 2: (2, 2), 4: (2, 2)}),
    512: (8, 256, {1: (4, 4), 2: (4, 4), 4: (4, 4)}),
    1024: (16, 256, {1: (5, 4), 2: (5, 5), 4: (4, 4)}),
}
_TABLE: dict[str, dict[int, tuple[int, int, dict[int, tuple[int, int]]]]] = {
    "tanh": _ELMAN,
    "relu": _ELMAN,
    "gru": {
        64: (1, 256, {1: (1, 3), 2: (1, 3), 4: (1, 3)}),
        128: (4, 256, {1: (1, 3), 2: (1, 3), 4: (1, 3)}),
        256: (8, 256, {1: (2, 6), 2: (2, 6), 4: (2, 6)}),
        512: (16, 256, {1: (3, 10), 2: (3, 10), 4: (2, 9)}),
    },
    "lstm": {
        64: (1, 256, {1: (1, 2), 2: (1, 2)}),
        128: (4, 256, {1: (1, 4), 2: (1, 4), 4: (1, 4)}),
        256: (8, 256, {1: (2, 8), 2: (2, 8), 4: (2, 8)}),
        512: (16, 256, {2: (2, 11), 4: (1, 9)}),
    },
}
_PORTABLE_CLUSTER = 8
_NON_PORTABLE_CLUSTERS = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


class Config(NamedTuple):
    """What the source is compiled for."""

    cell: str
    units: int  # hidden units, the layer's own filled up with idle ones
    blocks: int  # of a cluster
    threads: int  # of a block
    rows: int  # of a cluster
    held: tuple[int, int]  # chunks of the weight in registers, forward and backward

    def options(self) -> tuple[str, ...]:
        """The compiler's."""
        number = list(GATES).index(self.cell)
        values = {"CELL": number, "HP": self.units, "CL": self.blocks, "NT": self.threads, "B": self.rows}
        values |= {"KF": self.held[0], "KB": self.held[1]}
        return ("--std=c++17", *(f"-D{name}={value}" for name, value in values.items()))

    def shared_bytes(self, backward: bool) -> int:
        """Shared memory of a block: the chunks that are not in registers, two buffers, two barriers."""
        gates = GATES[self.cell]
        length = self.units * (gates if backward else 1)
        outputs = self.units // self.blocks * (1 if backward else gates)
        wide = 32 * (2 if length % 128 else 4)
        rest = (length // wide - self.held[backward]) * wide
        return 4 * (rest * outputs + 2 * self.rows * length) + 16


def configurations() -> list[Config]:
    """Every configuration that ships."""
    return [
        Config(cell, units, blocks, threads, rows, held)
        for cell, sizes in _TABLE.items()
        for units, (blocks, threads, choices) in sizes.items()
        for rows, held in choices.items()
    ]


@cache
def source() -> str:
    """The kernels' source, for NVRTC as it is: it includes nothing."""
    return "".join(_text(name) for name in ("persistent_device", "persistent_cells", "persistent"))


def _text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.cu").read_text(encoding="utf-8")


# --- which configuration runs a case


def find(cell: Cell, params: Params, shape: tuple[int, int], steps: Steps, capability: tuple[int, int]) -> Config | str:
    """The configuration for this case, or one sentence that says why there is none.

    Args:
        cell: the cell.
        params: as in the scan; their dtype and the weight's shape (G*H, H) decide.
        shape: (T, N).
        steps: which rows take part when.
        capability: the device's, (9, 0) for a Hopper.
    """
    name, hidden = _names().get(id(cell)), params["weight_hh"].shape[-1]
    if capability < (9, 0):
        return f"needs compute capability 9.0, the device has {capability[0]}.{capability[1]}"
    if name is None:
        return f"only for the standard Elman, GRU and LSTM cells, this is {cell.name}"
    if "weight_hr" in params:
        return "not for projected states"
    if str(params["weight_hh"].dtype) != "float32":
        return f"only for float32, the parameters are {params['weight_hh'].dtype}"
    if steps.reset is not None:
        return "not with reset"
    if 0 in shape or hidden == 0:
        return "nothing to do"
    units = min((k for k in _TABLE[name] if k >= hidden), default=0)
    if not units:
        return f"{hidden} units of {name} are more than fit on the chip: at most {max(_TABLE[name])}"
    return _choose(name, units, shape[1], capability)


@cache
def _names() -> dict[int, str]:
    """The standard cells by identity: `cells` makes each of them once."""
    own = {"tanh": (cells.elman(), cells.elman("tanh")), "relu": (cells.elman("relu"),)}
    own |= {"gru": (cells.gru(),), "lstm": (cells.lstm(),)}
    return {id(cell): name for name, made in own.items() for cell in made}


@lru_cache(maxsize=256)
def _choose(name: str, units: int, n: int, capability: tuple[int, int]) -> Config | str:
    """The rows of a cluster that should take the least time for a batch of n; see `_cycles`."""
    blocks, threads, choices = _TABLE[name][units]
    made = [Config(name, units, blocks, threads, rows, held) for rows, held in choices.items()]
    room = (99 if capability[0] == 12 else 227) * 1024
    made = [c for c in made if max(c.shared_bytes(False), c.shared_bytes(True)) <= room]
    if not made:
        return f"{units} units of {name} need more shared memory than the device has"
    return min(made, key=lambda c: _cycles(c, n))


def _cycles(c: Config, n: int) -> float:
    """A model of a step, not a measurement: waves of clusters, each some 700 cycles of waiting beside its arithmetic.

    132 multiprocessors (an H100 or H200) of 128 multiplications and 32 words from shared memory a cycle.
    """
    waves = ceil(ceil(n / c.rows) / (132 // c.blocks))
    multiply = GATES[c.cell] * c.units**2 / c.blocks / 128
    read = c.threads / 32 * c.units / 32
    weights = (c.shared_bytes(False) - 8 * c.rows * c.units) / 128
    return waves * (700 + max(c.rows * multiply, c.rows * read + weights))


# --- forward and its adjoint


class Kept(NamedTuple):
    """What backward needs."""

    config: Config
    weight: Array
    h: Array  # (T+1, N, H), the initial state before the first step
    c: Array | None
    saved: Array | None  # (T, N, SAVED, H)
    active: Array | None  # (T, N) bytes


def forward(
    config: Config,
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    steps: Steps,
    *,
    home: State,
    xp: Namespace,
    reverse: bool,
    keep: bool,
) -> tuple[Array, State, Tape | None]:
    """See xprnn.scan.forward, which is the specification."""
    count, n = x.shape[:2]
    u, gates = xp.ascontiguousarray(params["weight_hh"]), GATES[config.cell]
    hidden = u.shape[1]
    bias, late = _biases(xp, config, params, hidden)
    xg = affine(xp, x, params["weight_ih"], bias)
    memory = [_empty(xp, (count + 1, n, hidden), u) for _ in state]
    first, last = (count, 0) if reverse else (0, count)
    for m, s in zip(memory, state, strict=True):
        m[first, ...] = s
    saved = _empty(xp, (count, n, 4, hidden), u) if keep and gates > 1 else None
    active = None if steps.active is None else xp.ascontiguousarray(xp.astype(steps.active, xp.uint8))
    h, c = memory[0], memory[1] if len(memory) > 1 else None
    launch(config, KERNELS[0], ceil(n / config.rows), (u, late, xg, active, h, c, saved, count, n, hidden, int(reverse)))
    after = tuple(m[:-1, ...] if reverse else m[1:, ...] for m in memory)
    final = tuple(xp.asarray(m[last, ...], copy=True) for m in memory)
    if steps.active is not None:
        y = xp.where(steps.active[..., None], after[0], xp.zeros_like(after[0]))
    else:  # the tape lives in this memory, and CuPy has no read-only arrays
        y = xp.asarray(after[0], copy=True) if keep else after[0]
    if not keep:
        return y, final, None
    kept = Kept(config, u, h, c, saved, active)
    return y, final, Tape(backward, xp, cell, params, x, state, home, steps, reverse, lambda: after, kept, NAME)


def backward(
    tape: Tape, dy: Array | None, dstate: tuple[Array | None, ...], dstates: tuple[Array | None, ...] = ()
) -> tuple[Array | None, State, list[None], Params]:
    """The adjoint of `forward`."""
    kept: Kept = tape.saved
    xp, u, config = tape.xp, kept.weight, kept.config
    count, n, hidden = kept.h.shape[0] - 1, *kept.h.shape[1:]
    if dy is not None and tape.steps.active is not None:
        dy = xp.where(tape.steps.active[..., None], dy, xp.zeros_like(dy))
    given = [None] * len(tape.initial) if not dstates else list(dstates)
    given[0] = dy if given[0] is None else given[0] if dy is None else dy + given[0]
    given = [None if g is None else xp.ascontiguousarray(g) for g in given]
    ds = [xp.zeros_like(i) if d is None else xp.asarray(d, copy=True) for i, d in zip(tape.initial, dstate, strict=True)]
    ds = [xp.ascontiguousarray(d) for d in ds]
    dx = _empty(xp, (count, n, u.shape[0]), u)
    dp = _empty(xp, dx.shape, u) if config.cell == "gru" else None
    dcs, dc = (given[1], ds[1]) if len(ds) > 1 else (None, None)
    pointers = (u, kept.saved, kept.h, kept.c, kept.active, given[0], dcs, ds[0], dc, dx, dp)
    launch(config, KERNELS[1], ceil(n / config.rows), (*pointers, count, n, hidden, int(tape.reverse)))
    dx_in, dparams = _weight_gradients(tape, kept, dx, dx if dp is None else dp)
    return dx_in, tuple(ds), [None] * len(ds), dparams


def _weight_gradients(tape: Tape, kept: Kept, dx: Array, dp: Array) -> tuple[Array | None, Params]:
    """One GEMM for each weight, over all T*N rows at once."""
    xp, params = tape.xp, tape.params
    dx_in, dw, db = affine_back(xp, dx, tape.x, params["weight_ih"])
    before = kept.h[1:, ...] if tape.reverse else kept.h[:-1, ...]
    dp2 = flat(xp, dp)
    grads = {"weight_ih": dw, "weight_hh": xp.matmul(xp.permute_dims(dp2, (1, 0)), flat(xp, before)), "bias_ih": db}
    if "bias_hh" in params:
        grads["bias_hh"] = xp.asarray(db, copy=True) if dp is dx else xp.sum(dp2, axis=0, dtype=dp2.dtype)
    return dx_in, {name: grads[name] for name in params}


def _biases(xp: Namespace, config: Config, params: Params, hidden: int) -> tuple[Array | None, Array | None]:
    """What is added to the projection, and the GRU's bias that stands inside the reset gate's product."""
    b, b_hh = params.get("bias_ih"), params.get("bias_hh")
    if b is None or b_hh is None:
        return b, None
    if config.cell != "gru":
        return b + b_hh, None
    late = xp.asarray(b_hh[2 * hidden :], copy=True)
    return b + xp.concat((b_hh[: 2 * hidden], xp.zeros_like(late))), late


def _empty(xp: Namespace, shape: tuple[int, ...], like: Array) -> Array:
    return xp.empty(shape, dtype=like.dtype, device=device_of(like))


# --- the device


def launch(config: Config, name: str, clusters: int, args: tuple[Any, ...]) -> None:
    """Run a kernel on its arguments: arrays, None for those that are missing, and integers."""
    import numpy as np

    device = args[0].device
    with device:
        values = tuple(np.uintp(0) if a is None else np.int32(a) if isinstance(a, int) else a for a in args)
        kernel = _kernels(config, device.id)[name]
        kernel(
            (clusters * config.blocks,),
            (config.threads,),
            values,
            shared_mem=config.shared_bytes(name == KERNELS[1]),
        )


@cache
def _kernels(config: Config, device: int) -> dict[str, Any]:
    """Both kernels, compiled for the current device."""
    import cupy

    module = cupy.RawModule(code=source(), options=config.options())
    kernels = {name: module.get_function(name) for name in KERNELS}
    for name, kernel in kernels.items():
        kernel.max_dynamic_shared_size_bytes = config.shared_bytes(name == KERNELS[1])
        if config.blocks > _PORTABLE_CLUSTER:
            from cupy_backends.cuda.api import driver

            driver.funcSetAttribute(kernel.kernel.ptr, _NON_PORTABLE_CLUSTERS, 1)
    return kernels
