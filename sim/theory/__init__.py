# SPDX-License-Identifier: GPL-2.0-or-later
"""Closed forms that runs are compared with. Imports scenario and device."""
