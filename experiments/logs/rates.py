# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast a device is saved and loaded, as far as the logs tell.

On the single channel a save contains the read(), the copies and a full socket; a load contains the wait for bytes,
which is the source's save. So both bound the rate from below only. With multifd a write() is seen by itself. The
driver's functions show SAVE and LOAD by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from experiments.logs.clocks import Clocks
from experiments.logs.device_quantities import state_size, stop_pieces, usual, whole_bytes
from experiments.logs.driver import LOAD, NS_PER_S, SAVE, Calls
from experiments.logs.facts import DeviceFacts, Piece
from experiments.logs.pair import Pair
from experiments.logs.quantity import LEAST_BYTES, MIB, US_PER_MS, US_PER_S, LogQuantity, bounded, measured, unknown
from sim.scenario.scenario import Scenario

SAVE_KEY, LOAD_KEY, FINISH_KEY = "firmware.save_mib_per_s", "firmware.load_mib_per_s", "firmware.load_finish_ms"
ENOUGH = 3
"""With fewer write()s, the last one cannot be told from the others. Ours."""
LONG = 0.5
"""A write() that takes this part of the longest one ends with a LOAD, as that does. Ours."""
EVEN, LONG_PLACE = 0.25, 0.9
"""If the median write() takes this part of one that is longer than 90 % of them, each takes as long as its bytes."""
QUICK_PLACE = 0.25
"""Of full packets the quicker ones count: what else the machine does only makes them slower. Ours."""
STALL_US, STALL_RATIO, STALL_SHARE = 20_000, 3.0, 1 / 3
"""A write() that takes this much, and so many times what others take, is no LOAD, if there are at most this share of
the LOADs that chunks of the base's size make. Ours."""
COPY_SHARE = 0.25
"""A write() of which more is a copy does not tell what LOAD takes. Ours."""
BOTH = "on one channel a save contains a full socket, and a load the wait for what is saved: neither is seen by itself"


def rate_quantities(pair: Pair, clocks: Clocks, calls: Calls, base: Scenario) -> Iterator[LogQuantity]:
    """The rates, the end of a load, and what a write() of critical data took beside its LOAD."""
    if not pair.traced and not calls:
        for key in (SAVE_KEY, LOAD_KEY, FINISH_KEY):
            yield unknown(key, "QMP events have no bytes, and no times of write()s")
        return
    yield from _save(pair, calls, base)
    yield from _load(pair, calls, base)
    yield from _finish(pair, clocks, base)
    for at, (_, there) in enumerate(pair.devices):
        objects = base.device[min(at, len(base.device) - 1)].critical.objects
        found = stalls(stop_pieces(pair, there), base)
        if found and objects:
            stalled_us = sum(found)
            how = f"{len(found)} write()s after the stop took {stalled_us / US_PER_MS:.3f} ms more than the others"
            each_us = stalled_us / objects
            yield bounded(f"device.{at}.critical.setup_us", each_us, f"{how}, as {objects} objects", 0.0, each_us)


def stalls(pieces: Sequence[Piece], base: Scenario) -> list[int]:
    """What a few write()s took more than all others, if these are no LOADs: us, the longest first. The last write(),
    which ends the load, is left out."""
    longest = sorted((piece.us for piece in pieces[:-1]), reverse=True)
    loads = sum(piece.bytes or MIB for piece in pieces) / base.driver.chunk_bytes
    for count in range(1, min(len(longest), int(loads * STALL_SHARE) + 1)):
        if longest[count - 1] >= max(STALL_US, STALL_RATIO * longest[count]):
            return [each - longest[count] for each in longest[:count]]
    return []


def shared(pair: Pair, engines: float) -> float:
    """How much slower a command is, if multifd has all devices at it at once, and they share the base's engines."""
    return max(1.0, len(pair.devices) / engines) if pair.source.multifd else 1.0


# --- saves ------------------------------------------------------------------------------------------------------------


def saved_bytes(here: DeviceFacts, there: DeviceFacts) -> int:
    """What was saved of the stopped device; with multifd no event has it, and the size of the state is taken."""
    if here.stop_bytes or here.save_thread is None:
        return here.stop_bytes
    size = state_size(here, there)
    return size.bytes if size.known else 0


