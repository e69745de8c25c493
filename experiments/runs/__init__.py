# SPDX-License-Identifier: GPL-2.0-or-later
"""Many runs: made in processes or on a cluster, kept, and written as tables with a manifest. Imports sim only."""
