"""The exponential moving average of the weights: its numbers, and who sees it."""

import signal
import socket
import time

import pytest
import torch
from daily import daily
from torch import nn
from toy_runs import die_at, finish, in_slow_motion, kill_me, one_thread, rows, settings, start, train_toy  # noqa: F401 (fixtures)

from torchmdnet import load_model
from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.training import run
from torchmdnet.training.averaging import WeightAverage, decay_at
from torchmdnet.training.files import SafeCheckpointIO
from torchmdnet.training.lightning import LNNP

DECAY = 0.9


def test_the_decay_grows_to_the_one_that_is_asked_for():
    assert [decay_at(step, 0.5) for step in (1, 2, 8, 9)] == [2 / 11, 3 / 12, 0.5, 0.5]
    assert decay_at(10_000, 0.999) == 0.999 > decay_at(8_000, 0.999) == 8001 / 8010


def test_the_average_of_a_toy_by_hand():
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    model.register_buffer("seen", torch.zeros(()))
    average = WeightAverage(model, 0.3)
    expected = [1.0, -2.0]
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3), (4, 0.3)):
        with torch.no_grad():
            model.weight += step
            model.seen += 1
        average.update()
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, model.weight.tolist(), strict=True)]
        assert average.averages["weight"].tolist() == pytest.approx(expected, rel=1e-14)
    assert list(average.averages) == ["weight"], "buffers are those of the model"


def test_model_and_average_change_places_and_back():
    model = nn.Linear(2, 1)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1.0)
    raw, version = model.weight.detach().clone(), model.weight._version
    average.update()
    mean = average.averages["weight"].clone()
    for _ in range(2):
        average.swap(into_model=True)
        assert torch.equal(model.weight, mean)
        assert torch.equal(average.averaged["weight"], mean)
        assert torch.equal(average.state_dict()["weights"]["weight"], raw)
    assert model.weight._version > version, "what is derived from weights is made again"
    average.swap(into_model=False)
    assert torch.equal(model.weight, raw)
    assert torch.equal(average.averaged["weight"], mean)


# ------------------------------------------------------------------------------------------------ runs


def _raw(path):
    return read_checkpoint(path)["torchmdnet"]["state"]["model_ema"]["weights"]


def _averaged(path):
    return {name.removeprefix("model."): value for name, value in read_checkpoint(path)["state_dict"].items()}


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory):
    """Three epochs, with the weights after each step, and those that each validation batch saw."""
    steps, validated = [], []
    step_end, validate = LNNP.on_train_batch_end, LNNP.validation_step
    patch = pytest.MonkeyPatch()

    def copy(module):
        return {name: value.detach().clone() for name, value in module.model.named_parameters()}

    def on_train_batch_end(self, *args):
        steps.append(copy(self))
        return step_end(self, *args)

    def validation_step(self, *args, **kwargs):
        validated.append((len(steps), copy(self)))
        return validate(self, *args, **kwargs)

    patch.setattr(LNNP, "on_train_batch_end", on_train_batch_end)
    patch.setattr(LNNP, "validation_step", validation_step)
    torch.set_num_threads(1)
    folder = train_toy(tmp_path_factory.mktemp("averaged") / "run", num_epochs=3, model_ema_decay=DECAY, lr=1e-2)
    patch.undo()
    return folder, steps, validated


def _expected(steps, start):
    average = {name: value.double() for name, value in start.items()}
    for number, weights in enumerate(steps, start=1):
        d = min(DECAY, (1 + number) / (10 + number))
        average = {name: d * average[name] + (1 - d) * weights[name].double() for name in average}
    return average


def test_validation_and_checkpoints_hold_the_average_and_training_goes_on_with_the_weights(averaged_run):
    folder, steps, validated = averaged_run
    start = next(weights for number, weights in validated if number == 0)  # the sanity check
    for number, weights in validated:
        if number:
            expected = _expected(steps[:number], start)
            assert all(torch.allclose(weights[n].double(), expected[n], atol=1e-6) for n in expected)
            assert any((weights[n] - steps[number - 1][n]).abs().max() > 1e-4 for n in expected)
    last = _expected(steps, start)
    assert all(torch.allclose(_averaged(folder / "last.ckpt")[n].double(), last[n], atol=1e-6) for n in last)
    assert all(torch.equal(_raw(folder / "last.ckpt")[n], steps[-1][n]) for n in last)


def test_the_best_epoch_and_the_potential_hold_the_average(averaged_run):
    folder, _, validated = averaged_run
    best = read_checkpoint(folder / "best.ckpt")
    seen = next(weights for number, weights in reversed(validated) if number == best["global_step"])
    assert all(torch.equal(_averaged(folder / "best.ckpt")[name], value) for name, value in seen.items())
    loaded = load_model(folder / "potential.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in seen.items())
    losses = [float(row["val_total_mse_loss"]) for row in rows(folder) if "lr" in row]
    assert losses.index(min(losses)) == best["epoch"]


def test_without_a_best_epoch_the_result_is_the_average(tmp_path):
    """Stopped by the clock before the first epoch was ranked, as without a validation set or a loss."""
    folder = train_toy(tmp_path / "run", num_epochs=1, model_ema_decay=DECAY, val_size=0)
    loaded = load_model(folder / "potential.safetensors").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in _averaged(folder / "last.ckpt").items())


