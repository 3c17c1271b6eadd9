"""One training step of the text model in xprnn, torch and JAX, each as its users would write it for speed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import xprnn
from benchmarks.harness.problem import TRAIN_STEP, Implementation
from xprnn.charlm.corpus import Vocabulary, default_text
from xprnn.charlm.trainer import TrainConfig, TrainState, train_step
from xprnn.training.data_parallel import DataParallel, keep_freed_memory

__all__ = [
    "COMPARED_WINDOWS",
    "LEARNING_RATE",
    "LOSS_INTERVAL",
    "MAX_GRAD_NORM",
    "H",
    "T",
    "TrainStep",
    "make_implementation",
    "text_model",
    "text_windows",
    "torch_train_step",
]

LAYER_CLASSES = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU"}
H, T, LEARNING_RATE, MAX_GRAD_NORM = 256, 64, 2e-3, 1.0
COMPARED_WINDOWS = 5  # their losses are compared before timing
LOSS_INTERVAL = 10  # windows between two reads of the loss, as in xprnn.charlm.trainer
TrainStep = Callable[[Any, Any], Any]  # (x, targets), integers (T,N) -> the loss, convertible by float()


def text_windows(n: int) -> tuple[Iterator[tuple[Any, Any]], int]:
    """Return an endless iterator over windows of the default text in n streams, and the vocabulary size."""
    text = default_text()
    ids = np.asarray(Vocabulary.from_text(text).encode(text))[: n * (len(text) // n)].reshape(n, -1).T.copy()
    pairs = [(ids[t : t + T], ids[t + 1 : t + T + 1]) for t in range(0, len(ids) - T - 1, T)]
    return itertools.cycle(pairs), len(set(text))


def text_model(cell: str, v: int) -> tuple[Any, dict[str, Any]]:
    """Create the model, a recurrent layer and a linear head, and its initial parameters."""
    model = xprnn.Sequential(rnn=getattr(xprnn, LAYER_CLASSES[cell])(v, H), head=xprnn.Linear(H, v))
    return model, model.init(np.random.default_rng(0), like=np.zeros(0, np.float32))


def make_implementation(framework: str, cell: str, batch: int, threads: int) -> Implementation:
    """Return an implementation whose call trains on the next window. Its results are the first losses.

    Args:
        framework: "xprnn", "torch" or "jax".
        cell: "elman", "lstm" or "gru".
        batch: number of streams of text.
        threads: number of CPU threads.
    """
    windows, v = text_windows(batch)
    model, params = text_model(cell, v)
    if framework == "xprnn":
        step = xprnn_train_step(model, params, threads)
    elif framework == "torch":
        step = torch_train_step(model, params, threads)
    else:
        step = jax_train_step(params, cell, batch)
    count = itertools.count(1)

    def call() -> None:
        loss = step(*next(windows))
        if next(count) % LOSS_INTERVAL == 0:
            float(loss)

    def results() -> dict[str, Any]:
        return {"losses": np.array([float(step(*next(windows))) for _ in range(COMPARED_WINDOWS)])}

    return Implementation({TRAIN_STEP: call}, results)


class ConstantRate(TrainConfig):
    """A constant learning rate, so that Adam is the same in all frameworks."""

    def learning_rate_at(self, train_state: TrainState) -> float:
        """Return the learning rate of every step."""
        return self.learning_rate


def xprnn_train_step(model: Any, params: dict[str, Any], threads: int) -> TrainStep:
    """Train as `python -m xprnn train` does, with one BLAS thread."""
    from threadpoolctl import threadpool_limits

    keep_freed_memory()
    threadpool_limits(1, user_api="blas")
    config = ConstantRate(learning_rate=LEARNING_RATE, clip=MAX_GRAD_NORM)
    data_parallel = DataParallel(threads)
    state = [TrainState(0, params, xprnn.adam(LEARNING_RATE).init(params))]

    def step(x: Any, target: Any) -> Any:
        state[0], loss = train_step(model, state[0], x, target, config, data_parallel)
        return loss

    return step


def torch_train_step(model: Any, params: dict[str, Any], threads: int | None = None, device: str = "cpu") -> TrainStep:
    """Train in torch: one-hot rows, nn.RNN (LSTM, GRU) and nn.Linear, eager, fused Adam.

    Args:
        model: the model of xprnn, whose sizes are used.
        params: its initial parameters.
        threads: number of CPU threads; None: torch's default.
        device: "cpu" or "cuda".
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    v, layer_class = model.layers["head"].out_features, type(model.layers["rnn"]).__name__
    rnn, head = getattr(torch.nn, layer_class)(v, H).to(device), torch.nn.Linear(H, v).to(device)
    rnn.load_state_dict({k[4:]: torch.tensor(a) for k, a in params.items() if k.startswith("rnn.")})
    head.load_state_dict({k[5:]: torch.tensor(a) for k, a in params.items() if k.startswith("head.")})
    parameters = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, fused=True)
    carried: dict[str, Any] = {"state": None}
    one_hot = torch.eye(v, device=device)

    def step(x: Any, target: Any) -> Any:
        y, state = rnn(one_hot[torch.from_numpy(x).to(device)], carried["state"])
        carried["state"] = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        labels = torch.from_numpy(target).to(device).reshape(-1)
        loss = torch.nn.functional.cross_entropy(head(y).reshape(-1, v), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        return loss.detach()

    return step


def jax_train_step(params: dict[str, Any], cell_name: str, batch: int) -> TrainStep:
    """Train in JAX: the whole step jitted with donated buffers, the input gather hoisted out of a lax.scan, optax."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.harness.peers import jax_cell

    cell = jax_cell(cell_name)
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adam(LEARNING_RATE))

    def loss_of(p: Any, state: Any, x: Any, target: Any) -> Any:
        ut, b_hh = p["rnn.weight_hh_l0"].T, p["rnn.bias_hh_l0"]
        xg = p["rnn.weight_ih_l0"].T[x] + p["rnn.bias_ih_l0"]

        def body(state: Any, xt: Any) -> Any:
            state = cell(state, xt, state[0] @ ut + b_hh)
            return state, state[0]

        state, y = jax.lax.scan(body, state, xg)
        logits = y @ p["head.weight"].T + p["head.bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean(), state

    def update(p: Any, moments: Any, state: Any, x: Any, target: Any) -> Any:
        (value, state), grads = jax.value_and_grad(loss_of, has_aux=True)(p, state, x, target)
        changes, moments = optimizer.update(grads, moments, p)
        return optax.apply_updates(p, changes), moments, state, value

    jitted = jax.jit(update, donate_argnums=(0, 1, 2))
    p = {k: jnp.array(a) for k, a in params.items()}
    zeros = tuple(jnp.zeros((batch, H)) for _ in range(2 if cell_name == "lstm" else 1))
    carried = {"all": (p, optimizer.init(p), zeros)}

    def step(x: Any, target: Any) -> Any:
        *after, value = jitted(*carried["all"], x, target)
        carried["all"] = tuple(after)
        return value

    return step
