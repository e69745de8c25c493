# SPDX-License-Identifier: GPL-2.0-or-later
"""Results in words and tables: for a terminal, for the page of all results, and read back. Imports questions, study,
runs."""
