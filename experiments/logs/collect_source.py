# SPDX-License-Identifier: GPL-2.0-or-later
"""The events of a source."""

from __future__ import annotations

import math
import zlib

from experiments.logs.collect_base import BaseCollector
from experiments.logs.events import TraceEvent
from experiments.logs.facts import SOURCE, DeviceFacts, Report, Size, Stretch, Window

MOST_DIRTY = 0.9
"""Where more of the state is dirty, what was written twice cannot be reckoned. Ours."""


def _written(dirty: int, device: DeviceFacts) -> int:
    """Bytes that were written, if so many of the state are dirty: some were written twice, if writes go anywhere."""
    whole = max((report.initial_bytes + report.dirty_bytes for report in device.reports), default=0)
    whole = max(whole, device.first_pass_bytes or 0)
    share = dirty / whole if whole else 0.0
    return round(-whole * math.log1p(-share)) if share < MOST_DIRTY else dirty


class SourceCollector(BaseCollector):
    """Of a source."""

    def _on_vfio_save_setup(self, event: TraceEvent) -> None:
        device = self._device(event)
        device.setup_us, device.buffer_bytes = event.time_us, event.value("data buffer size") or 0
        self._now.side = SOURCE

    def _on_vfio_query_stop_copy_size(self, event: TraceEvent) -> None:
        if event.value("ret") in (0, None):
            self._size(event, "stopcopy size")

    def _on_vfio_state_pending_exact(self, event: TraceEvent) -> None:
        self._size(event, "stopcopy size")
        if not self._stopped:
            self._report(event, "precopy initial size", "precopy dirty size")
        self._beyond(event)

    def _on_vfio_state_pending_estimate(self, event: TraceEvent) -> None:
        """QEMU 10: the first answer of PRECOPY_INFO."""
        if not self._device(event).reports:
            self._report(event, "precopy initial size", "precopy dirty size")

    def _on_vfio_state_pending(self, event: TraceEvent) -> None:
        """QEMU 11.1: what is asked for last, after the stop, is in what is pending of all."""
        if event.value("final") == 1:
            left = (event.value(f"precopy {each} size") or 0 for each in ("initial", "dirty"))
            self._device(event).left_bytes = sum(left)
        elif event.value("exact") == 1:
            self._beyond(event)

    def _beyond(self, event: TraceEvent) -> None:
        """Size and PRECOPY_INFO, asked for together."""
        size, *announced = (event.value(f"{each} size") for each in ("stopcopy", "precopy initial", "precopy dirty"))
        if size is not None and not self._stopped:
            self._device(event).beyond = size, max(0, size - sum(each or 0 for each in announced))

    def _size(self, event: TraceEvent, key: str) -> None:
        sizes, size = self._device(event).sizes, event.value(key)
        if size is not None and not self._stopped:
            sizes[1:] = [Size(event.time_us, size)]

    def _on_vfio_query_precopy_size(self, event: TraceEvent) -> None:
        if event.value("ret") in (0, None):
            self._report(event, "init", "dirty")

    def _report(self, event: TraceEvent, initial: str, dirty: str) -> None:
        device = self._device(event)
        report = Report(event.time_us, event.value(initial) or 0, event.value(dirty) or 0, event.value("reinit") == 1)
        last_quiet = len(device.reports) > 1 and not device.reports[-1].reinit
        device.reports[len(device.reports) - last_quiet :] = [report]
        unread, since_us = self._unread.get(device.name, 0), self._dirty.get(device.name)
        self._unread[device.name] = report.initial_bytes + report.dirty_bytes
        if since_us is not None and not report.reinit:
            device.dirtied_bytes += _written(max(0, self._unread[device.name] - unread), device)
            device.dirtied_us += event.time_us - since_us
        elif since_us is None and device.first_pass_us is not None and not self._unread[device.name]:
            device.dirtied_us += event.time_us - device.first_pass_us
        if device.first_pass_us is not None:
            # The first report after the first pass has also what was written during that: it counts if it is 0.
            self._dirty[device.name] = event.time_us

    def _on_vfio_save_block(self, event: TraceEvent) -> None:
        device, size = self._device(event), event.value("data_size") or 0
        device.last_block_us = event.time_us
        device.pieces_crc = zlib.crc32(b"%d," % size, device.pieces_crc)
        self._unread[device.name] = max(0, self._unread.get(device.name, 0) - size)
        if self._stopped:
            device.stop_bytes += size
            device.stop_blocks += 1
        else:
            device.precopy_bytes += size
            device.precopy_blocks += 1

    def _on_vfio_save_block_precopy_empty_hit(self, event: TraceEvent) -> None:
        if not self._stopped:
            self._device(event).drained_us = event.time_us
            self._unread[event.device] = 0

    def _on_vfio_save_iterate(self, event: TraceEvent) -> None:
        device = self._device(event)
        if self._stopped or event.value("precopy initial size") or event.value("precopy dirty size"):
            return
        if device.first_pass_bytes is None:
            device.first_pass_bytes, device.first_pass_us = device.precopy_bytes, event.time_us

    def _on_vfio_save_complete_precopy_start(self, event: TraceEvent) -> None:
        self._saving[event.device] = event.time_us

    def _on_vfio_save_complete_precopy(self, event: TraceEvent) -> None:
        if (begin_us := self._saving.pop(event.device, None)) is not None:
            self._device(event).save = Stretch(begin_us, event.time_us)

    def _on_vfio_save_complete_precopy_thread_start(self, event: TraceEvent) -> None:
        self._threads[event.device] = event.time_us

    def _on_vfio_save_complete_precopy_thread_end(self, event: TraceEvent) -> None:
        if (begin_us := self._threads.pop(event.device, None)) is not None:
            self._device(event).save_thread = Stretch(begin_us, event.time_us)

    def _on_vfio_send_init_data_flag(self, event: TraceEvent) -> None:
        self._device(event).sent_initial_us.append(event.time_us)

    def _on_migration_bitmap_sync_start(self, event: TraceEvent) -> None:
        self._sync_us = event.time_us

    def _on_migration_bitmap_sync_end(self, event: TraceEvent) -> None:
        if self._sync_us is not None:
            syncs = self._now.final_syncs if self._stopped else self._now.syncs
            syncs.append((Stretch(self._sync_us, event.time_us), event.value("dirty_pages") or 0))
        self._sync_us = None

    def _on_migrate_transferred(self, event: TraceEvent) -> None:
        size, ms = event.value("transferred"), event.value("time_spent")
        self._now.side = SOURCE
        if size is not None and ms:
            given = event.value("switchover_bw") or 0
            devices = sum(device.precopy_bytes for device in self._now.devices.values())
            self._now.windows.append(Window(event.time_us, size, ms, given, event.value("max_size") or 0, devices))

    def _on_qemu_savevm_query_pending(self, event: TraceEvent) -> None:
        self._now.side = SOURCE
        if self._now.first_pending_bytes is None:
            self._pending(event.value("precopy") or 0)
        if event.value("final") == 1:
            left = sum(device.left_bytes for device in self._now.devices.values())
            self._now.final_ram_bytes = max(0, (event.value("precopy") or 0) - left)
        elif event.value("exact") == 1:
            self._now.decided = event.time_us, event.value("total") or 0

    def _on_migrate_pending_estimate(self, event: TraceEvent) -> None:
        if self._now.first_pending_bytes is None:
            self._pending(event.value("size") or 0)

    def _pending(self, size: int) -> None:
        self._now.first_pending_bytes = size
        first = [device.reports[0] for device in self._now.devices.values() if device.reports]
        self._now.first_device_pending_bytes = sum(each.initial_bytes + each.dirty_bytes for each in first)

    def _on_migrate_pending_exact(self, event: TraceEvent) -> None:
        self._now.decided = event.time_us, event.value("size") or 0

    def _on_migration_thread_low_pending(self, event: TraceEvent) -> None:
        self._now.moments["decided"] = event.time_us

    def _on_savevm_send_switchover_start(self, event: TraceEvent) -> None:
        self._now.moments["switchover start"] = event.time_us

    def _on_source_return_path_thread_switchover_acked(self, event: TraceEvent) -> None:
        self._now.acks_us.append(event.time_us)
        self._now.ack_kind = "reusable" if event.value("switchover_ack_pending_num") is not None else "one_shot"

    def _on_migration_request_switchover_ack_legacy(self, event: TraceEvent) -> None:
        self._now.moments["legacy ack"] = event.time_us

    def _on_source_return_path_thread_pong(self, event: TraceEvent) -> None:
        self._now.moments.setdefault("pong", event.time_us)

    def _on_source_return_path_thread_shut(self, event: TraceEvent) -> None:
        self._now.moments["shut"] = event.time_us

    def _on_vmstate_downtime_save(self, event: TraceEvent) -> None:
        self._vmstate(event, self._now.saves_us)
