"""The order of rows: batches of an epoch and their micro-batches, pure functions of seed, epoch and lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MEGABATCH = 50  # batches among which rows of like length are grouped; 50 leaves plenty of randomness


def epoch_batches(lengths_N: NDArray[np.int32], batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The global batches of one epoch: row ids, every row once, rows of like length together.

    A pure function of its arguments. Rows are shuffled, cut into groups of `MEGABATCH` batches, sorted by length
    inside a group and cut into batches, whose order is shuffled again. The last batch may be smaller.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths_N))
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), batch_size * MEGABATCH):
        group = order[start : start + batch_size * MEGABATCH]
        group = group[np.argsort(lengths_N[group], kind="stable")]
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(
    batch: NDArray[np.int64], micro_batch_size: int, process: int, num_processes: int
) -> list[NDArray[np.int64]]:
    """This process's share of a global batch, cut into micro-batches: equally many in every process, some maybe empty.

    Equally many, because shards are gathered, and statistics summed, by all processes together in each of them.
    Processes take every n-th row, so that rows of like length, and with them the work, are spread evenly.
    """
    mine = batch[process::num_processes]
    count = math.ceil(math.ceil(len(batch) / num_processes) / micro_batch_size)
    return [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]


def length_order(lengths_N: NDArray[np.int32], start: int, stop: int) -> NDArray[np.int64]:
    """Row ids start..stop-1, longest first (so that running out of memory shows at once)."""
    ids = np.arange(start, stop)
    return ids[np.argsort(-lengths_N[start:stop], kind="stable")]


def chunks(ids: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Cut row ids into pieces of `size`."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
