# SPDX-License-Identifier: GPL-2.0-or-later
"""Questions put to the simulator, the command line, and an API to call (`from experiments import api`)."""

__version__ = "0.2.0"
"""The project's version: pyproject.toml, the manifests and `proto-v3 --version` read it here."""
INTERRUPTED = 130
"""The exit status of a program ended by Ctrl-C: 128 + SIGINT."""
