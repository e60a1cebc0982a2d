"""How stable the choice of sensitive weights is, against the number of calibration sequences.

    python tests/benchmarks/calibration.py SOURCE [--sequence-length 512] [--text FILE]

Two disjoint sets of 16 sequences. For growing parts of the first: how much of its choice (the top 0.1%) the whole
second set's choice shares, and which share of the second set's Fisher mass it covers (against the best possible).
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import tempfile
from pathlib import Path

import numpy as np
from zo_mlx.convert.select import Selector
from zo_mlx.convert.sensitivity import DEFAULT_TEXT, calibration_sequences, fisher_scores
from zo_mlx.convert.sources import Source, open_source

SET = 16


def growing_sums(source: Source, sequences: np.ndarray, at: tuple[int, ...]) -> dict[int, np.ndarray]:
    """The sum of the scores of the first n sequences, all layers end to end, for each n of `at`."""
    model = source.open_model()
    total, sums = np.zeros(1, np.float32), {}
    for n, row in enumerate(sequences, 1):
        total = total + np.concatenate([np.array(s).ravel() for _, s in fisher_scores(model, row[None])])
        if n in at:
            sums[n] = total.copy()
    return sums


def top(scores: np.ndarray) -> np.ndarray:
    """Positions of the top 0.1%."""
    selector = Selector({"all": scores.size}, 1e-3, "global")
    selector.add("all", scores)
    return selector.result()["all"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a Hugging Face directory or .gguf file")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--text", default=str(DEFAULT_TEXT))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = open_source(args.source, None, Path(scratch))
        text = Path(args.text).read_text(encoding="utf-8")
        sequences = calibration_sequences(source.tokenizer, text, 2 * SET, args.sequence_length, seed=0)
        reference = growing_sums(source, sequences[SET:], (SET,))[SET]
        best = top(reference)
        print(f"{args.source}, {args.text}: the second set's own choice covers {share(reference, best):.1%}")
        print("sequences  overlap  covers")
        for n, scores in growing_sums(source, sequences[:SET], (1, 2, 4, 8, 16)).items():
            own = top(scores)
            overlap = len(np.intersect1d(own, best, assume_unique=True)) / len(best)
            print(f"{n:9}{overlap:9.1%}{share(reference, own):8.1%}")


def share(scores: np.ndarray, chosen: np.ndarray) -> float:
    """The chosen weights' share of the sum of all scores."""
    return float(scores[chosen].sum(dtype=np.float64) / scores.sum(dtype=np.float64))


if __name__ == "__main__":
    main()
