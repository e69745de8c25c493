# SPDX-License-Identifier: GPL-2.0-or-later
"""One host and the network between two: link, machine, VMMs. Imports device and what that imports."""
