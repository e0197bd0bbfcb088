"""What is kept of a teacher's distributions, and the bytes it becomes.

    N  positions: rows that a loss counts    K  ids kept of a position    M  ids kept of all N, end to end
    V  vocabulary, or classes                T  listed temperatures

A block holds the positions of one row of data: little-endian sections, each beginning on a whole byte:

    sizes    ids kept of each position, N x uint8 (uint16 where more than 255 are possible); only if they vary
    lse      log-sum-exp of value / temperature over the whole vocabulary, N x T x float32; not in `full`
    ids      M unsigned integers of `id_bits`, the least significant bit first; not in `full`
    values   M codes of `value_bits`, in the same way: log-probabilities at temperature 1
    counts   `sampled`: how often each id was drawn, less one, M integers of `count_bits`

A value code c of b < 32 bits stands for -64 * (c / (2^b - 1))^2: fine steps where probabilities are large, and nothing
below e^-64. 32 bits are a float32; `full` then keeps the logits unchanged. The lse of `top_k` belong to the values as
they are stored: exp(value / temperature - lse) sums to the teacher's mass on the kept ids, however coarse the codes.
Works without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
RANGE = 64.0
"""Nats: a kept log-probability is no smaller than -RANGE."""
MAX_BITS = 25  # an integer that begins anywhere in a byte must end within four


@dataclass(frozen=True)
class Kept:
    """What is kept of N positions.

    Attributes:
        values: log-probabilities at temperature 1 of the kept ids, [M]; `full`: of all ids, or logits, [N, V].
        ids_M: empty for `full`.
        sizes_N: ids kept of each position.
        lse_NT: see the module's docstring.
        counts_M: `sampled`: draws of each id; else empty.
    """

    values: Floats
    ids_M: Ints
    sizes_N: Ints
    lse_NT: Floats
    counts_M: Ints

    def __len__(self) -> int:
        return len(self.sizes_N)

    def rows(self, start: int, stop: int) -> Kept:
        """These positions."""
        if self.values.ndim > 1:
            lse_NT = self.lse_NT[start:stop]
            return Kept(self.values[start:stop], self.ids_M, self.sizes_N[start:stop], lse_NT, self.counts_M)
        edges = np.concatenate([[0], np.cumsum(self.sizes_N)])
        ids = slice(edges[start], edges[stop])
        return Kept(
            self.values[ids], self.ids_M[ids], self.sizes_N[start:stop], self.lse_NT[start:stop], self.counts_M[ids]
        )

    @staticmethod
    def empty(layout: Layout) -> Kept:
        """Of no positions."""
        return layout.decode(np.empty(0, np.uint8), 0)

    @staticmethod
    def join(parts: list[Kept]) -> Kept:
        """All positions of several parts, in order."""
        if len(parts) == 1:
            return parts[0]
        names = ("values", "ids_M", "sizes_N", "lse_NT", "counts_M")
        return Kept(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Layout:
    """How positions are kept.

    Attributes:
        kind: `full` all ids; `top_k` the likeliest; `sampled` random ones, drawn from the mean of the teacher's
            distributions at the listed temperatures.
        vocabulary: V.
        value_bits: 8, 12, 16 or 32.
        temperatures: at which they can be used; empty for `full`, which can be used at any.
        count: ids per position (`top_k`, at most) or draws per position (`sampled`); 0 for `full`.
        ragged: whether the number of ids varies.
    """

    kind: Literal["full", "top_k", "sampled"]
    vocabulary: int
    value_bits: int = 32
    temperatures: tuple[float, ...] = ()
    count: int = 0
    ragged: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of an id: as many as the vocabulary needs."""
        return max(1, (self.vocabulary - 1).bit_length())

    @property
    def count_bits(self) -> int:
        """Bits of a number of draws."""
        return max(1, (self.count - 1).bit_length()) if self.kind == "sampled" else 0

    def bytes_per_position(self, num_ids: float) -> float:
        """Bytes of a position with this many ids, without the row's offset of 8 bytes."""
        if self.kind == "full":
            return self.vocabulary * self.value_bits / 8
        sizes = self._size_dtype.itemsize if self.ragged else 0
        bits = self.id_bits + self.value_bits + self.count_bits
        return sizes + 4 * len(self.temperatures) + num_ids * bits / 8

    @property
    def _size_dtype(self) -> np.dtype[Any]:
        return np.dtype("u1" if self.count <= 255 else "<u2")

    def encode(self, kept: Kept) -> bytes:
        """Positions → a block."""
        values = kept.values.reshape(-1)
        if self.kind == "full":
            return _packed_values(values, self.value_bits)
        sections = [kept.sizes_N.astype(self._size_dtype).tobytes()] if self.ragged else []
        sections.append(kept.lse_NT.astype("<f4").tobytes())
        sections.append(pack(kept.ids_M, self.id_bits))
        sections.append(_packed_values(values, self.value_bits))
        if self.kind == "sampled":
            sections.append(pack(kept.counts_M - 1, self.count_bits))
        return b"".join(sections)

    def decode(self, block: Bytes, num_positions: int) -> Kept:
        """A block → its positions."""
        none: Ints = np.empty(0, np.int64)
        if self.kind == "full":
            count = num_positions * self.vocabulary
            values = _unpacked_values(block, count, self.value_bits).reshape(num_positions, self.vocabulary)
            sizes_N = np.full(num_positions, self.vocabulary)
            return Kept(values, none, sizes_N, np.empty((num_positions, 0), np.float32), none)
        at = 0

        def take(num_bytes: int) -> Bytes:
            nonlocal at
            at += num_bytes
            return block[at - num_bytes : at]

        if self.ragged:
            sizes_N = take(num_positions * self._size_dtype.itemsize).view(self._size_dtype).astype(np.int64)
        else:
            sizes_N = np.full(num_positions, self.count)
        width = len(self.temperatures)
        lse_NT = take(4 * num_positions * width).view("<f4").reshape(num_positions, width)
        total = int(sizes_N.sum())
        ids_M = unpack(take(_num_bytes(total, self.id_bits)), total, self.id_bits)
        values = _unpacked_values(take(_num_bytes(total, self.value_bits)), total, self.value_bits)
        counts_M = none
        if self.kind == "sampled":
            counts_M = unpack(take(_num_bytes(total, self.count_bits)), total, self.count_bits) + 1
        return Kept(values, ids_M, sizes_N, lse_NT.astype(np.float32, copy=False), counts_M)


