# SPDX-License-Identifier: GPL-2.0-or-later
"""Live mode: the protocols of `proto_v3`, unchanged, and the device of `sim`, behind real file descriptors.

Four processes: a device process and a VMM at each side (`processes`). A device process runs the simulated drivers on
the real clock, with the state as real bytes. A VMM reaches them by ioctls on a UNIX socket, and reads and writes data
fds that were passed to it (`fd`). The two VMMs are connected by TCP (`tcp`).
"""
