"""A model file whose options are missing or of another kind is refused with its name and the option."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.build import create_model
from torchmdnet.checkpoint import describe, load_model, save_model
from torchmdnet.checkpoint.load import load_weights, usable_device
from torchmdnet.checkpoint.native import read_native, write_native
from torchmdnet.checkpoint.sound import check_finite, check_weights
from torchmdnet.errors import CheckpointError, ConfigError
from torchmdnet.scripts.main import main
from torchmdnet.testing import tiny_model


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.ckpt"
    save_model(tiny_model("tensornet"), path)
    return torch.load(path, weights_only=True)


@pytest.fixture
def changed(content, tmp_path):
    def write(change):
        path = tmp_path / "changed.ckpt"
        stored = dict(content["hyper_parameters"])
        stored = change(stored) or stored
        torch.save({**content, "hyper_parameters": stored}, path)
        return path

    return write


@pytest.mark.parametrize("key", ["embedding_dimension", "model", "output_model"])
@pytest.mark.parametrize("words", [["convert", "new.safetensors"], ["export", "new.pt2"]], ids=lambda words: words[0])
def test_a_command_says_which_option_a_file_lacks(changed, key, words, tmp_path, monkeypatch, capsys):
    def leave_out(stored):
        stored.pop(key)

    monkeypatch.chdir(tmp_path)
    path = changed(leave_out)
    with pytest.raises(SystemExit) as end:
        main([words[0], str(path), words[1]])
    told = capsys.readouterr().err
    assert end.value.code in (1, 2)
    assert f"{key}: " in told
    assert "Traceback" not in told
    assert not list(tmp_path.glob("new*"))


def test_an_old_checkpoint_without_its_number_of_layers_says_so(content, tmp_path):
    state = {key: value for key, value in content["state_dict"].items() if not key.endswith("distance.box")}
    options = {key: value for key, value in content["hyper_parameters"].items() if key != "num_layers"}
    torch.save({"state_dict": state, "hyper_parameters": options}, tmp_path / "old.ckpt")
    for read in (load_model, describe):
        with pytest.raises(CheckpointError, match=r"old\.ckpt: 'num_layers' is missing"):
            read(tmp_path / "old.ckpt")


@pytest.mark.parametrize(("option", "message"), [
    ({"num_layers": "a"}, "num_layers: 'a' is not valid. It takes a whole number"),
    ({"cutoff_upper": float("nan")}, "cutoff_upper: 'nan' is not valid. It takes a finite number"),
    ({"activation": ["silu"]}, "activation: .* It takes text"),
    ({"num_layers": -2}, "num_layers: '-2' is not valid. It takes a whole number from 0 on"),
    ({"max_num_neighbors": 2.5}, "max_num_neighbors: '2.5' is not valid. It takes a whole number"),
    ({"derivative": "false"}, "derivative: 'false' is not valid. It takes true or false"),
    ({"remove_ref_energy": 7}, "remove_ref_energy: '7' is not valid. It takes true or false"),
    ({"prior_args": "none"}, "prior_args: 'none' is not valid. It takes a mapping"),
    ({"system_embedding": 0}, "system_embedding: '0' is not valid. It takes text"),
    ({"cutoff_lower": True}, "cutoff_lower: 'True' is not valid. It takes a finite number"),
    ({"num_layers": 10**9}, "num_layers=1000000000 describes a larger model than the file holds"),
    ({"embedding_dimension": 10**6}, "embedding_dimension=1000000 describes a larger model"),
])  # fmt: skip
def test_options_of_another_kind_are_refused_by_their_key(changed, option, message):
    path = changed(lambda stored: stored | option)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_model(path)


def _with_nan(weight):
    weight = weight.clone()
    weight.view(-1)[-1] = float("nan")
    return weight


UNSOUND = {
    "NaN": (_with_nan, "holds NaN or infinite numbers"),
    "infinite": (lambda weight: torch.full_like(weight, float("inf")), "holds NaN or infinite numbers"),
    "whole": (lambda weight: weight.long(), "holds torch.int64, where the model has torch.float64"),
    "complex": (lambda weight: weight.to(torch.complex64), "holds complex numbers"),
}


@pytest.mark.parametrize("kind", UNSOUND)
@pytest.mark.parametrize("name", ["emb.weight", "std", "representation_model.distance.box"])
def test_weights_that_are_no_numbers_of_a_model_are_refused_by_name(content, tmp_path, kind, name):
    change, message = UNSOUND[kind]
    state = {**content["state_dict"]}
    key = next(key for key in state if key.endswith(name))
    torch.save({**content, "state_dict": {**state, key: change(state[key])}}, tmp_path / "odd.ckpt")
    for read in (load_model, lambda path: load_weights(tiny_model("tensornet"), path)):
        with pytest.raises(CheckpointError, match=rf"odd\.ckpt: the tensor .*{name} {message}"):
            read(tmp_path / "odd.ckpt")


def test_a_native_file_with_the_right_digest_but_without_numbers_is_refused(tmp_path):
    model = tiny_model("tensornet")
    save_model(model, tmp_path / "good.safetensors")
    state, card = read_native(tmp_path / "good.safetensors")
    name = next(name for name in state if name.endswith("emb.weight"))
    write_native(tmp_path / "bad.safetensors", {**state, name: state[name] * float("nan")}, card)
    with pytest.raises(CheckpointError, match=rf"the tensor {name} holds NaN"):
        load_model(tmp_path / "bad.safetensors")


def test_whole_numbers_and_what_is_infinite_in_a_new_model_too_are_let_be(content):
    own = {"mask": torch.tensor([0.0, float("-inf")]), "z": torch.tensor([1, 2]), "w": torch.zeros(2)}
    check_weights({**own, "w": torch.ones(2, dtype=torch.float64)}, own, "file")
    with pytest.raises(CheckpointError, match="the tensor w holds NaN or infinite"):
        check_weights({**own, "w": torch.full((2,), 1e300, dtype=torch.float64)}, own, "file")
    with pytest.raises(CheckpointError, match=r"the tensor z holds torch\.float32"):
        check_weights({**own, "z": torch.ones(2)}, own, "file")
    check_finite([{"state": {0: {"step": torch.tensor(3), "m": torch.ones(2)}}}], "optimizer_states", "file")
    with pytest.raises(CheckpointError, match=r"optimizer_states\.0\.state\.0\.m holds NaN"):
        check_finite([{"state": {0: {"m": torch.tensor(float("nan"))}}}], "optimizer_states", "file")


@pytest.mark.parametrize("stored", [3, "text", [1], None])
def test_options_that_are_no_mapping_are_refused(changed, content, stored):
    path = changed(lambda _: None)
    torch.save({**content, "hyper_parameters": stored}, path)
    for read in (load_model, describe):
        with pytest.raises(CheckpointError, match=r"changed\.ckpt"):
            read(path)


def test_weights_that_are_no_tensors_are_refused(content, tmp_path):
    torch.save({**content, "state_dict": {"model.mean": [1, 2]}}, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"odd\.ckpt"):
        load_model(tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"odd\.ckpt"):
        load_weights(tiny_model("tensornet"), tmp_path / "odd.ckpt")


def test_an_option_that_a_new_model_needs_is_named(content):
    options = {key: value for key, value in content["hyper_parameters"].items() if key != "embedding_dimension"}
    with pytest.raises(ConfigError, match="embedding_dimension: missing"):
        create_model(options)


def test_weights_to_start_from_are_read_before_data(tmp_path, monkeypatch):
    from torchmdnet.config import resolve
    from torchmdnet.training import run as training

    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    monkeypatch.setattr(training, "DataModule", lambda *_: pytest.fail("data were asked for"))
    words = ["--dataset", "TinyQM", "--load-weights", str(tmp_path / "bad.ckpt"), "--log-dir", str(tmp_path / "run")]
    with pytest.raises(CheckpointError, match=r"bad\.ckpt is not a model file"):
        training.train(resolve(words))


def test_weights_that_are_no_numbers_are_refused_before_data_are_read(content, tmp_path, monkeypatch):
    from torchmdnet.config import resolve
    from torchmdnet.training import run as training

    state = {name: _with_nan(value) if "emb.weight" in name else value for name, value in content["state_dict"].items()}
    torch.save({**content, "state_dict": state}, tmp_path / "nan.ckpt")
    monkeypatch.setattr(training, "DataModule", lambda *_: pytest.fail("data were asked for"))
    words = ["--dataset", "TinyQM", "--load-weights", str(tmp_path / "nan.ckpt"), "--log-dir", str(tmp_path / "run")]
    with pytest.raises(CheckpointError, match=r"nan\.ckpt: the tensor state_dict\..*emb\.weight holds NaN"):
        training.train(resolve(words))


@pytest.mark.parametrize("part", ["weights", "optimizer_states", "ema"])
def test_a_run_does_not_continue_from_numbers_that_are_none(part):
    from torchmdnet.training.lightning import LNNP

    module = LNNP(dict(tiny_model("tensornet").hyper_parameters))

    def checkpoint():
        return {
            "state_dict": {f"model.{name}": value.clone() for name, value in module.model.state_dict().items()},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
            "torchmdnet": {"state": {"ema": {"train": {"y": torch.ones(1)}}}},
        }

    module.on_load_checkpoint(checkpoint())
    assert float(module.ema["train"]["y"]) == 1
    damaged = checkpoint()
    inside = {
        "weights": next(value for name, value in damaged["state_dict"].items() if name.endswith("emb.weight")),
        "optimizer_states": damaged["optimizer_states"][0]["state"][0]["exp_avg"],
        "ema": damaged["torchmdnet"]["state"]["ema"]["train"]["y"],
    }[part]
    inside.view(-1)[-1] = float("nan")
    name = {"weights": r"\S*emb\.weight", "optimizer_states": r"optimizer_states\.0\.state\.0\.exp_avg"}.get(
        part, r"ema\.train\.y"
    )
    with pytest.raises(CheckpointError, match=rf"the tensor {name} holds NaN"):
        module.on_load_checkpoint(damaged)


def test_a_misspelt_device_comes_with_the_right_name():
    with pytest.raises(ConfigError, match=r"device: 'cdua' is not available\. Did you mean 'cuda'\?"):
        usable_device("cdua")


def test_a_misspelt_argument_of_a_calculator_is_refused():
    from torchmdnet.calculators import TMDNETCalculator

    with pytest.raises(ConfigError, match=r"unit: there is no such argument\. Did you mean 'units'\?"):
        TMDNETCalculator(tiny_model("tensornet"), unit="eV")


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "", "nonsense:x"])
def test_a_device_that_is_not_there_is_refused_before_the_file_is_read(device):
    with pytest.raises(ConfigError, match="device: "):
        usable_device(device)
    with pytest.raises(ConfigError, match="device: "):
        load_model("no-such-file.ckpt", device=device)


def test_a_setting_that_is_refused_comes_with_the_name_of_its_file(changed):
    for change in ({"num_layers": 10**9}, {"cutoff_upper": 1e300}, {"prior_model": "D2", "prior_args": None}):
        with pytest.raises((ConfigError, CheckpointError), match=r"changed\.ckpt: "):
            load_model(changed(lambda stored, change=change: {**stored, **change}))
    with pytest.raises((ConfigError, CheckpointError), match=r"changed\.ckpt"):
        load_model(changed(lambda stored: stored.clear()))
