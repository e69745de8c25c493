# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of the command line, one file each. Imports all rooms of experiments except the api."""
