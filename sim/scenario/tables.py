# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of a scenario file, each with its rules.

Units stand in the key names. A default is what the named driver, kernel or VMM does.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sim.scenario.suffixes import MAX_STREAMS
from sim.scenario.units import (
    GIB,
    KIB,
    MIB,
    NS_PER_US,
    PAGE_BYTES,
    NonNegative,
    Positive,
    PositiveMs,
    Rate,
    Table,
    Text,
    Whole,
    ns,
)


class Ram(Table):
    """Guest RAM. Pages of zeros come first in the first pass and cost a scan, not a copy."""

    size_gib: Annotated[float, Field(gt=0, le=65536)]
    """The guest's RAM."""
    nonzero_gib: NonNegative
    """RAM that is not zero, and is copied in the first pass."""
    scan_gib_per_s: Positive
    """How fast pages of zeros are found."""
    send_gib_per_s: Positive
    """How fast one thread sends pages."""
    dirty_mib_per_s: NonNegative
    """What the guest writes to its RAM."""
    working_set_mib: Positive
    """These writes stay in so much RAM, so a page may be written twice before it is sent."""
    sync_ms: NonNegative
    """To fetch the dirty bitmap before a pass."""
    final_sync_ms: NonNegative
    """To fetch it once more when the guest is stopped."""
    final_scan_ms: NonNegative
    """The last search for dirty pages beyond those that are sent, when the guest is stopped."""
    frame_mib: Annotated[float, Field(ge=PAGE_BYTES / MIB, le=1024)] = 1.0
    """Pages are sent in frames of this size."""

    frame_bytes = Whole("frame_mib")
    sync_ns = Whole("sync_ms")
    final_sync_ns = Whole("final_sync_ms")
    final_scan_ns = Whole("final_scan_ms")
    scan_bytes_per_s = Rate("scan_gib_per_s")
    send_bytes_per_s = Rate("send_gib_per_s")
    dirty_bytes_per_s = Rate("dirty_mib_per_s")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.nonzero_gib > self.size_gib:
            raise self.wrong("nonzero_gib", f"must be at most size_gib = {self.size_gib:g}")
        if self.working_set_mib > self.size_gib * 1024:
            raise self.wrong("working_set_mib", f"must be at most size_gib, {self.size_gib * 1024:g} MiB")
        return self


Engines = Annotated[float, Field(ge=1, le=256)]


class Firmware(Table):
    """A PF's firmware: shared by its VFs. The same at the source and at the target."""

    engines: Engines
    """Commands that run at full speed at once; more of them share the speed. It is what the next three keys are where
    they are left out."""
    save_engines: Engines | None = None
    """The same for the SAVEs of all VFs of the PF, at the source."""
    load_engines: Engines | None = None
    """The same for the LOADs of all VFs of the PF, at the target."""
    vf_engines: Engines | None = None
    """The same for the commands of one VF: what several streams of a device can gain."""
    save_mib_per_s: Positive
    """Of one SAVE command."""
    save_command_us: NonNegative
    """What a SAVE takes beside its bytes."""
    load_mib_per_s: Positive
    """Of one LOAD command."""
    load_command_us: NonNegative
    """What a LOAD takes beside its bytes."""
    load_finish_ms: NonNegative
    """The command that ends a device's load."""
    service_cv: Annotated[float, Field(ge=0, le=2)]
    """How much the times of commands vary: standard deviation over mean."""
    state_command_ms_per_vf: NonNegative = 0.0
    """What each suspend and each quiesce of a device takes more for each VF of its PF that migrates, its own included.
    Not a resume: no source says that it grows."""
    state_command_us_per_vector: NonNegative = 0.0
    """What each suspend and each quiesce takes more for each vector of the device."""
    state_command_us_per_pf_vector: NonNegative = 0.0
    """What each suspend and each quiesce takes more for each vector of all VFs of its PF that migrate: the growth of
    `state_command_ms_per_vf`, by the size of the VFs."""
    state_commands: Literal["parallel", "serial"] = "parallel"
    """Whether the suspends, quiesces and resumes of several VFs of a PF run beside each other, or one after the other.
    It matters to a VMM that asks for several at once (`vmm.parallel_stop`)."""
    quiesce_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of what the `state_command` keys add to a suspend and a quiesce together, the part that the quiesce takes."""
    load_finish_us_per_vector: NonNegative = 0.0
    """What the end of a device's load takes more for each of its vectors."""

    save_bytes_per_s = Rate("save_mib_per_s")
    save_command_ns = Whole("save_command_us")
    load_bytes_per_s = Rate("load_mib_per_s")
    load_command_ns = Whole("load_command_us")
    load_finish_ns = Whole("load_finish_ms")
    state_command_ns_per_vf = Whole("state_command_ms_per_vf")
    state_command_ns_per_vector = Whole("state_command_us_per_vector")
    state_command_ns_per_pf_vector = Whole("state_command_us_per_pf_vector")
    load_finish_ns_per_vector = Whole("load_finish_us_per_vector")

    @property
    def engines_for_saves(self) -> float:
        """SAVEs of a PF that run at full speed at once."""
        return self.engines if self.save_engines is None else self.save_engines

    @property
    def engines_for_loads(self) -> float:
        """LOADs of a PF that run at full speed at once."""
        return self.engines if self.load_engines is None else self.load_engines

    @property
    def engines_of_a_vf(self) -> float:
        """Commands of one VF that run at full speed at once."""
        return self.engines if self.vf_engines is None else self.vf_engines

    @model_validator(mode="after")
    def _varies_or_not(self) -> Self:
        if 0 < self.service_cv < 1e-3:
            raise self.wrong("service_cv", "must be 0, or at least 0.001")
        return self


