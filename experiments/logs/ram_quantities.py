# SPDX-License-Identifier: GPL-2.0-or-later
"""What the logs tell of the guest's RAM."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator

from experiments.logs.cmdline import QemuSettings
from experiments.logs.facts import SideFacts
from experiments.logs.pair import Pair
from experiments.logs.quantity import (
    GIB,
    MIB,
    US_PER_MS,
    US_PER_S,
    LogQuantity,
    bounded,
    measured,
    median_ms,
    times_told,
    unknown,
)
from experiments.logs.waterfall import stop_us
from sim.scenario.scenario import Scenario
from sim.scenario.units import PAGE_BYTES

ZERO_PAGE_BYTES = 9
"""On the wire (QEMU migration/ram.c)."""
NEAR = 0.1
"""So near to max-bandwidth a window was filled by it. Ours."""


def ram_quantities(pair: Pair, settings: QemuSettings, base: Scenario) -> Iterator[LogQuantity]:
    """Its size, what is not zero, its rates, and what the syncs take."""
    source = pair.source
    size = settings.ram_bytes
    how = "-m"
    if size is None and source.begun and source.first_pending_bytes is not None:
        size = source.first_pending_bytes - source.first_device_pending_bytes
        how = "what was pending when the iterations began, less the devices' part"
    if size is None or size <= 0:
        yield unknown("ram.size_gib", "neither -m (--cmdline) nor the beginning of the log is known")
        return
    yield measured("ram.size_gib", size / GIB, f"{how}, {size} bytes")
    left = _left_bytes(pair)
    nonzero = yield from _nonzero(pair, settings, size, left)
    scan = yield from _ram_rates(source, settings, size, nonzero, left)
    syncs = [stretch.us for stretch, _ in source.syncs]
    if syncs:
        how = f"migration_bitmap_sync_start to _end before the stop, {times_told(syncs)}"
        yield measured("ram.sync_ms", median_ms(syncs), how)
    if source.final_syncs:
        last = [stretch.us for stretch, _ in source.final_syncs]
        how = f"migration_bitmap_sync_start to _end after the stop, {times_told(last)}"
        yield measured("ram.final_sync_ms", sum(last) / US_PER_MS, how)
    yield from _last_scan(pair, base, left, nonzero, scan)
    yield from _dirty(source, size, base)


def _left_bytes(pair: Pair) -> int:
    """Of RAM, what was left when the guest was stopped."""
    source = pair.source
    if source.final_ram_bytes is not None:
        return source.final_ram_bytes
    sizes = [here.sizes[-1].bytes for here, _ in pair.devices if here.sizes]  # QEMU 10: the figure is of all
    return max(0, source.decided[1] - sum(sizes)) if source.decided and len(sizes) == len(pair.devices) else 0


def _last_scan(pair: Pair, base: Scenario, left: int, nonzero: int | None, scan: float | None) -> Iterator[LogQuantity]:
    """What the last pass takes beside the sync and what was left: pages, and zeros that were not looked at yet."""
    source = pair.source
    most_us = _last_pass_us(source)
    if most_us is None:
        yield unknown("ram.final_scan_ms", "vmstate_downtime_save is not in the source's log")
        return
    most_ms = most_us / US_PER_MS
    how = f"vmstate_downtime_save of RAM without the last sync, {most_ms:.3f} ms, less the {left} bytes left"
    fastest = max([base.ram.send_bytes_per_s / 1000, *(window.bytes_per_ms for window in source.windows)])
    zeros = max(0, left - nonzero) if nonzero is not None else 0
    left_ms = (left - zeros) / fastest + zeros / (scan or base.ram.scan_bytes_per_s) * 1000
    likely_ms = max(0.0, most_ms - left_ms)
    yield bounded("ram.final_scan_ms", likely_ms, how, 0.0 if left else likely_ms, most_ms)


def _nonzero(pair: Pair, settings: QemuSettings, size: int, left: int) -> Generator[LogQuantity, None, int | None]:
    """Yields one quantity; returns the bytes."""
    if settings.normal_bytes is not None:
        most = min(size, settings.normal_bytes)
        how = f"normal-bytes of query-migrate, {settings.normal_bytes}; pages that were sent twice are in it"
        yield bounded("ram.nonzero_gib", most / GIB, how, None, most / GIB)
        return most
    moved = sum(window.bytes for window in pair.source.windows)
    moved -= pair.source.windows[-1].device_bytes if pair.source.windows else 0
    if not pair.source.windows or not pair.source.begun:
        yield unknown("ram.nonzero_gib", "migrate_transferred is not in the source's log from its beginning")
        return None
    # A page of zeros takes 9 bytes: moved = nonzero + (size - nonzero) / page x 9.
    zero_share = ZERO_PAGE_BYTES / PAGE_BYTES
    nonzero = min(size, max(0, round((moved - size * zero_share) / (1 - zero_share))))
    last, fastest = pair.source.windows[-1], max(window.bytes_per_ms for window in pair.source.windows)
    behind = round(max(0, stop_us(pair) - last.end_us) / US_PER_MS * fastest) + left
    most = min(size, nonzero + behind)
    how = (
        f"{max(0, moved)} bytes of migrate_transferred that are no device's; pages that were sent twice are in it. Up "
        f"to {behind} bytes were left, or came behind the last migrate_transferred"
    )
    yield bounded("ram.nonzero_gib", nonzero / GIB, how, None, most / GIB)
    return nonzero


def _ram_rates(
    source: SideFacts, settings: QemuSettings, size: int, nonzero: int | None, left: int
) -> Generator[LogQuantity, None, float | None]:
    """Yields quantities; returns how fast zeros are found, bytes/s."""
    if not source.windows or nonzero is None or not source.begun:
        return None
    send = max(window.bytes_per_ms for window in source.windows) * 1000
    limit = settings.max_bandwidth_bytes_per_s
    how = "the fastest window of migrate_transferred, RAM and devices together"
    if limit is not None and send > (1 - NEAR) * limit:
        how += f"; max-bandwidth, {limit} bytes/s, held it back"
    if nonzero >= MIB:
        yield bounded("ram.send_gib_per_s", send / GIB, how, send / GIB)
    else:
        yield unknown("ram.send_gib_per_s", f"only {nonzero} bytes of RAM were not zero")
    passes = _first_scan(source, size - nonzero - left, nonzero, send), _last_zeros(source, left - nonzero)
    scan, how = max((each for each in passes if each is not None), default=(0.0, ""))
    if not scan:
        return None
    yield bounded("ram.scan_gib_per_s", scan / GIB, how, scan / GIB)
    return scan


def _first_scan(source: SideFacts, scanned: int, nonzero: int, send: float) -> tuple[float, str] | None:
    """How fast zeros were found before the first sync, bytes/s at least, and how that is known."""
    begin_us = next((at_us for at_us, state in source.statuses if state == "active"), None)
    first = next((stretch.begin_us for stretch, _ in source.syncs if begin_us and stretch.begin_us > begin_us), None)
    if begin_us is None or first is None:
        return None
    scan_s = (first - begin_us) / US_PER_S - (nonzero / send if nonzero >= MIB else 0)
    if scan_s <= 0 or scanned < MIB:
        return None
    how = "the first pass, from active to the first sync of RAM, less the time of pages that are not zero"
    return scanned / scan_s, f"{how}; devices' turns are in it"


def _last_zeros(source: SideFacts, zeros: int) -> tuple[float, str] | None:
    """The same after the stop, if more was left then than is not zero."""
    took_us = _last_pass_us(source)
    if not took_us or zeros < MIB:
        return None
    took = f"{took_us / US_PER_MS:.3f} ms, what the last pass took (vmstate_downtime_save)"
    return zeros * US_PER_S / took_us, f"{zeros} bytes of zeros were left when the guest was stopped, within {took}"


def _last_pass_us(source: SideFacts) -> int | None:
    """What the last pass took without its sync. None: the log does not show it."""
    whole_us, end_us = source.saves_us.get("ram"), source.moments.get("RAM done")
    if whole_us is None or end_us is None:
        return None
    inside = [stretch for stretch, _ in source.final_syncs if stretch.begin_us < end_us < stretch.end_us + whole_us]
    return max(0, whole_us - sum(stretch.us for stretch in inside))


def _dirty(source: SideFacts, size: int, base: Scenario) -> Iterator[LogQuantity]:
    """By the dirty pages of each sync, which count from the last period of a second."""
    syncs = [*source.syncs, *source.final_syncs]
    if len(syncs) < 2:
        yield unknown("ram.dirty_mib_per_s", "there were no two syncs of RAM (migration_bitmap_sync_end)")
        return
    pages, span_us = 0, syncs[-1][0].end_us - syncs[0][0].end_us
    for (_, before), (_, now) in itertools.pairwise(syncs):
        pages += now - before if now >= before else now
    rate = pages * PAGE_BYTES / max(1, span_us) * US_PER_S / MIB
    how = f"dirty_pages of migration_bitmap_sync_end, {pages} in {span_us / US_PER_S:.3g} s"
    yield measured("ram.dirty_mib_per_s", rate, how)
    most = max(dirty for _, dirty in syncs) * PAGE_BYTES / MIB
    if most > base.ram.working_set_mib or size / MIB < base.ram.working_set_mib:
        value = min(size / MIB, max(most, PAGE_BYTES / MIB))
        yield bounded("ram.working_set_mib", value, "the most dirty pages of one sync", value, size / MIB)
