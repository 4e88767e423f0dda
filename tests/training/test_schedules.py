"""Learning rates planned over a run, and runs that end by the clock."""

import math
import time

import pytest
import torch
from toy_runs import one_thread, rows, settings, train_toy  # noqa: F401 (fixtures)

from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.errors import ConfigError
from torchmdnet.training import schedules
from torchmdnet.training.lightning import LNNP
from torchmdnet.training.schedules import RunPlan, cosine, warmup_stable_decay


def _plan(num_steps=100, **options):
    plan = RunPlan({"lr": 2.0, **options})
    plan.begin(num_steps)
    return plan


def test_the_cosine_falls_from_one_to_zero():
    assert [cosine(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert cosine(0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert [cosine(p, 0.2) for p in (0.1, 0.2, 0.6, 1.0, 1.1)] == pytest.approx([1, 1, 0.5, 0, 0])


def test_the_stable_rate_falls_linearly_in_the_end():
    assert [warmup_stable_decay(p, 0.2) for p in (0, 0.8, 0.9, 0.95, 1)] == pytest.approx([1, 1, 0.5, 0.25, 0])


def test_rates_of_a_cosine_after_a_warm_up():
    plan = _plan(lr_schedule="cosine", lr_warmup_steps=20)
    rates = [plan.learning_rate(step) for step in range(100)]
    assert rates[:20] == pytest.approx([2.0 * (step + 1) / 20 for step in range(20)])
    assert rates[20:] == pytest.approx([1 + math.cos(math.pi * (step - 20) / 80) for step in range(20, 100)])
    assert 0 < rates[-1] < 1e-3


def test_a_cosine_is_that_of_pytorch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    plan = _plan(lr_schedule="cosine")
    for step in range(100):
        assert plan.learning_rate(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_rates_of_warm_up_stable_decay():
    plan = _plan(lr_schedule="warmup-stable-decay", lr_warmup_steps=10, lr_decay_fraction=0.25)
    rates = [plan.learning_rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:75] == [2.0] * 65
    assert rates[75:] == pytest.approx([2.0 * (100 - step) / 25 for step in range(75, 100)])


def test_the_plateau_scheduler_has_the_rate_after_the_warm_up():
    plan = _plan(lr_warmup_steps=3)
    assert [plan.learning_rate(step) for step in range(5)] == [
        pytest.approx(2 / 3),
        pytest.approx(4 / 3),
        2,
        None,
        None,
    ]


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(schedules.time, "monotonic", lambda: now[0])
    return now


def _run(plan, clock, seconds, steps_per_epoch=10, between=0.0):
    """Rates of a run whose steps take ``seconds``, until the time is over."""
    rates = []
    while not plan.is_over:
        if len(rates) % steps_per_epoch == 0:
            clock[0] += between if rates else 0.0
            plan.begin_epoch()
        plan.begin_step(ends_epoch=len(rates) % steps_per_epoch == steps_per_epoch - 1)
        rates.append(plan.learning_rate(len(rates)))
        clock[0] += seconds
        plan.end_step()
    return rates


@pytest.mark.parametrize("between", [0.0, 2.0, 7.0])
@pytest.mark.parametrize("kind", ["cosine", "warmup-stable-decay"])
def test_by_the_clock_the_rate_falls_to_zero_in_the_time(kind, between, clock):
    plan = _plan(math.inf, lr_schedule=kind, lr_warmup_steps=5, max_time=100.0)
    rates = _run(plan, clock, 0.5, between=between)  # epochs of 5 s of steps, and validations
    assert clock[0] + between <= 1000.0 + 100.0, "there is time for the last validation"
    assert plan.seconds > 100 - 2 * between - 1
    assert max(rates) > 1.99
    assert rates[-1] < 0.06 * 2.0
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_the_steps_count_where_they_are_done_before_the_time(clock):
    plan = _plan(100, lr_schedule="cosine", max_time=1e6)
    slow = [plan.learning_rate(step) for step in range(100)]
    assert slow == pytest.approx([1 + math.cos(math.pi * step / 100) for step in range(100)])


def test_a_warm_up_longer_than_the_time_still_ends_at_zero(clock):
    plan = _plan(math.inf, lr_schedule="cosine", lr_warmup_steps=1000, max_time=50.0)
    rates = _run(plan, clock, 0.5, steps_per_epoch=1000)
    assert len(rates) < 110
    assert rates[-1] < 0.02 * max(rates)


def test_the_first_step_in_which_loops_are_compiled_does_not_end_a_run(clock):
    plan = _plan(math.inf, lr_schedule="cosine", max_time=100.0)
    plan.begin_epoch()
    plan.begin_step()
    clock[0] += 70.0
    plan.end_step()
    assert len(_run(plan, clock, 0.5, steps_per_epoch=1000)) > 50


def test_the_time_of_the_parts_of_a_run_adds_up(clock):
    plan = _plan(math.inf, lr_schedule="cosine", max_time=100.0)
    clock[0] += 40.0
    state = plan.state_dict()
    clock[0] += 1e6
    later = RunPlan({"lr": 2.0, "lr_schedule": "cosine", "max_time": 100.0})
    later.begin(math.inf, state)
    later.begin_step()
    assert later.learning_rate(50) == pytest.approx(2 * cosine(0.4))
    clock[0] += 60.0
    assert later.seconds_left == 0


# ------------------------------------------------------------------------------------------------ runs


def _rates_of(monkeypatch):
    """The learning rate of every step, as it is taken."""
    rates, update = [], LNNP.on_train_batch_end

    def noting(self, *args):
        rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        return update(self, *args)

    monkeypatch.setattr(LNNP, "on_train_batch_end", noting)
    return rates


def test_a_run_takes_the_planned_rates_step_by_step(tmp_path, monkeypatch):
    rates = _rates_of(monkeypatch)
    folder = train_toy(
        tmp_path / "run", lr_schedule="cosine", lr_warmup_steps=2, weight_decay_on="matrices", weight_decay=1e-3
    )
    plan = RunPlan({"lr": 1e-2, "lr_schedule": "cosine", "lr_warmup_steps": 2})
    plan.begin(12)
    assert rates == [[plan.learning_rate(step)] * 2 for step in range(12)]  # four epochs of three batches
    assert float([row for row in rows(folder) if "lr" in row][-1]["lr"]) == pytest.approx(rates[-1][0])
    assert read_checkpoint(folder / "last.ckpt")["lr_schedulers"] == []


def test_max_time_ends_a_run_in_time_with_a_rate_near_zero(tmp_path, capsys):
    began = time.monotonic()
    folder = train_toy(
        tmp_path / "run",
        dataset_arg={"delay": 0.05},
        lr_schedule="cosine",
        max_time=4,
        num_epochs=-1,
        model_ema_decay=0.9,
    )
    assert time.monotonic() - began < 4 + 5  # data, model and the final test
    state = read_checkpoint(folder / "last.ckpt")["torchmdnet"]["state"]["plan"]
    assert 3 < state["seconds"] < 4.5
    rates = [float(row["lr"]) for row in rows(folder) if "lr" in row]
    assert rates[-1] < 0.05 * 1e-2 < rates[0]
    assert (folder / "potential.safetensors").exists()
    assert "val_total_mse_loss" in [row for row in rows(folder) if "lr" in row][-1], "the last weights are validated"
    assert "Stopped: max_time, 4 s, is over; the learning rate fell to" in capsys.readouterr().out


def test_a_run_whose_time_is_over_trains_on_with_more(tmp_path, capsys):
    from torchmdnet.training.run import train

    options = {"dataset_arg": {"delay": 0.05}, "lr_schedule": "cosine", "num_epochs": -1}
    folder = train_toy(tmp_path / "run", **options, max_time=2)
    before = read_checkpoint(folder / "last.ckpt")["global_step"]
    last = {**options, "load_model": str(folder / "last.ckpt")}
    train(settings(folder, **last, max_time=2))
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == before
    assert capsys.readouterr().out.count("max_time, 2 s, is over") == 2
    train(settings(folder, **last, max_time=4))
    assert read_checkpoint(folder / "last.ckpt")["global_step"] > before
    assert read_checkpoint(folder / "last.ckpt")["torchmdnet"]["state"]["plan"]["seconds"] > 3


def test_a_plateau_run_may_have_a_limit_too(tmp_path, capsys):
    folder = train_toy(tmp_path / "run", dataset_arg={"delay": 0.05}, max_time=2, num_epochs=1000)
    assert float(rows(folder)[0]["lr"]) == pytest.approx(1e-2)
    assert "Stopped: max_time, 2 s, is over." in capsys.readouterr().out


def test_a_warm_up_of_all_steps_is_warned_of_and_still_ends_at_zero(caplog):
    plan = _plan(10, lr_schedule="cosine", lr_warmup_steps=50)
    assert "lr_warmup_steps: 50 are all steps of the run (10 in num_epochs)" in caplog.text
    rates = [plan.learning_rate(step) for step in range(10)]
    assert rates[:6] == pytest.approx([2.0 * (step + 1) / 50 for step in range(6)])
    assert rates[-1] < 0.3 * max(rates)
    caplog.clear()
    _plan(10, lr_schedule="cosine", lr_warmup_steps=9)
    assert not caplog.text


def test_going_back_to_the_plateau_takes_the_rate_of_the_options(tmp_path):
    from torchmdnet.training.run import train

    folder = train_toy(tmp_path / "run", lr_schedule="cosine")
    train(settings(folder, load_model=str(folder / "last.ckpt"), num_epochs=5))
    table = [row for row in rows(folder) if "lr" in row]
    assert float(table[-1]["lr"]) == pytest.approx(1e-2)
    assert float(table[-2]["lr"]) < 1e-3


def test_other_groups_of_weight_decay_are_refused_in_a_run_that_goes_on(tmp_path):
    from torchmdnet.training.run import train

    folder = train_toy(tmp_path / "run", num_epochs=1, weight_decay=0.1)
    with pytest.raises(ConfigError, match=r"^weight_decay_on: 'matrices', but the run of .* had 'all'"):
        train(settings(folder, load_model=str(folder / "last.ckpt"), weight_decay=0.1, weight_decay_on="matrices"))
