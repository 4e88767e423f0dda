"""Several processes on this machine, as one node each."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from toy_runs import finish, one_thread, rows, settings, start, train_toy  # noqa: F401 (fixtures)

from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.config import launcher
from torchmdnet.config.launcher import rendezvous_seconds
from torchmdnet.errors import ConfigError, PeerError
from torchmdnet.training import distributed
from torchmdnet.training.distributed import choose_world, cluster_environment


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

    evaluate = run.evaluate_split

    def noting(trainer, module, *args):
        result = evaluate(trainer, module, *args)
        weights = {name: value.cpu() for name, value in module.state_dict().items()}
        torch.save(weights, os.path.join(trainer.default_root_dir, f"weights{trainer.global_rank}.pt"))
        return result

    run.evaluate_split = noting


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
    """Both halves of a batch have as many energies, but not as many forces: every label counts once."""
    options = {"num_epochs": 2, "precision": 64}
    one = train_toy(tmp_path / "one", batch_size=8, **options)
    settings(tmp_path / "two", batch_size=4, **options)
    assert _two_nodes(["--conf", tmp_path / "two.yaml"]) == [0, 0]
    for ours, theirs in zip(rows(tmp_path / "two"), rows(one), strict=True):
        assert {k: float(v) for k, v in ours.items()} == pytest.approx(
            {k: float(v) for k, v in theirs.items()}, rel=1e-8
        )
    ours, theirs = (read_checkpoint(tmp_path / name / "last.ckpt")["state_dict"] for name in ("two", "one"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-8, atol=1e-10)


def test_terms_are_weighed_by_the_labels_of_all_processes(tmp_path):
    """Losses times these factors, averaged over the processes, are means over all labels; also where one has none."""
    from torchmdnet.training.lightning import LNNP

    module = LNNP(vars(settings(tmp_path / "run")))
    sizes = {"y": (4, 4), "neg_dy": (30, 54), "dipole": (0, 6), "charges": (0, 0)}
    labels = [{term: torch.zeros(counts[rank]) for term, counts in sizes.items()} for rank in (0, 1)]
    pairs = [{term: (label, label, len(label)) for term, label in held.items()} for held in labels]
    assert module._shares(pairs[0]) is None
    shares = []
    for rank in (0, 1):
        others = torch.tensor([counts[1 - rank] for counts in sizes.values()], dtype=torch.float64)
        strategy = SimpleNamespace(reduce=lambda values, reduce_op, others=others: values + others)
        module._trainer = SimpleNamespace(world_size=2, strategy=strategy)
        shares.append(module._shares(pairs[rank]))
    for term, (first, second) in sizes.items():
        total = max(first + second, 1)
        assert float(shares[0][term]) / 2 == pytest.approx(first / total)
        assert float(shares[1][term]) / 2 == pytest.approx(second / total)


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


@pytest.mark.parametrize(
    ("rank", "role"), [(0, "waited for the other 1, but process 1 did not come"), (1, "could not reach process 0")]
)
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
    assert ("nothing listens there: process 0 has not started" in said) == (rank == 1)
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
    assert rendezvous_seconds() == launcher.WAIT_SECONDS


@pytest.mark.parametrize(
    ("gpus", "ngpus", "expected"),
    [(0, -1, ("cpu", 1)), (0, 2, ("cpu", 2)), (3, -1, ("gpu", 3)), (3, 2, ("gpu", 2))],
)
def test_minus_one_is_every_gpu_or_one_process(monkeypatch, gpus, ngpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_world(ngpus, 1) == (*expected, 1)


def test_more_gpus_than_there_are_is_refused_with_the_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"ngpus: 4 asked for, but 2 visible.*CUDA_VISIBLE_DEVICES"):
        choose_world(4, 1)


# ------------------------------------------------------------------------------------------- one run, not several


def agree(facts, *, seconds=5.0, ranks=None):
    """Let processes, here threads, compare their facts; what each of them raises, or None."""
    store, raised = torch.distributed.HashStore(), {}

    def join(number, rank, mine):
        try:
            distributed._agree(store, rank, len(facts), mine, time.monotonic() + seconds)
        except (ConfigError, TimeoutError) as error:
            raised[number] = str(error)

    numbered = list(enumerate(zip(ranks or range(len(facts)), facts, strict=False)))
    threads = [threading.Thread(target=join, args=(n, rank, mine)) for n, (rank, mine) in numbered if mine is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [raised.get(number) for number, _ in numbered]


def test_processes_with_the_same_settings_agree():
    assert agree([{"lr": 0.1, "properties": None}] * 4) == [None] * 4


def test_other_settings_are_refused_in_every_process_by_key_and_value():
    for said in agree([{"lr": 0.1, "seed": 1}, {"lr": 0.1, "seed": 1}, {"lr": 0.2, "seed": 1}]):
        assert said is not None
        assert "lr: 0.1 in process 0, 0.2 in process 2" in said
        assert "seed" not in said


def test_a_process_that_never_comes_is_named_in_every_process():
    for said in filter(None, agree([{"lr": 0.1}, {"lr": 0.1}, None, None], seconds=0.5)[:2]):
        assert "process 2, 3 did not come" in said
        assert "NODE_RANK" in said


def test_two_processes_with_one_number_are_refused():
    first, *others = agree([{}, {}], ranks=[0, 1, 1], seconds=1)
    assert first is None
    assert sum("Two processes say that they are process 1 of 2" in (said or "") for said in [*others]) <= 1


def test_the_data_are_compared(tmp_path):
    from torchmdnet.data import DataModule
    from torchmdnet.data.digest import data_digest

    data = DataModule({**vars(settings(tmp_path / "run")), "log_dir": None})
    data.setup()
    parts = {"train": data.idx_train, "val": data.idx_val}
    digest = data_digest(data.dataset, parts)
    assert digest == data_digest(data.dataset, parts)
    assert digest != data_digest(data.dataset, {**parts, "train": data.idx_train.flip(0)})


def test_a_port_that_another_program_holds_does_not_hold_the_run(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        settings(tmp_path / "run", num_epochs=1)
        environment = _node(1, str(other.getsockname()[1]), TORCHMDNET_RENDEZVOUS_TIMEOUT="3")
        environment["STDERR_TO"] = str(tmp_path / "said")
        began = time.monotonic()
        process = start(["--conf", tmp_path / "run.yaml", "--num-nodes", 2], environment, fault=keep_what_is_said)
        assert finish(process, 100) == 2
        assert time.monotonic() - began < 60
        assert "could not reach process 0" in (tmp_path / "said").read_text()


# ------------------------------------------------------------------------------------------------ signals and loss


def slow_steps():
    """Let a step take long enough for a signal to arrive in the middle of an epoch, and say what is said."""
    import os

    from torchmdnet.training.callbacks import PoliteStop
    from torchmdnet.training.lightning import LNNP

    PoliteStop.ASK_EVERY = 2
    step = LNNP.training_step

    def slow(self, batch, batch_idx=0):
        time.sleep(0.1)
        (Path(os.environ["MARK"]) / f"stepping{os.environ['NODE_RANK']}").touch()
        return step(self, batch, batch_idx)

    LNNP.training_step = slow
    keep_what_is_said()


def _stepping(tmp_path, **more):
    """Two nodes in the middle of a long run."""
    settings(tmp_path / "run", num_epochs=500, batch_size=2)
    port = _free_port()
    nodes = [
        start(
            ["--conf", tmp_path / "run.yaml", "--num-nodes", 2],
            _node(rank, port, MARK=str(tmp_path), STDERR_TO=str(tmp_path / f"said{rank}"), **more),
            fault=slow_steps,
        )
        for rank in (0, 1)
    ]
    until = time.monotonic() + 120
    while not all((tmp_path / f"stepping{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < until
        time.sleep(0.1)
    return nodes


@pytest.mark.parametrize("asked", [[0], [1], [0, 1]])
def test_sigterm_to_any_of_two_nodes_saves_in_the_middle_of_an_epoch_and_ends_both(asked, tmp_path):
    nodes = _stepping(tmp_path)
    for rank in asked:
        os.kill(nodes[rank].pid, signal.SIGTERM)
    assert [finish(node) for node in nodes] == [143, 143]
    told = (tmp_path / "said0").read_text()
    assert "Continue with: torchmd-train --load-model" in told
    assert "Start it on every node" in told
    if asked == [1]:
        assert "Process 1 received SIGTERM: all stop at this step." in told
    assert read_checkpoint(tmp_path / "run/last.ckpt")["global_step"] > 0


def test_a_node_that_dies_is_named_by_the_other_which_says_how_to_go_on(tmp_path):
    nodes = _stepping(tmp_path)
    os.kill(nodes[1].pid, signal.SIGKILL)
    assert [finish(node) for node in nodes] == [1, -signal.SIGKILL]
    _expect_lost(tmp_path / "said0", 0, r"process 1 is gone or has stopped\. Processes wait 120 s")


def _expect_lost(said, rank, message):
    """One line in our own words: who is missing, after how long, and what to do."""
    told = said.read_text()
    assert re.search(rf"Process {rank} of 2 lost its connection to the others \d+ s after the start .*{message}", told)
    assert "tart all of them again" in told
    for foreign in ("Traceback", "gloo", "third_party", "127.0.0.1:"):
        assert foreign not in told.replace(str(said.parent), "")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_node_that_stops_without_dying_is_given_up_in_time(tmp_path, stopped):
    nodes = _stepping(tmp_path, TORCHMDNET_RENDEZVOUS_TIMEOUT="10")
    os.kill(nodes[stopped].pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        assert finish(nodes[1 - stopped]) == 1
    finally:
        os.kill(nodes[stopped].pid, signal.SIGKILL)
        nodes[stopped].join()
    assert time.monotonic() - began < 60
    message = f"process {stopped} is gone or has stopped\\. Processes wait 10 s"
    _expect_lost(tmp_path / f"said{1 - stopped}", 1 - stopped, message)


def stop_in_the_rendezvous():
    """Let a process stop where the environment says: before it compares settings, or after."""
    import os

    place = os.environ["STOPS"]
    agree = distributed._agree

    def stopping(*args):
        if place == "before":
            os.kill(os.getpid(), signal.SIGSTOP)
        agree(*args)
        os.kill(os.getpid(), signal.SIGSTOP)

    if os.environ["NODE_RANK"] == os.environ["STOPPED"]:
        distributed._agree = stopping
    keep_what_is_said()


@pytest.mark.slow
@pytest.mark.parametrize(("stopped", "place"), [(0, "before"), (0, "after"), (1, "before"), (1, "after")])
def test_a_node_that_stops_in_the_rendezvous_is_given_up_in_time(tmp_path, stopped, place):
    settings(tmp_path / "run", num_epochs=1)
    port, more = _free_port(), {"TORCHMDNET_RENDEZVOUS_TIMEOUT": "10", "STOPS": place, "STOPPED": str(stopped)}
    nodes = [
        start(
            ["--conf", tmp_path / "run.yaml", "--num-nodes", 2],
            _node(rank, port, STDERR_TO=str(tmp_path / f"said{rank}"), **more),
            fault=stop_in_the_rendezvous,
        )
        for rank in (0, 1)
    ]
    began = time.monotonic()
    try:
        assert finish(nodes[1 - stopped]) == 2
    finally:
        os.kill(nodes[stopped].pid, signal.SIGKILL)
        nodes[stopped].join()
    assert time.monotonic() - began < 90
    told = (tmp_path / f"said{1 - stopped}").read_text()
    who = "could not reach process 0" if stopped == 0 else r"waited for the other 1\b"
    assert re.search(rf"Process {1 - stopped} of 2 {who}.*MASTER_PORT", told)
    for foreign in ("Traceback", "gloo", "third_party"):
        assert foreign not in told.replace(str(tmp_path), "")


# ------------------------------------------------------------------------------------------------------ launchers

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
SRUN = {"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_NNODES": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.fixture
def bare(monkeypatch):
    """A CPU, and none of the variables of launchers."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in TORCHRUN:
            monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


