"""Training steps of seven jobs in xprnn, torch and JAX, each as its users would write it.

A step takes a batch out of the data and runs forward, loss, backward, clipping by global norm and the optimiser.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import xprnn
from benchmarks.harness.problem import TRAIN_STEP, Array, Implementation

__all__ = ["COMPARED_STEPS", "JOBS", "Data", "Job", "first_step_seconds", "make_data", "make_implementation"]

MAX_NORM = 1.0
COMPARED_STEPS = 5  # their losses are compared before timing
NUM_BATCHES = 8
LAYER_CLASSES = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU"}
IGNORED = -100  # torch's mark of a target that does not count


@dataclass(frozen=True)
class Job:
    """A model and how it is trained.

    cell: a key of LAYER_CLASSES.
    sizes: D features of x (or V classes, if `read` is not "features"), H hidden units, outputs, N batch, T steps.
    read: "features"; "one-hot": class numbers, one-hot encoded; "embedding": class numbers, looked up in a (D, H)
        table.
    tagging: bidirectional, with lengths; padding does not count in the loss.
    last: the loss is that of the last step only.
    windows: a batch is a window of N parallel streams instead of N selected rows.
    """

    cell: str
    sizes: tuple[int, int, int, int, int]
    loss: str = "cross_entropy"
    optimizer: str = "adam"
    read: str = "features"
    tagging: bool = False
    last: bool = False
    windows: bool = False

    @property
    def learning_rate(self) -> float:
        """The learning rate of the optimiser."""
        return 1e-3 if self.optimizer == "adam" else 0.05


JOBS = {
    "digits by rows": Job("lstm", (8, 64, 10, 64, 8), last=True),
    "small regression": Job("elman", (4, 32, 1, 32, 20), loss="mse", optimizer="sgd", last=True),
    "tagging": Job("lstm", (1000, 64, 12, 16, 30), read="embedding", tagging=True),
    "amplifier": Job("lstm", (1, 16, 1, 16, 512), loss="mse", windows=True),
    "next character": Job("lstm", (65, 128, 65, 32, 50), read="one-hot", windows=True),
    "long sequences": Job("gru", (2, 64, 1, 8, 1000), loss="mse", last=True),
    "larger": Job("lstm", (64, 256, 50, 64, 50)),
}


class Data(NamedTuple):
    """The data of a job, time-major, with `NUM_BATCHES` batches.

    x: (T, count, D) floats or (T, count) class numbers; with windows (NUM_BATCHES T, N, ...).
    target: class numbers or floats like x; (count, ...) for a loss of the last step.
    lengths: (count,), or None.
    keys: of each batch: N row numbers, or the first step of a window.
    """

    x: Array
    target: Array
    lengths: Array | None
    keys: list[Any]

    def batch(self, job: Job, key: Any) -> tuple[Any, Any, Any]:
        """Take a batch: x, the target, and lengths or None. The fields may be arrays of any library."""
        if job.windows:
            steps = slice(key, key + job.sizes[4])
            return self.x[steps], self.target[steps], None
        target = self.target[key] if job.last else self.target[:, key]
        return self.x[:, key], target, None if self.lengths is None else self.lengths[key]


def make_data(job: Job) -> Data:
    """Draw random data."""
    rng, (d, _, v, n, t) = np.random.default_rng(0), job.sizes
    steps, count = (NUM_BATCHES * t, n) if job.windows else (t, NUM_BATCHES * n)
    lead = (count,) if job.last else (steps, count)
    if job.read == "features":
        x: Array = rng.standard_normal((steps, count, d), dtype=np.float32)
    else:
        x = rng.integers(d, size=(steps, count))
    target: Array = (
        rng.integers(v, size=lead) if job.loss == "cross_entropy" else rng.standard_normal((*lead, v), dtype=np.float32)
    )
    lengths = rng.integers(t // 3, t + 1, size=count) if job.tagging else None
    keys = [k * t for k in range(NUM_BATCHES)] if job.windows else [*rng.permutation(count).reshape(NUM_BATCHES, -1)]
    return Data(x, target, lengths, keys)


def make_model(job: Job) -> tuple[Any, dict[str, Array]]:
    """Create xprnn's model and the initial parameters of all implementations."""
    d, h, v, _, _ = job.sizes
    layer_class = getattr(xprnn, LAYER_CLASSES[job.cell])
    layers: dict[str, Any] = {"read": xprnn.Embedding(d, h)} if job.read == "embedding" else {}
    layers["rnn"] = layer_class(h if job.read == "embedding" else d, h, bidirectional=job.tagging)
    if job.last:
        layers["last"] = xprnn.LastStep()
    model = xprnn.Sequential(**layers, head=xprnn.Linear(h * (1 + job.tagging), v))
    return model, model.init(np.random.default_rng(1), like=np.zeros(0, np.float32))