class Driver(Table):
    """The kernel driver. The defaults are what mlx5 does (Linux 7.1, drivers/vfio/pci/mlx5)."""

    chunk_mib: Annotated[int, Field(ge=1, le=1024)]
    """One SAVE saves so much of the state."""
    chunks: Annotated[int, Field(ge=1, le=64)]
    """How many there are: the next SAVE waits until one is read."""
    lock: Literal["none", "per_fd", "device", "global"]
    """What read() holds: nothing, a lock of its fd, of the device, or of the whole driver."""
    lock_over: Literal["copy", "command"] = "copy"
    """What that lock is held over: the copy alone, or each SAVE command too."""
    call_us: NonNegative
    """A read() or write(), beside its bytes."""
    precopy: Literal["incremental", "reread", "check"] = "incremental"
    """`incremental`: what became dirty (mlx5). `reread`: the whole context again, at most once each `reread_ms`
    (virtio). `check`: a few bytes by which the target sees whether it fits, the state itself only when stopped
    (hisi_acc, qat)."""
    precopy_image: Literal["whole", "chunks"] = "whole"
    """One SAVE an image before the stop, as mlx5; or in chunks, as after it."""
    initial: Literal["image", "critical"] = "image"
    """What counts as initial_bytes: the whole first image (mlx5), or the critical objects in it."""
    reinit: Literal["flush", "invalidate", "priority", "none"] = "flush"
    """On new critical data, for a user who opted in. `flush`: unread bytes become initial and the new ones follow
    (mlx5). `invalidate`: unread dirty bytes are dropped and dirty again. `priority`: it is saved at once, and goes
    before dirty records of which nothing was read. `none`: the driver never reports any."""
    stop_copy_size: Literal["full", "left"] = "full"
    """What MIG_DATA_SIZE reports. `full`: a whole image, in any state (mlx5, whose query does not ask for an increment:
    mlx5vf_pci_get_data_size). `left`: what is not read yet."""
    stop_copy_size_factor: Annotated[float, Field(ge=1e-3, le=1000)] = 1.0
    """What MIG_DATA_SIZE reports, by what is right: vfio.h calls it an estimate. v2's reads are no longer than what it
    reports when the session begins (QEMU, vfio_save_setup)."""
    precopy_info_factor: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """The same of dirty_bytes of GET_PRECOPY_INFO, and in v3 of pending_bytes of a dirty stream's GET_STREAM_INFO."""
    precopy_info_v2: bool = True
    """The kernel knows MIG_PRECOPY_INFOv2. If not, a VMM that asks for REINIT gets none (QEMU goes on without)."""
    precopy_end: Literal["ENOMSG", "0"] = "ENOMSG"
    """What read() gives at the temporary end: by the header ENOMSG; mtty and qat give 0."""
    epochs: Literal["keep", "invalidate"] = "keep"
    """v3: whether a new epoch leaves earlier dirty data valid, or not."""
    reread_ms: PositiveMs = 1000.0
    """With `precopy = reread`."""
    finish_again_ms: NonNegative = 0.0
    """With `precopy = reread`: what is left of `firmware.load_finish_ms` at the end, if the target loaded a whole
    context before. It then paid that key at the end of the first one, in pre-copy."""
    unread_context: Literal["sent", "dropped"] = "sent"
    """With `precopy = reread`: what becomes of a context that is saved, and of which nothing was read, when the device
    is stopped and the whole context is saved once more. `sent`: both are (virtio, virtiovf_pci_save_device_final_data).
    `dropped`: only the last one is."""
    check_bytes: Annotated[int, Field(ge=1, le=1 << 20)] = 4096
    """With `precopy = check`."""

    chunk_bytes = Whole("chunk_mib")
    call_ns = Whole("call_us")
    reread_ns = Whole("reread_ms")
    finish_again_ns = Whole("finish_again_ms")

    @property
    def has_priority(self) -> bool:
        """v2: critical data may overtake dirty records. Only a driver that saves what became new has any."""
        return self.reinit == "priority" and self.precopy == "incremental"