@pytest.mark.parametrize(("variables", "expected"), [(TORCHRUN, (2, 2)), (SRUN, (3, 2)), ({}, (1, 1))])
def test_the_world_is_the_launchers(bare, variables, expected):
    for name, value in variables.items():
        bare.setenv(name, value)
    assert choose_world(-1, 1) == ("cpu", *expected)
    assert choose_world(expected[0], expected[1]) == ("cpu", *expected)


def test_options_that_contradict_the_launcher_are_refused(bare):
    for name, value in TORCHRUN.items():
        bare.setenv(name, value)
    with pytest.raises(ConfigError, match=r"ngpus: 3 does not fit what torchrun started, 2"):
        choose_world(3, 2)
    with pytest.raises(ConfigError, match=r"num_nodes: 3 does not fit what torchrun started, 2"):
        choose_world(2, 3)


def test_unequal_nodes_are_refused(bare):
    for name, value in {**SRUN, "SLURM_NTASKS": "5"}.items():
        bare.setenv(name, value)
    with pytest.raises(ConfigError, match=r"srun started 5 processes on 2 nodes.*--ntasks-per-node"):
        choose_world(-1, 1)


@pytest.mark.parametrize(
    ("variables", "name", "value"),
    [
        (TORCHRUN, "LOCAL_WORLD_SIZE", "0"),
        (TORCHRUN, "WORLD_SIZE", "0"),
        (TORCHRUN, "LOCAL_RANK", None),
        (TORCHRUN, "RANK", None),
        (TORCHRUN, "RANK", "4"),
        (TORCHRUN, "LOCAL_RANK", "2"),
        (SRUN, "SLURM_NNODES", "0"),
        (SRUN, "SLURM_PROCID", "6"),
        (SRUN, "SLURM_NODEID", None),
        (SRUN, "SLURM_NODEID", "2"),
        (SRUN, "SLURM_LOCALID", "3"),
    ],
)
def test_variables_of_a_launcher_that_do_not_fit_are_refused_by_name(bare, variables, name, value):
    for key, text in variables.items():
        bare.setenv(key, text)
    if value is None:
        bare.delenv(name)
    else:
        bare.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^{name}: "):
        choose_world(-1, 1)


