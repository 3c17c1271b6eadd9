"""Adapters of the libraries with automatic differentiation: torch, and Keras on JAX or torch."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.features.problem import (
    LEAK,
    D,
    FeatureProblem,
    H,
    N,
    T,
    UnsupportedFeatureError,
    public_names_containing,
    signature_error,
)
from benchmarks.features.questions import LibraryAdapter

__all__ = ["Keras", "Torch"]


class Torch(LibraryAdapter):
    """torch: nn.RNN, nn.LSTM, nn.GRU."""

    def __init__(self) -> None:
        super().__init__()
        import torch

        torch.set_num_threads(1)
        self.module, self.version = torch, torch.__version__.split("+")[0]

    def to_array(self, value: Any) -> Any:
        """Convert to a tensor."""
        return self.module.tensor(value)

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """Run the layer, with packed sequences for lengths, and autograd."""
        nn, tensor = self.module.nn, self.to_array
        layer_class = {"rnn": nn.RNN, "leaky": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[p.cell]
        if (p.mask is not None and p.lengths is None) or p.reset is not None:
            raise signature_error(layer_class.forward)
        options = {"nonlinearity": np.sin} if p.cell == "leaky" else {}  # any function of the user
        layer = layer_class(D, H, **options).to(tensor(p.dy).dtype)
        with self.module.no_grad():
            for name in ("weight_ih", "weight_hh", "bias_ih"):
                getattr(layer, f"{name}_l0").copy_(tensor(p.arrays[name]))
            layer.bias_hh_l0.zero_()
        x, h0, c0 = ((to_array or tensor)(p.arrays[k] if k == "x" else p.arrays[k][None]) for k in ("x", "h0", "c0"))
        leaves = [v.requires_grad_() for v in (x, h0, c0) if self.module.is_tensor(v)]
        rnn = nn.utils.rnn
        packed = x
        if p.lengths:
            packed = rnn.pack_padded_sequence(x, self.module.tensor(p.lengths), enforce_sorted=False)
        y, final = layer(packed, (h0, c0) if p.cell == "lstm" else h0)
        y = rnn.pad_packed_sequence(y, total_length=len(p.dy))[0] if p.lengths else y
        h = (final[0] if p.cell == "lstm" else final)[0]
        ((y * tensor(p.dy)).sum() + (h * tensor(p.dh)).sum()).backward()
        grads = {"dx": leaves[0].grad, "dh0": leaves[1].grad[0]}
        grads |= {f"d{name}": getattr(layer, f"{name}_l0").grad for name in ("weight_ih", "weight_hh", "bias_ih")}
        return {"y": y, "h": h} | grads | ({"dc0": leaves[2].grad[0]} if p.cell == "lstm" else {})

    def gru(self) -> str:
        """Compare torch's GRU, which resets after the product, with the original one."""
        return super().gru().replace("wrong:", "no, its GRU is another:")

    def column_softmax(self, x: Any) -> Any:
        """Call torch.softmax."""
        return self.module.softmax(x, 0)

    def layer_sizes(self) -> str:
        """Call the constructor with two hidden sizes."""
        self.module.nn.RNN(D, self.layer_widths, 2)
        return "yes"

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """Return output, h_n and c_n."""
        y, final = self.module.nn.LSTM(D, H).double()(self.to_array(p.arrays["x"]))
        return [y, *final]

    def gradient_checker(self) -> str:
        """Check a right gradient, and one that lacks a factor of 2, with autograd.gradcheck."""
        torch = self.module

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Any) -> Any:
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx: Any, dy: Any) -> Any:
                return dy * ctx.saved_tensors[0]

        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        right = torch.autograd.gradcheck(lambda x: x * x, x)
        wrong = torch.autograd.gradcheck(Square.apply, x, raise_exception=False)
        return "yes (autograd.gradcheck)" if right and not wrong else "no"

    def bounded_memory(self) -> str:
        """Report the arguments: torch.utils.checkpoint needs a user's loop over the chunks."""
        raise signature_error(self.module.nn.LSTM.forward)