class Host(Table):
    """Both hosts: their memory, their threads, and how much they vary."""

    copy_gib_per_s: Positive
    """What one thread copies."""
    memory_gib_per_s: Positive
    """What all threads copy together."""
    wake_up_us: NonNegative = 0.0
    """What a thread of the VMM that waited takes until it runs again: for data, for room in a connection, for work."""
    spread_cv: Annotated[float, Field(ge=0, le=2)] = 0.0
    """How much a host's fixed times vary from run to run: standard deviation over mean. In each run each host has one
    factor for the set-up, for the vCPUs, for RAM's sync and scan, for the state commands of its devices, and for
    configs and other devices. Commands that move state vary by firmware.service_cv."""

    copy_bytes_per_s = Rate("copy_gib_per_s")
    memory_bytes_per_s = Rate("memory_gib_per_s")
    wake_up_ns = Whole("wake_up_us")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.copy_gib_per_s > self.memory_gib_per_s:
            raise ValueError(
                f"copy_gib_per_s = {self.copy_gib_per_s:g} (one thread): must be at most "
                f"memory_gib_per_s = {self.memory_gib_per_s:g} (all of them)"
            )
        return self


class Link(Table):
    """The network between the hosts."""

    gbit_per_s: Positive
    """What all connections carry together."""
    per_connection_gbit_per_s: Positive
    """What one connection carries at most."""
    round_trip_us: NonNegative
    """There and back."""
    socket_buffer_mib: Annotated[float, Field(gt=0, le=4096)]
    """What a connection holds that its reader has not taken."""

    bytes_per_s = Rate("gbit_per_s")
    per_connection_bytes_per_s = Rate("per_connection_gbit_per_s")
    socket_buffer_bytes = Whole("socket_buffer_mib")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.per_connection_gbit_per_s > self.gbit_per_s:
            raise self.wrong("per_connection_gbit_per_s", f"must be at most link.gbit_per_s = {self.gbit_per_s:g}")
        return self

    @property
    def latency_ns(self) -> int:
        """Half a round trip."""
        return round(self.round_trip_us * NS_PER_US / 2)


class DowntimeStep(Table):
    """A downtime limit that holds from a time on."""

    after_s: Positive
    """So long after the migration began."""
    limit_ms: Positive
    """The limit from then on."""


