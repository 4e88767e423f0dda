"""Names and addresses of parts."""

from __future__ import annotations

import re

import pytest

from torchmdnet.catalogue import Catalogue
from torchmdnet.config import resolve
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


@pytest.mark.parametrize(
    ("option", "address", "words"),
    [
        ("dataset", "builtins:list", "is a plain list. It takes a class with __len__() and __getitem__()"),
        ("dataset", "os:system", "is no class. It takes a class with __len__() and __getitem__()"),
        ("dataset", "torch.nn:Linear", "has no __len__(). It takes a class with __len__() and __getitem__()"),
        ("model", "os:system", "is no subclass of torch.nn.Module"),
        ("model", "torch.nn:Module", "has no reset_parameters()"),
        ("model", "torch.nn:Linear", "in_features: missing from the model configuration"),
        ("output-model", "builtins:dict", "is no subclass of torchmdnet.heads.base.OutputModel"),
        ("output-model", "torch.nn:Identity", "is no subclass of torchmdnet.heads.base.OutputModel"),
        ("prior-model", "builtins:dict", "is no subclass of torchmdnet.priors.base.BasePrior"),
        ("prior-model", "torch.nn:Identity", "is no subclass of torchmdnet.priors.base.BasePrior"),
        ("train-loss", "torch.nn:L1Loss", "L1Loss is a class. It takes a function of prediction and target"),
        ("train-loss", "builtins:max", "It takes a function of prediction and target"),
        ("train-loss", "math:pi", "is a float. It takes a function of prediction and target"),
    ],
)
def test_objects_of_another_kind_are_refused_before_they_are_called(option, address, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        resolve(["--dataset", "TinyQM", f"--{option}", address])
