# SPDX-License-Identifier: GPL-2.0-or-later
"""One device: its state, guest, firmware and driver, and the data fds that save and load it. Imports scenario,
clock, resource."""
