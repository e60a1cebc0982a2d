"""`zo-mlx convert`."""

import argparse
import dataclasses
import json
from typing import Any, get_args

from .. import convert
from ..convert.masks import Mask
from ..convert.quantize import MODES, QUANT_RECIPES
from ..convert.select import Scope
from . import add_command


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "convert", _run, "Quantize a model and find its sensitive weights.")
    p.add_argument("--hf-path", "--model", required=True, help="Hugging Face or MLX directory, hub id, or .gguf file.")
    p.add_argument("--mlx-path", default="mlx_model", help="Directory to write; must not exist.")
    p.add_argument("-q", "--quantize", action="store_true", help="Accepted for mlx-lm's sake: always on here.")
    p.add_argument("--q-bits", type=int, help="Bits per weight (default: 4).")
    p.add_argument("--q-group-size", type=int, help="Weights that share a scale (default: 64).")
    p.add_argument("--q-mode", choices=MODES, default="affine", help="Kind of quantization.")
    p.add_argument("--quant-predicate", choices=QUANT_RECIPES, help="mlx-lm's recipe of mixed bits.")
    p.add_argument("--dtype", help="float16, bfloat16 or float32 for what stays unquantized; default: the source's.")
    p.add_argument("--density", type=float, default=1e-3, help="Fraction of the linear layers' weights to train.")
    p.add_argument("--scope", choices=get_args(Scope), default="global", help="One threshold, or one per tensor.")
    p.add_argument("--mask", choices=get_args(Mask), default="sensitive", help="Which weights; others to compare with.")
    p.add_argument("--isolate", action="store_true", help="Leave sensitive weights out of the quantizer's range.")
    p.add_argument("--calibration-data", metavar="FILE", help="Text file; default: the text in the package.")
    p.add_argument("--num-samples", type=int, default=16, help="Calibration sequences.")
    p.add_argument("--sequence-length", type=int, default=256, help="Tokens in each.")
    p.add_argument("--seed", type=int, default=0, help="Decides which parts of the text are taken.")
    p.add_argument("--perplexity-data", metavar="FILE", help="Text file to measure perplexity on, before and after.")
    p.add_argument("--revision", help="Branch, tag or commit of a hub id.")
    p.add_argument("--memory-limit", type=float, metavar="GB", help="Memory to aim at; default: one block's need.")
    p.add_argument("--upload-repo", metavar="REPO", help="Hub repository to upload the result to.")
    p.add_argument("--resume", action="store_true", help="Go on with an interrupted conversion, if there is one.")


def _run(args: argparse.Namespace) -> None:
    names = (
        "hf_path mlx_path q_bits q_group_size q_mode quant_predicate dtype density scope mask isolate calibration_data "
        "num_samples sequence_length seed perplexity_data memory_limit revision upload_repo resume"
    )
    done = convert(**{name: getattr(args, name) for name in names.split()})
    if args.json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        share = "" if done.coverage is None else f"; they hold {done.coverage:.1%} of the Fisher scores' sum"
        print(
            f"{done.mlx_path}: {done.trainable:,} of {done.candidates:,} weights are trainable{share}. "
            f"{done.seconds:.0f} s, peak {done.peak_memory / 1e9:.2f} GB"
        )
        if done.perplexity:
            before, after, trained = (
                done.perplexity[k]["perplexity"] for k in ("source", "quantized", "with_sensitive")
            )
            print(f"Perplexity {before:.3f}; quantized {after:.3f}, with the sensitive weights in place {trained:.3f}")