class Vmm(Table):
    """The VMM's costs and settings."""

    read_mib: Annotated[float, Field(ge=1 / KIB, le=1024)] = 1.0
    """The buffer of one read()."""
    pieces_at_once: Annotated[int, Field(ge=1, le=64)] = 1
    """So many frames of RAM, and reads of a data fd, are simulated as one, where buffers have room for it and nothing
    is decided in between. 1 unless runs are screened (sim.scenario.screening)."""
    write_kib: Annotated[int, Field(ge=1, le=1 << 20)] = 32
    """The most of one write() at the target, on the main connection."""
    setup_ms: NonNegative
    """Before the first byte; the guest runs."""
    vcpu_stop_ms: NonNegative
    """To stop the vCPUs."""
    vcpu_start_ms: NonNegative
    """To announce the guest at the target, and to start its vCPUs."""
    downtime_limit_ms: Positive = 300.0
    """The guest is stopped when what is left fits this time at the measured bandwidth."""
    bandwidth_window_ms: PositiveMs = 100.0
    """The bandwidth is measured over so long a time."""
    bandwidth_gbit_per_s: Positive | None = None
    """Used in place of the measured bandwidth, once the first window is over (QEMU's avail-switchover-bandwidth)."""
    max_bandwidth_mib_per_s: Positive | None = None
    """v2: the most that is sent before the guest is stopped, as a quota for each `bandwidth_window_ms`; when RAM has
    used it up, the devices have no turn. If left out, there is no limit; QEMU's max-bandwidth is 128 MiB/s unless its
    user raises it, as those of VFIO do."""
    stop_rule: Literal["whole", "parts"] | None = None
    """What must fit the downtime limit: all that is left together (`whole`, as in QEMU), or also RAM and each device's
    data by itself, with the first pass over each device loaded (`parts`). If left out, v2 does the first and v3 the
    second."""
    decision_interval_ms: Annotated[float, Field(ge=0.1, le=1e9)]
    """v2: what a round of the migration thread takes that has nothing to send, beside RAM's sync and the devices'
    calls. QEMU does not pause."""
    ram_budget_ms: PositiveMs
    """RAM is sent for so long before the devices have their turn."""
    give_up_s: Annotated[float, Field(gt=0, le=86400)]
    """A migration that has not stopped the guest by then did not converge."""
    cancel_after_s: Positive | None = None
    """When the user cancels the migration, if the guest is not stopped yet."""
    force_after_s: Positive | None = None
    """When the guest is stopped, if it is not yet, however much is left, and whether or not an ack is there or critical
    data is loaded: as `virsh migrate --timeout S --timeout-suspend` and OpenStack's force_complete do, which pause the
    guest (an ack is then not waited for: QEMU, migration_can_switchover). If left out, never."""
    downtime_steps: Annotated[list[DowntimeStep], Field(max_length=1000)] = []
    """How the downtime limit rises in the course of the migration, as OpenStack sets it in steps, and users of libvirt
    by `virsh migrate-setmaxdowntime`. `downtime_limit_ms` holds before the first."""
    other_load_ms: NonNegative = 0.0
    """The state of all other devices, loaded before the VFIO devices' config."""
    config_load_us_per_vector: NonNegative = 0.0
    """What the load of a VFIO device's config takes more for each of its vectors."""
    device_buffer_gib_per_s: Positive | None = None
    """What one thread of QEMU moves of device data through the main channel's buffers of 32 KiB; without it, that is
    free. Multifd and v3 send from where read() put the data."""
    precopy_user: Literal["deduces", "polls"] = "deduces"
    """`deduces`: asks for PRECOPY_INFO only when the remaining bytes seem to fit, and subtracts what it reads until
    then (QEMU). `polls`: asks in every round."""
    reinit: bool = False
    """Opts in to PRECOPY_INFOv2."""
    switchover_ack: Literal["off", "one_shot", "reusable"] = "off"
    """The target must have loaded the initial data before the guest is stopped. `one_shot`: QEMU 8.1, and 11.1 with an
    older machine type. `reusable`: QEMU 11.1 with a machine type of 11.1 or newer; asked for again after a REINIT."""
    parallel_stop: bool = False
    """The devices change their states at once when the guest is stopped, in each of the two passes. In QEMU one does
    after the other."""
    parallel_config: bool = False
    """The configs of the VFIO devices are loaded at once. In QEMU one is after the other, under the big lock."""
    late_reinit: Literal["fail", "retry"] = "fail"
    """With a reusable ack, if a device reports REINIT after it was decided to stop: the migration fails (QEMU 11.1), or
    the guest is resumed, and stopped again when the ack is there."""
    max_retries: Annotated[int, Field(ge=0, le=1000)] = 3
    """v2, with `late_reinit = retry`: after this number of retries it fails after all."""
    multifd: bool = False
    """RAM over `multifd_channels` connections of their own: of v2, and of v3, whose devices have streams for all else.
    The other keys of multifd that are about devices are v2's."""
    multifd_channels: Annotated[int, Field(ge=1, le=256)] = 2
    """With multifd."""
    multifd_device_state: bool = True
    """With multifd, stop-copy data of the devices takes them too, a save and a load thread a device (QEMU 10.0)."""
    multifd_dedicated: Annotated[int, Field(ge=0, le=255)] = 0
    """Number of channels that carry only device state; 0: all are shared with RAM."""
    multifd_load: Literal["device_threads", "channel_threads"] = "device_threads"
    """Who write()s at the target: a thread a device, or the thread that received the packet."""
    multifd_load_threads: Annotated[int, Field(ge=0, le=64)] = 0
    """Largest number of devices that are loaded at once; 0: all."""
    multifd_max_queued_mib: Annotated[float, Field(gt=0, le=1 << 20)] | None = None
    """The most of a device's state that may wait at the target to be written; if more waits, the migration fails. If
    left out, there is no limit, as by QEMU's default (its x-migration-max-queued-buffers-size)."""
    multifd_copy_gib_per_s: Positive | None = None
    """What a thread copies of device data into a packet at the source, where all devices' save threads take turns under
    one mutex, and out of it at the target, where a device's packets take turns (QEMU 10.0). Without it there are no
    mutexes, and these copies are free."""
    precopy_threads: bool = False
    """v2: each device has a thread that reads it before the stop, beside RAM and the other devices, and sends on
    multifd's channels if these carry device state. In QEMU the thread that sends RAM does it, one read a round."""
    precopy_idle_ms: PositiveMs = 10.0
    """With `precopy_threads`: how long such a thread waits when the device has nothing to give, before it asks for
    more, which makes the device save what became dirty."""
    early_save: bool = False
    """With multifd for device state: the save thread of each device starts when that device is stopped. In QEMU all
    start when all devices are."""
    multifd_sync_us_per_channel: NonNegative = 0.0
    """What it takes the source's migration thread for each channel to have all of them synced, which it does after each
    pass over RAM, the last one included (QEMU, multifd_send_sync_main)."""
    multifd_close_us_per_channel: NonNegative = 0.0
    """What the target takes for each of its channels to shut them down, when all is loaded and before the guest starts
    (QEMU, multifd_recv_shutdown)."""

    read_bytes = Whole("read_mib")
    write_bytes = Whole("write_kib")
    setup_ns = Whole("setup_ms")
    vcpu_stop_ns = Whole("vcpu_stop_ms")
    vcpu_start_ns = Whole("vcpu_start_ms")
    downtime_limit_ns = Whole("downtime_limit_ms")
    bandwidth_window_ns = Whole("bandwidth_window_ms")
    decision_interval_ns = Whole("decision_interval_ms")
    precopy_idle_ns = Whole("precopy_idle_ms")
    ram_budget_ns = Whole("ram_budget_ms")
    give_up_ns = Whole("give_up_s")
    other_load_ns = Whole("other_load_ms")
    config_load_ns_per_vector = Whole("config_load_us_per_vector")
    multifd_sync_ns_per_channel = Whole("multifd_sync_us_per_channel")
    multifd_close_ns_per_channel = Whole("multifd_close_us_per_channel")

    @property
    def device_buffer_bytes_per_s(self) -> float | None:
        """None: the buffers cost nothing."""
        return None if self.device_buffer_gib_per_s is None else self.device_buffer_gib_per_s * GIB

    @property
    def multifd_copy_bytes_per_s(self) -> float | None:
        """None: the copy costs nothing."""
        return None if self.multifd_copy_gib_per_s is None else self.multifd_copy_gib_per_s * GIB

    @model_validator(mode="after")
    def _channels_for_ram(self) -> Self:
        if self.multifd_dedicated >= self.multifd_channels:
            why = f"must leave channels for RAM, multifd_channels = {self.multifd_channels}"
            raise self.wrong("multifd_dedicated", why)
        if self.multifd_load == "channel_threads" and self.multifd_load_threads:
            raise self.wrong("multifd_load_threads", "must be left out where channel threads load")
        if self.switchover_ack == "reusable" and not self.reinit:
            raise self.wrong("switchover_ack", "goes with reinit = true only, which is what asks for it again")
        return self

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        if self.force_after_s is not None and self.force_after_s >= self.give_up_s:
            raise self.wrong("force_after_s", f"must be less than give_up_s = {self.give_up_s:g}")
        times = [step.after_s for step in self.downtime_steps]
        if times != sorted(set(times)):
            raise ValueError(f"downtime_steps: after_s = {times}: must grow from step to step")
        if times and times[-1] >= self.give_up_s:
            raise ValueError(
                f"downtime_steps: after_s = {times[-1]:g}: must be less than give_up_s = {self.give_up_s:g}"
            )
        return self


