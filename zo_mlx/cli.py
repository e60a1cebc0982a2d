"""The command line: one parser per command, each a thin layer over the Python API."""

import argparse
import dataclasses
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any, get_args

from . import __version__, load, train_seeds
from . import convert as convert_model
from . import evaluate as evaluate_model
from . import generate as generate_text
from . import train as train_model
from .adapter import BEST
from .config import TrainConfig, read_yaml, value_type
from .convert.masks import Mask
from .convert.quantize import MODES, QUANT_RECIPES
from .convert.select import Scope
from .errors import UsageError, ZoError
from .info import as_text, info
from .metric import CROSS_ENTROPY
from .plot import plot
from .progress import print_line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zo-mlx", description=__import__("zo_mlx").__doc__)
    parser.add_argument("--version", action="version", version=f"zo-mlx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (_add_convert, _add_train, _add_evaluate, _add_generate, _add_info):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="Print JSON instead of text.")
    return parser


def _command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help, formatter_class=_Help)
    parser.set_defaults(run=run)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _add_convert(commands: Any) -> argparse.ArgumentParser:
    p = _command(commands, "convert", _convert, "Quantize a model and find its sensitive weights.")
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
    return p


def _add_train(commands: Any) -> argparse.ArgumentParser:
    p = _command(commands, "train", _train, "Fine-tune a converted model's sensitive weights.")
    p.add_argument("-c", "--config", metavar="YAML", help="Settings file with mlx-lm's keys; flags take precedence.")
    p.add_argument("--resume", action="store_true", help="Go on with the run in the adapter directory.")
    p.add_argument("--overwrite", action="store_true", help="Replace the run in the adapter directory.")
    p.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="Train with N seeds, from --seed on, in ADAPTER_PATH/seed-*.",
    )
    for f in dataclasses.fields(TrainConfig):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if value_type(f) is bool:
            p.add_argument(flag, action="store_true", default=None, help=text)
        elif value_type(f) is not dict:
            p.add_argument(
                flag,
                type=_number_or(f.metadata["word"]) if "word" in f.metadata else value_type(f),
                default=argparse.SUPPRESS,
                choices=f.metadata.get("choices"),
                help=text if f.default is None else f"{text} (default: {f.default})",
            )
    return p


def _number_or(word: str) -> Any:
    """An argument's type: a number, or a word in its place."""

    def number(text: str) -> float | str:
        return text if text == word else float(text)

    return number


def _add_evaluate(commands: Any) -> argparse.ArgumentParser:
    p = _command(commands, "evaluate", _evaluate, "Measure a model, with or without an adapter, on a data file.")
    _add_model(p)
    p.add_argument("--data", required=True, help="A .jsonl file, or a directory whose test.jsonl is taken.")
    p.add_argument("--batch-size", type=int, default=16, help="Examples at a time.")
    p.add_argument("--test-batches", type=int, default=-1, help="Batches to evaluate, -1 for all.")
    p.add_argument("--max-seq-length", type=int, default=2048, help="Longest sequence in tokens.")
    p.add_argument("--mask-prompt", action="store_true", help="Leave the prompt out of the loss.")
    p.add_argument(
        "--objective",
        default=CROSS_ENTROPY,
        help="Score the answers, too: accuracy, exact-match, f1, or module:function.",
    )
    p.add_argument("--max-tokens", type=int, help="Tokens of a generated answer; default: of the longest completion.")
    return p


def _add_generate(commands: Any) -> argparse.ArgumentParser:
    p = _command(commands, "generate", _generate, "Generate text with a model, with or without an adapter.")
    _add_model(p)
    p.add_argument("-p", "--prompt", required=True, help="The prompt; - reads it from standard input.")
    p.add_argument("-m", "--max-tokens", type=int, default=100, help="Longest continuation.")
    p.add_argument("--temp", type=float, default=0.0, help="Sampling temperature.")
    p.add_argument("--top-p", type=float, default=1.0, help="Nucleus sampling.")
    p.add_argument("--seed", type=int, default=None, help="Makes sampling repeatable.")
    p.add_argument("--ignore-chat-template", action="store_true", help="Take the prompt as it is.")
    return p


def _add_info(commands: Any) -> argparse.ArgumentParser:
    p = _command(commands, "info", _info, "Say what is in a model directory, an index or an adapter.")
    p.add_argument("path", help="Model directory, sensitive.safetensors, or adapter directory.")
    p.add_argument("--plot", metavar="FILE", help="Draw where the sensitive weights sit (.png, .pdf or .svg).")
    return p


def _add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="mlx_model", help="MLX model directory.")
    p.add_argument("--adapter-path", default=None, help="Adapter directory made by `zo-mlx train`.")


def _convert(args: argparse.Namespace) -> None:
    names = (
        "hf_path mlx_path q_bits q_group_size q_mode quant_predicate dtype density scope mask isolate calibration_data "
        "num_samples sequence_length seed perplexity_data memory_limit revision upload_repo resume"
    )
    done = convert_model(**{name: getattr(args, name) for name in names.split()})
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


