"""A run that was killed and continued ends like one that was left alone, to the last bit."""

import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared
from daily import daily, rarely
from toy_data import Toy
from toy_runs import die_at, finish, in_slow_motion, kill_me, one_thread, rows, settings, start, train_toy  # noqa: F401 (fixtures)

from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.config.command_line import resolve
from torchmdnet.datasets.frames import Frames
from torchmdnet.errors import ConfigError
from torchmdnet.training import run
from torchmdnet.training.callbacks import Checkpoints
from torchmdnet.training.files import SafeCheckpointIO
from torchmdnet.training.lightning import LNNP
from torchmdnet.training.logger import RunLogger

#: Everything that has a memory is switched on: smoothing, warm-up, plateau, early stopping, periodic tests.
CHANGES = {
    "num_epochs": 5,
    "batch_size": 5,  # the last batch of an epoch is short
    "test_interval": 2,
    "save_interval": 2,
    "ema_alpha_y": 0.3,
    "ema_alpha_neg_dy": 0.6,
    "lr": 5e-2,
    "lr_patience": 0,
    "lr_factor": 0.5,
    "lr_warmup_steps": 7,
    "early_stopping_patience": 4,
    "weight_decay": 1e-3,
    "gradient_clipping": 20.0,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert finish(start(_command(folder))) == 0
    return folder


def _command(folder):
    settings(folder, **CHANGES)  # writes the configuration beside the folder
    return ["--conf", folder.with_name(f"{folder.name}.yaml")]


def _assert_same(folder, expected):
    for name in ("metrics.csv", "errors.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert sorted(p.name for p in folder.glob("*.ckpt")) == sorted(p.name for p in expected.glob("*.ckpt"))
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = read_checkpoint(folder / name), read_checkpoint(expected / name)
        assert ours["global_step"] == theirs["global_step"]
        for key, value in theirs["state_dict"].items():
            assert torch.equal(ours["state_dict"][key], value), key
        assert str(ours["optimizer_states"]) == str(theirs["optimizer_states"])
        assert ours["lr_schedulers"] == theirs["lr_schedulers"]
        assert str(ours["torchmdnet"]["state"]["ema"]) == str(theirs["torchmdnet"]["state"]["ema"])


# ------------------------------------------------------------------------------------------------ killed


def in_a_step():
    die_at(13, LNNP, "training_step")


def in_validation():
    die_at(4, LNNP, "validation_step")


def while_a_checkpoint_is_written():
    save, calls = torch.save, []

    def half(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            kill_me()

    torch.save = half


def between_the_best_and_the_last_checkpoint():
    from torchmdnet.training import callbacks

    die_at(2, callbacks, "copy_file")


def after_the_epoch_is_logged():
    die_at(2, SafeCheckpointIO, "save_checkpoint")


def before_the_final_test():
    die_at(1, run, "load_best")


def before_the_report():
    die_at(1, run, "write_all")


def while_the_division_is_written():
    write = np.savez

    def half(file, *args, **kwargs):
        write(file, *args, **kwargs)
        file.flush()
        kill_me()

    np.savez = half


def between_the_tables_and_the_last_checkpoint():
    from torchmdnet.training import callbacks

    die_at(3, callbacks.Checkpoints, "_save")


def between_the_last_checkpoint_and_what_follows():
    from torchmdnet.training import callbacks

    save, calls = callbacks.Checkpoints._save, []

    def dies(self, trainer, path):
        save(self, trainer, path)
        calls.append(1)
        if len(calls) == 3:
            callbacks.copy_file(path, self.last_path)
            kill_me()

    callbacks.Checkpoints._save = dies


def test_a_run_without_a_validation_set_loses_no_row_of_its_tables(tmp_path):
    options = {"num_epochs": 6, "val_size": 0, "test_size": 8, "save_interval": 100}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for each in (whole, folder):
        settings(each, **options)
    assert finish(start(["--conf", whole.with_name("whole.yaml")])) == 0
    command = ["--conf", folder.with_name("run.yaml")]
    for fault in (between_the_tables_and_the_last_checkpoint, between_the_last_checkpoint_and_what_follows):
        assert finish(start(command, fault=fault)) == -signal.SIGKILL
        command = ["--load-model", folder / "last.ckpt"]
    assert finish(start(command)) == 0
    for name in ("metrics.csv", "errors.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_drafts_of_a_killed_run_are_removed_by_the_next(tmp_path):
    folder = tmp_path / "run"
    settings(folder, num_epochs=1)
    command = ["--conf", folder.with_name("run.yaml")]
    assert finish(start(command, fault=while_the_division_is_written)) == -signal.SIGKILL
    assert not (folder / "splits.npz").exists()
    (folder / ".splits.npz-abc123.npz").touch()  # as earlier versions named it
    assert len(list(folder.glob(".splits.npz*"))) == 2
    assert finish(start(command)) == 0
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


MOMENTS = [
    in_a_step,
    in_validation,
    while_a_checkpoint_is_written,
    between_the_best_and_the_last_checkpoint,
    after_the_epoch_is_logged,
    between_the_last_checkpoint_and_what_follows,
    before_the_final_test,
    before_the_report,
]


@pytest.mark.parametrize(
    "moment", rarely(MOMENTS, in_validation, between_the_best_and_the_last_checkpoint, before_the_final_test)
)
def test_a_killed_run_continues_as_if_nothing_had_happened(moment, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    assert finish(start(_command(folder), fault=moment)) == -signal.SIGKILL
    read_checkpoint(folder / "last.ckpt")
    assert finish(start(["--load-model", folder / "last.ckpt"])) == 0
    _assert_same(folder, uninterrupted)


@pytest.mark.slow
def test_a_run_killed_again_and_again_still_arrives(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    assert finish(start(_command(folder), fault=in_a_step)) == -signal.SIGKILL
    for fault, status in ((in_validation, -signal.SIGKILL), (after_the_epoch_is_logged, -signal.SIGKILL), (None, 0)):
        assert finish(start(["--load-model", folder / "last.ckpt"], fault=fault)) in (status, 0)
    _assert_same(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("val_size", [8, 0])
def test_a_run_killed_at_random_moments_ends_with_the_tables_of_one_that_was_not(val_size, tmp_path):
    options = {"num_epochs": 12, "val_size": val_size, "save_interval": 3}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for each in (whole, folder):
        settings(each, **options)
    assert finish(start(["--conf", whole.with_name("whole.yaml")])) == 0
    rng = np.random.default_rng(val_size)
    for _ in range(8):
        last = folder / "last.ckpt"
        before = last.stat().st_mtime_ns if last.exists() else None
        process = start(["--load-model", last] if before else ["--conf", folder.with_name("run.yaml")])
        while process.is_alive() and (last.stat().st_mtime_ns if last.exists() else None) == before:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        process.kill()
        assert finish(process) in (0, -signal.SIGKILL)
    assert finish(start(["--load-model", last])) == 0
    for name in ("metrics.csv", "errors.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())


# ------------------------------------------------------------------------------------------------ stopped


@pytest.mark.parametrize("number", daily([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_a_stopped_run_saves_the_step_it_was_at_and_continues_from_there(number, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    process = start(_command(folder), fault=in_slow_motion)
    while not (folder / "last.ckpt").exists():
        time.sleep(0.02)
        assert process.is_alive()
    time.sleep(0.35)  # into the next epoch
    os.kill(process.pid, number)
    assert finish(process) == 128 + number
    assert read_checkpoint(folder / "last.ckpt")["global_step"] % 5 != 0  # inside an epoch of five batches
    assert finish(start(["--load-model", folder / "last.ckpt"])) == 0
    _assert_same(folder, uninterrupted)


def _interrupted_in_validation(times):
    """Ctrl-C while the third epoch is validated."""
    validate, calls = LNNP.validation_step, []

    def validation_step(self, *args, **kwargs):
        calls.append(1)
        if self.current_epoch == 2 and args[-1] == 0:  # the test set is validated too
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
        return validate(self, *args, **kwargs)

    LNNP.validation_step = validation_step


def interrupted_once():
    _interrupted_in_validation(1)


def interrupted_twice():
    _interrupted_in_validation(2)


@pytest.mark.parametrize(("fault", "epoch"), [(interrupted_once, 2), (interrupted_twice, 1)], ids=["once", "twice"])
def test_a_validation_is_finished_after_one_interrupt_and_given_up_after_two(fault, epoch, tmp_path, uninterrupted):
    """Either way the run continues to the same numbers: from after the epoch, or from before it."""
    folder = tmp_path / "run"
    assert finish(start(_command(folder), fault=fault)) == 128 + signal.SIGINT
    assert read_checkpoint(folder / "last.ckpt")["epoch"] == epoch
    assert finish(start(["--load-model", folder / "last.ckpt"])) == 0
    _assert_same(folder, uninterrupted)


def test_several_processes_stop_at_the_same_step_when_one_is_asked(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    settings(folder, **{**CHANGES, "batch_size": 2, "num_epochs": 100, "early_stopping_monitor": None})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = ["--conf", folder.with_name("run.yaml"), "--num-nodes", 2]
    nodes = [start(command, {**place, "NODE_RANK": str(rank)}, fault=asking_often) for rank in (0, 1)]
    while not (folder / "last.ckpt").exists():
        time.sleep(0.02)
        assert all(node.is_alive() for node in nodes)
    os.kill(nodes[1].pid, signal.SIGINT)
    assert finish(nodes[0], 60) in (143, 130)
    assert finish(nodes[1], 60) == 130
    read_checkpoint(folder / "last.ckpt")


def asking_often():
    from torchmdnet.training.callbacks import PoliteStop

    PoliteStop.ASK_EVERY = 2
    in_slow_motion()


# ------------------------------------------------------------------------------------------------ continued


def _continue(folder, checkpoint="last.ckpt", **changes):
    return run.train(settings(folder, load_model=str(folder / checkpoint), **changes))


@pytest.fixture
def two_epochs(tmp_path):
    return train_toy(tmp_path / "run", num_epochs=2)


def test_more_epochs_in_the_same_folder_continue_the_table(two_epochs):
    first = rows(two_epochs)[:2]
    _continue(two_epochs, num_epochs=4)
    assert [row["epoch"] for row in rows(two_epochs) if "lr" in row] == ["0.0", "1.0", "2.0", "3.0"]
    assert rows(two_epochs)[:2] == first


def test_nothing_is_trained_when_all_epochs_are_done(two_epochs):
    before = (two_epochs / "metrics.csv").read_bytes()
    _continue(two_epochs, num_epochs=2)
    assert (two_epochs / "metrics.csv").read_bytes() == before


def test_fewer_epochs_than_are_done_are_refused_before_work_starts(two_epochs, capsys):
    from torchmdnet.scripts.train import main

    before = (two_epochs / "metrics.csv").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["--load-model", str(two_epochs / "last.ckpt"), "--num-epochs", "1"])
    assert ended.value.code == 2
    assert re.search(
        r"error: num_epochs: 1, but .*last\.ckpt has 2 epochs behind it.*3 or more", capsys.readouterr().err
    )
    assert (two_epochs / "metrics.csv").read_bytes() == before


def _inside_an_epoch(folder):
    """Let ``last.ckpt`` stand after the first batch of the epoch to come."""
    checkpoint = read_checkpoint(folder / "last.ckpt")
    loop = checkpoint["loops"]["fit_loop"]
    loop["epoch_progress"]["current"]["ready"] += 1
    loop["epoch_loop.batch_progress"]["current"]["processed"] = 1
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    torch.save(checkpoint, folder / "mid.ckpt")


def test_another_batch_size_is_refused_in_the_middle_of_an_epoch(two_epochs):
    _inside_an_epoch(two_epochs)
    with pytest.raises(ConfigError, match=r"batch_size: 10, but .*mid\.ckpt .* batches of 8\. Continue with --batch-s"):
        _continue(two_epochs, "mid.ckpt", num_epochs=4, batch_size=10)
    _continue(two_epochs, num_epochs=3, batch_size=10)  # from the end of an epoch


def test_a_copied_run_goes_on_in_its_own_folder(two_epochs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_epochs, copy)
    before = {path.name: path.stat().st_mtime_ns for path in two_epochs.iterdir()}
    last = ["--load-model", str(copy / "last.ckpt")]
    assert Path(resolve(last).log_dir) == copy
    assert resolve([*last, "--log-dir", "elsewhere"]).log_dir == "elsewhere"
    conf = tmp_path / "more.yaml"
    conf.write_text("log_dir: named\n")
    assert resolve([*last, "--conf", str(conf)]).log_dir == "named"
    for name in ("hparams.yaml", "input.yaml"):
        (copy / name).unlink()
    assert Path(resolve(last).log_dir) == two_epochs  # a checkpoint alone, kept somewhere
    assert {path.name: path.stat().st_mtime_ns for path in two_epochs.iterdir()} == before


def _best(folder):
    """Epoch of the best weights, and the loss that the run remembers of it."""
    states = read_checkpoint(folder / "last.ckpt")["callbacks"]
    score = next(state["best_model_score"] for key, state in states.items() if key.startswith("ModelCheckpoint"))
    return read_checkpoint(folder / "best.ckpt")["epoch"], float(score)


def test_the_best_of_before_counts_in_another_folder(two_epochs, tmp_path, caplog):
    before = _best(two_epochs)
    last = str(two_epochs / "last.ckpt")
    worse = train_toy(tmp_path / "worse", load_model=last, num_epochs=3, lr=10.0, save_interval=2)
    assert _best(worse) == before
    assert "is not counted" not in caplog.text
    (two_epochs / "best.ckpt").unlink()
    alone = train_toy(tmp_path / "alone", load_model=last, num_epochs=3, lr=10.0)
    assert _best(alone)[0] == 2
    assert f"with val_total_mse_loss {before[1]:.4g}, is not counted" in caplog.text


def test_an_early_stopped_run_that_goes_on_to_its_end_does_not_say_that_it_stopped_early(tmp_path, capsys):
    folder = train_toy(tmp_path / "run", early_stopping_patience=1, lr=0.0, num_epochs=9)
    assert "Stopped early" in capsys.readouterr().out
    _continue(folder, early_stopping_patience=50, lr=0.0, num_epochs=4)
    assert "All epochs done." in capsys.readouterr().out


def test_a_run_that_never_beats_its_old_best_is_tested_all_the_same(two_epochs):
    _continue(two_epochs, num_epochs=3, lr=10.0)
    assert "test_total_l1_loss" in rows(two_epochs)[-1]
    assert float(rows(two_epochs)[-1]["epoch"]) < 2


def test_a_changed_learning_rate_takes_effect_and_says_so(two_epochs, caplog):
    _continue(two_epochs, num_epochs=3, lr=1e-12)
    table = rows(two_epochs)
    assert float(table[2]["lr"]) == pytest.approx(1e-12, rel=1e-5)
    assert float(table[2]["val_total_mse_loss"]) == pytest.approx(float(table[1]["val_total_mse_loss"]), rel=1e-5)
    assert "lr: 1e-12 from now on (the checkpoint had 0.01)" in caplog.text


def test_every_changed_setting_of_network_and_loss_is_told_once(two_epochs, caplog):
    _continue(two_epochs, num_epochs=3, cutoff_upper=4.5, y_weight=0.5, y_loss_per_atom=True, lr=1e-3)
    told = [record.getMessage() for record in caplog.records if "from now on" in record.getMessage()]
    assert sorted(told) == [
        "cutoff_upper: 4.5 from now on (the checkpoint had 5.0).",
        "lr: 0.001 from now on (the checkpoint had 0.01).",
        "y_loss_per_atom: True from now on (the checkpoint had False).",
        "y_weight: 0.5 from now on (the checkpoint had 1.0).",
    ]


def test_another_size_of_the_network_is_refused_with_the_setting(two_epochs):
    with pytest.raises(ConfigError, match=r"^embedding_dimension: 16, but .* had 8\. .*Continue with embedding_dim"):
        _continue(two_epochs, num_epochs=3, embedding_dimension=16, cutoff_upper=4.5)


def test_an_unchanged_learning_rate_leaves_the_reduced_one_alone(tmp_path, caplog):
    options = {"lr": 2e-7, "lr_patience": 0, "lr_factor": 0.5, "lr_min": 0.0}
    folder = train_toy(tmp_path / "run", num_epochs=3, **options)
    _continue(folder, num_epochs=4, **options)
    assert [float(row["lr"]) for row in rows(folder) if "lr" in row] == pytest.approx([2e-7, 2e-7, 1e-7, 5e-8])
    assert "from now on" not in caplog.text


def test_changed_schedule_options_take_effect(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=2, lr=2e-7, lr_patience=50)
    _continue(folder, num_epochs=4, lr=2e-7, lr_patience=0, lr_factor=0.1, lr_min=5e-8, weight_decay=0.5)
    last = read_checkpoint(folder / "last.ckpt")
    assert float(rows(folder)[3]["lr"]) == pytest.approx(5e-8)
    assert last["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.5
    assert last["lr_schedulers"][0]["patience"] == 0


def test_a_longer_patience_lets_an_early_stopped_run_go_on_and_the_same_does_not(tmp_path):
    options = {"lr": 0.0, "num_epochs": 9}
    folder = train_toy(tmp_path / "run", early_stopping_patience=1, **options)
    assert len([row for row in rows(folder) if "lr" in row]) == 2
    _continue(folder, early_stopping_patience=1, **options)
    assert len([row for row in rows(folder) if "lr" in row]) == 2
    _continue(folder, early_stopping_patience=3, **options)
    assert len([row for row in rows(folder) if "lr" in row]) == 4


def test_delta_learning_is_continued_with_one_atomref(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=1, remove_ref_energy=True)
    from torchmdnet.scripts.train import get_args

    for epochs in (2, 3):
        run.train(get_args(["--load-model", str(folder / "last.ckpt"), "--num-epochs", str(epochs)]))
    stored = read_checkpoint(folder / "last.ckpt")["hyper_parameters"]
    assert stored["prior_model"] == [{"Atomref": {"enable": False}}]
    assert len(stored["prior_args"]) == 1


def test_a_file_without_our_own_state_is_continued(two_epochs):
    checkpoint = read_checkpoint(two_epochs / "last.ckpt")
    del checkpoint["torchmdnet"]
    for key in list(checkpoint["callbacks"]):
        if key.startswith("ModelCheckpoint"):
            del checkpoint["callbacks"][key]
    torch.save(checkpoint, two_epochs / "plain.ckpt")
    _continue(two_epochs, "plain.ckpt", num_epochs=3)
    assert float(rows(two_epochs)[2]["epoch"]) == 2


@pytest.mark.parametrize("name", ["metrics.csv", "errors.csv"])
@pytest.mark.parametrize("damage", [b"\xff\xfe", b"epoch,split\r\nx,train\r\n", b"epoch,lr\r\n0,1\x00\r\n"])
def test_a_damaged_table_stays_under_another_name(tmp_path, name, damage, caplog):
    (tmp_path / name).write_bytes(damage)
    logger = RunLogger(tmp_path, keep_until=3)
    assert logger.metrics == logger.errors == []
    (aside,) = tmp_path.glob(f"{name[:-4]}_*.csv")
    assert aside.read_bytes() == damage
    assert f"{name} is damaged" in caplog.text
    assert aside.name in caplog.text


def test_an_earlier_checkpoint_can_be_continued_and_writes_its_epochs_again(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=4)
    before = (folder / "metrics.csv").read_bytes()
    names = sorted(path.name for path in folder.glob("epoch=*"))
    _continue(folder, names[1], num_epochs=4)
    assert (folder / "metrics.csv").read_bytes() == before
    assert sorted(path.name for path in folder.glob("epoch=*")) == names


def test_a_module_with_random_numbers_continues_with_the_same_ones(tmp_path, monkeypatch):
    step = LNNP.training_step

    def noisy(self, batch, batch_idx=0):
        return step(self, batch, batch_idx) * (1 + torch.rand(()))

    monkeypatch.setattr(LNNP, "training_step", noisy)
    whole = train_toy(tmp_path / "whole", num_epochs=3)
    folder = train_toy(tmp_path / "run", num_epochs=2)
    _continue(folder, num_epochs=3)
    state = read_checkpoint(folder / "last.ckpt")["state_dict"]
    for name, value in read_checkpoint(whole / "last.ckpt")["state_dict"].items():
        assert torch.equal(state[name], value), name


def test_a_checkpoint_of_release_3_is_continued_and_its_best_stays_the_best(tmp_path):
    """A file with optimizer and scheduler state, beside the best checkpoint that Lightning's own callback ranked."""
    checkpoint = read_checkpoint(shared("interop/tn_o3/model.ckpt"))
    checkpoint["hyper_parameters"]["charge"] = False  # as a run on these data, which hold no charges, has it
    folder = tmp_path / "run"
    folder.mkdir()
    best = folder / f"epoch={checkpoint['epoch']}-val_loss=0.0001-test_loss=0.0000.ckpt"
    key = Checkpoints(folder, "val_total_mse_loss", every_n_epochs=1).state_key
    score = torch.tensor(1e-4)
    checkpoint["callbacks"] = {key: {"best_model_score": score, "best_k_models": {str(best): score}}}
    for path in (best, folder / "last.ckpt"):
        torch.save(checkpoint, path)
    first = checkpoint["epoch"]  # the file was written when its run had ended, with the number of the next epoch
    shape = {name: checkpoint["hyper_parameters"][name] for name in SHAPE}
    run.train(settings(folder, load_model=str(folder / "last.ckpt"), num_epochs=first + 2, lr=1e-3, **shape))
    assert [float(row["epoch"]) for row in rows(folder) if "lr" in row] == [first, first + 1]
    assert float(rows(folder)[-1]["epoch"]) == checkpoint["epoch"]
    state = read_checkpoint(folder / "best.ckpt")["state_dict"]
    assert all(torch.equal(state[name], value) for name, value in checkpoint["state_dict"].items())


# ------------------------------------------------------------------------------------------- on changed data


class Changed(Toy):
    """The toy data after somebody has worked on them, as the environment says."""

    def __init__(self, root=None) -> None:
        super().__init__()
        change = os.environ.get("TOY_CHANGE", "")
        samples = [self.frames.sample(number) for number in range(len(self))]
        samples = [{name: value.numpy() for name, value in sample.items()} for sample in samples]
        if change == "order":
            samples[3], samples[6] = samples[6], samples[3]
        if change == "labels":
            samples[3]["y"] = samples[3]["y"] + 1e-3
        if change == "number":
            samples.append(samples[0])
        self.frames = Frames.from_samples(samples)


@pytest.fixture(scope="module")
def to_change(tmp_path_factory):
    return train_toy(tmp_path_factory.mktemp("changed") / "run", dataset="test_resume:Changed", num_epochs=1)


def _content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "input.yaml"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("order", r"the 40 systems are others, or stand in another order \(pos, neg_dy, y\)"),
        ("labels", r"the structures are the same, but not their labels \(y\)"),
        ("number", "there were 40 systems, now there are 41"),
    ],
)
def test_a_run_does_not_continue_on_changed_data(change, words, to_change, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(to_change, tmp_path / "run")
    monkeypatch.setenv("TOY_CHANGE", change)
    before = _content(folder)
    options = {"dataset": "test_resume:Changed", "num_epochs": 2}
    with pytest.raises(ConfigError, match=f"no longer those of the run of .*last.ckpt: {words}.*--accept-changed-data"):
        _continue(folder, **options)
    assert _content(folder) == before
    _continue(folder, **options, accept_changed_data=True)
    assert "accept_changed_data: the run of" in caplog.text
    _continue(folder, **{**options, "num_epochs": 3})  # these are its data now
    assert [row["epoch"] for row in rows(folder) if "lr" in row] == ["0.0", "1.0", "2.0"]


def test_files_without_a_digest_of_the_data_are_continued(to_change, tmp_path, monkeypatch):
    folder = shutil.copytree(to_change, tmp_path / "run")
    checkpoint = read_checkpoint(folder / "last.ckpt")
    del checkpoint["torchmdnet"]["state"]["data_digest"]
    torch.save(checkpoint, folder / "last.ckpt")
    with np.load(folder / "splits.npz") as file:
        parts = {name: file[name] for name in ("idx_train", "idx_val", "idx_test")}
    np.savez(folder / "splits.npz", **parts)
    monkeypatch.setenv("TOY_CHANGE", "order")
    _continue(folder, dataset="test_resume:Changed", num_epochs=2, splits=str(folder / "splits.npz"))
    assert len([row for row in rows(folder) if "lr" in row]) == 2


def test_what_is_not_set_is_not_among_the_settings_of_a_model(to_change):
    assert "accept_changed_data" not in read_checkpoint(to_change / "last.ckpt")["hyper_parameters"]
    assert "accept_changed_data" not in (to_change / "hparams.yaml").read_text()


SHAPE = (
    "embedding_dimension", "num_layers", "num_rbf", "activation", "rbf_type", "trainable_rbf", "cutoff_lower",
    "cutoff_upper", "max_z", "max_num_neighbors", "equivariance_invariance_group", "output_model", "reduce_op",
)  # fmt: skip