class V3(Table):
    """How the VMMs use v3, unless the protocol's name says otherwise (`v3-n8-pool`)."""

    dirty_streams: Annotated[int, Field(ge=1, le=MAX_STREAMS)] = 4
    """With blocks: the number of threads that read them."""
    blocks: bool = False
    """One fd of addressable blocks in place of the dirty streams."""
    wire: Literal["streams", "pool", "one"] = "streams"
    """A connection a stream; one pool of connections for all streams; or one connection for everything."""
    pool_connections: Annotated[int, Field(ge=1, le=256)] = 4
    """With `wire = pool`."""
    critical_credit_mib: Annotated[float, Field(gt=0, le=4096)] = 4.0
    """With shared connections: the most of a device's critical stream at the target that its driver has not taken."""
    dirty_credit_mib: Annotated[float, Field(gt=0, le=4096)] = 64.0
    """The same for all dirty streams of a device together."""
    late_epoch: Literal["retry", "proceed"] = "proceed"
    """If the final check (vCPUs stopped) finds a new epoch: resume the guest and try again, or continue the stop."""
    decision_interval_ms: Annotated[float, Field(ge=0.1, le=1e9)] = 10.0
    """How long the VMM waits between two decisions whether to stop; its streams wake it for all else."""
    max_retries: Annotated[int, Field(ge=0, le=1000)] = 3
    """After this number of retries it continues with the stop."""
    force_after_ms: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """So long after the migration began, a guest whose critical data is not loaded is stopped all the same, as soon as
    the rest fits; what is late is set up in the downtime. If left out, never: a guest that reconfigures its devices
    faster than the target sets them up is not stopped."""
    target_knows: Literal["v3", "v2"] = "v3"
    """The target's VMM; if that is v2 only, the source falls back."""
    target_max_dirty_streams: Annotated[int, Field(ge=0, le=MAX_STREAMS)] | None = None
    """Of the target's devices; as the source's if it is left out."""

    critical_credit_bytes = Whole("critical_credit_mib")
    dirty_credit_bytes = Whole("dirty_credit_mib")
    decision_interval_ns = Whole("decision_interval_ms")

    @property
    def force_after_ns(self) -> int | None:
        """None: never."""
        return None if self.force_after_ms is None else ns(self.force_after_ms)


