# SPDX-License-Identifier: GPL-2.0-or-later
"""One question a file or folder: its grid, its answer, its figures. Imports study and draw."""
