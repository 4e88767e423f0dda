"""Words that a reader would not search for, and what to write instead: in pages, examples, docstrings and messages."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY

#: What is not written, as a regular expression, and terms that say it.
INSTEAD = {
    r"nobody|whoever": "say who does what: the user, the caller, the model; 'has no hooks'; 'default'",
    r"at hand": "available; stored; installed",
    r"anew": "again",
    r"so many": "this many; ``n``",
    r"there and back": "forward and backward pass",
    r"is said": "a warning is logged; is an error",
    r"stands? in for": "replaces; is accepted for",
    r"what would do|will not do": "accepted values; is not valid",
    r"doors?": "interfaces; calculators; the command line",
    r"ask it": "energies and forces; evaluate the model",
    r"turns? with the frame(?: of reference)?": "is equivariant under rotations",
    r"leaves? over": "energies relative to those of the elements",
}
#: Loops that are written for one compiler have words of their own.
LEFT_OUT = ("torchmdnet/ops/kernels/", "_fused.py")

FILES = sorted(
    path
    for pattern in ("README.md", "CHANGELOG.md", "docs/**/*.md", "examples/*", "benchmarks/*.md", "torchmdnet/**/*.py")
    for path in REPOSITORY.glob(pattern)
    if path.suffix in (".md", ".py", ".yaml", ".ipynb") and not any(part in path.as_posix() for part in LEFT_OUT)
)


@pytest.mark.parametrize("words", INSTEAD)
def test_a_phrase_that_readers_would_not_search_for_is_not_used(words) -> None:
    spaced = words.replace(" ", r"\s+(?:#:?\s+)?")  # also where a line ends between two words, in a comment too
    pattern = re.compile(rf"\b(?:{spaced})\b", re.IGNORECASE)
    found = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(REPOSITORY)}:{line}: {match[0]!r}; write: {INSTEAD[words]}")
    assert not found, "\n".join(found)
