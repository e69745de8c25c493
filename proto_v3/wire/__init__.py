# SPDX-License-Identifier: GPL-2.0-or-later
"""What the two VMMs send each other: frames, channels, streams over connections. Imports notify, timeline, errors."""
