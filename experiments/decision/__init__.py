# SPDX-License-Identifier: GPL-2.0-or-later
"""What to change first, and what it brings: changes in order of what they cost to make, over all plausible machines; it
imports `runs` and `study`, and what is below `experiments`."""
