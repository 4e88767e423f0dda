"""Several processes on this machine, as one node each."""

import socket
import time

import numpy as np
import pytest
import torch
from toy_runs import finish, one_thread, rows, settings, start, train_toy  # noqa: F401 (fixtures)

from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.errors import ConfigError
from torchmdnet.training import distributed
from torchmdnet.training.distributed import choose_devices, rendezvous_seconds


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _node(rank, port, **more):
    return {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}


def _two_nodes(flags):
    """The exit statuses of the same command on both nodes."""
    port = _free_port()
    nodes = [start([*flags, "--num-nodes", 2], _node(rank, port)) for rank in (0, 1)]
    return [finish(node) for node in nodes]


def note_final_weights():
    """Let every process write down what it ended with."""
    import os

    from torchmdnet.training import run

    evaluate = run._evaluate

    def noting(trainer, module, *args):
        result = evaluate(trainer, module, *args)
        weights = {name: value.cpu() for name, value in module.state_dict().items()}
        torch.save(weights, os.path.join(trainer.default_root_dir, f"weights{trainer.global_rank}.pt"))
        return result

    run._evaluate = noting


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_nodes") / "run"
    settings(folder, num_epochs=3, batch_size=4, test_interval=2)
    command = ["--conf", folder.with_name("run.yaml")]
    port = _free_port()
    nodes = [start([*command, "--num-nodes", 2], _node(r, port), fault=note_final_weights) for r in (0, 1)]
    assert [finish(node) for node in nodes] == [0, 0]
    return folder


def test_two_nodes_end_with_the_same_weights(two_nodes):
    first, second = (torch.load(two_nodes / f"weights{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_nodes_share_the_batches_of_an_epoch(two_nodes):
    steps = [int(row["step"]) for row in rows(two_nodes) if "lr" in row]
    assert steps == [2, 5, 8]  # 24 systems in batches of 4, half of them in each process


def test_only_the_first_node_writes_and_reports_everyones_errors(two_nodes, tmp_path):
    """The same weights, evaluated by one process, have the errors that two processes put together."""
    from torchmdnet.data import DataModule
    from torchmdnet.training.evaluate import evaluate
    from torchmdnet.training.lightning import LNNP

    module = LNNP.load_from_checkpoint(two_nodes / "best.ckpt")
    data = DataModule({**module.hparams, "log_dir": None})
    data.setup()
    errors = evaluate(module, data.test_dataloader(), "test", device=torch.device("cpu")).errors
    assert errors.num_molecules == 8
    assert float(rows(two_nodes)[-1]["test_y_l1_loss"]) == pytest.approx(errors.y_mae, rel=1e-5)
    assert float(rows(two_nodes)[-1]["test_neg_dy_l1_loss"]) == pytest.approx(errors.neg_dy_mae, rel=1e-5)
    assert len(list(two_nodes.glob("metrics*.csv"))) == 1
    assert len(np.load(two_nodes / "splits.npz")["idx_train"]) == 24


def test_two_nodes_continue_from_their_last_checkpoint(two_nodes):
    assert _two_nodes(["--load-model", two_nodes / "last.ckpt", "--num-epochs", 4]) == [0, 0]
    assert [row["epoch"] for row in rows(two_nodes) if "lr" in row] == ["0.0", "1.0", "2.0", "3.0"]
    assert read_checkpoint(two_nodes / "last.ckpt")["global_step"] == 12


def test_two_processes_with_half_the_batch_train_like_one(tmp_path):
    """Both halves of a batch have as many energies, so the mean of their means is the mean."""
    options = {"derivative": False, "num_epochs": 2, "precision": 64}
    one = train_toy(tmp_path / "one", batch_size=8, **options)
    settings(tmp_path / "two", batch_size=4, **options)
    assert _two_nodes(["--conf", tmp_path / "two.yaml"]) == [0, 0]
    for ours, theirs in zip(rows(tmp_path / "two"), rows(one), strict=True):
        assert {k: float(v) for k, v in ours.items()} == pytest.approx({k: float(v) for k, v in theirs.items()})


def test_two_processes_share_labels_of_which_one_may_have_none(tmp_path):
    """The errors that both put together are those of one process; with one system a batch, many batches lack labels."""
    from torchmdnet.data import DataModule
    from torchmdnet.training.evaluate import evaluate
    from torchmdnet.training.lightning import LNNP

    folder = tmp_path / "run"
    settings(
        folder,
        dataset="toy_labels:ToyLabels",
        dataset_arg={"missing": 2},
        properties={"dipole": None, "charges": {"weight": 2.0}},
        y_weight=0.0,
        neg_dy_weight=0.0,
        num_epochs=2,
        batch_size=1,
        val_size=2,
    )
    assert _two_nodes(["--conf", tmp_path / "run.yaml"]) == [0, 0]
    module = LNNP.load_from_checkpoint(folder / "best.ckpt")
    data = DataModule({**module.hparams, "log_dir": None})
    data.setup()
    errors = evaluate(module, data.test_dataloader(), "test", device=torch.device("cpu")).errors
    for term in ("dipole", "charges"):
        assert float(rows(folder)[-1][f"test_{term}_l1_loss"]) == pytest.approx(errors.others[term][0], rel=1e-4)
    assert all("train_dipole_mse_loss" in row for row in rows(folder)[:2])


@pytest.mark.parametrize(("rank", "role"), [(0, "waited for the other 1"), (1, "could not reach process 0")])
def test_a_node_that_is_left_alone_gives_up_and_says_for_whom_it_waited(rank, role, tmp_path):
    settings(tmp_path / "run", num_epochs=1)
    environment = _node(rank, _free_port(), TORCHMDNET_RENDEZVOUS_TIMEOUT="2")
    began = time.monotonic()
    environment["STDERR_TO"] = str(tmp_path / "said")
    process = start(["--conf", tmp_path / "run.yaml", "--num-nodes", 2], environment, fault=keep_what_is_said)
    assert finish(process, 60) == 2
    assert time.monotonic() - began < 50
    said = (tmp_path / "said").read_text()
    assert f"Process {rank} of 2 {role}" in said
    assert "MASTER_PORT" in said
    assert "Traceback" not in said


def keep_what_is_said():
    import os
    import sys

    sys.stderr = open(os.environ["STDERR_TO"], "w", buffering=1)  # noqa: SIM115


def test_a_wait_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHMDNET_RENDEZVOUS_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match=r"TORCHMDNET_RENDEZVOUS_TIMEOUT.*soon"):
        rendezvous_seconds()
    monkeypatch.delenv("TORCHMDNET_RENDEZVOUS_TIMEOUT")
    assert rendezvous_seconds() == distributed.WAIT_SECONDS


@pytest.mark.parametrize(
    ("gpus", "ngpus", "expected"),
    [(0, -1, ("cpu", 1)), (0, 2, ("cpu", 2)), (3, -1, ("gpu", 3)), (3, 2, ("gpu", 2))],
)
def test_minus_one_is_every_gpu_or_one_process(monkeypatch, gpus, ngpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_devices(ngpus) == expected


def test_more_gpus_than_there_are_is_refused_with_the_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"ngpus: 4 asked for, but 2 visible.*CUDA_VISIBLE_DEVICES"):
        choose_devices(4)
