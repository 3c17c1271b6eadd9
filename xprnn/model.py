"""The parts around a recurrent layer, and their chain: Linear, Embedding, Sequential, with a layer's verbs.

Every part has init, call, forward, backward, step, config and shapes; a part without a state passes None through.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from xprnn.affine import affine, affine_back
from xprnn.around import Around
from xprnn.arrays import Array, InputError, Params, check_integers, check_shape, from_numpy, is_integer, resolve
from xprnn.checks import check_init, check_param_shapes, check_params, keep_positive
from xprnn.layers import GRU, LSTM, RNN
from xprnn.stack import Gradients

__all__ = ["Embedding", "Linear", "Sequential", "from_config"]


@dataclass(frozen=True)
class Linear:
    """The output head: y = x W' + b on the last axis, for all steps at once.

    Args:
        in_features: H >= 1.
        out_features: V >= 1.
        bias: whether b exists.

    >>> import numpy as np
    >>> head = Linear(3, 2)
    >>> params = head.init(np.random.default_rng(0), like=np.zeros(0))
    >>> head(params, np.ones((5, 4, 3)))[0].shape
    (5, 4, 2)
    """

    in_features: int
    out_features: int
    bias: bool = True

    def __post_init__(self) -> None:
        keep_positive(self, "in_features", "out_features")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""
        return {"weight": (self.out_features, self.in_features)} | ({"bias": (self.out_features,)} if self.bias else {})

    def init(self, rng: Generator, like: Array) -> Params:
        """torch's: U(-1/sqrt(in_features), 1/sqrt(in_features))."""
        check_init("Linear.init", rng, like)
        bound = 1 / np.sqrt(self.in_features)
        return {name: from_numpy(rng.uniform(-bound, bound, shape), like) for name, shape in self.shapes().items()}

    def __call__(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None]:
        """y (..., V) for x (..., H)."""
        y, _, _ = self.forward(params, x)
        return y, None

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """y (..., V), None, and the tape."""
        where = "Linear.forward"
        check_params(where, params, self.shapes())
        xp = resolve(where, {"x": x, **params})
        check_param_shapes(where, params, self.shapes())
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise InputError(
                f"{where}: x (...,H) must end in {self.in_features} features, found shape {tuple(x.shape)}"
            )
        return affine(xp, x, params["weight"], params.get("bias")), None, (xp, params, x)

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """The adjoint of forward."""
        xp, params, x = tape
        resolve("Linear.backward", {"params": params["weight"], "dy": dy})
        check_shape("Linear.backward", "dy", "(the shape of y)", dy, (*x.shape[:-1], self.out_features))
        dx, dw, db = affine_back(xp, dy, x, params["weight"])
        return Gradients(dx, None, {"weight": dw, "bias": db} if self.bias else {"weight": dw})

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """One time step: x (N, H) -> y (N, V)."""
        return self(params, x)

    def config(self) -> dict[str, Any]:
        """The configuration as JSON-able data."""
        return {"type": "Linear", "in_features": self.in_features, "out_features": self.out_features, "bias": self.bias}


