# SPDX-License-Identifier: GPL-2.0-or-later
"""A run as tracks, samples, a table of spans and a Perfetto file. Imports runs and sim."""
