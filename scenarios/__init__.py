# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario files that ship with the project."""
