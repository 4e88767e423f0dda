"""The transformer attends as its equation says, and says that it is deprecated without touching warning filters."""

from __future__ import annotations

import warnings

import pytest
import torch

from torchmdnet.models.torchmd_t import TorchMD_T
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.tape.tape import Definitions
from torchmdnet.testing import small_molecules

OPTIONS: dict = {
    "hidden_channels": 8,
    "num_layers": 1,
    "num_rbf": 5,
    "num_heads": 2,
    "cutoff_upper": 3.0,
    "max_z": 10,
    "dtype": torch.float64,
}


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("influence", ["keys", "values", "both", "none"])
def test_one_layer_is_the_equation(influence: str) -> None:
    torch.manual_seed(0)
    model = TorchMD_T(**OPTIONS, distance_influence=influence, attn_activation="tanh")
    layer = model.attention_layers[0]
    systems = small_molecules()
    num_atoms, H, D = len(systems.z), 2, 4
    x = torch.randn(num_atoms, 8, dtype=torch.float64)
    h = layer.layernorm(x)
    q, k, p = (linear(h).view(-1, H, D) for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    gathered = torch.zeros(num_atoms, H, D, dtype=torch.float64)
    for i in range(num_atoms):
        for j in range(num_atoms):
            r = (systems.pos[i] - systems.pos[j]).norm()
            if systems.batch[i] != systems.batch[j] or r >= 3.0:
                continue
            rbf = model.distance_expansion(r)
            weight, value = q[i] * k[j], p[j]
            if layer.dk_proj is not None:
                weight = weight * layer.act(layer.dk_proj(rbf)).view(H, D)
            if layer.dv_proj is not None:
                value = value * layer.act(layer.dv_proj(rbf)).view(H, D)
            weight = torch.tanh(weight.sum(-1, keepdim=True)) * 0.5 * (torch.cos(torch.pi * r / 3.0) + 1)
            gathered[i] += value * weight
    expected = layer.o_proj(gathered.view(-1, 8))
    graph = model.graph(systems.z, systems.pos, systems.batch)
    function = RadialFunction(layer, "radial", fades=False)
    radial = model.radial(graph, model.distance_expansion, model.envelope, [function], training=True)
    found = model.refine(Definitions(graph, radial), layer, function, x) - x
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_building_one_warns_and_leaves_the_filters_alone() -> None:
    before = list(warnings.filters)
    with pytest.warns(DeprecationWarning, match="equivariant-transformer or tensornet"):
        TorchMD_T(**OPTIONS)
    assert warnings.filters == before
