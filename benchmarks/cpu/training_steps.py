"""The text job's training step in xprnn, torch and JAX, each as its own users would write it for speed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import xprnn
from benchmarks.harness.problem import Implementation
from xprnn.charlm.corpus import Vocabulary, default_text
from xprnn.charlm.trainer import TrainConfig, TrainState, train_step
from xprnn.training.data_parallel import DataParallel, keep_freed_memory

__all__ = [
    "COMPARED_WINDOWS",
    "LEARNING_RATE",
    "LOSS_INTERVAL",
    "MAX_GRAD_NORM",
    "STEP_CALL",
    "H",
    "T",
    "TrainStep",
    "make_implementation",
    "text_windows",
]

LAYER_CLASSES = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU"}
H, T, LEARNING_RATE, MAX_GRAD_NORM = 256, 64, 2e-3, 1.0
STEP_CALL = "step"  # the call's name
COMPARED_WINDOWS = 5  # windows whose losses are compared
LOSS_INTERVAL = 10  # windows between two looks at the loss, as in xprnn.charlm.trainer
TrainStep = Callable[
    [Any, Any], Any
]  # (x, targets), (T, N) integers -> the loss, a number or what float() makes one of


def text_windows(n: int) -> tuple[Iterator[tuple[Any, Any]], int]:
    """Windows of the default text in n streams, without an end, and V."""
    text = default_text()
    ids = np.asarray(Vocabulary.from_text(text).encode(text))[: n * (len(text) // n)].reshape(n, -1).T.copy()
    pairs = [(ids[t : t + T], ids[t + 1 : t + T + 1]) for t in range(0, len(ids) - T - 1, T)]
    return itertools.cycle(pairs), len(set(text))


def make_implementation(framework: str, cell: str, batch: int, threads: int) -> Implementation:
    """A call that learns from the next window; the results are the losses of the first ones."""
    windows, v = text_windows(batch)
    task = {"cell": cell, "batch": batch, "threads": threads}
    model = xprnn.Sequential(rnn=getattr(xprnn, LAYER_CLASSES[cell])(v, H), head=xprnn.Linear(H, v))
    params = model.init(np.random.default_rng(0), like=np.zeros(0, np.float32))
    step = {"xprnn": xprnn_train_step, "torch": torch_train_step, "jax": jax_train_step}[framework](task, model, params)
    count = itertools.count(1)

    def call() -> None:
        loss = step(*next(windows))
        if next(count) % LOSS_INTERVAL == 0:
            float(loss)

    def results() -> dict[str, Any]:
        return {"losses": np.array([float(step(*next(windows))) for _ in range(COMPARED_WINDOWS)])}

    return Implementation({STEP_CALL: call}, results)


class ConstantRate(TrainConfig):
    """One learning rate: Adam is the same in all three."""

    def rate(self, now: TrainState) -> float:
        """Of every step."""
        return self.learning_rate


def xprnn_train_step(task: dict[str, Any], model: Any, params: dict[str, Any]) -> TrainStep:
    """The step of `python -m xprnn train`, with one BLAS thread, as there."""
    from threadpoolctl import threadpool_limits

    keep_freed_memory()
    threadpool_limits(1, user_api="blas")
    schedule = ConstantRate(learning_rate=LEARNING_RATE, clip=MAX_GRAD_NORM)
    crew = DataParallel(task["threads"])
    kept = {"now": TrainState(0, params, xprnn.adam(LEARNING_RATE).init(params))}

    def step(x: Any, target: Any) -> Any:
        kept["now"], loss = train_step(model, kept["now"], x, target, schedule, crew)
        return loss

    return step


def torch_train_step(task: dict[str, Any], model: Any, params: dict[str, Any]) -> TrainStep:
    """torch: one-hot rows, nn.RNN (LSTM, GRU) and nn.Linear, eager; Adam in its fused form."""
    import torch

    torch.set_num_threads(task["threads"])
    v = model.layers["head"].out_features
    rnn, head = getattr(torch.nn, LAYER_CLASSES[task["cell"]])(v, H), torch.nn.Linear(H, v)
    rnn.load_state_dict({k[4:]: torch.tensor(a) for k, a in params.items() if k.startswith("rnn.")})
    head.load_state_dict({k[5:]: torch.tensor(a) for k, a in params.items() if k.startswith("head.")})
    every = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(every, LEARNING_RATE, fused=True)
    kept: dict[str, Any] = {"state": None}
    one_hot = torch.eye(v)

    def step(x: Any, target: Any) -> Any:
        y, state = rnn(one_hot[torch.from_numpy(x)], kept["state"])
        kept["state"] = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        loss = torch.nn.functional.cross_entropy(head(y).reshape(-1, v), torch.from_numpy(target).reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(every, MAX_GRAD_NORM)
        optimizer.step()
        return loss.detach()

    return step


def jax_train_step(task: dict[str, Any], model: Any, params: dict[str, Any]) -> TrainStep:
    """JAX: the whole step jitted, its buffers donated; the input's look-up hoisted out of a lax.scan; optax."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.harness.peers import jax_cell

    cell = jax_cell(task["cell"])
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

    fast = jax.jit(update, donate_argnums=(0, 1, 2))
    p = {k: jnp.array(a) for k, a in params.items()}
    blank = tuple(jnp.zeros((task["batch"], H)) for _ in range(2 if task["cell"] == "lstm" else 1))
    kept = {"all": (p, optimizer.init(p), blank)}

    def step(x: Any, target: Any) -> Any:
        *carried, value = fast(*kept["all"], x, target)
        kept["all"] = tuple(carried)
        return value

    return step