def test_no_other_launcher_is_asked_for_the_place(bare):
    """SLURM with one task, or with --ntasks, and LSF: Lightning would refuse them, or train alone."""
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/x"}.items():
        bare.setenv(name, value)
    assert type(cluster_environment()).__name__ == "LightningEnvironment"
    for name, value in SRUN.items():
        bare.setenv(name, value)
    found = cluster_environment()
    assert (found.world_size(), found.global_rank(), found.local_rank(), found.node_rank()) == (6, 0, 0, 0)
    assert found.creates_processes_externally
    found.validate_settings(2, 1)
    for name in SRUN:
        bare.delenv(name)
    for name, value in TORCHRUN.items():
        bare.setenv(name, value)
    assert cluster_environment().creates_processes_externally


@pytest.mark.slow
def test_two_processes_train_under_a_slurm_job_of_one_task(bare, tmp_path):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "0",
                        "SLURM_JOB_NAME": "x"}.items():  # fmt: skip
        bare.setenv(name, value)
    settings(tmp_path / "run", num_epochs=1, batch_size=4, ngpus=2)
    done = subprocess.run(
        [sys.executable, "-m", "torchmdnet.scripts.train", "--conf", str(tmp_path / "run.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [int(row["step"]) for row in rows(tmp_path / "run") if "lr" in row] == [2]


@pytest.mark.slow
def test_torchrun_on_one_machine_trains_once(tmp_path):
    settings(tmp_path / "run", num_epochs=2, batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", _free_port()]
    command += ["-m", "torchmdnet.scripts.train", "--conf", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [int(row["step"]) for row in rows(tmp_path / "run") if "lr" in row] == [2, 5]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_no_process_outlives_the_one_that_started_it(tmp_path, launcher):
    """Not even in the middle of a batch that takes a minute, in which nothing is heard of the other processes."""
    settings(tmp_path / "run", dataset="toy_data:Stuck", batch_size=4)
    train = ["torchmdnet.scripts.train", "--conf", str(tmp_path / "run.yaml")]
    if launcher == "lightning":
        command, count = [sys.executable, "-m", *train, "--ngpus", "2"], 1
    else:
        run = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", _free_port(), "-m"]
        command, count = [sys.executable, "-m", *run, *train], 2
    path = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[2]}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "READING": str(tmp_path / "reading")}
    parent = psutil.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    family = []
    try:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("reading*"))) < count:
            assert parent.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        family = parent.children(recursive=True)
        assert len(family) >= count
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    finally:
        for process in [parent, *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize(
    ("variables", "ends"),
    [({}, False), ({"TORCHMDNET_LAUNCHER": "{parent}"}, True), ({"TORCHMDNET_LAUNCHER": "1{parent}"}, False),
     ({"LOCAL_RANK": "1", "NODE_RANK": "1"}, False), ({"TORCHELASTIC_RUN_ID": "none"}, True)],
)  # fmt: skip
def test_only_what_the_run_has_started_ends_with_its_parent(bare, variables, ends):
    watched = []
    bare.setattr(distributed, "end_with_parent", lambda: watched.append(True))
    for name, value in variables.items():
        bare.setenv(name, value.format(parent=os.getppid()))
    distributed.end_with_launcher()
    assert bool(watched) == ends


def test_a_process_whose_launcher_ended_while_it_was_starting_ends_too(monkeypatch):
    monkeypatch.setenv("TORCHMDNET_LAUNCHER", f"1{os.getppid()}")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(PeerError, match="which started this one as part of its run, has ended"):
        distributed.end_with_launcher()


def test_more_processes_than_a_machine_without_gpus_can_run_are_refused(monkeypatch, bare):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert choose_world(8, 1).devices == 8
    with pytest.raises(ConfigError, match=r"ngpus: 9 processes are too many for the 4 cores.*Choose 8 or fewer"):
        choose_world(9, 1)
