"""Sequential: named layers that run one after the other, as one trainable model."""

from collections.abc import Callable
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeGuard

from numpy.random import Generator

from xprnn.arrays.namespace import Array, InputError, Params
from xprnn.arrays.validation import check_init, check_params
from xprnn.cells.serialization import activation_from_config, cell_from_config
from xprnn.engine.fast_steps import make_layer_step, make_sequential_step
from xprnn.engine.layer import CallsForward, FastStep, Steppable
from xprnn.kernels.tape import Gradients, ModelTape
from xprnn.layers.base import Layer, StatelessLayer
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

_CACHED_ATTRIBUTES = ("_parameter_shapes", "_parameter_names")
_Flags = dict[str, Any]


class Sequential(Steppable, CallsForward):
    """Run named layers one after the other; a Sequential is itself a layer.

    Its parameters are named "layer.parameter". Its state is the state of its recurrent layer; with several, it is a
    dict from their names to their states. A mask that a layer detects (Masking) applies to all layers after it.

    Args:
        layers: name=layer, in order.

    Raises:
        InputError: there is no layer, an argument is not a layer, or a layer does not accept the number of features,
            the order of axes (batch_first) or the missing time axis (LastStep) of the layer before it. User-defined
            layers are not checked here: they raise at their first call.

    >>> import numpy as np, xprnn
    >>> model = Sequential(rnn=xprnn.RNN(3, 4), head=Linear(4, 2))
    >>> params = model.init(np.random.default_rng(0), like=np.zeros(0))
    >>> y, state, tape = model.forward(params, np.ones((5, 1, 3)))
    >>> sorted(model.backward(tape, y).dparams)[:3]
    ['head.bias', 'head.weight', 'rnn.bias_hh_l0']
    """

    layers: MappingProxyType[str, Layer]  # read-only, as a configuration is immutable

    def __init__(self, /, **layers: Layer) -> None:
        if not layers:
            raise InputError(
                "Sequential: at least one layer is needed, as in Sequential(rnn=RNN(3, 4), head=Linear(4, 2))"
            )
        for name, layer in layers.items():
            if not all(hasattr(layer, method) for method in ("init", "forward", "backward", "step", "shapes")):
                raise InputError(f"Sequential: {name} must be a layer, found {type(layer).__name__}")
        if type(self) is Sequential:  # a subclass may transform arrays between its layers
            check_compatible("Sequential", layers, Sequential)
        object.__setattr__(self, "layers", MappingProxyType(dict(layers)))

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: value for k, value in super().__getstate__().items() if k not in _CACHED_ATTRIBUTES}
        return {**kept, "layers": dict(self.layers)}  # a mappingproxy cannot be copied or pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "layers": MappingProxyType(dict(state["layers"]))})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Sequential is a frozen configuration: make a new one instead of setting {name}")

    def __repr__(self) -> str:
        return f"Sequential({', '.join(f'{name}={layer!r}' for name, layer in self.layers.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequential) and list(self.layers.items()) == list(other.layers.items())

    def __hash__(self) -> int:
        return hash(tuple(self.layers.items()))

    def _stateful_names(self) -> list[str]:
        return [name for name, layer in self.layers.items() if not _is_stateless(layer)]

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
        return states[names[0]] if len(names) == 1 else {name: states[name] for name in names} or None

    @cached_property
    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The result of `shapes`, kept because a model is immutable: every call checks it."""
        return self.shapes()

    @cached_property
    def _parameter_names(self) -> dict[str, list[tuple[str, str]]]:
        """(name in the layer, name in the model) of the parameters of every layer."""
        names = self._parameter_shapes
        return {k: [(name[len(k) + 1 :], name) for name in names if name.startswith(f"{k}.")] for k in self.layers}

    def _split_params(self, where: str, params: Params) -> dict[str, Params]:
        check_params(where, params, self._parameter_shapes)
        return {layer: {key: params[name] for key, name in names} for layer, names in self._parameter_names.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name."""
        return {f"{name}.{key}": shape for name, layer in self.layers.items() for key, shape in layer.shapes().items()}

    def init(self, rng: Generator, like: Array, **options: Any) -> Params:
        """Draw initial parameters, layer by layer.

        Args:
            rng: a numpy.random.Generator; every array library gets the same numbers.
            like: an array whose library, dtype and device the parameters take.
            options: options of the recurrent layers' `init`, such as scheme="glorot".

        Returns:
            dict of arrays with the names and shapes of `shapes()`.
        """
        check_init("Sequential.init", rng, like)
        stateful = self._stateful_names()
        return {
            f"{name}.{key}": array
            for name, layer in self.layers.items()
            for key, array in layer.init(rng, like, **(options if name in stateful else {})).items()
        }

    def __call__(
        self, params: Params, x: Array, state: Any = None, lengths: Any = None, mask: Any = None, reset: Any = None
    ) -> tuple[Array, Any]:
        """Run the model for inference: return y and the final state, without tape and dropout.

        lengths, mask and reset go to the recurrent layers; see Recurrent.forward.
        """
        x, final, _ = self._call(params, x, state, {"lengths": lengths, "mask": mask, "reset": reset})
        return x, final

    def _call(self, params: Params, x: Any, state: Any, flags: _Flags) -> tuple[Any, Any, _Flags]:
        """Return y, the final state, and the flags for layers after this model."""
        layer_params, states = self._split_params("Sequential", params), self._unpack_states("Sequential", state)
        for name, layer in self.layers.items():
            if _is_plain_sequential(layer):
                x, states[name], flags = layer._call(layer_params[name], x, states[name], flags)
                continue
            y, states[name] = layer(layer_params[name], x, states[name], **flags)
            x, flags = y, _transform_mask(layer, x, flags)
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
        """Return y, the final state, and the tape for `backward`.

        state, lengths, mask, reset and options (rng, checkpoint) go to the recurrent layers; see Recurrent.forward.
        """
        x, final, tape, _ = self._forward(
            params, x, state, {"lengths": lengths, "mask": mask, "reset": reset, **options}
        )
        return x, final, tape

    def _forward(self, params: Params, x: Any, state: Any, flags: _Flags) -> tuple[Any, Any, Any, _Flags]:
        """Return y, the final state, the tape, and the flags for layers after this model."""
        where = "Sequential.forward"
        layer_params, states = self._split_params(where, params), self._unpack_states(where, state)
        tapes = ModelTape()
        for name, layer in self.layers.items():
            if _is_plain_sequential(layer):
                x, states[name], tapes[name], flags = layer._forward(layer_params[name], x, states[name], flags)
                continue
            y, states[name], tapes[name] = layer.forward(layer_params[name], x, states[name], **flags)
            x, flags = y, _transform_mask(layer, x, flags)
        return x, self._pack_states(states), tapes, flags

    def explain(
        self, params: Params, x: Array, lengths: Any = None, mask: Any = None, reset: Any = None, state: Any = None
    ) -> str:
        """Return one line for each layer and direction of each recurrent layer: its name and the kernel that will run.

        The layers before the last recurrent one are run without a tape, because the kernel depends on their output. See
        also `explain` of a recurrent layer.

        Args:
            params: as from `init`.
            x: as in `forward`.
            lengths: as in `forward`.
            mask: as in `forward`.
            reset: as in `forward`.
            state: as in `forward`.

        Raises:
            InputError: as `forward`.

        >>> import numpy as np, xprnn
        >>> model = Sequential(read=Embedding(5, 3), rnn=xprnn.GRU(3, 4), head=Linear(4, 2))
        >>> params = model.init(np.random.default_rng(0), like=np.zeros(0, np.float16))
        >>> print(model.explain(params, np.zeros((5, 2), dtype=int)))
        rnn, layer 0, forward: NumPy in place (not compiled: float16 is neither float32 nor float64)
        """
        where, stateful = "Sequential.explain", self._stateful_names()
        layer_params, states = self._split_params(where, params), self._unpack_states(where, state)
        flags, lines = {"lengths": lengths, "mask": mask, "reset": reset}, []
        last_stateful = max((k for k, name in enumerate(self.layers) if name in stateful), default=-1)
        for k, (name, layer) in enumerate(self.layers.items()):
            if hasattr(layer, "explain") and name in stateful:
                options = {"state": states[name]} if isinstance(layer, Sequential) else {}
                report = layer.explain(layer_params[name], x, **flags, **options)
                lines += [f"{name}, {line}" for line in report.splitlines()]
            if k >= last_stateful:
                break
            if _is_plain_sequential(layer):
                x, _, flags = layer._call(layer_params[name], x, states[name], flags)
            else:
                y, _ = layer(layer_params[name], x, states[name], **flags)
                x, flags = y, _transform_mask(layer, x, flags)
        return "\n".join(lines)

    def backward(self, tape: Any, dy: Array | None, dstate: Any = None) -> Gradients:
        """Return the gradients of x, the initial state and all parameters.

        Args:
            tape: the tape that `forward` returned.
            dy: cotangent of y, or None for zero.
            dstate: cotangent of the final state, in its structure, or None for zero.
        """
        if not isinstance(tape, dict) or tape.keys() != self.layers.keys():
            raise InputError("Sequential.backward: tape must be what this model's forward returned")
        dstates = self._unpack_states("Sequential.backward", dstate)
        dx, dparams = dy, {}
        for name, layer in reversed([*self.layers.items()]):
            dx, dstates[name], dparams[name] = layer.backward(tape[name], dx, dstates[name])
        named = {f"{name}.{key}": array for name in self.layers for key, array in dparams[name].items()}
        return Gradients(dx, self._pack_states(dstates), named)

    def step(self, params: Params, x: Array, state: Any = None) -> tuple[Array, Any]:
        """Compute one time step of a stream through all layers: return y and the next state."""
        result = self._fast_step(params, x, state)
        if result is not None:
            return result
        where = "Sequential.step"
        layer_params, states = self._split_params(where, params), self._unpack_states(where, state)
        for name, layer in self.layers.items():
            x, states[name] = layer.step(layer_params[name], x, states[name])
        return x, self._pack_states(states)

    def make_fast_step(self, prefix: str, count: int) -> FastStep | None:
        """Return the fast path of `step` for parameters named `prefix` + name in a dict of `count`, or None."""
        steps = {name: make_layer_step(layer, f"{prefix}{name}.", count) for name, layer in self.layers.items()}
        return None if None in steps.values() else make_sequential_step(steps, self._stateful_names())

    def config(self) -> dict[str, Any]:
        """Return the configuration as data that JSON can hold; `from_config` reads it."""
        return {"type": "Sequential", "layers": {name: layer.config() for name, layer in self.layers.items()}}


