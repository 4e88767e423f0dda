"""Text from outside that can be written and name a file."""

from __future__ import annotations

from collections.abc import Callable

from torchmdnet.errors import ConfigError

__all__ = ["Refusal", "check_text", "flaw_of", "shortened"]

#: Makes an error of a message.
Refusal = Callable[[str], Exception]


def check_text(text: str, name: str, refusal: Refusal = ConfigError) -> str:
    """Text that can be written and name a file; refused with the place where it stands otherwise."""
    problem = flaw_of(text)
    if problem:
        raise refusal(f"{name}: {problem}.")
    return text


def flaw_of(text: str) -> str | None:
    """Why text cannot be used anywhere; None where it can."""
    if "\0" in text:
        return f"{shortened(text)} has a character of code 0, which no text or file name may have"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return f"{shortened(text)} has half of a character (a surrogate), which cannot be written"
    return None


def shortened(text: str, most: int = 60) -> str:
    """The beginning of a text as Python writes it."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}..."
