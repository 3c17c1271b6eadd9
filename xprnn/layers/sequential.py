"""Sequential: recurrent layers and the parts around them as one trainable model, which is one more layer."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from numpy.random import Generator

from xprnn.arrays.namespace import Array, InputError, Params
from xprnn.arrays.validation import check_init, check_params
from xprnn.cells.serialization import activation_of, cell_of
from xprnn.engine.call_cache import chain_step, quick_of
from xprnn.engine.layer import Calls, Quick, Streams
from xprnn.kernels.tape import Gradients, ModelTape
from xprnn.layers.base import Part
from xprnn.layers.context_shift import Around
from xprnn.layers.elementwise import Apply, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.masking import Hold, Last, Masking
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN
from xprnn.layers.sequence_ops import Flip, Merge
from xprnn.layers.shape_inference import check_widths

__all__ = ["Sequential", "from_config"]

_Flags = dict[str, Any]


class Sequential(Streams, Calls):
    """A chain of named parts that is itself a part: its parameters are "name.parameter".

    Its state is that of its recurrent part; with several, a dict from their names to theirs. A mask found by one part
    (Masking) holds for the parts after it.

    Args:
        parts: name=part, in order.

    Raises:
        InputError: no parts, something that is not a part, or a part that takes another number of features than the
            one before it gives, another order of axes (batch_first), or a time axis that a Last before it has ended.
            Parts of your own, of which this is not known, are left to the first call.

    >>> import numpy as np, xprnn
    >>> model = Sequential(rnn=xprnn.RNN(3, 4), head=Linear(4, 2))
    >>> params = model.init(np.random.default_rng(0), like=np.zeros(0))
    >>> y, state, tape = model.forward(params, np.ones((5, 1, 3)))
    >>> sorted(model.backward(tape, y).dparams)[:3]
    ['head.bias', 'head.weight', 'rnn.bias_hh_l0']
    """

    parts: MappingProxyType[str, Any]  # to read: a configuration is frozen

    def __init__(self, /, **parts: Any) -> None:
        if not parts:
            raise InputError(
                "Sequential: at least one part is needed, as in Sequential(rnn=RNN(3, 4), head=Linear(4, 2))"
            )
        for name, part in parts.items():
            if not all(hasattr(part, verb) for verb in ("init", "forward", "backward", "step", "shapes")):
                raise InputError(f"Sequential: {name} must be a layer, found {type(part).__name__}")
        if type(self) is Sequential:  # a class of your own may do more between its parts
            check_widths("Sequential", parts, Sequential)
        object.__setattr__(self, "parts", MappingProxyType(dict(parts)))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": dict(self.parts)}  # a proxy can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "parts": MappingProxyType(dict(state["parts"]))})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Sequential is a frozen configuration: make a new one instead of setting {name}")

    def __repr__(self) -> str:
        return f"Sequential({', '.join(f'{n}={p!r}' for n, p in self.parts.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequential) and list(self.parts.items()) == list(other.parts.items())

    def __hash__(self) -> int:
        return hash(tuple(self.parts.items()))

    def _recurrent(self) -> list[str]:
        return [n for n, p in self.parts.items() if not _stateless(p)]

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

    def __call__(
        self, params: Params, x: Array, state: Any = None, lengths: Any = None, mask: Any = None, reset: Any = None
    ) -> tuple[Array, Any]:
        """Inference through all parts; lengths, mask and reset go to the recurrent ones."""
        x, final, _ = self._call(params, x, state, {"lengths": lengths, "mask": mask, "reset": reset})
        return x, final

    def _call(self, params: Params, x: Any, state: Any, flags: _Flags) -> tuple[Any, Any, _Flags]:
        own, states = self._own("Sequential", params), self._states("Sequential", state)
        for n, part in self.parts.items():
            if _is_chain(part):
                x, states[n], flags = part._call(own[n], x, states[n], flags)
                continue
            y, states[n] = part(own[n], x, states[n], **flags)
            x, flags = y, _following(part, x, flags)
        return x, self._joined(states), flags

    def forward(
        self,
        params: Params,
        x: Array,
        state: Any = None,
        lengths: Any = None,
        mask: Any = None,
        reset: Any = None,
        **options: Any,
    ) -> tuple[Array, Any, Any]:
        """y, the final state, and the tape; lengths, mask, reset and options as in a layer's forward."""
        x, final, tape, _ = self._forward(
            params, x, state, {"lengths": lengths, "mask": mask, "reset": reset, **options}
        )
        return x, final, tape

    def _forward(self, params: Params, x: Any, state: Any, flags: _Flags) -> tuple[Any, Any, Any, _Flags]:
        own, states = self._own("Sequential.forward", params), self._states("Sequential.forward", state)
        tapes = ModelTape()
        for n, part in self.parts.items():
            if _is_chain(part):
                x, states[n], tapes[n], flags = part._forward(own[n], x, states[n], flags)
                continue
            y, states[n], tapes[n] = part.forward(own[n], x, states[n], **flags)
            x, flags = y, _following(part, x, flags)
        return x, self._joined(states), tapes, flags

    def explain(
        self, params: Params, x: Array, lengths: Any = None, mask: Any = None, reset: Any = None, state: Any = None
    ) -> str:
        """A line for each layer and direction of each recurrent part, under the part's name: which kernel it runs on.

        See the layers' own `explain`. What reaches a part is found by running the parts before it, without a tape.

        Args:
            params: as from `init`.
            x, lengths, mask, reset, state: as `forward` gets them.

        Raises:
            InputError: what `forward` would refuse too.

        >>> import numpy as np, xprnn
        >>> model = Sequential(read=Embedding(5, 3), rnn=xprnn.GRU(3, 4), head=Linear(4, 2))
        >>> params = model.init(np.random.default_rng(0), like=np.zeros(0, np.float16))
        >>> print(model.explain(params, np.zeros((5, 2), dtype=int)))
        rnn, layer 0, forward: NumPy in place (not compiled: float16 is neither float32 nor float64)
        """
        own, states = self._own("Sequential.explain", params), self._states("Sequential.explain", state)
        flags, lines = {"lengths": lengths, "mask": mask, "reset": reset}, []
        last = max((k for k, n in enumerate(self.parts) if n in self._recurrent()), default=-1)
        for k, (n, part) in enumerate(self.parts.items()):
            if hasattr(part, "explain") and n in self._recurrent():
                more = {"state": states[n]} if isinstance(part, Sequential) else {}
                lines += [f"{n}, {line}" for line in part.explain(own[n], x, **flags, **more).splitlines()]
            if k >= last:
                break
            if _is_chain(part):
                x, _, flags = part._call(own[n], x, states[n], flags)
            else:
                y, _ = part(own[n], x, states[n], **flags)
                x, flags = y, _following(part, x, flags)
        return "\n".join(lines)

    def backward(self, tape: Any, dy: Array | None, dstate: Any = None) -> Gradients:
        """The adjoint of forward, part by part in reverse order."""
        if not isinstance(tape, dict) or tape.keys() != self.parts.keys():
            raise InputError("Sequential.backward: tape must be what this model's forward returned")
        dstates = self._states("Sequential.backward", dstate)
        dx, grads = dy, {}
        for n, part in reversed([*self.parts.items()]):
            dx, dstates[n], grads[n] = part.backward(tape[n], dx, dstates[n])
        return Gradients(dx, self._joined(dstates), {f"{n}.{k}": a for n in self.parts for k, a in grads[n].items()})

    def step(self, params: Params, x: Array, state: Any = None) -> tuple[Array, Any]:
        """Streaming: one time step through all parts."""
        done = self._step(params, x, state)
        if done is not None:
            return done
        own, states = self._own("Sequential.step", params), self._states("Sequential.step", state)
        for n, part in self.parts.items():
            x, states[n] = part.step(own[n], x, states[n])
        return x, self._joined(states)

    def quick(self, prefix: str, count: int) -> Quick | None:
        """The step for NumPy arrays that fit, of parameters under `prefix` in a dict of `count`, or None."""
        steps = {n: quick_of(p, f"{prefix}{n}.", count) for n, p in self.parts.items()}
        return None if None in steps.values() else chain_step(steps, self._recurrent())

    def config(self) -> dict[str, Any]:
        """The configuration as JSON-able data."""
        return {"type": "Sequential", "parts": {n: p.config() for n, p in self.parts.items()}}