def _save(pair: Pair, calls: Calls, base: Scenario) -> Iterator[LogQuantity]:
    if times_ns := calls.get(SAVE):
        size = sum(here.precopy_bytes + saved_bytes(here, there) for here, there in pair.devices)
        yield _of_calls(SAVE_KEY, size, times_ns, "mlx5vf_cmd_save_vhca_state to mlx5vf_save_callback")
        return
    bounds = [found for at in range(len(pair.devices)) if (found := _one_save(pair, at, base)) is not None]
    if not bounds:
        yield unknown(SAVE_KEY, "less than 1 MiB of each device moved after the stop")
        return
    rate, least, how = max(bounds)
    event = "thread_start to thread_end" if pair.source.multifd else "vfio_save_complete_precopy_start to its end"
    rate *= shared(pair, base.firmware.engines_for_saves)
    yield bounded(SAVE_KEY, rate, f"{event}, {how}; {'the channels are in it' if pair.source.multifd else BOTH}", least)


def _one_save(pair: Pair, at: int, base: Scenario) -> tuple[float, float, str] | None:
    """Likely and least rate by one device, and how. The first chunks are saved as soon as it is in STOP_COPY."""
    here, there = pair.devices[at]
    took, size, stopped = here.save or here.save_thread, saved_bytes(here, there), here.to("STOP_COPY")
    if took is None or size < LEAST_BYTES or not took.us:
        return None
    begin_us = took.begin_us if stopped is None else min(took.begin_us, stopped.end_us)
    ahead = base.driver.chunks * base.driver.chunk_bytes if took.begin_us > begin_us else 0
    least = size * US_PER_S / (took.end_us - begin_us) / MIB
    moved_us = max(1, took.us - (0 if pair.source.multifd else sum(stalls(stop_pieces(pair, there), base))))
    likely = max(0, size - ahead) * US_PER_S / moved_us / MIB
    whole_ms = (took.end_us - begin_us) / US_PER_MS
    how = f"{size} bytes in {took.us / US_PER_MS:.3f} ms; {whole_ms:.3f} ms since STOP_COPY, when its SAVEs began"
    return max(least, likely), least, how


def _of_calls(key: str, size: int, times_ns: Sequence[int], what: str) -> LogQuantity:
    whole_ns = sum(times_ns)
    if size < LEAST_BYTES or whole_ns <= 0:
        return unknown(key, f"{what}: {len(times_ns)} calls, but less than 1 MiB")
    how = f"{what}, {len(times_ns)} calls, {size} bytes in {whole_ns / 1e6:.3f} ms"
    return measured(key, size * NS_PER_S / whole_ns / MIB, how)


# --- loads ------------------------------------------------------------------------------------------------------------


def _load(pair: Pair, calls: Calls, base: Scenario) -> Iterator[LogQuantity]:
    if times_ns := calls.get(LOAD):
        size = sum(piece.bytes for _, there in pair.devices for piece in there.pieces)
        size = size or sum(saved_bytes(here, there) for here, there in pair.devices)
        what = "mlx5vf_cmd_load_vhca_state, without what the last one takes more"
        yield _of_calls(LOAD_KEY, size, [sum(times_ns) - _late_ns(times_ns, len(pair.devices))], what)
        return
    if pair.source.multifd and (found := _of_full_packets(pair)) is not None:
        yield found
        return
    size = us = count = 0
    for here, there in pair.devices:
        pieces = regular(stop_pieces(pair, there), _packet_bytes(here, there), base)
        size += sum(piece.bytes for piece in pieces)
        us += sum(piece.us for piece in pieces)
        count += len(pieces)
    if size < LEAST_BYTES or us <= 0:
        yield unknown(LOAD_KEY, "less than 1 MiB of each device moved after the stop")
        return
    written = size * US_PER_S / us / MIB
    told = f"{count} of them, {size} bytes in {us / US_PER_MS:.3f} ms"
    if not pair.source.multifd:
        how = f"vfio_load_state to vfio_load_state_device_data after the stop, {told}; {BOTH}"
        yield bounded(LOAD_KEY, max(written, base.firmware.load_mib_per_s), how, written)
        return
    how = f"vfio_load_state_device_buffer_load_start to _load_end, {told}; {len(pair.devices)} devices at once"
    share = shared(pair, base.firmware.engines_for_loads)
    copied_us = size * US_PER_S / base.host.copy_bytes_per_s
    if copied_us > us * COPY_SHARE:
        yield bounded(LOAD_KEY, max(written, base.firmware.load_mib_per_s), f"{how}; mostly the copy", written)
    else:
        how += f"; less the copy at host.copy_gib_per_s = {base.host.copy_gib_per_s:g}"
        rate = size * US_PER_S / (us - copied_us) / MIB
        yield bounded(LOAD_KEY, rate * share, how, rate, rate * share)


