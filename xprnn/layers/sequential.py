"""Sequential: recurrent layers and the parts around them as one trainable model, which is one more layer."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from numpy.random import Generator

from xprnn.arrays.namespace import Array, InputError, Params
from xprnn.arrays.validation import check_init, check_params
from xprnn.cells.serialization import activation_from_config, cell_from_config
from xprnn.engine.call_cache import make_layer_step, make_sequential_step
from xprnn.engine.layer import CallsForward, FastStep, Steppable
from xprnn.kernels.tape import Gradients, ModelTape
from xprnn.layers.base import StatelessLayer
from xprnn.layers.context_shift import ContextShift
from xprnn.layers.elementwise import ActivationLayer, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.masking import HoldLastOutput, LastStep, Masking
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN
from xprnn.layers.sequence_ops import MergeDirections, ReverseTime
from xprnn.layers.shape_inference import check_compatible

__all__ = ["Sequential", "from_config"]

_Flags = dict[str, Any]


class Sequential(Steppable, CallsForward):
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

    layers: MappingProxyType[str, Any]  # to read: a configuration is frozen

    def __init__(self, /, **parts: Any) -> None:
        if not parts:
            raise InputError(
                "Sequential: at least one part is needed, as in Sequential(rnn=RNN(3, 4), head=Linear(4, 2))"
            )
        for name, part in parts.items():
            if not all(hasattr(part, verb) for verb in ("init", "forward", "backward", "step", "shapes")):
                raise InputError(f"Sequential: {name} must be a layer, found {type(part).__name__}")
        if type(self) is Sequential:  # a class of your own may do more between its parts
            check_compatible("Sequential", parts, Sequential)
        object.__setattr__(self, "layers", MappingProxyType(dict(parts)))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "layers": dict(self.layers)}  # a proxy can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "layers": MappingProxyType(dict(state["layers"]))})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Sequential is a frozen configuration: make a new one instead of setting {name}")

    def __repr__(self) -> str:
        return f"Sequential({', '.join(f'{n}={p!r}' for n, p in self.layers.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequential) and list(self.layers.items()) == list(other.layers.items())

    def __hash__(self) -> int:
        return hash(tuple(self.layers.items()))

    def _stateful_names(self) -> list[str]:
        return [n for n, p in self.layers.items() if not _is_stateless(p)]

    def _unpack_states(self, where: str, state: Any) -> dict[str, Any]:
        names = self._stateful_names()
        if state is None:
            return dict.fromkeys(self.layers)
        if len(names) == 1:
            return dict.fromkeys(self.layers) | {names[0]: state}
        if not isinstance(state, dict) or state.keys() != set(names):
            raise InputError(
                f"{where}: state must be a dict with the keys {', '.join(names)}, found {type(state).__name__}"
            )
        return dict.fromkeys(self.layers) | state

    def _pack_states(self, states: dict[str, Any]) -> Any:
        names = self._stateful_names()
        return states[names[0]] if len(names) == 1 else {n: states[n] for n in names} or None

    def _split_params(self, where: str, params: Params) -> dict[str, Params]:
        check_params(where, params, self.shapes())
        return {n: {k[len(n) + 1 :]: a for k, a in params.items() if k.startswith(n + ".")} for n in self.layers}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""
        return {f"{n}.{k}": s for n, p in self.layers.items() for k, s in p.shapes().items()}

    def init(self, rng: Generator, like: Array, **options: Any) -> Params:
        """Each part's own init, in order; the options go to the recurrent parts."""
        check_init("Sequential.init", rng, like)
        names = self._stateful_names()
        made = {n: p.init(rng, like, **(options if n in names else {})) for n, p in self.layers.items()}
        return {f"{n}.{k}": a for n, own in made.items() for k, a in own.items()}

    def __call__(
        self, params: Params, x: Array, state: Any = None, lengths: Any = None, mask: Any = None, reset: Any = None
    ) -> tuple[Array, Any]:
        """Inference through all parts; lengths, mask and reset go to the recurrent ones."""
        x, final, _ = self._call(params, x, state, {"lengths": lengths, "mask": mask, "reset": reset})
        return x, final

    def _call(self, params: Params, x: Any, state: Any, flags: _Flags) -> tuple[Any, Any, _Flags]:
        own, states = self._split_params("Sequential", params), self._unpack_states("Sequential", state)
        for n, part in self.layers.items():
            if _is_plain_sequential(part):
                x, states[n], flags = part._call(own[n], x, states[n], flags)
                continue
            y, states[n] = part(own[n], x, states[n], **flags)
            x, flags = y, _transform_mask(part, x, flags)
        return x, self._pack_states(states), flags

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
        own, states = self._split_params("Sequential.forward", params), self._unpack_states("Sequential.forward", state)
        tapes = ModelTape()
        for n, part in self.layers.items():
            if _is_plain_sequential(part):
                x, states[n], tapes[n], flags = part._forward(own[n], x, states[n], flags)
                continue
            y, states[n], tapes[n] = part.forward(own[n], x, states[n], **flags)
            x, flags = y, _transform_mask(part, x, flags)
        return x, self._pack_states(states), tapes, flags

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
        own, states = self._split_params("Sequential.explain", params), self._unpack_states("Sequential.explain", state)
        flags, lines = {"lengths": lengths, "mask": mask, "reset": reset}, []
        last = max((k for k, n in enumerate(self.layers) if n in self._stateful_names()), default=-1)
        for k, (n, part) in enumerate(self.layers.items()):
            if hasattr(part, "explain") and n in self._stateful_names():
                more = {"state": states[n]} if isinstance(part, Sequential) else {}
                lines += [f"{n}, {line}" for line in part.explain(own[n], x, **flags, **more).splitlines()]
            if k >= last:
                break
            if _is_plain_sequential(part):
                x, _, flags = part._call(own[n], x, states[n], flags)
            else:
                y, _ = part(own[n], x, states[n], **flags)
                x, flags = y, _transform_mask(part, x, flags)
        return "\n".join(lines)

    def backward(self, tape: Any, dy: Array | None, dstate: Any = None) -> Gradients:
        """The adjoint of forward, part by part in reverse order."""
        if not isinstance(tape, dict) or tape.keys() != self.layers.keys():
            raise InputError("Sequential.backward: tape must be what this model's forward returned")
        dstates = self._unpack_states("Sequential.backward", dstate)
        dx, grads = dy, {}
        for n, part in reversed([*self.layers.items()]):
            dx, dstates[n], grads[n] = part.backward(tape[n], dx, dstates[n])
        return Gradients(
            dx, self._pack_states(dstates), {f"{n}.{k}": a for n in self.layers for k, a in grads[n].items()}
        )

    def step(self, params: Params, x: Array, state: Any = None) -> tuple[Array, Any]:
        """Streaming: one time step through all parts."""
        done = self._fast_step(params, x, state)
        if done is not None:
            return done
        own, states = self._split_params("Sequential.step", params), self._unpack_states("Sequential.step", state)
        for n, part in self.layers.items():
            x, states[n] = part.step(own[n], x, states[n])
        return x, self._pack_states(states)

    def make_fast_step(self, prefix: str, count: int) -> FastStep | None:
        """The step for NumPy arrays that fit, of parameters under `prefix` in a dict of `count`, or None."""
        steps = {n: make_layer_step(p, f"{prefix}{n}.", count) for n, p in self.layers.items()}
        return None if None in steps.values() else make_sequential_step(steps, self._stateful_names())

    def config(self) -> dict[str, Any]:
        """The configuration as JSON-able data."""
        return {"type": "Sequential", "layers": {n: p.config() for n, p in self.layers.items()}}