def _is_plain_sequential(layer: Any) -> TypeGuard[Sequential]:
    """Return True for a Sequential, or a subclass that overrides neither `__call__` nor `forward`."""
    methods = ("__call__", "forward")
    return isinstance(layer, Sequential) and all(getattr(type(layer), m) is getattr(Sequential, m) for m in methods)


def _is_stateless(layer: Any) -> bool:
    if isinstance(layer, Sequential):
        return all(_is_stateless(inner) for inner in layer.layers.values())
    return isinstance(layer, (Linear, Embedding, ContextShift, StatelessLayer))


def _transform_mask(layer: Any, x: Any, flags: _Flags) -> _Flags:
    """Return the flags for the layers after `layer`: unchanged unless it has `transform_mask`."""
    return layer.transform_mask(x, flags) if hasattr(layer, "transform_mask") else flags


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
_LAYER_TYPES: dict[str, Callable[..., Any]] = {cls.__name__: cls for cls in _LAYER_CLASSES}


def from_config(config: Any) -> Any:
    """Build the layer or model that `config()` described.

    Args:
        config: a dict with "type" and the options of the layer, as `config()` returns it.

    Returns:
        A Layer of the class that "type" names.

    Raises:
        InputError: an unknown type, or options that the layer does not accept.

    >>> from_config({"type": "Linear", "in_features": 3, "out_features": 2}).bias
    True
    """
    if not isinstance(config, dict) or not isinstance(config.get("type"), str):
        raise InputError(f"from_config: expected a dict with a type, found {str(config)[:60]}")
    kind, options = config["type"], {k: v for k, v in config.items() if k != "type"}
    if kind == "Sequential":
        layers = options.get("layers")
        if not isinstance(layers, dict):
            raise InputError("from_config: a Sequential needs a dict of layers")
        return Sequential(**{str(name): from_config(layer) for name, layer in layers.items()})
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
