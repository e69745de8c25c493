# SPDX-License-Identifier: GPL-2.0-or-later
"""What the logs of one real migration tell of a machine: lines, events, facts, quantities, a scenario's keys.

It imports sim and proto_v3 only.
"""
