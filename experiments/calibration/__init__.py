# SPDX-License-Identifier: GPL-2.0-or-later
"""How scenarios' values are found from published figures, by least squares. It imports `report` and the rooms below.

`python -m experiments.calibration` (`make calibrate`) fits the keys that `mlx5.toml` lists; `--write` puts the values
into the scenario files.
"""
