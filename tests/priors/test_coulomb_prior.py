"""The Coulomb prior has the right size in any unit, and takes nearest images in any lattice."""

from __future__ import annotations

import itertools

import pytest
import torch

from torchmdnet.errors import ConfigError
from torchmdnet.graph import bare_graph
from torchmdnet.neighbors.nearest import nearest_pairs
from torchmdnet.priors import PRIORS

EV = 1.602176634e-19
OPTIONS: dict = {"lower_switch_distance": 0.1, "upper_switch_distance": 0.4, "energy_scale": EV}
UNIT_CHARGES = {"partial_charges": torch.tensor([1.0, 1.0], dtype=torch.float64)}


def energy(pos: torch.Tensor, box: torch.Tensor | None = None, charges=UNIT_CHARGES, **options) -> torch.Tensor:
    batch = torch.zeros(len(pos), dtype=torch.long)
    prior = PRIORS["Coulomb"](**{**OPTIONS, "distance_scale": 1e-10, **options})
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return prior.post_reduce(zero, torch.ones(len(pos), dtype=torch.long), pos, batch, box, charges)


def pair(r: float) -> torch.Tensor:
    return torch.tensor([[0.0, 0, 0], [r, 0, 0]], dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-10, 1e-9, 5.29177210903e-11], ids=["Å", "nm", "Bohr"])
def test_two_charges_a_nanometre_apart_have_one_energy_in_every_unit(scale: float) -> None:
    assert energy(pair(1e-9 / scale), distance_scale=scale).item() == pytest.approx(1.43996, rel=1e-5)


def test_it_is_switched_off_at_short_distances_given_in_nm() -> None:
    assert energy(pair(0.99)).item() == 0
    halfway = energy(pair(2.5)).item()
    assert halfway == pytest.approx(0.5 * 14.3996 / 2.5, rel=1e-4)
    assert energy(pair(4.0)).item() == pytest.approx(14.3996 / 4.0, rel=1e-4)


@pytest.mark.parametrize("skew", [0.0, 0.8, 2.3])
@pytest.mark.parametrize("open_direction", [None, 2])
def test_pairs_take_their_nearest_image(skew: float, open_direction: int | None) -> None:
    torch.manual_seed(0)
    box = 5.0 * torch.eye(3, dtype=torch.float64)
    box[1, 0], box[2, 1] = 5.0 * skew, -5.0 * skew
    if open_direction is not None:
        box[open_direction] = 0
    box = box @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    pos = 30 * torch.rand(6, 3, dtype=torch.float64)
    i, j, shifts = nearest_pairs(pos, torch.zeros(6).long(), box[None], 1)
    assert shifts is not None
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == list(itertools.combinations(range(6), 2))
    found = (pos[i] - pos[j] + shifts @ box).norm(dim=1)
    counts = torch.cartesian_prod(*[torch.arange(-16.0, 17.0, dtype=torch.float64)] * 3)
    nearest = (pos[i] - pos[j])[:, None] + (counts @ box)[None]
    torch.testing.assert_close(found, nearest.norm(dim=2).amin(dim=1))


def test_a_box_counts_whether_it_comes_with_the_call_or_the_prior() -> None:
    box = 9.0 * torch.eye(3, dtype=torch.float64)
    across = energy(pair(7.0), box)
    torch.testing.assert_close(across, energy(pair(2.0)))
    torch.testing.assert_close(energy(pair(7.0), box_vecs=box.tolist()), across)
    torch.testing.assert_close(energy(pair(7.0), initial_box=box), across)  # the name in older files


def test_forces_and_strain_follow_the_image() -> None:
    box = (9.0 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    pos = pair(7.0).requires_grad_()
    of_pos, of_box = torch.autograd.grad(energy(pos, box).sum(), [pos, box])
    slope = 14.3996 / 2.0**2  # of the bare energy; the switch adds its own
    assert of_pos[1, 0].item() == pytest.approx(-of_pos[0, 0].item())
    assert abs(of_box[0, 0].item()) == pytest.approx(abs(of_pos[0, 0].item()))
    assert abs(of_pos[0, 0].item()) < slope


def test_systems_do_not_feel_each_other_and_lone_atoms_nothing() -> None:
    prior = PRIORS["Coulomb"](**OPTIONS, distance_scale=1e-10)
    pos = torch.tensor([[0.0, 0, 0], [5, 0, 0], [1, 1, 1], [6, 1, 1], [0, 0, 9]], dtype=torch.float64)
    batch = torch.tensor([0, 0, 1, 1, 2])
    charges = torch.tensor([1.0, -1.0, 2.0, 1.0, 5.0], dtype=torch.float64)
    zero = torch.zeros(3, 1, dtype=torch.float64)
    y = prior.post_reduce(zero, torch.ones(5).long(), pos, batch, None, {"partial_charges": charges})
    unit = 2.30707e-28 / EV / 5e-10
    torch.testing.assert_close(y[:, 0], torch.tensor([-unit, 2 * unit, 0.0], dtype=torch.float64))


def test_missing_or_misshapen_charges_are_named() -> None:
    with pytest.raises(ValueError, match="extra_args="):
        energy(pair(3.0), charges={})
    with pytest.raises(ValueError, match=r"partial_charges has shape \(3,\) but there are 2 atoms"):
        energy(pair(3.0), charges={"partial_charges": torch.ones(3)})


def test_switch_distances_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="not in order"):
        PRIORS["Coulomb"](**{**OPTIONS, "lower_switch_distance": 0.5}, distance_scale=1e-10)


