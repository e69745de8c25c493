# SPDX-License-Identifier: GPL-2.0-or-later
"""Time: the port that the model sees, and the virtual clock behind it. Imports proto_v3.errors only."""
