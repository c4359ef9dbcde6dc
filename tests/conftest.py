"""Settings of the whole suite: no window system, and the same hypothesis examples every time."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")
settings.register_profile("lvmppl", deadline=None, derandomize=True)
settings.load_profile("lvmppl")
