"""How an error shows names and values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`did you mean '…'?` for the known name that is most alike, or nothing."""
    alike = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=cutoff)
    return f"did you mean '{alike[0]}'?" if alike else ""


def listed(names: Iterable[str], last: str = "") -> str:
    """Names in a row; `last` stands before the last one."""
    words = list(names)
    if last and len(words) > 1:
        return f"{', '.join(words[:-1])} {last} {words[-1]}"
    return ", ".join(words)


def abridged(names: Iterable[str]) -> str:
    """Names of sites in a row; of more than eight the first and the last, and their number."""
    words = list(names)
    return ", ".join(words) if len(words) <= 8 else f"{words[0]}, …, {words[-1]} ({len(words)} sites)"


def shown(value: object) -> str:
    """A value as an error shows it: with its type where that tells more, and not longer than a line."""
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}…"
    if isinstance(value, dict):
        return f"the mapping {text}"
    if isinstance(value, list | tuple):
        return f"the list {text}"
    return {bool: str(value).lower(), type(None): "nothing"}.get(type(value), text)


def one_line(error: Exception) -> str:
    """Its type and message, not longer than a few lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