def _of_full_packets(pair: Pair) -> LogQuantity | None:
    """The rate where each write() takes as long as its bytes: by the median of those that are full. None if most
    write()s take next to nothing, as where a few end with a LOAD."""
    every = [piece.us for _, there in pair.devices for piece in there.pieces]
    buffer_bytes = max(here.buffer_bytes or MIB for here, _ in pair.devices)
    if len(every) < 2 * ENOUGH:
        return None
    middle, long = median(every), sorted(every)[int(LONG_PLACE * (len(every) - 1))]
    if middle < EVEN * long or middle < STALL_US / 10:
        return None
    full = sorted(each for each in every if each >= LONG * middle)
    took_us = full[int(QUICK_PLACE * (len(full) - 1))]
    how = "vfio_load_state_device_buffer_load_start to _load_end"
    how += f", {took_us / US_PER_MS:.3f} ms for a full packet of {buffer_bytes} bytes, lower quartile of {len(full)}"
    return measured(LOAD_KEY, buffer_bytes * US_PER_S / took_us / MIB, f"{how}; {len(pair.devices)} devices at once")


def _packet_bytes(here: DeviceFacts, there: DeviceFacts) -> float:
    """The size of a packet of multifd, in the mean."""
    return whole_bytes(here, there)[0] / max(1, len(there.pieces))


def regular(pieces: Sequence[Piece], packet_bytes: float, base: Scenario) -> list[Piece]:
    """The write()s up to the last one that ends with a LOAD like the others, each with its bytes, without stalls. What
    comes behind is loaded in the very last write(), with the end of the load."""
    slow = len(stalls(pieces, base))
    most = sorted((piece.us for piece in pieces[:-1]), reverse=True)[slow : slow + 1]
    before = [
        Piece(piece.begin_us, piece.begin_us + min([piece.us, *most]), piece.bytes or round(packet_bytes))
        for piece in pieces[:-1]
    ]
    last = max((at for at, piece in enumerate(before) if piece.us >= LONG * most[0]), default=-1) if most else -1
    return before[: last + 1]


def _late_ns(times_ns: Sequence[int], devices: int) -> int:
    """What the longest LOAD of each device takes more than the usual one."""
    if len(times_ns) < ENOUGH * devices:
        return 0
    usual_ns = median(times_ns)
    return round(sum(each - usual_ns for each in sorted(times_ns)[-devices:]))


def _finish(pair: Pair, clocks: Clocks, base: Scenario) -> Iterator[LogQuantity]:
    """The end of a load: what the last write() takes more than its LOAD. What the driver does as it leaves RESUMING is
    in resume_ms."""
    found = [each for here, there in pair.devices if (each := _last(pair, clocks, here, there, base)) is not None]
    if not found:
        yield unknown(FINISH_KEY, "no write() after the stop is in the target's log, or no SWITCHOVER_START")
        return
    low, value, high = (median(each[at] for each in found) for at in range(3))
    how = f"what the last write() takes more than the others; all of it, if they are fewer than {ENOUGH}"
    share = shared(pair, base.firmware.engines_for_loads)
    if share > 1:
        how += f"; {len(pair.devices)} devices at once"
        yield bounded(FINISH_KEY, value / share, how, low / share, high)
    elif high - low <= 0.1 * high:
        yield measured(FINISH_KEY, value, f"{how}, {len(found)} devices")
    else:
        yield bounded(FINISH_KEY, value, f"{how}; a LOAD and a wait for bytes may be in it", low, high)


def _last(
    pair: Pair, clocks: Clocks, here: DeviceFacts, there: DeviceFacts, base: Scenario
) -> tuple[float, float, float] | None:
    """Least, likely and most of one device, ms. With few write()s, the last one is not told from the others."""
    pieces = stop_pieces(pair, there)
    if not pieces:
        return None
    last = pieces[-1]
    if len(pieces) < ENOUGH:
        return 0.0, last.us / US_PER_MS, last.us / US_PER_MS
    packet_bytes = _packet_bytes(here, there)
    before = regular(pieces, packet_bytes, base)
    size, us = sum(piece.bytes for piece in before), sum(piece.us for piece in before)
    behind = sum(piece.bytes or packet_bytes for piece in pieces[len(before) :])
    load_us = max(usual(pieces[:-1]), behind * us / size if size else 0.0)
    excess_us = max(0.0, last.us - load_us)
    waits_us = 0.0
    if here.last_block_us is not None:
        waits_us = max(0, here.last_block_us + clocks.offset_us - last.begin_us) + (clocks.uncertainty_us or 0)
    return max(0.0, excess_us - waits_us) / US_PER_MS, excess_us / US_PER_MS, last.us / US_PER_MS
