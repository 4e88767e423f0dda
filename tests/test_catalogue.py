"""Names and addresses of parts."""

from __future__ import annotations

import pytest

from torchmdnet.catalogue import Catalogue
from torchmdnet.errors import ConfigError

SHAPES = Catalogue("shape", {"fraction": "fractions:Fraction", "path": "pathlib:Path"})


def test_names_and_addresses_give_the_object() -> None:
    from fractions import Fraction

    assert SHAPES["fraction"] is Fraction
    assert SHAPES["fractions:Fraction"] is Fraction
    assert list(SHAPES) == ["fraction", "path"]
    assert "fraction" in SHAPES
    assert "fractions:Fraction" not in SHAPES
    assert SHAPES.name_of(Fraction) == "fraction"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fracton", "shape: 'fracton' is not available. Did you mean 'fraction'"),
        ("PATH", "Did you mean 'path'"),
        ("no_such_package.x:Y", "names module 'no_such_package.x', which cannot be found"),
        ("fractions:Fracton", "module 'fractions' has no 'Fracton'"),
        (3, "shape: 3 is not available"),
    ],
)
def test_what_is_not_there_is_explained(name, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SHAPES[name]
