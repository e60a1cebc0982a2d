"""Which blocks a run trains, and whether those before are run apart."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .answers import Judge
from .blocks import BlockwiseModel
from .config import TrainConfig
from .data import Dataset
from .head import Head
from .objective import WORTH_SHARING
from .sparse import SparseModel


@dataclass(frozen=True)
class Depth:
    """What was chosen.

    Attributes:
        blocks: of the model, where they are a plain chain and that is of use; else None.
        has_prefix: whether the blocks before the trained ones are run apart.
        spans: where the trained weights are among those of the index.
    """

    blocks: BlockwiseModel | None
    has_prefix: bool
    spans: list[tuple[int, int]]


def choose_depth(
    config: TrainConfig,
    sparse: SparseModel,
    head: Head,
    judge: Judge | None,
    data: Dataset,
    values: mx.array,
    warn: Callable[[str], None],
) -> Depth:
    """Choose, let `sparse` train no other blocks from now on, and fill in `config.num_layers`.

    Args:
        judge: of the model's answers, if these are the objective.
        data: the training set.
        values: of all weights of the index.
        warn: is called with what is worth a warning.
    """
    count, exact = len(sparse.model.layers), config.gradient == "exact"
    blocks = None
    if (exact or config.num_layers != -1 or sparse.first_block > 0) and max(sparse.spans()) < count:
        blocks = BlockwiseModel.of_chain(sparse.model)

    def saves(trained: float) -> bool:
        """Whether a step takes less work if the blocks before the trained ones, a share of all, are run apart.

        Else answers are generated, or the choices' rows go on from their prompts through all blocks, which for a share
        u of the tokens takes about 1.5 u of the time (and with exact gradients less than apart).
        """
        if blocks is None or (judge and judge.generates):
            return False
        if not exact:
            return not head.continues or trained <= 1.5 * data.unshared
        shares = data.unshared <= WORTH_SHARING and head.continues and blocks.continues()
        return bool(config.cache_prefix) or not shares

    last = config.num_layers
    if last is None:  # as many as learn as much in a step; but fewer only where that saves work
        last = sparse.last_half()
        last = -1 if exact or not saves(last / count) else last
    config.num_layers = last
    spans = sparse.train_last(count if last == -1 else last, values)
    first = sparse.first_block
    if blocks is None and (exact or 0 < first < count):
        warn("the model's blocks are not a plain chain: a step computes, and holds, all of them at once")
    has_prefix = 0 < first < count and saves(1 - first / count)
    if config.cache_prefix and not has_prefix:
        warn("--cache-prefix has no effect: nothing is computed before what is trained that could be kept")
    return Depth(blocks, has_prefix, spans)