class Keras(LibraryAdapter):
    """Keras: SimpleRNN, LSTM, GRU and RNN, on the back end that KERAS_BACKEND names."""

    def __init__(self) -> None:
        super().__init__(precision="float32")  # some back ends compute in float32 for any input
        import keras

        self.module, self.backend = keras, keras.backend.backend()
        self.version = f"{keras.__version__} on {self.backend} {metadata.version(self.backend).split('+')[0]}"

    def to_array(self, value: Any) -> Any:
        """Convert to the back end's tensor."""
        return self.module.ops.convert_to_tensor(value)

    def layer(self, cell: str, dtype: str) -> Any:
        """Create a layer that returns y, with zeros at masked steps, and the states."""
        layers = self.module.layers
        options = {"return_sequences": True, "return_state": True, "zero_output_for_mask": True, "dtype": dtype}
        if cell == "leaky":
            return layers.RNN(self.leaky_cell(dtype), **options)
        if cell == "gru":
            return layers.GRU(H, reset_after=False, **options)
        return (layers.SimpleRNN if cell == "rnn" else layers.LSTM)(H, **options)

    def leaky_cell(self, dtype: str) -> Any:
        """Create the user-defined cell as a subclass, as Keras's guide shows."""
        ops = self.module.ops

        class Leaky(self.module.layers.SimpleRNNCell):  # type: ignore[misc, name-defined]
            def call(self, x: Any, states: Any, training: bool = False) -> Any:
                h = states[0]
                a = ops.tanh(ops.matmul(x, self.kernel) + ops.matmul(h, self.recurrent_kernel) + self.bias)
                h = (1 - LEAK) * h + LEAK * a
                return h, [h]

        return Leaky(H, dtype=dtype)

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """Run the layer; the back end differentiates with respect to x, the states and the weights."""
        if p.reset is not None:
            raise signature_error(self.module.layers.LSTM.call, exclude=("sequence",))
        to_array, pair, a = to_array or self.to_array, p.cell == "lstm", p.arrays
        layer = self.layer(p.cell, str(p.dtype))
        layer.build((N, len(a["x"]), D))
        weights = [
            a["weight_ih"].T,
            a["weight_hh"].T,
            a["bias_ih"],
        ]  # Keras stores (D, GH), and the gates of the GRU as z,r,n
        if p.cell == "gru":
            weights = [swap_reset_update(w) for w in weights]
        layer.set_weights(weights)
        states = [a["h0"], a["c0"]][: 1 + pair]
        mask = None if p.mask is None else self.to_array(p.mask.T.copy())
        leaves = [to_array(np.ascontiguousarray(a["x"].transpose(1, 0, 2))), *map(to_array, states)]
        grad = self.gradients_by_jax if self.backend == "jax" else self.gradients_by_torch
        (y, h), (dx, *dstates), dweights = grad(layer, leaves, mask, (p.dy.transpose(1, 0, 2), p.dh))
        if p.cell == "gru":
            dweights = [swap_reset_update(w) for w in dweights]
        results = {"y": y.swapaxes(1, 0), "dx": dx.swapaxes(1, 0), "h": h}
        results |= {"dweight_ih": dweights[0].T, "dweight_hh": dweights[1].T, "dbias_ih": dweights[2]}
        return results | {f"d{k}0": d for k, d in zip("hc", dstates, strict=False)}

    def gradients_by_jax(self, layer: Any, leaves: list[Any], mask: Any, cotangents: Any) -> Any:
        """Differentiate stateless_call by jax.vjp."""
        import jax

        fixed = [v.value for v in layer.non_trainable_variables]

        def function(leaves: Any, weights: Any) -> Any:
            out, _ = layer.stateless_call(weights, fixed, leaves[0], initial_state=leaves[1:], mask=mask)
            return out[0], out[1]

        out, back = jax.vjp(function, leaves, [v.value for v in layer.trainable_variables])
        return out, *back(tuple(map(jax.numpy.asarray, cotangents)))

    def gradients_by_torch(self, layer: Any, leaves: list[Any], mask: Any, cotangents: Any) -> Any:
        """Differentiate by torch's autograd."""
        import torch

        weights = [v.value for v in layer.trainable_variables]
        leaves = [torch.as_tensor(v).requires_grad_() for v in leaves]
        y, h, *_ = layer(leaves[0], initial_state=leaves[1:], mask=mask)
        grads = torch.autograd.grad([y, h], [*leaves, *weights], [torch.tensor(c) for c in cotangents])
        return (y, h), grads[: len(leaves)], grads[len(leaves) :]

    def column_softmax(self, x: Any) -> Any:
        """Call keras.ops.softmax."""
        return self.module.ops.softmax(x, axis=0)

    def layer_sizes(self) -> str:
        """Create one layer from a list of cells."""
        layers = self.module.layers
        y = layers.RNN([layers.SimpleRNNCell(h) for h in self.layer_widths])(self.to_array(np.ones((N, T, D), "f")))
        return "yes" if y.shape[-1] == self.layer_widths[-1] else "no"

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """Return all outputs with return_sequences and return_state."""
        layer = self.layer("lstm", str(p.dtype))
        layer.build((N, T, D))
        layer.set_weights([p.arrays["weight_ih"].T, p.arrays["weight_hh"].T, p.arrays["bias_ih"]])
        return list(layer(self.to_array(np.ascontiguousarray(p.arrays["x"].transpose(1, 0, 2)))))

    def gradient_checker(self) -> str:
        """Search the public names for a gradient checker."""
        modules = (self.module, self.module.ops, self.module.utils)
        names = [name for module in modules for name in public_names_containing(module, "grad", "check")]
        raise UnsupportedFeatureError(f"names with 'grad' and 'check': {', '.join(names) or 'none'}")

    def bounded_memory(self) -> str:
        """Report the arguments: keras.remat runs a whole layer again, with all its steps."""
        raise signature_error(self.module.layers.LSTM.call)


def swap_reset_update(w: Any) -> Any:
    """Swap the reset and update gates on the last axis."""
    parts = w[..., :H], w[..., H : 2 * H], w[..., 2 * H :]
    order = (parts[1], parts[0], parts[2])
    if isinstance(w, np.ndarray):
        return np.concatenate(order, -1)
    from keras import ops

    return ops.concatenate(order, -1)
