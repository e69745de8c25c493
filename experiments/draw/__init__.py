# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures: the one style, panels, and the figures of the commands. Imports study and runs."""
