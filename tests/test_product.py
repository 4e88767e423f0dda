"""Architectures, heads and priors in every combination: each meets the contract, or is refused with words."""

from __future__ import annotations

import logging

import pytest

from torchmdnet.build import create_model
from torchmdnet.errors import ConfigError
from torchmdnet.heads import HEADS
from torchmdnet.priors import PRIORS
from torchmdnet.testing.product import (
    ARCHITECTURES_TRIED,
    PRIORS_TRIED,
    features_of,
    options_of,
    priors_available,
    refusal_of,
    takes_priors,
    untrue_of,
)
from torchmdnet.testing.tiny import TINY

INVARIANT = ("graph-network", "transformer")


def needs_vectors(head: str) -> bool:
    """By name: equivariant heads, vectors and tensors; but the spatial extent reads scalars under any name."""
    return head in ("VectorOutput", "Polarizability") or (
        head.startswith("Equivariant") and head != "EquivariantElectronicSpatialExtent"
    )


REFUSED = {(a, h) for a in INVARIANT for h in HEADS if needs_vectors(h)} | {
    (a, "ScalarPlusWeightedCoulomb") for a in ARCHITECTURES_TRIED if a != "tensornet2"
}
FITTING = [(a, h) for a in ARCHITECTURES_TRIED for h in HEADS if (a, h) not in REFUSED]
#: An architecture with vectors of its own takes the equivariant head of the same name, so that one need not come twice.
TWICE = {("equivariant-transformer", head) for head in HEADS if f"Equivariant{head}" in HEADS}
TAKING_PRIORS = {head for head in HEADS if takes_priors(head)}
PRIORS_AVAILABLE = [prior for prior in priors_available() if prior != "none"]
COMBINATIONS = [(a, h, "none") for a, h in FITTING if (a, h) not in TWICE] + [
    (a, h, prior) for a, h in FITTING for prior in PRIORS_AVAILABLE if h in TAKING_PRIORS and (a, h) not in TWICE
]


def is_daily(architecture: str, head: str, prior: str) -> bool:
    """Every head alone; every prior in each architecture, in turn under each head that takes one and is not its own."""
    if prior == "none" or head == "ScalarPlusWeightedCoulomb":
        return True
    taking = [h for a, h, p in COMBINATIONS if (a, p) == (architecture, prior) and h != "ScalarPlusWeightedCoulomb"]
    return head == taking[PRIORS_AVAILABLE.index(prior) % len(taking)]


CASES = [
    pytest.param(*case, id=", ".join(case), marks=[] if is_daily(*case) else pytest.mark.slow) for case in COMBINATIONS
]


@pytest.mark.parametrize(("architecture", "head", "prior"), CASES)
def test_the_contract_holds(architecture: str, head: str, prior: str) -> None:
    assert untrue_of(options_of(architecture, head, prior)) == {}


@pytest.mark.parametrize(("architecture", "head"), sorted(REFUSED), ids=map(", ".join, sorted(REFUSED)))
def test_what_does_not_fit_is_refused_with_words(architecture: str, head: str) -> None:
    reason = refusal_of(architecture, head)
    model = ARCHITECTURES_TRIED[architecture]["model"]
    assert reason is not None
    assert head in reason
    assert f"model {model!r} does not" in reason
    assert "Use model: tensornet" in reason


@pytest.mark.parametrize("head", [head for head in HEADS if getattr(HEADS[head], "per_atom_output", False)])
@pytest.mark.parametrize("architecture", ARCHITECTURES_TRIED)
def test_values_of_atoms_are_refused_as_output(architecture: str, head: str) -> None:
    with pytest.raises(ConfigError, match="gives a value of each atom and cannot be the output of a system"):
        create_model({**TINY, **ARCHITECTURES_TRIED[architecture], "output_model": head})


@pytest.mark.parametrize(
    "head", ["DipoleMoment", "ElectronicSpatialExtent", "VectorOutput", "Dipole", "Polarizability"]
)
def test_priors_of_other_heads_are_dropped_with_a_warning(head: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = create_model({**TINY, **options_of("equivariant-transformer", head, "ZBL")})
    assert model.prior_model is None
    assert "does not allow prior models; dropping ZBL" in caplog.text


def test_every_head_and_prior_is_tried() -> None:
    daily = [case for case in COMBINATIONS if is_daily(*case)]
    assert {head for _, head, _ in daily} == set(HEADS)
    assert {(a, prior) for a, _, prior in daily} == {(a, p) for a in ARCHITECTURES_TRIED for p in priors_available()}
    assert {(h, prior) for _, h, prior in daily} >= {(h, p) for h in TAKING_PRIORS for p in PRIORS_AVAILABLE}
    tried = {name.partition(",")[0] for name in PRIORS_TRIED}
    assert set(PRIORS) <= tried


@pytest.mark.parametrize("architecture", ARCHITECTURES_TRIED)
def test_features_are_those_an_architecture_is_known_for(architecture: str) -> None:
    features = features_of(architecture)
    expected = {
        "vector features": architecture not in INVARIANT,
        "tensor features": architecture.startswith("tensornet"),
        "total charge changes the energy": architecture.startswith("tensornet"),
        "mirror images differ": "SO(3)" in architecture,
    }
    assert features == {**dict.fromkeys(features, True), **expected}
