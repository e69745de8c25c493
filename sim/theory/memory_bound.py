# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory that a v3 run needs at the target at the most, as docs/protocol-v3.md says it.

With D devices and L dirty wire streams each, or L threads that read blocks:

    VMM      a connection a stream    D x (read + L x frame)
             shared connections       D x (max(critical credit, read) + max(dirty credit, frame))
    driver   streams                  critical record + sum over the dirty streams (dirty record)
             addressable blocks       critical record + L x frame

A frame is what one read() returns; with addressable blocks it is a record of as many blocks as fit into one read. A
record's payload is a chunk, or one object or block where that is larger; before the stop, in a driver that saves images
as a whole, it is all objects, or all blocks of the stream. Epochs leave earlier data valid here: if they did not, a
critical record would also have their ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto_v3.wire.streams import Wire
from sim.device.record import V3_HEADER_BYTES
from sim.device.record_format import RecordBlocks, RecordEnd
from sim.scenario.device import Device
from sim.scenario.protocol import AppliedScenario
from sim.scenario.scenario import Scenario


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """The most bytes that a v3 run may hold at the target."""

    vmm_bytes: int  # for all devices
    driver_bytes: int  # for the device that may hold most
    sockets_bytes: int
    """In the connections' buffers of both hosts: memory too, but neither the VMM's nor the driver's."""


def memory_bound(applied: AppliedScenario) -> MemoryBound:
    """The bound of a v3 run."""
    scenario = applied.scenario
    options, read = scenario.v3_options(), scenario.switchover_settings().read_bytes
    vmm = driver = 0
    for device in scenario.devices:
        frame = _blocks_record(device, read) if options.blocks else read
        credits = options.credits
        if options.wire is Wire.STREAMS:
            vmm += read + options.wire_streams * frame
        else:
            vmm += max(credits.critical_bytes, read) + max(credits.dirty_bytes, frame)
        dirty = [_dirty_record(scenario, device, at, options.wire_streams) for at in range(options.wire_streams)]
        of_dirty = options.wire_streams * frame if options.blocks else sum(dirty)
        driver = max(driver, _critical_record(scenario, device) + of_dirty)
    sockets = options.connections(len(scenario.devices)) * scenario.link.socket_buffer_bytes
    return MemoryBound(vmm, driver, sockets)


def _blocks_record(device: Device, read_bytes: int) -> int:
    blocks = max(1, read_bytes // device.block_bytes)
    return V3_HEADER_BYTES + RecordBlocks.SIZE + blocks * (8 + device.block_bytes)


def _critical_record(scenario: Scenario, device: Device) -> int:
    object_bytes = device.critical.object_bytes
    payload = device.critical.objects * object_bytes
    if scenario.driver.precopy_image == "chunks":
        payload = min(payload, max(object_bytes, scenario.driver.chunk_bytes))
    return V3_HEADER_BYTES + max(payload, RecordEnd.SIZE)


def _dirty_record(scenario: Scenario, device: Device, stream: int, streams: int) -> int:
    """If all of a device's state comes after the stop, the device gives chunks, whatever its image before it."""
    before_stop = device.blocks - device.stop_only_blocks
    whole = len(range(stream, before_stop, streams)) * device.block_bytes
    chunk = min(scenario.driver.chunk_bytes, len(range(stream, device.blocks, streams)) * device.block_bytes)
    payload = chunk if scenario.driver.precopy_image == "chunks" else max(whole, chunk)
    return V3_HEADER_BYTES + max(payload, RecordEnd.SIZE)