def _is_plain_sequential(part: Any) -> bool:
    """Whether it is a Sequential whose verbs are Sequential's own: a class of your own may have others."""
    verbs = ("__call__", "forward")
    return isinstance(part, Sequential) and all(getattr(type(part), v) is getattr(Sequential, v) for v in verbs)


def _is_stateless(part: Any) -> bool:
    if isinstance(part, Sequential):
        return all(_is_stateless(p) for p in part.layers.values())
    return isinstance(part, (Linear, Embedding, ContextShift, StatelessLayer))


def _transform_mask(part: Any, x: Any, flags: _Flags) -> _Flags:
    """The lengths, mask, reset and options for the parts after this one: its own unless it says otherwise."""
    return part.transform_mask(x, flags) if hasattr(part, "transform_mask") else flags


_LAYER_CLASSES = (
    RNN,
    LSTM,
    GRU,
    Recurrent,
    Linear,
    Embedding,
    ContextShift,
    Masking,
    HoldLastOutput,
    LastStep,
    ReverseTime,
    MergeDirections,
    ActivationLayer,
    Softmax,
)
_LAYER_TYPES: dict[str, Callable[..., Any]] = {part.__name__: part for part in _LAYER_CLASSES}


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
        parts = options.get("layers")
        if not isinstance(parts, dict):
            raise InputError("from_config: a Sequential needs a dict of layers")
        return Sequential(**{str(n): from_config(p) for n, p in parts.items()})
    if kind not in _LAYER_TYPES:
        raise InputError(f"from_config: type must be one of Sequential, {', '.join(_LAYER_TYPES)}, found {kind!r}")
    if options.get("cell") is not None:
        options["cell"] = cell_from_config(options["cell"])
    for name in ("nonlinearity", "f"):
        if isinstance(options.get(name), dict):
            options[name] = activation_from_config(options[name])
    try:
        return _LAYER_TYPES[kind](**options)
    except TypeError as error:
        raise InputError(f"from_config: {kind}: {error}") from None