@dataclass(frozen=True)
class Embedding:
    """A look-up table: integers (...) -> rows (..., D) of a (V, D) weight.

    Args:
        num_embeddings: V >= 1.
        embedding_dim: D >= 1.

    >>> import numpy as np
    >>> table = Embedding(5, 2)
    >>> params = table.init(np.random.default_rng(0), like=np.zeros(0))
    >>> table(params, np.asarray([[1, 4]]))[0].shape
    (1, 2, 2)
    """

    num_embeddings: int
    embedding_dim: int

    def __post_init__(self) -> None:
        keep_positive(self, "num_embeddings", "embedding_dim")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""
        return {"weight": (self.num_embeddings, self.embedding_dim)}

    def init(self, rng: Generator, like: Array) -> Params:
        """torch's: standard normal."""
        check_init("Embedding.init", rng, like)
        return {"weight": from_numpy(rng.standard_normal(self.shapes()["weight"]), like)}

    def __call__(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None]:
        """The rows (..., D) of the integers x (...)."""
        y, _, _ = self.forward(params, x)
        return y, None

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """The rows, None, and the tape."""
        where = "Embedding.forward"
        check_params(where, params, self.shapes())
        xp = resolve(where, dict(params), {"x": x})
        check_param_shapes(where, params, self.shapes())
        if not is_integer(xp, x):
            raise InputError(f"{where}: x must be integers in 0..{self.num_embeddings - 1}, found {x.dtype}")
        check_integers(where, "x", xp, x, self.num_embeddings)
        table = xp.permute_dims(params["weight"], (1, 0))
        return affine(xp, x, table, None), None, (xp, table, x)

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """The adjoint of forward; dx is None."""
        xp, table, x = tape
        resolve("Embedding.backward", {"params": table, "dy": dy})
        check_shape("Embedding.backward", "dy", "(the shape of y)", dy, (*x.shape, self.embedding_dim))
        _, dw, _ = affine_back(xp, dy, x, table)
        return Gradients(None, None, {"weight": xp.permute_dims(dw, (1, 0))})

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """One time step: integers (N,) -> (N, D)."""
        return self(params, x)

    def config(self) -> dict[str, Any]:
        """The configuration as JSON-able data."""
        return {"type": "Embedding", "num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}


class Sequential:
    """A chain of named parts that is itself a part: its parameters are "name.parameter".

    Its state is that of its recurrent part; with several, a dict from their names to theirs.

    Args:
        parts: name=part, in order.

    Raises:
        InputError: no parts, or something that is not a part.

    >>> import numpy as np, xprnn
    >>> model = Sequential(rnn=xprnn.RNN(3, 4), head=Linear(4, 2))
    >>> params = model.init(np.random.default_rng(0), like=np.zeros(0))
    >>> y, state, tape = model.forward(params, np.ones((5, 1, 3)))
    >>> sorted(model.backward(tape, y).dparams)[:3]
    ['head.bias', 'head.weight', 'rnn.bias_hh_l0']
    """

    __slots__ = ("parts",)
    parts: dict[str, Any]

    def __init__(self, **parts: Any) -> None:
        if not parts:
            raise InputError(
                "Sequential: at least one part is needed, as in Sequential(rnn=RNN(3, 4), head=Linear(4, 2))"
            )
        for name, part in parts.items():
            if not all(hasattr(part, verb) for verb in ("init", "forward", "backward", "step", "shapes")):
                raise InputError(f"Sequential: {name} must be a layer, found {type(part).__name__}")
        object.__setattr__(self, "parts", dict(parts))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Sequential is a frozen configuration: make a new one instead of setting {name}")

    def __repr__(self) -> str:
        return f"Sequential({', '.join(f'{n}={p!r}' for n, p in self.parts.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequential) and list(self.parts.items()) == list(other.parts.items())

    def __hash__(self) -> int:
        return hash(tuple(self.parts.items()))

    def _recurrent(self) -> list[str]:
        return [n for n, p in self.parts.items() if not isinstance(p, (Linear, Embedding, Around))]

    def _states(self, where: str, state: Any) -> dict[str, Any]:
        names = self._recurrent()
        if state is None:
            return dict.fromkeys(self.parts)
        if len(names) == 1:
            return dict.fromkeys(self.parts) | {names[0]: state}
        if not isinstance(state, dict) or state.keys() != set(names):
            raise InputError(
                f"{where}: state must be a dict with the keys {', '.join(names)}, found {type(state).__name__}"
            )
        return dict.fromkeys(self.parts) | state

    def _joined(self, states: dict[str, Any]) -> Any:
        names = self._recurrent()
        return states[names[0]] if len(names) == 1 else {n: states[n] for n in names} or None

    def _own(self, where: str, params: Params) -> dict[str, Params]:
        check_params(where, params, self.shapes())
        return {n: {k[len(n) + 1 :]: a for k, a in params.items() if k.startswith(n + ".")} for n in self.parts}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""
        return {f"{n}.{k}": s for n, p in self.parts.items() for k, s in p.shapes().items()}

    def init(self, rng: Generator, like: Array, **options: Any) -> Params:
        """Each part's own init, in order; the options go to the recurrent parts."""
        check_init("Sequential.init", rng, like)
        names = self._recurrent()
        made = {n: p.init(rng, like, **(options if n in names else {})) for n, p in self.parts.items()}
        return {f"{n}.{k}": a for n, own in made.items() for k, a in own.items()}

    def __call__(self, params: Params, x: Array, state: Any = None, **flags: Any) -> tuple[Array, Any]:
        """Inference through all parts; flags (lengths, mask, reset) go to the recurrent ones."""
        own, states = self._own("Sequential", params), self._states("Sequential", state)
        for n, part in self.parts.items():
            x, states[n] = part(own[n], x, states[n], **flags)
        return x, self._joined(states)

    def forward(self, params: Params, x: Array, state: Any = None, **flags: Any) -> tuple[Array, Any, Any]:
        """y, the final state, and the tape; flags as in a layer's forward."""
        own, states = self._own("Sequential.forward", params), self._states("Sequential.forward", state)
        tapes = {}
        for n, part in self.parts.items():
            x, states[n], tapes[n] = part.forward(own[n], x, states[n], **flags)
        return x, self._joined(states), tapes

    def backward(self, tape: Any, dy: Array | None, dstate: Any = None) -> Gradients:
        """The adjoint of forward, part by part in reverse order."""
        dstates = self._states("Sequential.backward", dstate)
        dx, grads = dy, {}
        for n, part in reversed(self.parts.items()):
            dx, dstates[n], grads[n] = part.backward(tape[n], dx, dstates[n])
        return Gradients(dx, self._joined(dstates), {f"{n}.{k}": a for n in self.parts for k, a in grads[n].items()})

    def step(self, params: Params, x: Array, state: Any = None) -> tuple[Array, Any]:
        """Streaming: one time step through all parts."""
        own, states = self._own("Sequential.step", params), self._states("Sequential.step", state)
        for n, part in self.parts.items():
            x, states[n] = part.step(own[n], x, states[n])
        return x, self._joined(states)

    def config(self) -> dict[str, Any]:
        """The configuration as JSON-able data."""
        return {"type": "Sequential", "parts": {n: p.config() for n, p in self.parts.items()}}


_TYPES: dict[str, Callable[..., Any]] = {part.__name__: part for part in (RNN, LSTM, GRU, Linear, Embedding, Around)}


def from_config(config: Any) -> Any:
    """The layer or model that `config()` described.

    Raises:
        InputError: not such a description.

    >>> from_config({"type": "Linear", "in_features": 3, "out_features": 2}).bias
    True
    """
    if not isinstance(config, dict) or not isinstance(config.get("type"), str):
        raise InputError(f"from_config: expected a dict with a type, found {str(config)[:60]}")
    kind, options = config["type"], {k: v for k, v in config.items() if k != "type"}
    if kind == "Sequential":
        parts = options.get("parts")
        if not isinstance(parts, dict):
            raise InputError("from_config: a Sequential needs a dict of parts")
        return Sequential(**{str(n): from_config(p) for n, p in parts.items()})
    if kind not in _TYPES:
        raise InputError(f"from_config: type must be one of Sequential, {', '.join(_TYPES)}, found {kind!r}")
    try:
        return _TYPES[kind](**options)
    except TypeError as error:
        raise InputError(f"from_config: {kind}: {error}") from None
