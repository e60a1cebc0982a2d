"""Estimators and learning rates on a model made linear in its trainable weights: a training run in seconds.

    python tests/benchmarks/linearized.py --data DIR [--model demo/model] [--num-layers N] [--train 640] [--valid 320]
        [--seeds 3] [--gram FILE] [--rows 19200]

DIR holds train.jsonl and valid.jsonl with choices of one token each. Their scores' gradients with respect to the values
are taken at the start (`mx.grad`), and only the products of all pairs of them are kept: random directions move the
scores of all examples by normal numbers with these covariances (of +-1 directions nearly so, because many weights add
up), so that nothing else is needed to follow a run, as long as scores change in proportion to values. Printed are
validation loss, validation accuracy and training loss after a sixth, a third, two thirds and all of the rows; means
over seeds, which share batches and directions between arms. With `--num-layers` only the last blocks' weights are
trained; rows then count for as much as these are of all blocks, and once for what comes before. One-sided arms whose
rate is in nats begin anew where nothing is gained, as runs do.
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from zo_mlx.batches import batch_order
from zo_mlx.config import RATE_FALL
from zo_mlx.control import MEASURED, sgd_rate
from zo_mlx.data import Example
from zo_mlx.guard import WINDOW
from zo_mlx.head import split_head
from zo_mlx.memory import bounded_cache
from zo_mlx.model import load_sparse
from zo_mlx.objective import collate
from zo_mlx.rows import load_dataset

AT_ONCE = 32


@dataclass
class Linear:
    """E examples of C choices; the first `train` are for training.

    Attributes:
        scores: (E, C - 1), of the choices but the first, minus the first one's, before training.
        gram: (E (C - 1), E (C - 1)), products of their gradients.
        labels: (E,).
        part: the share of the blocks that are trained.
    """

    scores: np.ndarray
    gram: np.ndarray
    labels: np.ndarray
    train: int
    part: float


def linearize(model: Path, examples: list[Example], train: int, blocks: int | None) -> Linear:
    """Gradients of all scores with respect to the last blocks' values, an example's in branches of its own."""
    sparse, _, index, _ = load_sparse(model)
    head, values = split_head(sparse.model), index.initial_values()
    blocks = len(sparse.model.layers) if blocks in (None, -1) else blocks
    values = mx.concatenate([values[a:b] for a, b in sparse.train_last(blocks, values)])
    choices = len(examples[0].choices)

    def difference(branches: mx.array, group: list[Example], signs: mx.array) -> tuple[mx.array, mx.array]:
        sparse.set_values(branches)
        batch = collate([[e] for e in group])
        states = head.hidden(batch.tokens)
        logits = head.logits(states.reshape(-1, states.shape[-1])[mx.array(batch.positions)]).astype(mx.float32)
        chosen = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        found = mx.concatenate([chosen[mx.array(batch.target_position), mx.array(batch.target_token)], mx.zeros(1)])
        scored = found[mx.array(batch.slots)].sum(axis=-1)[:, 0]
        return (scored * signs).sum(), scored

    gradient = mx.value_and_grad(difference)
    scores, rows = (
        np.zeros((len(examples), choices - 1)),
        np.zeros((len(examples), choices - 1, values.size), np.float16),
    )
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    at_once = max(1, AT_ONCE // (choices - 1))
    for start in range(0, len(order), at_once):
        some = order[start : start + at_once]
        signs = np.zeros((len(some) * (choices - 1), choices), np.float32)
        signs[:, 0], signs[range(len(signs)), np.arange(len(signs)) % (choices - 1) + 1] = -1, 1
        group = [examples[i] for i in some for _ in range(choices - 1)]
        branches = mx.broadcast_to(values, (len(group), values.size))
        (_, scored), found = gradient(branches, group, mx.array(signs))
        rows[some] = np.array(found).reshape(len(some), choices - 1, -1)
        scores[some] = np.array(scored)[:: choices - 1, 1:] - np.array(scored)[:: choices - 1, :1]
        print(f"  {start + len(some)}/{len(order)}", end="\r", flush=True)
    flat = rows.reshape(-1, values.size).astype(np.float32)
    part = min(1.0, blocks / len(sparse.model.layers))
    return Linear(scores, flat @ flat.T, np.array([e.label for e in examples]), train, part)


def softmax(scores: np.ndarray) -> np.ndarray:
    """(..., C - 1) relative scores -> (..., C)."""
    full = np.concatenate([np.zeros((*scores.shape[:-1], 1)), scores], axis=-1)
    raised = np.exp(full - full.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def losses_of(task: Linear, scores: np.ndarray) -> np.ndarray:
    """Cross-entropy of all examples, (E,), from relative scores."""
    p = softmax(scores)
    return -np.log(p[range(len(p)), task.labels])


@dataclass(frozen=True)
class Arm:
    """`q` directions over `share` examples each: one-sided, on the same ones, or two-sided, each on its own."""

    one_sided: bool
    q: int
    share: int
    nats: float | None = None
    rate: float = 0.0

    @property
    def batch(self) -> int:
        return self.share if self.one_sided else self.share * self.q

    @property
    def rows(self) -> int:
        return self.share * (self.q + 1) if self.one_sided else 2 * self.share * self.q


def batches(task: Linear, examples: list[Example], size: int, seed: int) -> Iterator[np.ndarray]:
    epoch = 0
    while True:
        yield from batch_order(examples[: task.train], size, seed, epoch)
        epoch += 1


def run(task: Linear, root: np.ndarray, examples: list[Example], arm: Arm, rows: int, seed: int) -> np.ndarray:
    """Validation loss, validation accuracy and training loss at four moments: (4, 3)."""
    rng, scores = np.random.default_rng(seed), task.scores.copy()
    right = task.labels[:, None] == np.arange(1, scores.shape[1] + 1)
    seen = step = 0
    used, square, points = 0.0, 0.0, []
    initial = losses_of(task, scores)
    look, halvings, gains = WINDOW if arm.one_sided and arm.nats else 0, 0, list[float]()
    moments = [rows / 6, rows / 3, 2 * rows / 3, rows]
    order = batches(task, examples, arm.batch, seed)
    while moments:
        batch, step = next(order), step + 1
        moved = (root @ rng.standard_normal((root.shape[1], arm.q))).T.reshape(arm.q, *scores.shape)
        slopes = np.empty(arm.q)
        for d in range(arm.q):
            own = batch if arm.one_sided else batch[d :: arm.q]
            slopes[d] = ((softmax(scores[own])[:, 1:] - right[own]) * moved[d, own]).sum(axis=-1).mean()
        if look:
            gains.append((initial - losses_of(task, scores))[batch].mean())
        seen += arm.q
        square += (np.mean(slopes**2) - square) * arm.q / seen
        if arm.nats is None:
            rate = arm.rate * RATE_FALL ** (step - 1)
        else:
            rate = sgd_rate(square, arm.q, step, arm.nats) * 0.5**halvings if seen >= MEASURED else 0.0
        scores -= rate * np.tensordot(slopes, moved, 1) / arm.q
        used += task.part * (arm.rows + (arm.batch if look else 0)) + (1 - task.part) * arm.batch
        if look and len(gains) == look:  # as `Control` does
            late, gains = np.array(gains[look // 2 :]), []
            if late.mean() > late.std(ddof=1) / len(late) ** 0.5:
                look = 0
            else:
                scores, look, halvings = task.scores.copy(), 2 * look, halvings + 1
        if used >= moments[0]:
            moments.pop(0)
            losses, hits = losses_of(task, scores), softmax(scores).argmax(axis=-1) == task.labels
            points.append([losses[task.train :].mean(), hits[task.train :].mean(), losses[: task.train].mean()])
    return np.array(points)


ARMS = [
    *(Arm(False, 1, 16, rate=rate) for rate in (2e-5, 5e-5, 1e-4, 2e-4, 4e-4)),
    *(Arm(False, 8, 2, rate=rate) for rate in (5e-5, 2.4e-4)),
    Arm(False, 8, 2, nats=0.02),
    *(Arm(True, q, share, nats=0.02) for q, share in ((1, 16), (3, 8), (7, 4), (15, 2), (8, 16))),
    *(Arm(True, 7, 4, nats=nats) for nats in (0.005, 0.01, 0.04)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--num-layers", type=int, metavar="N", help="train the last N blocks; default: all")
    parser.add_argument("--train", type=int, default=640)
    parser.add_argument("--valid", type=int, default=320)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=19_200)
    parser.add_argument("--gram", metavar="FILE", help="where the products of gradients are kept (.npz)")
    args = parser.parse_args()
    _, tokenizer, _, _ = load_sparse(Path(args.model))
    examples = [
        e
        for split, count in (("train", args.train), ("valid", args.valid))
        for e in load_dataset(Path(args.data) / f"{split}.jsonl", tokenizer, 2048).examples[:count]
    ]
    if args.gram and Path(args.gram).exists():
        kept = np.load(args.gram)
        task = Linear(kept["scores"], kept["gram"], kept["labels"], args.train, float(kept["part"]))
        print(f"{args.gram}: of the last {task.part:.0%} of the blocks")
    else:
        with bounded_cache():
            task = linearize(Path(args.model), examples, args.train, args.num_layers)
        if args.gram:
            np.savez(args.gram, scores=task.scores, gram=task.gram, labels=task.labels, part=task.part)
    values, vectors = np.linalg.eigh(task.gram.astype(np.float64))
    root = vectors * np.sqrt(np.maximum(values, 0))
    print(f"{args.data}: a score's gradient has a mean square of {values.sum() / len(values):.0f}; "
          f"{values[-1] / values.sum():.0%} of it in one direction")  # fmt: skip
    for arm in ARMS:
        found = np.mean([run(task, root, examples, arm, args.rows, seed) for seed in range(args.seeds)], axis=0)
        cells = "   ".join(f"{loss:.3f} {accuracy:.1%} {train:.3f}" for loss, accuracy, train in found)
        name = f"{'one' if arm.one_sided else 'two'}-sided, {arm.q} x {arm.share}"
        print(f"{name:20}{f'nats {arm.nats}' if arm.nats else f'rate {arm.rate}':14}{cells}", flush=True)


if __name__ == "__main__":
    main()