def quantized(values: NDArray[np.floating[Any]], bits: int) -> Floats:
    """Log-probabilities as they come back from codes of this many bits."""
    if bits == 32:
        return values.astype(np.float32)
    return _from_codes(_codes(values, bits), bits)


def pack(numbers: NDArray[np.integer[Any]], bits: int) -> bytes:
    """Unsigned integers end to end, `bits` each, the least significant bit first; zeros fill the last byte."""
    assert bits <= MAX_BITS
    if bits in (8, 16):
        return numbers.astype(f"<u{bits // 8}").tobytes()
    words = numbers.astype("<u4").view(np.uint8).reshape(-1, 4)
    stream = np.unpackbits(words, axis=1, bitorder="little")[:, :bits]
    return np.packbits(stream.reshape(-1), bitorder="little").tobytes()


def unpack(packed: Bytes, count: int, bits: int) -> Ints:
    """The reverse of `pack`."""
    if bits in (8, 16):
        return packed.view(f"<u{bits // 8}")[:count].astype(np.int64)
    padded = np.concatenate([packed, np.zeros(4, np.uint8)])
    starts = np.arange(count, dtype=np.int64) * bits
    windows = padded[(starts >> 3)[:, None] + np.arange(4)].view("<u4")[:, 0]
    shifted = windows >> (starts & 7).astype(np.uint32)
    numbers: Ints = (shifted & np.uint32((1 << bits) - 1)).astype(np.int64)
    return numbers


def _num_bytes(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _codes(values: NDArray[np.floating[Any]], bits: int) -> NDArray[np.uint32]:
    depth = np.clip(-values.astype(np.float64), 0.0, RANGE)
    codes: NDArray[np.uint32] = np.rint(np.sqrt(depth / RANGE) * (2**bits - 1)).astype(np.uint32)
    return codes


def _from_codes(codes: NDArray[np.integer[Any]], bits: int) -> Floats:
    values: Floats = (-RANGE * np.square(codes / (2**bits - 1))).astype(np.float32)
    return values


def _packed_values(values: Floats, bits: int) -> bytes:
    return values.astype("<f4").tobytes() if bits == 32 else pack(_codes(values, bits), bits)


def _unpacked_values(packed: Bytes, count: int, bits: int) -> Floats:
    if bits == 32:
        return packed[: 4 * count].view("<f4").astype(np.float32, copy=False)
    return _from_codes(unpack(packed, count, bits), bits)
