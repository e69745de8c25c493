# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VMM does: the steps of a migration, v2 and v3 at both ends, the decision to stop. Imports all others."""
