# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VMM and a VFIO migration driver agree on: v2 as the kernel has it, v3 as a proposal.

Plain asyncio code against small ports (`device`, `machine`, `channel`). Nothing here knows whether it runs in virtual
time or on real file descriptors; nothing here imports from `sim`.
"""
