# SPDX-License-Identifier: GPL-2.0-or-later
"""A device's state as bytes: its blocks, then its critical objects, in anonymous memory.

The guest's data is computed from the block's number and version: a block that is old, torn or in the wrong place
differs from the right one.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from sim.device.guest import Int32
from sim.device.record import NO_INDICES
from sim.device.state import Content, Indices
from sim.scenario.device import Device

DIGEST_BYTES = 8
BLOCK_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
VERSION_MULTIPLIER = np.uint64(0xC2B2AE3D27D4EB4F)
FILL_BYTES = 4 << 20
"""Filled in one step, when the state is made."""

Words = NDArray[np.uint64]
Runs = tuple[Indices, Indices]
"""Runs of bytes in a store: their offsets, and their numbers of bytes."""


class StateStore(Content):
    """The bytes of one device."""

    def __init__(self, device: Device, *, filled: bool) -> None:
        """`filled`: with the guest's data, every version 0; otherwise zeros, to be loaded into."""
        self.block_bytes = device.block_bytes
        self.blocks = device.blocks
        self.objects = device.critical.objects
        self.object_bytes = device.critical.object_bytes
        self._objects_at = self.blocks * self.block_bytes
        size = self._objects_at + self.objects * self.object_bytes
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages: slower, no more
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._memory)
        words = np.frombuffer(self.view[: self._objects_at], np.uint64)
        self._block_words: Words = words.reshape(self.blocks, self.block_bytes // 8)
        if filled:
            self._fill()
            # NumPy loads parts of itself at first use, for some 15 ms: not while the guest writes.
            self.write_blocks(np.zeros(1, np.int32), np.zeros(self.blocks, np.int32))
        else:
            np.frombuffer(self.view, np.uint8).fill(0)  # a device has its memory before it is loaded

    @cached_property
    def _row(self) -> Words:
        return _row(self.block_bytes // 8)

    @cached_property
    def _object_row(self) -> Words:
        """An object may be as large as all of the state: only a store that the guest writes to needs this."""
        return _row(-(-self.object_bytes // 8))

    def _fill(self) -> None:
        at_once = max(1, FILL_BYTES // self.block_bytes)
        for first in range(0, self.blocks, at_once):
            numbers = np.arange(first, min(first + at_once, self.blocks))
            marks = _marks(numbers, np.zeros(len(numbers), np.int32))
            np.add(self._row, marks[:, None], out=self._block_words[numbers[0] : numbers[-1] + 1])
        self._put_objects(np.arange(self.objects), np.zeros(self.objects, np.int32))

    @override
    def write_blocks(self, written: Int32, version: Int32) -> None:
        numbers = np.unique(written)
        for number, mark in zip(numbers.tolist(), _marks(numbers, version[numbers]), strict=True):
            np.add(self._row, mark, out=self._block_words[number])

    @override
    def write_objects(self, made_new: Int32, version: Int32) -> None:
        numbers = np.unique(made_new)
        self._put_objects(numbers, version[numbers])

    def _put_objects(self, numbers: NDArray[Any], versions: Int32) -> None:
        for number, mark in zip(numbers.tolist(), _marks(numbers, versions), strict=True):
            self.object_at(number)[:] = (self._object_row + mark).tobytes()[: self.object_bytes]

    def object_at(self, number: int) -> memoryview:
        """A critical object's bytes."""
        start = self._objects_at + number * self.object_bytes
        return self.view[start : start + self.object_bytes]

    def block_pieces(self, numbers: Indices) -> Iterator[memoryview]:
        """The bytes of these blocks, in their order; neighbours are one piece. Views are made one by one: thousands of
        them would take more memory than all else of a stream."""
        return self._pieces(self.block_runs(numbers))

    def object_pieces(self, numbers: Indices) -> Iterator[memoryview]:
        """The bytes of these critical objects; neighbours are one piece."""
        return self._pieces(self.object_runs(numbers))

    def _pieces(self, runs: Runs) -> Iterator[memoryview]:
        for start, size in zip(*runs, strict=True):
            yield self.view[start : start + size]

    def block_runs(self, numbers: Indices) -> Runs:
        """The runs of these blocks, in their order; neighbours are one run."""
        return _runs(numbers, 0, self.block_bytes)

    def object_runs(self, numbers: Indices) -> Runs:
        """The runs of these critical objects; neighbours are one run."""
        return _runs(numbers, self._objects_at, self.object_bytes)

    def digests(self) -> bytes:
        """One digest a block, then one a critical object, of DIGEST_BYTES each. Slow: call it in a thread."""
        digests = bytearray()
        for start in range(0, self._objects_at, self.block_bytes):
            digests += _digest(self.view[start : start + self.block_bytes])
        for number in range(self.objects):
            digests += _digest(self.object_at(number))
        return bytes(digests)


def _runs(numbers: Indices, base: int, size: int) -> Runs:
    if not len(numbers):
        return NO_INDICES, NO_INDICES
    # Plain methods of arrays: np.diff() and others of Python code take longer than a copy of 100 KiB.
    begins = np.concatenate(([0], (numbers[1:] - numbers[:-1] != 1).nonzero()[0] + 1))
    ends = np.concatenate((begins[1:], [len(numbers)]))
    return base + numbers[begins] * size, (ends - begins) * size


def _digest(piece: memoryview) -> bytes:
    return hashlib.blake2b(piece, digest_size=DIGEST_BYTES).digest()


def _row(words: int) -> Words:
    """The words of a block or object without its mark; all differ, so that none can pass for another."""
    row: Words = np.arange(words, dtype=np.uint64) << np.uint64(32)
    return row


def _marks(numbers: NDArray[Any], versions: Int32) -> Words:
    """One word a block, computed from its number and version."""
    with np.errstate(over="ignore"):
        of_block = (numbers.astype(np.uint64) + np.uint64(1)) * BLOCK_MULTIPLIER
        marks: Words = of_block ^ (versions.astype(np.uint64) + np.uint64(1)) * VERSION_MULTIPLIER
    return marks


def differences(source: bytes, target: bytes, blocks: int) -> str:
    """How two devices' digests differ, in words; empty if they are equal."""
    if source == target:
        return ""
    if len(source) != len(target):
        return f"{len(source) // DIGEST_BYTES} digests at the source, {len(target) // DIGEST_BYTES} at the target"
    here, there = (np.frombuffer(each, np.uint64) for each in (source, target))
    wrong = here != there
    return f"{int(wrong[:blocks].sum())} blocks and {int(wrong[blocks:].sum())} critical objects differ in their bytes"
