"""The grid of channels: ways over the wire, numbers of connections and what one carries, credits, uneven streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.study.experiment import Point

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
"""favours-v2 without its one lock and its one engine: what is left is the link and the connections."""
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
"""nic-reconfig with little RAM and half the state: more runs in the same time. No critical data can go while the VMM is
set up; that would be most of the lag of the shortest migrations."""
QUICK_SETUP = {"setup_us": 50.0, "reconfigurations_per_s": 20.0, "objects": 64}
"""Set-up that takes the target next to nothing (1.6 ms a reconfiguration): the wire's share of the lag can be seen."""
SHIPPED_SETUP = {"setup_us": 2000.0, "reconfigurations_per_s": 5.0, "objects": 512}
"""nic-reconfig's own: 64 ms of set-up a reconfiguration."""
SHARES = (1 / 16, 1 / 4, 1.0)
"""Of the link, what one connection carries."""
STREAMS = (1, 4, 16, 30)
"""Dirty streams: 3, 6, 18 and 32 connections in all, dedicated or in a pool."""
MANY = 4
"""The N at which all else but N is swept."""
POOLS = (1, 2, 3, 5, 8, 16, 31)
BUSY_STREAMS = (1, 2, 4)
"""Streams that have something to send. Blocks go to streams by their number modulo N, so that even the writes of a
hotspot come out even; a state of fewer blocks than streams does not."""
BUFFER_MIB = 10.0
BUFFERS_MIB = (BUFFER_MIB, 2.0)
CREDIT_MIB = 64.0
AMPLE_CREDIT_MIB = 512.0
"""More than 32 sockets of 10 MiB hold."""
PLACE = ("part", "streams", "per_connection_gbit_per_s", "pool_connections", "socket_buffer_mib", "dirty_credit_mib")
LAG_PLACE = (*PLACE, "setup_us", "busy_streams")


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
    factors: dict[str, str | int | float | bool] = {
        "part": part,
        "streams": streams,
        "per_connection_gbit_per_s": gbit,
        "pool_connections": pool,
        "socket_buffer_mib": buffer_mib,
        "dirty_credit_mib": credit_mib,
        "busy_streams": busy or streams,
        "setup_us": setup["setup_us"] if setup else 0.0,
    }
    return Point("nic-reconfig" if setup else "favours-v2", protocol, tuple(settings), factors)


def dedicated(streams: int) -> str:
    """The protocol's name."""
    return f"v3-n{streams}"


def points(quick: bool) -> list[Point]:
    """Numbers of connections and what one carries; credits; sizes of the pool; uneven streams; the critical lag."""
    shares = (SHARES[0], SHARES[-1]) if quick else SHARES
    streams = (MANY, STREAMS[-2]) if quick else STREAMS
    return [
        *_width(shares, streams),
        *_pools(streams, (2, 5, 16) if quick else POOLS),
        *_uneven(BUSY_STREAMS[:1] if quick else BUSY_STREAMS),
        *_lag(shares, BUFFERS_MIB[:1] if quick else BUFFERS_MIB),
    ]


def _width(shares: Sequence[float], streams: Sequence[int]) -> list[Point]:
    found = []
    for share in shares:
        for n in streams:
            names = [dedicated(n), f"{dedicated(n)}-pool", "v2-multifd"]
            names += [f"{dedicated(n)}-one", "v2"] if n == MANY else []
            found += [_point("width", name, share, streams=n) for name in names]
    return found


def _pools(streams: Sequence[int], pools: Sequence[int]) -> list[Point]:
    """Where a connection carries least: pools of any size; credit that covers all sockets; smaller sockets."""
    narrow, name = SHARES[0], f"{dedicated(MANY)}-pool"
    crowded = [n for n in streams if (n + 1) * BUFFER_MIB > CREDIT_MIB]
    ample = [_point("credit", f"{dedicated(n)}-pool", narrow, streams=n, credit_mib=AMPLE_CREDIT_MIB) for n in crowded]
    sized = [_point("pool", name, narrow, pool=pool) for pool in pools]
    large = [pool for pool in pools if pool * BUFFER_MIB > CREDIT_MIB]
    small = [
        _point("buffer", protocol, narrow, streams=n, buffer_mib=BUFFERS_MIB[1])
        for n in crowded
        for protocol in (dedicated(n), f"{dedicated(n)}-pool")
    ]
    return [
        *ample,
        *small,
        *sized,
        *(_point("pool", name, narrow, pool=pool, credit_mib=AMPLE_CREDIT_MIB) for pool in large),
    ]


def _uneven(busy: Sequence[int]) -> list[Point]:
    names = (dedicated(MANY), f"{dedicated(MANY)}-pool")
    return [_point("uneven", name, SHARES[0], busy=few) for few in busy for name in names]


def _lag(shares: Sequence[float], buffers_mib: Sequence[float]) -> list[Point]:
    names = (dedicated(MANY), f"{dedicated(MANY)}-pool", f"{dedicated(MANY)}-one", "v2")
    return [
        _point("lag", name, share, buffer_mib=buffer_mib, setup=setup)
        for share in shares
        for setup, buffers in ((QUICK_SETUP, buffers_mib), (SHIPPED_SETUP, buffers_mib[:1]))
        for buffer_mib in buffers
        for name in names
    ]