def test_energy_is_finite_and_flat_for_charges_at_one_place() -> None:
    pos = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    prior = PRIORS["Coulomb"](**OPTIONS, distance_scale=1e-10)
    y = prior.per_system(bare_graph(torch.ones(2).long(), pos, torch.zeros(2).long(), extra=UNIT_CHARGES))
    (slope,) = torch.autograd.grad(y.sum(), pos)
    assert y.item() == 0
    assert torch.isfinite(slope).all()


def crystal(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Positions, charges and box of a salt whose nearest ions are 2.8 Å apart, and its Madelung constant."""
    if name == "NaCl":
        sites = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
        return 2.8 * sites, 1 - 2 * (sites.sum(dim=1) % 2), 5.6 * torch.eye(3, dtype=torch.float64), 1.747564594633
    edge = 2.8 * 2 / 3**0.5
    pos = torch.tensor([[0.0, 0, 0], [edge / 2] * 3], dtype=torch.float64)
    return pos, torch.tensor([1.0, -1.0]).double(), edge * torch.eye(3, dtype=torch.float64), 1.762674773070


@pytest.mark.parametrize("name", ["NaCl", "CsCl"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"lattice_sum": "ewald", "cutoff_distance": 6.0}, 1e-6),
        ({"lattice_sum": "ewald", "cutoff_distance": 10.0}, 1e-6),
        ({"lattice_sum": "damped-shifted", "cutoff_distance": 15.0}, 1e-3),
    ],
    ids=["Ewald, short", "Ewald, long", "damped and shifted"],
)
def test_a_salt_has_its_madelung_energy(name: str, options: dict, tolerance: float) -> None:
    pos, charges, box, madelung = crystal(name)
    switch = {"lower_switch_distance": 0.1, "upper_switch_distance": 0.2}  # below the distance of the ions
    found = energy(pos, box, {"partial_charges": charges}, **options, **switch).item()
    assert found == pytest.approx(-madelung * 14.39964 / 2.8 * len(pos) / 2, rel=tolerance + 3e-6)


@pytest.mark.parametrize("net", [0.0, 0.7])
def test_an_ewald_sum_does_not_depend_on_where_it_is_split(net: float) -> None:
    torch.manual_seed(1)
    box = 6 * torch.eye(3, dtype=torch.float64) + 0.8 * torch.randn(3, 3, dtype=torch.float64)
    pos, charges = torch.rand(6, 3, dtype=torch.float64) @ box, torch.randn(6, dtype=torch.float64)
    given = {"partial_charges": charges - charges.mean() + net / 6}
    values = [
        energy(pos, box, given, lattice_sum="ewald", cutoff_distance=8.0 * f, alpha=0.55 / f).item()
        for f in (1, 1.3, 2)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_a_damped_and_shifted_sum_nears_the_crystal_as_its_cutoff_grows() -> None:
    pos, charges, box, _ = crystal("NaCl")
    pos = pos + 0.2 * torch.randn(pos.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = {"partial_charges": charges}
    exact = energy(pos, box, given, lattice_sum="ewald", cutoff_distance=10.0)
    error = [
        (energy(pos, box, given, lattice_sum="damped-shifted", cutoff_distance=c) - exact).abs().item()
        for c in (8.0, 24.0)
    ]
    assert error[1] < error[0] / 2


def test_a_damped_and_shifted_sum_ends_smoothly() -> None:
    values = []
    for r in (10 - 1e-6, 10 + 1e-6):
        pos = pair(r).requires_grad_()
        value = energy(pos, lattice_sum="damped-shifted", cutoff_distance=10.0)
        values.append((value.item(), torch.autograd.grad(value.sum(), pos)[0] if r < 10 else torch.zeros(2, 3)))
    assert values[0][0] == pytest.approx(values[1][0], abs=1e-10)
    assert values[0][1].abs().max() < 1e-5


def test_molecules_beside_crystals_are_summed_directly() -> None:
    pos, charges, box, _ = crystal("CsCl")
    prior = PRIORS["Coulomb"](**OPTIONS, distance_scale=1e-10, lattice_sum="ewald", cutoff_distance=8.0)
    both = bare_graph(
        torch.ones(4).long(),
        torch.cat([pair(5.0), pos]),
        torch.tensor([0, 0, 1, 1]),
        torch.stack([torch.zeros(3, 3).double(), box]),
        {"partial_charges": torch.cat([torch.ones(2).double(), charges])},
    )
    y = prior.per_system(both)
    torch.testing.assert_close(y[:1], energy(pair(5.0)))
    alone = energy(pos, box, {"partial_charges": charges}, lattice_sum="ewald", cutoff_distance=8.0)
    torch.testing.assert_close(y[1:], alone)


def test_an_ewald_sum_of_a_slab_is_refused() -> None:
    box = torch.diag(torch.tensor([5.0, 5.0, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"box 0 is open in 1 directions. Use lattice_sum='damped-shifted'"):
        energy(pair(3.0), box, lattice_sum="ewald", cutoff_distance=8.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lattice_sum": "pme"}, "lattice_sum='pme' is not available. Choose from nearest, damped-shifted, ewald"),
        ({"lattice_sum": "ewald"}, "needs a cutoff_distance"),
        ({"lattice_sum": "ewald", "cutoff_distance": 3.0}, "beyond the upper switch distance of 4"),
        ({"cutoff_distance": 9.0}, "cutoff_distance and alpha belong to"),
    ],
)
def test_lattice_sums_without_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PRIORS["Coulomb"](**OPTIONS, distance_scale=1e-10, **options)
