"""Arguments of the commands `convert`, `info` and `run`: their rows of the command table."""

from __future__ import annotations

import argparse

__all__ = ["MODEL_COMMANDS"]

_CONVERT_EXAMPLES = """
  python -m xprnn convert model.pt model.npz
  python -m xprnn convert book book.onnx --dtype float32
  python -m xprnn convert keras-model.keras model.safetensors
  python -m xprnn convert model.weights.h5 model.npz --config model.json
  python -m xprnn convert weights.safetensors model.npz --nonlinearity relu --batch-first
Reads .safetensors (of xprnn, or a state_dict), .npz, .pt and .pth (a state_dict), .onnx, .keras and .h5.
Writes .safetensors, .npz, .pt, .pth and .onnx. An xprnn .safetensors file has torch's parameter names and shapes:
safetensors.torch.load_file reads it.
"""
_INFO_EXAMPLES = """
  python -m xprnn info book
  python -m xprnn info model.onnx
"""
_RUN_EXAMPLES = """
  python -m xprnn run model.onnx input.npy
  python -m xprnn run model.pt input.npy --stream --output output.npy
INPUT has the shape (T,N,D): T steps, N sequences, D features. It is (N,T,D) if the model is batch-first, and (T,D) for
one sequence. For an Embedding, INPUT holds integers (T,N) or (T,).
"""


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options for files that store weights without an architecture")
    group.add_argument("--nonlinearity", choices=("tanh", "relu"), help="nonlinearity of an nn.RNN (default: tanh)")
    group.add_argument("--config", metavar="FILE", help="architecture of a .weights.h5 file: a .json or .keras file")
    group.add_argument("--batch-first", action="store_true", default=None, help="layers take (N,T,D), not (T,N,D)")
    order = "names of the layers in the order in which they run, if their widths allow more than one order"
    group.add_argument("--order", nargs="+", metavar="LAYER", help=order)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="model file, or directory of a run")
    parser.add_argument("target", metavar="OUT", help="file to write; its ending selects the format")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="dtype of the parameters (default: that of IN)")
    _add_source_options(parser)


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="model file of any format, or directory of a run")
    _add_source_options(parser)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model file of any format, or directory of a run")
    parser.add_argument("input", metavar="INPUT", help="array to run it on, a .npy file")
    parser.add_argument("--output", metavar="OUT", help=".npy file to write (default: print the output)")
    parser.add_argument("--stream", action="store_true", help="run one step at a time with a carried state")
    _add_source_options(parser)


def _source_options(args: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(args, name) for name in ("nonlinearity", "batch_first", "order", "config")}


def _convert(args: argparse.Namespace) -> int:
    from xprnn.cli.model_commands import convert_command

    return convert_command(args.source, args.target, args.dtype, **_source_options(args))


def _info(args: argparse.Namespace) -> int:
    from xprnn.cli.model_commands import info_command

    return info_command(args.file, **_source_options(args))


def _run(args: argparse.Namespace) -> int:
    from xprnn.cli.model_commands import run_command

    return run_command(args.model, args.input, args.output, args.stream, **_source_options(args))


MODEL_COMMANDS = {
    "convert": ("write a model file in another format", _CONVERT_EXAMPLES, _convert_arguments, _convert),
    "info": ("print the contents of a model file", _INFO_EXAMPLES, _info_arguments, _info),
    "run": ("run a model on an array", _RUN_EXAMPLES, _run_arguments, _run),
}