TrainStep = Callable[[Any], Any]  # key of a batch -> the loss, convertible by float()


def make_implementation(framework: str, job: str, threads: int) -> Implementation:
    """Return an implementation whose call trains on the next batch and reads its loss. Its results are losses.

    Args:
        framework: "xprnn", "torch", "torch_compile" or "jax".
        job: a key of JOBS.
        threads: number of CPU threads of torch; the others follow the environment.
    """
    chosen = JOBS[job]
    data = make_data(chosen)
    if framework == "xprnn":
        step = xprnn_step(chosen, data)
    elif framework == "jax":
        step = jax_step(chosen, data)
    else:
        step = torch_step(chosen, data, threads, compiled=framework == "torch_compile")
    keys = itertools.cycle(data.keys)

    def call() -> float:
        return float(step(next(keys)))

    return Implementation({TRAIN_STEP: call}, lambda: {"losses": np.array([call() for _ in range(COMPARED_STEPS)])})


def xprnn_step(job: Job, data: Data) -> TrainStep:
    """Train in xprnn."""
    model, params = make_model(job)
    optimizer = getattr(xprnn, job.optimizer)(job.learning_rate)
    loss_function = getattr(xprnn, job.loss)
    state = [params, optimizer.init(params)]
    step_numbers = np.arange(job.sizes[4])[:, None]

    def step(key: Any) -> Any:
        x, target, lengths = data.batch(job, key)
        flags = {} if lengths is None else {"lengths": lengths}
        y, _, tape = model.forward(state[0], x, **flags)
        weighting = {} if lengths is None else {"mask": step_numbers < lengths}
        loss, dy = loss_function(y, target, **weighting)
        gradients, _ = xprnn.clip_by_global_norm(model.backward(tape, dy).dparams, MAX_NORM)
        state[:] = optimizer.update(state[0], gradients, state[1])
        return loss

    return step


def first_step_seconds(job: str) -> float:
    """Return the seconds of xprnn's first training step in this process; data and parameters exist before."""
    chosen = JOBS[job]
    data = make_data(chosen)
    step, start = xprnn_step(chosen, data), time.perf_counter()
    step(data.keys[0])
    return time.perf_counter() - start


def _torch_parameters(modules: dict[str, Any], params: dict[str, Array]) -> list[Any]:
    """Copy the initial parameters into the modules that are not None; return the modules' parameters."""
    import torch

    present = {name: module for name, module in modules.items() if module is not None}
    for name, module in present.items():
        named = {key.partition(".")[2]: torch.tensor(a) for key, a in params.items() if key.startswith(f"{name}.")}
        module.load_state_dict(named)
    return [p for module in present.values() for p in module.parameters()]


