"""The grid of channels: ways over the wire, numbers of connections and the rate of one, credits, uneven streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from experiments.study.experiment import Factor, Point

LINK_GBIT_PER_S = 10.0
STATE_MIB = 256
WIRE_BOUND = (
    f"device.0.state_mib={STATE_MIB}",
    f"device.0.stop_only_mib={STATE_MIB}",
    "device.0.block_kib=256",
    "device.0.max_dirty_streams=32",
    "driver.lock=per_fd",
    "firmware.engines=32",
    "ram.size_gib=1",
    "ram.nonzero_gib=0.001",
)
"""favours-v2 without its one lock and its one engine: only the link and the connections are left as limits."""
LAG_DEVICE = (
    "ram.size_gib=0.5",
    "ram.nonzero_gib=0.0625",
    "ram.dirty_mib_per_s=5",
    "ram.working_set_mib=16",
    "device.0.state_mib=256",
    "device.0.block_kib=256",
    "vmm.give_up_s=6",
    "vmm.setup_ms=0",
)
"""nic-reconfig with little RAM and half the state: more runs in the same time. No critical data can move while the VMM
is set up, and that would be most of the lag of the shortest migrations: so setup_ms is 0."""
QUICK_SETUP = {"setup_us": 50.0, "reconfigurations_per_s": 20.0, "objects": 64}
"""Set-up that costs the target next to nothing (1.6 ms a reconfiguration): the wire's part of the lag can be seen."""
SHIPPED_SETUP = {"setup_us": 2000.0, "reconfigurations_per_s": 5.0, "objects": 512}
"""nic-reconfig's own: 64 ms of set-up a reconfiguration."""
SHARES = (1 / 16, 1 / 4, 1.0)
"""The part of the link's rate that one connection carries."""
NARROW_GBIT_PER_S = LINK_GBIT_PER_S * SHARES[0]
STREAMS = (1, 4, 16, 30)
"""Dirty streams: 3, 6, 18 and 32 connections in all, dedicated or in a pool."""
MANY = 4
"""The N of all sweeps that do not sweep N."""
POOLS = (1, 2, 3, 5, 8, 16, 31)
BUSY_STREAMS = (1, 2, 4)
"""Streams that have something to send. Blocks go to streams by their number modulo N, so that even the writes of a
hotspot come out even; a state of fewer blocks than streams does not."""
BUFFER_MIB = 10.0
BUFFERS_MIB = (BUFFER_MIB, 2.0)
CREDIT_MIB = 64.0
AMPLE_CREDIT_MIB = 512.0
"""More than 32 sockets of 10 MiB hold."""
FACTORS = (
    "part",
    "streams",
    "per_connection_gbit_per_s",
    "pool_connections",
    "socket_buffer_mib",
    "dirty_credit_mib",
    "busy_streams",
    "setup_us",
)
PLACE = (*FACTORS[:-2], "setup_us", "busy_streams")
"""The same, in the order of the table of effects."""


def _point(
    part: str,
    protocol: str,
    share: float,
    *,
    streams: int = MANY,
    pool: int | None = None,
    buffer_mib: float = BUFFER_MIB,
    credit_mib: float = CREDIT_MIB,
    busy: int = 0,
    setup: Mapping[str, float] | None = None,
) -> Point:
    """`pool` connections beside the first one; by default as many as dedicated streams would have."""
    pool = streams + 1 if pool is None else pool
    gbit = LINK_GBIT_PER_S * share
    settings = [
        f"link.gbit_per_s={LINK_GBIT_PER_S:g}",
        f"link.per_connection_gbit_per_s={gbit:g}",
        f"link.socket_buffer_mib={buffer_mib:g}",
        f"v3.dirty_credit_mib={credit_mib:g}",
        f"v3.pool_connections={pool}",
        f"vmm.multifd_channels={max(2, pool)}",
        *(LAG_DEVICE if setup else WIRE_BOUND),
    ]
    if busy:
        settings += [f"device.0.block_kib={STATE_MIB // busy * 1024}", f"driver.chunk_mib={STATE_MIB}"]
    if setup:
        settings += [
            f"device.0.critical.setup_us={setup['setup_us']:g}",
            f"device.0.critical.objects={setup['objects']:g}",
            f"device.0.reconfigurations.poisson_per_s={setup['reconfigurations_per_s']:g}",
        ]
    setup_us = setup["setup_us"] if setup else 0.0
    place: tuple[Factor, ...] = (part, streams, gbit, pool, buffer_mib, credit_mib, busy or streams, setup_us)
    factors = dict(zip(FACTORS, place, strict=True))
    return Point("nic-reconfig" if setup else "favours-v2", protocol, tuple(settings), factors)


def dedicated(streams: int) -> str:
    """The protocol with a connection a stream."""
    return f"v3-n{streams}"


def pooled(streams: int) -> str:
    """The protocol with a pool of connections."""
    return f"v3-n{streams}-pool"


def points(quick: bool) -> list[Point]:
    """Numbers of connections and the rate of one; credits; sizes of the pool; uneven streams; the critical lag."""
    shares = (SHARES[0], SHARES[-1]) if quick else SHARES
    streams = (MANY, STREAMS[-2]) if quick else STREAMS
    busy = BUSY_STREAMS[:1] if quick else BUSY_STREAMS
    return [
        *_width(shares, streams),
        *_pools(streams, (2, 5, 16) if quick else POOLS),
        *(_point("uneven", name, SHARES[0], busy=few) for few in busy for name in (dedicated(MANY), pooled(MANY))),
        *_lag(shares, BUFFERS_MIB[:1] if quick else BUFFERS_MIB),
    ]


def _width(shares: Sequence[float], streams: Sequence[int]) -> Iterator[Point]:
    for share in shares:
        for n in streams:
            names = [dedicated(n), pooled(n), "v2-multifd", *([f"{dedicated(n)}-one", "v2"] if n == MANY else [])]
            yield from (_point("width", name, share, streams=n) for name in names)


def _pools(streams: Sequence[int], sizes: Sequence[int]) -> Iterator[Point]:
    """Where a connection carries least: credit that covers all sockets; smaller sockets; pools of any size."""
    narrow = SHARES[0]
    crowded = [n for n in streams if (n + 1) * BUFFER_MIB > CREDIT_MIB]
    for n in crowded:
        yield _point("credit", pooled(n), narrow, streams=n, credit_mib=AMPLE_CREDIT_MIB)
    for n in crowded:
        for protocol in (dedicated(n), pooled(n)):
            yield _point("buffer", protocol, narrow, streams=n, buffer_mib=BUFFERS_MIB[1])
    for size in sizes:
        yield _point("pool", pooled(MANY), narrow, pool=size)
    for size in sizes:
        if size * BUFFER_MIB > CREDIT_MIB:
            yield _point("pool", pooled(MANY), narrow, pool=size, credit_mib=AMPLE_CREDIT_MIB)


def _lag(shares: Sequence[float], buffers_mib: Sequence[float]) -> Iterator[Point]:
    names = (dedicated(MANY), pooled(MANY), f"{dedicated(MANY)}-one", "v2")
    for share in shares:
        for setup, buffers in ((QUICK_SETUP, buffers_mib), (SHIPPED_SETUP, buffers_mib[:1])):
            for buffer_mib in buffers:
                yield from (_point("lag", name, share, buffer_mib=buffer_mib, setup=setup) for name in names)
