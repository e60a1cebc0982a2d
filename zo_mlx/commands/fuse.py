"""`zo-mlx fuse`."""

import argparse
import dataclasses
import json
from typing import Any

from .. import fuse
from . import add_command


def add(commands: Any) -> None:
    """Its parser; flags are those of `mlx_lm.fuse` but --trust-remote-code, and --bits."""
    p = add_command(commands, "fuse", _run, "Put an adapter's values into a copy of its model.")
    p.add_argument("--model", default="mlx_model", help="MLX model directory.")
    p.add_argument("--adapter-path", default="adapters", help="Adapter directory made by `zo-mlx train`.")
    p.add_argument("--save-path", default="fused_model", help="Directory to write; must not exist.")
    p.add_argument("--bits", type=int, choices=(8, 16), default=8, help="Bits of layers that have sensitive weights.")
    p.add_argument("--dequantize", "--de-quantize", action="store_true", help="Write all weights with 16 bits.")
    p.add_argument("--export-gguf", action="store_true", help="Write a GGUF file, too; with --dequantize.")
    p.add_argument("--gguf-path", default="ggml-model-f16.gguf", help="Name of that file, in the directory to write.")
    p.add_argument("--upload-repo", metavar="REPO", help="Hub repository to upload the result to.")


def _run(args: argparse.Namespace) -> None:
    names = "model adapter_path save_path bits dequantize export_gguf gguf_path upload_repo"
    done = fuse(**{name: getattr(args, name) for name in names.split()})
    if args.json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        print(f"{done.save_path}: {done.layers} layers at {done.bits} bits, {done.bytes / 1e6:.1f} MB in all")
