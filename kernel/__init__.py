# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux with VFIO to test against: how it is built and cached, how a command runs in it, which QEMUs run there, and
the sample driver (driver/). It needs Python only, and imports nothing of the project.
"""
