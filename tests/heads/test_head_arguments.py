"""Arguments of the output model: ``output_model: {Name: {argument: value}}``."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import yaml

from torchmdnet.build import create_model
from torchmdnet.checkpoint import describe, load_model, save_model
from torchmdnet.config import get_argparse, resolve
from torchmdnet.config.reader import read_yaml
from torchmdnet.config.values import coerce
from torchmdnet.errors import ConfigError
from torchmdnet.heads.coulomb import ScalarPlusWeightedCoulomb
from torchmdnet.heads.scalar import Scalar
from torchmdnet.scripts.info import rows_of
from torchmdnet.testing import small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY

SYSTEMS = small_molecules()


class Shifted(Scalar):
    """A head from another package."""

    def __init__(self, hidden_channels: int, shift: float = 0.0, doubled: bool = False, **options) -> None:
        if shift < -100:
            raise ValueError("no such shift")
        super().__init__(hidden_channels, **options)
        self.shift, self.doubled = shift, doubled

    def per_atom(self, features, graph):
        return super().per_atom(features, graph) * (1 + self.doubled) + self.shift


class Electrostatics(ScalarPlusWeightedCoulomb):
    """One that reads charges, whatever it is called."""


@pytest.fixture
def shifted(monkeypatch) -> str:
    module = types.ModuleType("heads_of_mine")
    module.Shifted, module.Electrostatics = Shifted, Electrostatics  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "heads_of_mine", module)
    return "heads_of_mine:Shifted"


def energies(model) -> torch.Tensor:
    return model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)[0].detach()


def test_an_argument_takes_the_place_of_the_option() -> None:
    own = tiny_model("tensornet", output_model={"Scalar": {"num_layers": 2, "activation": "tanh"}})
    head = tiny_model("tensornet", output_mlp_num_layers=2).output_model
    assert own.output_model.state_dict().keys() == head.state_dict().keys()
    assert "Tanh" in str(own.output_model)
    assert "Tanh" not in str(own.representation_model)
    variant = tiny_model("equivariant-transformer", output_model={"Scalar": {"reduce_op": "mean"}}).output_model
    assert type(variant) is type(tiny_model("equivariant-transformer").output_model)
    assert variant.reduce_op == "mean"


@pytest.mark.parametrize(
    ("output_model", "message"),
    [
        ({"Scalar": {"num_layer": 2}}, "output_model: Scalar has no argument 'num_layer'. Did you mean 'num_layers'"),
        ({"Scalar": {"hidden_channels": 2}}, "Scalar has no argument 'hidden_channels'"),
        ({"Scalar": {"num_layers": "two"}}, "output_model: Scalar: num_layers: 'two' is not valid. It takes a whole"),
        ({"Scalar": {"allow_prior_model": 0.5}}, "allow_prior_model: '0.5' is not valid. It takes true or false"),
        ({"Scalar": {"activation": "relv"}}, "activation: 'relv' is not available"),
        ({"Scalar": {"reduce_op": "median"}}, "reduce_op: 'median' is not available"),
        ({"Skalar": {"num_layers": 2}}, "'Skalar' is not available. Did you mean 'Scalar'"),
        ({"Scalar": {}, "Dipole": {}}, "is neither the name of a head nor one name with its arguments"),
        ({"Scalar": 3}, "is neither the name of a head nor one name with its arguments"),
        (["Scalar"], "is neither the name of a head"),
    ],
)
def test_what_cannot_be_is_refused(output_model, message) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_model("tensornet", output_model=output_model)


@pytest.mark.parametrize("argument", ["num_layers", "q_dim", "box_vecs"])
def test_what_the_architecture_decides_is_no_argument(argument) -> None:
    with pytest.raises(ConfigError, match=f"ScalarPlusWeightedCoulomb has no argument '{argument}'"):
        tiny_model("tensornet2", output_model={"ScalarPlusWeightedCoulomb": {argument: 2}})


def test_a_property_is_told_of_values_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="properties: volume: AtomScalar: num_layers: 'two' is not valid"):
        tiny_model("tensornet", properties={"volume": {"head": "AtomScalar", "num_layers": "two"}})


def test_a_head_of_another_package_takes_its_arguments(shifted) -> None:
    plain, moved = (tiny_model("tensornet", output_model=output) for output in (shifted, {shifted: {"shift": 2.5}}))
    atoms = torch.bincount(SYSTEMS.batch).to(torch.float64)[:, None]
    torch.testing.assert_close(energies(moved), energies(plain) + 2.5 * atoms)


def test_charges_are_for_heads_that_need_them_not_for_names(shifted) -> None:
    options = {"coulomb_cutoff": 5.0, "q_weights": [1.0, 0.5, 0.2]}
    named = tiny_model("tensornet2", output_model={"ScalarPlusWeightedCoulomb": options})
    other = tiny_model("tensornet2", output_model={"heads_of_mine:Electrostatics": options})
    assert torch.equal(energies(named), energies(other))
    assert named.output_model.coulomb_cutoff == 5.0


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("Scalar", "Scalar"),
        (["Scalar"], "Scalar"),
        ({"Scalar": None}, "Scalar"),
        ('{"Scalar": {"num_layers": 2}}', {"Scalar": {"num_layers": 2}}),
        (["{Scalar:", "{num_layers:", "2}}"], {"Scalar": {"num_layers": 2}}),
        ({"Scalar": {"allow_prior_model": "off"}}, {"Scalar": {"allow_prior_model": False}}),
    ],
)
def test_it_can_be_written_in_several_ways(written, value) -> None:
    assert coerce("output_model", written, "conf.yaml, line 1") == value


def test_the_command_line_takes_a_mapping() -> None:
    args = get_argparse().parse_args(["--output-model", '{"Scalar": {"num_layers": 2}}', "--lr", "1e-3"])
    assert args.output_model == {"Scalar": {"num_layers": 2}}


def settings(tmp_path, **options) -> list[str]:
    path = tmp_path / "conf.yaml"
    path.write_text(yaml.safe_dump({"dataset": "TinyQM", "model": "tensornet", "embedding_dimension": 8, **options}))
    return ["--conf", str(path), "--log-dir", str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"output_model": {"Scalar": {"num_layer": 2}}},
            r"conf.yaml, line \d+.*: output_model: Scalar has no argument",
        ),
        ({"output_model": {"Scaler": {}}}, r"conf.yaml, line \d+.*'Scaler' is not available. Did you mean 'Scalar'"),
        ({"output_model": {"Scalar": {"activation": "relv"}}}, r"conf.yaml, line \d+.*'relv' is not available"),
        ({"output_model": {"heads_of_mine:Shifted": {"shift": -200.0}}}, "cannot be built from .*: no such shift"),
        (
            {"output_model": {"Scalar": {"num_layers": 2}}, "output_mlp_num_layers": 1},
            r"Scalar: num_layers=2 contradicts output_mlp_num_layers=1 \(.*\). Leave one of them out",
        ),
        (
            {"output_model": {"Scalar": {"reduce_op": "mean"}}, "y_loss_per_atom": True},
            "reduce_op=mean y is a mean over atoms already",
        ),
    ],
)
def test_a_run_is_refused_before_it_begins(options, message, tmp_path, shifted) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(settings(tmp_path, **options))
    assert not (tmp_path / "run").exists()


def test_words_for_booleans_are_booleans(tmp_path, shifted) -> None:
    args = resolve(settings(tmp_path, output_model={shifted: {"shift": 1.0}}))
    assert args.output_model == {shifted: {"shift": 1.0}}
    assert coerce("output_model", {"Scalar": {"allow_prior_model": "no"}}, "x")["Scalar"]["allow_prior_model"] is False


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_keep_the_arguments(suffix, tmp_path, shifted, caplog) -> None:
    model = create_model({**TINY, "model": "tensornet", "output_model": {shifted: {"shift": 2.5, "doubled": True}}})
    path = tmp_path / f"model{suffix}"
    save_model(model.eval(), path)
    assert ("release 3 reads no arguments of a head" in caplog.text) == (suffix == ".ckpt")
    assert torch.equal(energies(load_model(path)), energies(model))
    card = describe(path)
    assert card["head"] == shifted
    assert card["hyper_parameters"]["output_model"] == {shifted: {"shift": 2.5, "doubled": True}}
    assert ("head", f"{shifted} (shift: 2.5, doubled: True)") in rows_of(card)


def test_an_option_for_a_loaded_model_wins_over_the_argument_in_the_file(tmp_path) -> None:
    options = {"coulomb_cutoff": 5.0, "q_weights": [1.0, 0.5, 0.2]}
    model = tiny_model("tensornet2", output_model={"ScalarPlusWeightedCoulomb": options})
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", coulomb_cutoff=7.0)
    assert loaded.output_model.coulomb_cutoff == 7.0
    assert loaded.hyper_parameters["output_model"] == {"ScalarPlusWeightedCoulomb": {"q_weights": [1.0, 0.5, 0.2]}}


def test_a_run_keeps_the_arguments(tmp_path) -> None:
    from torchmdnet.scripts.train import main

    head = {"Scalar": {"num_layers": 1}}
    main([*settings(tmp_path, output_model=head), "--num-epochs", "1", "--num-layers", "0", "--train-size", "8",
          "--val-size", "4", "--test-size", "0", "--num-rbf", "4"])  # fmt: skip
    for name in ("input.yaml", "hparams.yaml"):
        assert read_yaml(tmp_path / "run" / name)["output_model"].value == head
    for name in ("potential.safetensors", "last.ckpt"):
        assert len(load_model(tmp_path / "run" / name).output_model.output_network.layers) == 5
    args = resolve(["--load-model", str(tmp_path / "run" / "last.ckpt"), "--num-epochs", "2"])
    assert args.output_model == head
