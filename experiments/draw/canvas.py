# SPDX-License-Identifier: GPL-2.0-or-later
"""Matplotlib, as all figures use it: no setting of the user reaches a figure. Only this file imports it.

`import matplotlib` reads MPLBACKEND, which a Jupyter kernel exports to its children, and a matplotlibrc of the current
folder, of MATPLOTLIBRC or of the home folder. It fails if they are broken. Figures are drawn without a backend, with
matplotlib's defaults. A user's session gets its own settings back.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

DEFAULTS_FOLDER = "mpl-data"
"""The folder of matplotlib's own matplotlibrc, which sets nothing."""


@contextmanager
def _silent() -> Iterator[None]:
    """No words about a broken matplotlibrc, or a home folder that cannot be written."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _without_the_users_settings() -> Iterator[None]:
    """MPLBACKEND is not set, and the current folder, which is searched first, has a matplotlibrc that sets nothing."""
    found = importlib.util.find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        with chdir(Path(found.origin).parent / DEFAULTS_FOLDER):
            yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _load() -> None:
    """Import matplotlib; then set what a plain import would have set, as far as it is valid: for the user's figures."""
    if "matplotlib" in sys.modules:
        return
    with _without_the_users_settings():
        import matplotlib
    with suppress(Exception):
        users = matplotlib.rc_params_from_file(matplotlib.matplotlib_fname(), use_default_template=False)
        matplotlib.rcParams.update(users)
    with suppress(Exception):
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]


with _silent():
    _load()
    import matplotlib
    from matplotlib import figure
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import NullFormatter, NullLocator

__all__ = [
    "Artist",
    "Axes",
    "AxesImage",
    "ConstrainedLayoutEngine",
    "Figure",
    "Line2D",
    "NullFormatter",
    "NullLocator",
    "Patch",
    "Rectangle",
    "own_settings",
]

_OF_THE_SESSION = ("backend", "backend_fallback", "interactive")
"""Settings that change no figure, and that a session needs."""
_OURS = {key: value for key, value in matplotlib.rcParamsDefault.items() if key not in _OF_THE_SESSION} | {
    "svg.hashsalt": "proto-v3"  # without random ids, the same runs give the same file
}


@contextmanager
def own_settings() -> Iterator[None]:
    """Inside, and in a function that it decorates, matplotlib has its defaults, whatever the user has set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about defaults that matplotlib will drop
        with matplotlib.rc_context(_OURS):
            yield


class Figure(figure.Figure):
    """A figure that is drawn and saved with matplotlib's defaults too: what it draws last is made only then."""

    def draw(self, renderer: Any) -> None:
        """As matplotlib's."""
        with own_settings():
            super().draw(renderer)

    def savefig(self, fname: Any, **options: Any) -> None:
        """As matplotlib's."""
        with own_settings():
            super().savefig(fname, **options)
