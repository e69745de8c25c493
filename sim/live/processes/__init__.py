# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes of a live run: started, watched, ended; what runs in each. Imports fd, tcp and the model."""
