# SPDX-License-Identifier: GPL-2.0-or-later
"""Data fds and calls between a VMM process and its device process. Imports sim.device and the root of sim.live."""
