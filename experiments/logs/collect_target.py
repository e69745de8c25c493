# SPDX-License-Identifier: GPL-2.0-or-later
"""The events of a target."""

from __future__ import annotations

import zlib

from experiments.logs.collect_base import BaseCollector
from experiments.logs.events import TraceEvent
from experiments.logs.facts import TARGET, Piece, Stretch

DATA = "ef100004"
"""How a piece of a device's data begins on the wire (hw/vfio/migration.c, VFIO_MIG_FLAG_DEV_DATA_STATE)."""
MOST_PIECES = 1 << 20


class TargetCollector(BaseCollector):
    """Of a target."""

    def _on_vfio_load_state(self, event: TraceEvent) -> None:
        self._now.side = TARGET
        if event.args.endswith(DATA):
            self._loading[event.device] = event.time_us
            self._device(event).last_arrived_us = event.time_us

    def _on_vfio_load_state_device_data(self, event: TraceEvent) -> None:
        begin_us, device = self._loading.pop(event.device, None), self._device(event)
        device.pieces_crc = zlib.crc32(b"%d," % (event.value("size") or 0), device.pieces_crc)
        pieces = device.pieces
        if begin_us is not None and len(pieces) < MOST_PIECES:
            pieces.append(Piece(begin_us, event.time_us, event.value("size") or 0))

    def _on_vfio_load_device_config_state_start(self, event: TraceEvent) -> None:
        self._config[event.device] = event.time_us

    def _on_vfio_load_device_config_state_end(self, event: TraceEvent) -> None:
        if (begin_us := self._config.pop(event.device, None)) is not None:
            self._device(event).config = Stretch(begin_us, event.time_us)

    def _on_vfio_load_bufs_thread_start(self, event: TraceEvent) -> None:
        self._load_threads[event.device] = event.time_us

    def _on_vfio_load_bufs_thread_end(self, event: TraceEvent) -> None:
        if (begin_us := self._load_threads.pop(event.device, None)) is not None:
            self._device(event).load_thread = Stretch(begin_us, event.time_us)

    def _on_vfio_load_state_device_buffer_incoming(self, event: TraceEvent) -> None:
        device = self._device(event)
        device.arrived += 1
        device.first_arrived_us = device.first_arrived_us or event.time_us
        device.last_arrived_us = event.time_us

    def _on_vfio_load_state_device_buffer_starved(self, event: TraceEvent) -> None:
        self._starved.setdefault(event.device, event.time_us)

    def _on_vfio_load_state_device_buffer_load_start(self, event: TraceEvent) -> None:
        if (since_us := self._starved.pop(event.device, None)) is not None:
            self._device(event).waiting_us += event.time_us - since_us
        self._loading[event.device] = event.time_us

    def _on_vfio_load_state_device_buffer_load_end(self, event: TraceEvent) -> None:
        if (begin_us := self._loading.pop(event.device, None)) is not None:
            self._device(event).pieces.append(Piece(begin_us, event.time_us, 0))

    def _on_vfio_load_state_device_buffer_end(self, event: TraceEvent) -> None:
        self._device(event).loaded_us = event.time_us

    def _on_vmstate_downtime_load(self, event: TraceEvent) -> None:
        self._now.side = TARGET
        self._vmstate(event, self._now.loads_us)

    def _on_loadvm_process_command(self, event: TraceEvent) -> None:
        if "SWITCHOVER_START" in event.args:
            self._now.moments["switchover start"] = event.time_us
            self._now.side = TARGET

    def _on_loadvm_approve_switchover(self, event: TraceEvent) -> None:
        self._now.acks_us.append(event.time_us)
        if (name := event.args.removeprefix("Approver ")) in self._now.devices:
            self._now.devices[name].approved_us.append(event.time_us)

    def _on_migrate_send_rp_message(self, event: TraceEvent) -> None:
        kind = event.args.partition(":")[0]
        if kind.isdigit():
            self._now.rp_sent.setdefault(int(kind), []).append(event.time_us)
