# SPDX-License-Identifier: GPL-2.0-or-later
"""A VFIO device of the running kernel behind the port of `proto_v3`, and live mode's VMM on it. Imports `sim.live`.

`uapi` and `ioctl` are the raw calls, `sysfs` finds a device by name, `vfio` opens it, `iommu` maps memory for its DMA,
`device` and `fd` are the ports.
"""
