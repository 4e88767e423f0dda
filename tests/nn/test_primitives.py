"""Radial bases, cutoffs, activations and blocks give the numbers recorded from torchmd-net 3.1.0."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import shared
from torch import Tensor

from torchmdnet.graph import build_graph
from torchmdnet.heads.coulomb import short_range_damping
from torchmdnet.nn.activation import ACTIVATIONS
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.gated import GatedEquivariantBlock
from torchmdnet.nn.radial import RADIAL_BASES
from torchmdnet.nn.repulsion import RepulsionZBL
from torchmdnet.ops.cartesian import compose_tensor, decompose_tensor
from torchmdnet.ops.scatter import scatter


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    arrays = np.load(shared("interop/primitives.npz"))
    return {key: torch.tensor(arrays[key]) for key in arrays.files if key != "meta_json"}


@pytest.fixture(scope="module")
def meta() -> dict[str, dict]:
    return json.loads(str(np.load(shared("interop/primitives.npz"))["meta_json"]))


def same(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["rbf0", "rbf1", "rbf2", "rbf3"])
def test_radial_bases(name: str, recorded, meta) -> None:
    options = dict(meta[name])
    basis = RADIAL_BASES[options.pop("kind")](**options, dtype=torch.float64)
    for parameter, value in basis.state_dict().items():
        same(value, recorded[f"{name}/{parameter}"])
    same(basis(recorded["d"]), recorded[f"{name}/out"])


@pytest.mark.parametrize("name", ["cut0", "cut1"])
def test_cutoffs(name: str, recorded, meta) -> None:
    same(CosineCutoff(**meta[name])(recorded["d"]), recorded[f"{name}/out"])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, recorded) -> None:
    same(ACTIVATIONS[name]()(recorded["x"]), recorded[f"act/{name}"])


def test_damping_of_the_coulomb_head(recorded) -> None:
    same(1 - short_range_damping(recorded["d"]), recorded["exp_cutoff_4.6"])


@pytest.mark.parametrize("reduce", ["sum", "add", "mean", "max", "min", "mul"])
def test_reductions(reduce: str, recorded) -> None:
    result = scatter(recorded["scatter/src"], recorded["scatter/index"], dim=0, dim_size=6, reduce=reduce)
    same(result, recorded[f"scatter/{reduce}"])


def test_gated_equivariant_block(recorded) -> None:
    block = GatedEquivariantBlock(6, 4, activation="silu", scalar_activation=True, dtype=torch.float64)
    prefix = "geb/state/"
    block.load_state_dict({key[len(prefix) :]: value for key, value in recorded.items() if key.startswith(prefix)})
    x, v = block(recorded["geb/x"], recorded["geb/v"])
    same(x, recorded["geb/x_out"])
    same(v, recorded["geb/v_out"])


def test_tensor_decomposition(recorded) -> None:
    X = recorded["dec/X"]
    I, A, S = decompose_tensor(X)
    zero = torch.zeros_like
    same(I[:, 0], recorded["dec/I"].reshape(I[:, 0].shape))
    same(compose_tensor(zero(I), A, zero(S)), recorded["dec/A"])
    same(compose_tensor(zero(I), zero(A), S), recorded["dec/S"])


def test_repulsion_of_nuclei(recorded) -> None:
    graph = build_graph(recorded["repzbl/z"], recorded["repzbl/pos"], cutoff_upper=5.0)
    single = RepulsionZBL(max_z=20, dtype=torch.float32).double()  # the tables were made in single precision
    energy = single(graph.z, graph.edge_index, graph.edge_dist)
    same(energy[:, 0], recorded["repzbl/e_atom"])
    exact = RepulsionZBL(max_z=20, dtype=torch.float64)(graph.z, graph.edge_index, graph.edge_dist)
    torch.testing.assert_close(exact, energy, rtol=1e-6, atol=1e-6)
