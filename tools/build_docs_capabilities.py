"""Write docs/capabilities.md: which architectures, heads and priors go together, and what then holds.

python tools/build_docs_capabilities.py           # tries every combination, two minutes
python tools/build_docs_capabilities.py --quick   # builds them without trying, a few seconds
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torchmdnet.heads import HEADS
from torchmdnet.testing.product import (
    ARCHITECTURES_TRIED,
    FEATURES,
    PRIORS_TRIED,
    features_of,
    options_of,
    priors_available,
    refusal_of,
    takes_priors,
    untrue_of,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "capabilities.md"

HOLDS, FAILS, REFUSED = "✓", "✗", "–"

TEXT = """\
# What goes with what

This page is written by `tools/build_docs_capabilities.py`, which builds small random potentials and tries on them the
statements of `torchmdnet.testing`: forces and stress against finite differences, rotations, shuffled atoms, batches of
systems with different boxes and of single ones, the cutoff, both precisions, training, second derivatives. The tests
try the same. What a name means: [Models](models.md), [Priors](priors.md).

✓ all statements hold · – refused with an explanation, or absent · ✗ a statement fails

## Architectures and features

With a scalar and, beside it, every head that fits. The equivariant transformer is tried with `vector_cutoff: true`;
with `false`, the established default, it is not smooth through the cutoff.

{features}

## Architectures and heads

Heads for atoms, `PartialCharges` and `AtomScalar`, are named under `properties`; all others can be the `output_model`
or stand under `properties` too, except `ScalarPlusWeightedCoulomb`, which can only be the `output_model`.

{heads}

## Architectures, heads and priors

Heads that predict something else than energies take no priors: they are dropped with a warning.

{priors}
"""


def table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    """A table in Markdown."""
    lines = [[corner, *columns], ["---", *[":---:"] * len(columns)], *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(*, try_all: bool, tell: Callable[[str], None] = lambda line: None) -> str:
    """The page.

    Args:
        try_all: Whether to try each combination of architecture, head and prior; otherwise one that can be built is
            taken to hold, as the tests show.
        tell: Called with every statement that fails.
    """
    fits = {(a, h): refusal_of(a, h) is None for a in ARCHITECTURES_TRIED for h in HEADS}
    installed = priors_available()

    def cell(architecture: str, head: str, prior: str) -> str:
        if not fits[architecture, head]:
            return REFUSED
        if not try_all or prior not in installed:
            return HOLDS
        untrue = untrue_of(options_of(architecture, head, prior))
        for name, found in untrue.items():
            tell(f"{architecture}, {head}, {prior}: {name.replace('_', ' ')}: {found}")
        return FAILS if untrue else HOLDS

    def code(name: str) -> str:
        first, comma, rest = name.partition(",")
        return f"`{first}`{comma}{rest}"

    features = {name: features_of(name, try_all=try_all) for name in ARCHITECTURES_TRIED}
    plain = {(a, h): cell(a, h, "none") for a in ARCHITECTURES_TRIED for h in HEADS}
    with_priors = [head for head in HEADS if takes_priors(head)]
    kinds = [prior for prior in PRIORS_TRIED if prior != "none"]
    return TEXT.format(
        features=table(
            "",
            [code(a) for a in ARCHITECTURES_TRIED],
            {f: [HOLDS if features[a][f] else REFUSED for a in ARCHITECTURES_TRIED] for f in FEATURES},
        ),
        heads=table(
            "",
            [code(a) for a in ARCHITECTURES_TRIED],
            {code(h): [plain[a, h] for a in ARCHITECTURES_TRIED] for h in HEADS},
        ),
        priors=table(
            "architecture and head",
            kinds,
            {
                f"{code(a)}, `{h}`": [cell(a, h, prior) for prior in kinds]
                for a in ARCHITECTURES_TRIED
                for h in with_priors
                if fits[a, h]
            },
        ),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="build combinations without trying them")
    arguments = parser.parse_args()
    PAGE.write_text(page(try_all=not arguments.quick, tell=print), encoding="utf-8")
    print(f"wrote {PAGE}")