NO_FIGURES = {"citation", "case", "protocol", "fitted", "sums"}
"""Keys of a published entry that are no figures."""


class Published(Table):
    """What a source measured, to compare the runs of a protocol with. Milliseconds; in lists one value a device."""

    citation: Text
    case: Text | None = None
    """What the measurement is called, if not as the scenario is."""
    protocol: str = "v2"
    fitted: list[str] = []
    """Which of the figures below parameters were fitted to; `key` or `key.index`."""
    sums: list[str] = []
    """Which of them nothing was fitted to, but are sums of such as were, beside little else. The others are
    predictions."""
    stop_ms: Positive | None = None
    ram_save_ms: Positive | None = None
    device_save_ms: list[Positive] = []
    ram_load_ms: Positive | None = None
    device_load_ms: list[Positive] = []
    load_total_ms: list[Positive] = []
    """With multifd, how long a device's load thread lives; it waits for data, and writes it."""
    load_waiting_ms: list[Positive] = []
    load_waiting_mean_ms: Positive | None = None
    """Over the devices, for a source that distinguishes devices which are alike in the simulation."""
    load_writing_ms: list[Positive] = []
    src_saved_to_dst_loaded_ms: Positive | None = None
    """From the source's last byte to the end of the last config."""
    config_load_ms: list[Positive] = []
    announce_and_start_ms: Positive | None = None
    downtime_ms: Positive | None = None
    total_ms: Positive | None = None
    setup_ms: Positive | None = None

    def figures(self) -> dict[str, float]:
        """What is given, by key, in lists `key.index`."""
        figures: dict[str, float] = {}
        for key, value in self.model_dump(exclude=NO_FIGURES, exclude_none=True).items():
            if isinstance(value, list):
                figures |= {f"{key}.{index}": one for index, one in enumerate(value)}
            else:
                figures[key] = value
        return figures

    @model_validator(mode="after")
    def _fitted_is_given(self) -> Self:
        for name, keys in (("fitted", self.fitted), ("sums", self.sums)):
            for key in keys:
                if key not in self.figures():
                    raise ValueError(f"{name} = {key!r}: must be one of {', '.join(self.figures())}")
        if both := sorted({*self.fitted} & {*self.sums}):
            raise ValueError(f"sums = {both[0]!r}: must not be in fitted too")
        return self