def _train(args: argparse.Namespace) -> None:
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    flags = {k: v for k, v in vars(args).items() if k in names and v is not None}
    settings = {**(read_yaml(Path(args.config)) if args.config else {}), **flags}
    report = _print_json if args.json else _print_event
    if args.seeds is not None:
        found = train_seeds(args.seeds, resume=args.resume, overwrite=args.overwrite, report=report, **settings)
        if args.json:
            _print_json({"event": "result", **found.as_dict()})
        for name, numbers in ({} if args.json else found.spread).items():
            spread = ", ".join(f"{key} {mean:.3f} ± {deviation:.3f}" for key, (mean, deviation) in numbers.items())
            print(f"{name.capitalize()} over {args.seeds} seeds: {spread}")
        return
    result = train_model(resume=args.resume, overwrite=args.overwrite, report=report, **settings)
    if args.json:
        _print_json({"event": "result", **result.as_dict()})
    else:
        print(f"{result.adapter_path}: {result.iterations} steps, {result.adapter_bytes / 1e6:.2f} MB")
        if result.best and result.best.iteration < result.iterations:
            scored = result.after is not None and result.after.score is not None
            what = f"score {-result.best.loss:.3f}" if scored else f"loss {result.best.loss:.3f}"
            print(f"{result.adapter_path}/{BEST}: step {result.best.iteration}, validation {what}")


def _evaluate(args: argparse.Namespace) -> None:
    model, tokenizer = load(args.model, args.adapter_path)
    result = evaluate_model(
        model,
        tokenizer,
        args.data,
        batch_size=args.batch_size,
        num_batches=args.test_batches,
        max_seq_length=args.max_seq_length,
        mask_prompt=args.mask_prompt,
        objective=args.objective,
        max_tokens=args.max_tokens,
    )
    print(json.dumps(result.as_dict()) if args.json else result)


def _generate(args: argparse.Namespace) -> None:
    try:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError as e:
        raise UsageError(f"the prompt on standard input is not text: {e}") from None
    model, tokenizer = load(args.model, args.adapter_path)
    text = generate_text(
        model,
        tokenizer,
        prompt,
        max_tokens=args.max_tokens,
        temp=args.temp,
        top_p=args.top_p,
        seed=args.seed,
        ignore_chat_template=args.ignore_chat_template,
    )
    print(json.dumps({"text": text}) if args.json else text)


def _info(args: argparse.Namespace) -> None:
    found = info(args.path)
    if args.plot:
        plot(found, Path(args.plot))
    print(json.dumps(found) if args.json else as_text(found))


def _print_json(event: dict[str, Any]) -> None:
    print_line(json.dumps(event))


def _print_event(event: dict[str, Any]) -> None:
    if event["event"] == "train":
        loss = math.nan if event["train_loss"] is None else event["train_loss"]  # none of the losses was finite
        what = f"score {-loss:.3f}" if "train_score" in event else f"loss {loss:.3f}"
        line = (
            f"Iter {event['iteration']}: Train {what}, "
            f"Learning Rate {event['learning_rate']:.3e}, It/sec {event['iterations_per_second']:.3f}, "
            f"Tokens/sec {event['tokens_per_second']:.1f}, Peak mem {event['peak_memory']:.3f} GB"
        )
    elif event["event"] == "chosen":
        line = (
            f"Iter {event['iteration']}: Learning Rate {event['learning_rate']:.3e}, epsilon {event['epsilon']:.1e}: "
            f"slopes along {event['directions']} directions have a root mean square of {event['slope']:.3g}"
        )
    elif event["event"] == "returned":
        line = (
            f"Iter {event['iteration']}: the loss rose too far: back to the values of step {event['step']}, "
            f"learning rate halved {event['halvings']} times"
        )
    elif event["event"] == "warning":
        line = f"Warning: {event['message']}"
    elif event["event"] == "stopped":
        line = f"Iter {event['iteration']}: stopped, none of the last {event['patience']} validations was the best"
    else:
        name = "Val" if event["event"] == "validation" else "Test"
        score = f"{name} score {event['score']:.3f}, " if "score" in event else ""
        line = f"Iter {event['iteration']}: {score}{name} loss {event['loss']:.3f}"
        if "accuracy" in event:
            line += f", {name} accuracy {event['accuracy']:.1%}, macro-F1 {event['macro_f1']:.3f}"
        else:
            line += f", {name} ppl {event['perplexity']:.3f}"
    print_line(f"Seed {event['seed']}: {line}" if "seed" in event else line)


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 (run-time error), 2 (usage) or 130 (interrupted)."""
    args = build_parser().parse_args(argv)
    # Stop as for Ctrl-C: a run is left to be resumed, temporary files are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args.run(args)
    except ZoError as e:
        return _fail(str(e), e.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (OSError, RuntimeError, MemoryError) as e:
        return _fail(str(ZoError(str(e))) or type(e).__name__, ZoError.exit_code)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"zo-mlx: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
