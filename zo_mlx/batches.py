"""Which examples each step sees: a function of the data, the seed and the number of the step."""

from collections.abc import Sequence

import numpy as np

from .data import Example

# Batches of like lengths are made of this many at a time. With 8, 15 to 17% of what is computed is padding (SST-2, RTE,
# TREC in batches of 16), with 32 it is 6 to 9%; larger pools would bring the same examples together in every epoch.
POOL = 32


def batch_order(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch: a function of its arguments alone.

    Batches differ from epoch to epoch, have little padding, and are stratified: each has the labels in about the
    proportions of the whole set, and its examples come in order of label. That takes the part of the gradient's noise
    away that comes from uneven labels, which for short answers is the larger part. Up to `batch_size - 1` examples
    sit an epoch out.

    Returns:
        Arrays of `batch_size` example numbers.
    """
    rng = np.random.default_rng((seed, epoch))
    answers = ["" if e.label is None else e.choices[e.label] for e in examples]
    labels = np.unique(answers, return_inverse=True)[1]
    lengths = np.array([e.length for e in examples])
    order = rng.permutation(len(examples))
    order = _interleaved(order, labels[order])[: len(order) // batch_size * batch_size]
    # Within pools, examples of like lengths go together.
    for pool in np.split(order, range(POOL * batch_size, len(order), POOL * batch_size)):
        by_length = pool[np.argsort(lengths[pool], kind="stable")]
        pool[:] = _interleaved(by_length, labels[by_length])
    batches = order.reshape(-1, batch_size)
    for batch in batches:
        batch[:] = batch[np.argsort(labels[batch], kind="stable")]
    return list(batches[rng.permutation(len(batches))])


def _interleaved(items: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Spread each label evenly over the whole, keeping the order of the items within it."""
    place = np.empty(len(items))
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return items[np.argsort(place, kind="stable")]


class Batches:
    """The batches of all steps.

    Args:
        examples: at least as many as a batch has.
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int):
        self._examples, self._size, self._seed = examples, size, seed
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])
        self.in_epoch = len(examples) // size

    def of(self, step: int, steps: int = 1) -> list[Example]:
        """The examples of a step (from 1).

        Args:
            steps: together with those of the steps around it, so many each time an epoch is divided into such groups.
        """
        epoch, position = divmod(step - 1, self.in_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, batch_order(self._examples, self._size, self._seed, epoch)
        first = position // steps * steps
        return [self._examples[i] for batch in self._epoch[1][first : first + steps] for i in batch]