def test_an_average_changes_no_step(averaged_run, tmp_path):
    folder, steps, _ = averaged_run
    plain = train_toy(tmp_path / "run", num_epochs=3, lr=1e-2)
    state = read_checkpoint(plain / "last.ckpt")
    assert all(torch.equal(state["state_dict"][f"model.{name}"], value) for name, value in steps[-1].items())
    assert state["torchmdnet"]["state"]["model_ema"] is None
    key = "train_total_mse_loss"
    assert [row.get(key) for row in rows(plain)] == [row.get(key) for row in rows(folder)]


def test_the_average_is_what_other_runs_start_from(averaged_run, tmp_path):
    folder, *_ = averaged_run
    fresh = train_toy(tmp_path / "run", load_weights=str(folder / "last.ckpt"), lr=0.0, num_epochs=1)
    ours, theirs = _averaged(fresh / "last.ckpt"), _averaged(folder / "last.ckpt")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------ continued

#: Everything of a planned run that has a memory.
CHANGES = {
    "num_epochs": 5,
    "batch_size": 5,
    "model_ema_decay": 0.95,
    "lr": 2e-2,
    "lr_schedule": "cosine",
    "lr_warmup_steps": 7,
    "weight_decay": 1e-2,
    "weight_decay_on": "matrices",
    "y_loss_per_atom": True,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert finish(start(_command(folder))) == 0
    return folder


def _command(folder):
    settings(folder, **CHANGES)
    return ["--conf", folder.with_name(f"{folder.name}.yaml")]


def _assert_same(folder, expected):
    for name in ("metrics.csv", "errors.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    for name in ("last.ckpt", "best.ckpt"):
        assert all(torch.equal(_averaged(folder / name)[n], v) for n, v in _averaged(expected / name).items())
        assert all(torch.equal(_raw(folder / name)[n], v) for n, v in _raw(expected / name).items())
        ours, theirs = read_checkpoint(folder / name), read_checkpoint(expected / name)
        assert str(ours["optimizer_states"]) == str(theirs["optimizer_states"])


def in_a_step():
    die_at(13, LNNP, "training_step")


def in_validation():
    """While the model holds the average."""
    die_at(5, LNNP, "validation_step")


def while_a_checkpoint_is_written():
    die_at(3, SafeCheckpointIO, "save_checkpoint")


@pytest.mark.parametrize("moment", daily([in_a_step, in_validation, while_a_checkpoint_is_written], in_validation))
def test_a_killed_run_continues_as_if_nothing_had_happened(moment, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    assert finish(start(_command(folder), fault=moment)) == -signal.SIGKILL
    assert finish(start(["--load-model", folder / "last.ckpt"])) == 0
    _assert_same(folder, uninterrupted)


def test_a_run_stopped_inside_an_epoch_continues_from_there(tmp_path, uninterrupted):
    import os

    folder = tmp_path / "run"
    process = start(_command(folder), fault=in_slow_motion)
    while not (folder / "last.ckpt").exists():
        time.sleep(0.02)
        assert process.is_alive()
    time.sleep(0.35)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM
    assert read_checkpoint(folder / "last.ckpt")["global_step"] % 5
    assert finish(start(["--load-model", folder / "last.ckpt"])) == 0
    _assert_same(folder, uninterrupted)


def test_an_average_can_be_switched_off_and_on_in_a_run(tmp_path, caplog):
    folder = train_toy(tmp_path / "run", num_epochs=2, model_ema_decay=DECAY)
    raw = _raw(folder / "last.ckpt")
    last = {"load_model": str(folder / "last.ckpt"), "lr": 0.0}
    run.train(settings(folder, **last, num_epochs=3))
    assert "model_ema_decay: 0.0 from now on (the checkpoint had 0.9)" in caplog.text
    assert all(torch.equal(_averaged(folder / "last.ckpt")[name], value) for name, value in raw.items())
    run.train(settings(folder, **last, num_epochs=4, model_ema_decay=DECAY))
    assert all(torch.equal(_raw(folder / "last.ckpt")[name], value) for name, value in raw.items())


def test_two_processes_agree_on_average_rate_and_end(tmp_path):
    folder = tmp_path / "run"
    changes = {"num_epochs": -1, "max_time": 6, "model_ema_decay": DECAY, "lr_schedule": "cosine", "batch_size": 4}
    settings(folder, **changes, dataset_arg={"delay": 0.02})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = ["--conf", folder.with_name("run.yaml"), "--num-nodes", 2]
    nodes = [start(command, {**place, "NODE_RANK": str(rank)}, fault=noting_weights) for rank in (0, 1)]
    assert [finish(node) for node in nodes] == [0, 0]
    (first, rate), (second, other) = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rate == other < 1e-3
    assert 4 < read_checkpoint(folder / "last.ckpt")["torchmdnet"]["state"]["plan"]["seconds"] < 7


def noting_weights():
    """Let every process write down the average that it ended training with, and its last learning rate."""
    import os

    end = LNNP.on_train_end

    def on_train_end(self):
        end(self)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        path = os.path.join(self.trainer.default_root_dir, f"rank{self.global_rank}.pt")
        torch.save(({name: value.detach().cpu() for name, value in self.model.named_parameters()}, rate), path)

    LNNP.on_train_end = on_train_end
