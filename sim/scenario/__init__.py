# SPDX-License-Identifier: GPL-2.0-or-later
"""What is simulated: scenario files, their tables and units, and protocols by name. Imports proto_v3 only."""