def _is_chain(part: Any) -> bool:
    """Whether it is a Sequential whose verbs are Sequential's own: a class of your own may have others."""
    verbs = ("__call__", "forward")
    return isinstance(part, Sequential) and all(getattr(type(part), v) is getattr(Sequential, v) for v in verbs)


def _stateless(part: Any) -> bool:
    if isinstance(part, Sequential):
        return all(_stateless(p) for p in part.parts.values())
    return isinstance(part, (Linear, Embedding, Around, Part))


def _following(part: Any, x: Any, flags: _Flags) -> _Flags:
    """The lengths, mask, reset and options for the parts after this one: its own unless it says otherwise."""
    return part.following(x, flags) if hasattr(part, "following") else flags


_KINDS = (RNN, LSTM, GRU, Recurrent, Linear, Embedding, Around, Masking, Hold, Last, Flip, Merge, Apply, Softmax)
_TYPES: dict[str, Callable[..., Any]] = {part.__name__: part for part in _KINDS}


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
    if options.get("cell") is not None:
        options["cell"] = cell_of(options["cell"])
    for name in ("nonlinearity", "f"):
        if isinstance(options.get(name), dict):
            options[name] = activation_of(options[name])
    try:
        return _TYPES[kind](**options)
    except TypeError as error:
        raise InputError(f"from_config: {kind}: {error}") from None
