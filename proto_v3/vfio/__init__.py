# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel promises: structures, state machine, ioctls, the port of a device. Imports wire.frames and errors."""
