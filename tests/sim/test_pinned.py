# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that firmware saves into and loads from: chunks of each stream, whole images, longest records."""

from __future__ import annotations

import pytest

from sim.device.record import HEADER_BYTES, V3_HEADER_BYTES
from sim.outcome import Outcome
from sim.scenario.units import KIB, MIB
from tests.build.runs import run
from tests.build.scenario import small_scenario

STREAMS = {"v2": 1, "v2-multifd": 1, "v3-n1": 2, "v3-n4": 5, "v3-n16-pool": 17}


def moved(protocol: str, **changes: object) -> Outcome:
    return run(small_scenario({key.replace("__", "."): value for key, value in changes.items()}), protocol)


@pytest.mark.parametrize("protocol", STREAMS)
@pytest.mark.parametrize(("devices", "chunks", "chunk_mib"), [(1, 2, 1), (3, 2, 2), (16, 1, 1), (1, 13, 8)])
def test_the_source_has_chunks_for_each_stream_of_each_device(
    protocol: str, devices: int, chunks: int, chunk_mib: int
) -> None:
    outcome = moved(protocol, device__0__count=devices, driver__chunks=chunks, driver__chunk_mib=chunk_mib)
    assert outcome.counters.pinned_chunks_bytes == devices * STREAMS[protocol] * chunks * chunk_mib * MIB
    assert outcome.counters.pinned_images_bytes == 0, "it saves in chunks from the start"
    header_bytes = HEADER_BYTES if protocol.startswith("v2") else V3_HEADER_BYTES
    blocks_bytes = min(chunk_mib * MIB, 8 * MIB)
    if protocol.startswith("v2"):
        assert outcome.counters.pinned_target_bytes == devices * (blocks_bytes + header_bytes)


@pytest.mark.parametrize(("protocol", "headers"), [("v2", HEADER_BYTES), ("v3-n1", 2 * V3_HEADER_BYTES)])
def test_an_image_that_is_saved_whole_lies_beside_the_chunks_and_is_as_long_at_the_target(
    protocol: str, headers: int
) -> None:
    """8 MiB of blocks and 16 KiB of objects: one record, or with v3 one a stream."""
    outcome = moved(protocol, driver__precopy_image="whole", driver__initial="image")
    state_bytes = 8 * MIB + 16 * KIB
    assert outcome.counters.pinned_images_bytes == state_bytes + headers
    assert outcome.counters.pinned_target_bytes == state_bytes + headers


@pytest.mark.parametrize("readers", [1, 4, 8])
def test_blocks_need_a_record_for_each_thread_that_reads_or_writes_and_no_chunks(readers: int) -> None:
    """Of 1 MiB and little more; the critical stream has its two chunks."""
    counters = moved(f"v3-blocks-n{readers}").counters
    assert readers * MIB < counters.pinned_chunks_bytes - 2 * MIB < 1.01 * readers * MIB
    assert 16 * KIB + MIB < counters.pinned_target_bytes < 16 * KIB + 1.01 * readers * MIB
