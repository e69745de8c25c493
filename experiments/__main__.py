# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m experiments`: the command line."""

from experiments.cli import main

main(prog_name="proto-v3")
