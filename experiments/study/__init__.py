# SPDX-License-Identifier: GPL-2.0-or-later
"""How a question is judged: experiments, claims, effects, verdicts, statistics. Imports runs."""