def torch_step(job: Job, data: Data, threads: int, *, compiled: bool) -> TrainStep:
    """Train in torch: nn.RNN (LSTM, GRU) and nn.Linear, packed sequences for lengths, fused Adam.

    `compiled` compiles model and loss by torch.compile.
    """
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    torch.set_num_threads(threads)
    _, params = make_model(job)
    d, h, v, _, steps = job.sizes
    embedded = job.read == "embedding"
    rnn = getattr(torch.nn, LAYER_CLASSES[job.cell])(h if embedded else d, h, bidirectional=job.tagging)
    head, one_hot = torch.nn.Linear(h * (1 + job.tagging), v), torch.eye(d)
    read = torch.nn.Embedding(d, h) if embedded else None
    parameters = _torch_parameters({"read": read, "rnn": rnn, "head": head}, params)

    def loss_of(x: Any, target: Any, lengths: Any) -> Any:
        x = read(x) if read is not None else one_hot[x] if job.read == "one-hot" else x
        if lengths is None:
            y, _ = rnn(x)
        else:
            packed, _ = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
            y, _ = pad_packed_sequence(packed, total_length=steps)
        z = head(y[-1] if job.last else y)
        if job.loss == "mse":
            return torch.nn.functional.mse_loss(z, target)
        return torch.nn.functional.cross_entropy(z.reshape(-1, v), target.reshape(-1), ignore_index=IGNORED)

    fused = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[job.optimizer]
    optimizer = fused(parameters, job.learning_rate, fused=True)
    tensors = Data(*(None if a is None else torch.from_numpy(a) for a in data[:3]), keys=data.keys)
    if data.lengths is not None:
        padding = torch.arange(steps)[:, None] >= tensors.lengths
        tensors = tensors._replace(target=torch.where(padding, IGNORED, tensors.target))
    compute_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step(key: Any) -> Any:
        loss = compute_loss(*tensors.batch(job, key if job.windows else torch.from_numpy(key)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        return loss.detach()

    return step


def jax_step(job: Job, data: Data) -> TrainStep:
    """Train in JAX: the whole step jitted with donated buffers, batches taken inside, lax.scan, optax."""
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.chain(optax.clip_by_global_norm(MAX_NORM), getattr(optax, job.optimizer)(job.learning_rate))
    on_device = Data(*jax.device_put(data[:3]), keys=data.keys)
    loss_of = _jax_loss(job)

    def take(key: Any) -> Any:
        if not job.windows:
            return on_device.batch(job, key)
        return *(jax.lax.dynamic_slice_in_dim(a, key, job.sizes[4]) for a in on_device[:2]), None

    def update(p: Any, moments: Any, key: Any) -> Any:
        value, gradients = jax.value_and_grad(loss_of)(p, *take(key))
        changes, moments = optimizer.update(gradients, moments, p)
        return optax.apply_updates(p, changes), moments, value

    jitted = jax.jit(update, donate_argnums=(0, 1))
    params = {key: jnp.array(a) for key, a in make_model(job)[1].items()}
    state = [params, optimizer.init(params)]

    def step(key: Any) -> Any:
        *state[:], value = jitted(*state, key)
        return value

    return step


def _jax_loss(job: Job) -> Callable[..., Any]:
    """Return the loss as a function of (params, x, target, lengths)."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.harness.peers import jax_cell

    cell, hidden, count = jax_cell(job.cell), job.sizes[1], 2 if job.cell == "lstm" else 1

    def run(p: Any, x: Any, active: Any, suffix: str = "") -> Any:
        w_ih, w_hh, b_ih, b_hh = (p[f"rnn.{k}_l0{suffix}"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        xg = (w_ih.T[x] if job.read == "one-hot" else x @ w_ih.T) + b_ih

        def body(state: Any, inputs: Any) -> Any:
            xt, keep = inputs
            new = cell(state, xt, state[0] @ w_hh.T + b_hh)
            if keep is not None:
                new = tuple(jnp.where(keep[:, None], a, b) for a, b in zip(new, state, strict=True))
            return new, new[0]

        zeros = (jnp.zeros((xg.shape[1], hidden)),) * count
        return jax.lax.scan(body, zeros, (xg, active), reverse=bool(suffix))[1]

    def loss_of(p: Any, x: Any, target: Any, lengths: Any) -> Any:
        x = p["read.weight"][x] if job.read == "embedding" else x
        active = None if lengths is None else jnp.arange(len(x))[:, None] < lengths
        y = run(p, x, active)
        if job.tagging:
            y = jnp.concatenate((y, run(p, x, active, "_reverse")), axis=-1)
        z = (y[-1] if job.last else y) @ p["head.weight"].T + p["head.bias"]
        if job.loss == "mse":
            return jnp.mean((z - target) ** 2)
        losses = optax.softmax_cross_entropy_with_integer_labels(z, target)
        return losses.mean() if active is None else (losses * active).sum() / active.sum()

    return loss_of
