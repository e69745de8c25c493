# SPDX-License-Identifier: GPL-2.0-or-later
"""One simulated device, its guest, firmware, driver, link and hosts; in virtual time and, in `live/`, in real time.
Imports proto_v3 only."""
