# SPDX-License-Identifier: GPL-2.0-or-later
"""Sets of parameters that scenario files extend."""
