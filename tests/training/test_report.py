import base64
import io
import logging
import math
import re
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from toy_runs import finished_run, one_thread, rows, train_toy  # noqa: F401 (fixtures)

from torchmdnet.page import MANY_POINTS
from torchmdnet.training import plots, report, run, terminal
from torchmdnet.training.evaluate import Baseline, Evaluation
from torchmdnet.training.metrics import Errors
from torchmdnet.training.plots import draw_learning_curves, draw_parity
from torchmdnet.training.terminal import Terminal, Units, duration, significant

EV = Units("eV", "Å")


def _png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_a_model_that_is_worse_than_nothing_is_told_of():
    def facts(energy, force):
        errors = SimpleNamespace(terms=("y", "neg_dy"), y_mae_per_atom=energy, neg_dy_mae=force, others={})
        baseline = SimpleNamespace(y_mae_per_atom=0.1, neg_dy_mae=0.5, others={})
        return SimpleNamespace(evaluation=SimpleNamespace(errors=errors, baseline=baseline))

    assert report.worse_than_trivial(facts(0.05, 0.2)) == []
    assert report.worse_than_trivial(facts(0.2, 0.2)) == ["energies"]
    assert report.worse_than_trivial(facts(0.2, 3e9)) == ["energies", "forces"]
    assert report.worse_than_trivial(SimpleNamespace(evaluation=None)) == []


# ------------------------------------------------------------------------------------------------ units and words


@pytest.mark.parametrize(
    ("units", "shown"),
    [
        (EV, ("72.1", "meV/atom", "meV/Å")),
        (Units("kcal/mol", "Å"), ("0.0721", "kcal/mol/atom", "kcal/mol/Å")),
        (Units("Hartree", "Bohr"), ("0.0721", "Hartree/atom", "Hartree/Bohr")),
        (Units(), ("0.0721", "energy unit/atom", "energy unit/length unit")),
    ],
)
def test_errors_are_shown_in_the_units_of_the_data_and_electronvolt_in_thousandths(units, shown):
    assert (units.show(0.0721), units.of_energy_per_atom, units.of_force) == shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.4, "1234"), (72.06, "72.1"), (0.004564, "0.00456"), (1e-7, "1.00e-07"), (0.0, "0"), (math.inf, "inf")],
)
def test_numbers_are_shown_with_three_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.3, "12 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (18120, "5 h 2 min")]
)
def test_durations_are_shown_in_two_units(seconds, text):
    assert duration(seconds) == text


# ------------------------------------------------------------------------------------------------ plots


@pytest.mark.parametrize("points", [30, MANY_POINTS + 1], ids=["points", "density"])
def test_parity_is_drawn_for_few_points_and_many(tmp_path, points):
    rng = np.random.default_rng(0)
    values = rng.normal(size=points)
    cloud = (values, values + 0.1 * rng.normal(size=points))
    evaluation = Evaluation("test", Errors(3, *([0.1] * 4), points, 0.1, 0.2), {"y": cloud, "neg_dy": cloud})
    assert draw_parity(tmp_path / "parity.png", evaluation, EV)
    width, height = _png_size(tmp_path / "parity.png")
    assert width > height > 300


def test_parity_of_one_term_has_one_panel_and_of_none_no_file(tmp_path):
    errors = Errors(2, 0.1, 0.1, 0.1, 0.1, 0, math.nan, math.nan)
    one = Evaluation("val", errors, {"y": (np.array([1.0, 1.0]), np.array([1.0, 1.0]))})
    assert draw_parity(tmp_path / "one.png", one, Units())
    width, height = _png_size(tmp_path / "one.png")
    assert width < 1.3 * height
    assert not draw_parity(tmp_path / "none.png", Evaluation("val", errors), EV)
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("rows", [[], [{"epoch": "0", "lr": "0.1"}], [{"epoch": "0", "train_total_mse_loss": "nan"}]])
def test_learning_curves_are_drawn_of_any_history(tmp_path, rows):
    draw_learning_curves(tmp_path / "curves.png", rows, [], "mse_loss", EV)
    assert _png_size(tmp_path / "curves.png")[0] > 300


@pytest.mark.parametrize(("last", "scale"), [(1e-5, "log"), (1e-11, "linear")], ids=["plateau", "planned"])
def test_a_rate_that_falls_to_nothing_is_drawn_linearly(last, scale, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    rows = [{"epoch": str(n), "lr": str(lr), "val_total_mse_loss": "1"} for n, lr in enumerate((1e-3, 5e-4, last))]
    draw_learning_curves(tmp_path / "curves.png", rows, [], "mse_loss", EV)
    assert drawn[0].axes[1].get_title() == "Learning rate"
    assert drawn[0].axes[1].get_yscale() == scale


# ------------------------------------------------------------------------------------------------ report.html


def test_the_report_needs_no_other_file(finished):
    page = (finished.folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert [base64.b64decode(image) for image in images] == [
        (finished.folder / name).read_bytes() for name in ("learning_curves.png", "parity.png")
    ]


def test_the_report_tells_data_settings_errors_files_and_versions(finished):
    page = (finished.folder / "report.html").read_text()
    text = re.sub(r"<[^>]+>", " ", page)
    for words in (
        "tensornet trained on toy_data:Toy", "Errors on the test set", "force component", "trivial MAE", "H C N O",
        "3 to 5", "pair potential", "embedding_dimension", "best.ckpt", "epoch=*.ckpt (4)", "torch_geometric", "meV/Å",
    ):  # fmt: skip
        assert words in text, words


def test_settings_that_differ_from_the_defaults_are_set_off(finished):
    page = (finished.folder / "report.html").read_text()
    assert re.search(r'<tr class="set"><td>num_rbf</td><td><code>8<', page)
    assert re.search(r"<tr><td>weight_decay</td><td><code>0.0<", page)


def test_html_in_names_does_no_harm(tmp_path):
    from torchmdnet.training.report import RunFacts, write_report

    facts = RunFacts(
        folder=tmp_path, options={"model": "<script>alert(1)</script>", "dataset": "a&b"}, units=EV,
        splits={"train": 1, "val": 0, "test": 0}, train_facts=None,
        evaluation=Evaluation("test", Errors(1, *([0.1] * 4), 3, 0.1, 0.1), {}, Baseline(0.2, 0.1, math.nan, math.nan)),
        provenance={"citation": "<b>"}, monitor="val_total_mse_loss", best_score=math.inf, tested="current weights",
        tested_epoch=None, num_epochs=1, num_parameters=3, device="CPU", seconds=1.0, samples_per_second=math.nan,
    )  # fmt: skip
    page = write_report(facts, {}).read_text()
    assert "<script" not in page
    assert "a&amp;b" in page
    assert "&lt;b&gt;" in page


# ------------------------------------------------------------------------------------------------ terminal


def on_a_terminal(monkeypatch, folder, width, **changes):
    """Lines that a run shows on a terminal of some width, all states of the bar included; and its folder."""
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=width, color_system=None, highlight=False)
    monkeypatch.setattr(run, "console_for", lambda: console)
    monkeypatch.setattr(terminal, "REDRAW_SECONDS", 0.0)
    folder = train_toy(folder, **changes)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()], folder


def test_a_terminal_gets_a_bar_of_the_whole_run_with_loss_and_errors_and_a_table(tmp_path, monkeypatch):
    lines, folder = on_a_terminal(monkeypatch, tmp_path / "run", 140, num_epochs=2)
    text = "\n".join(lines)
    assert re.search(r"epoch 1 of 2 .+ batch 2 of 3  \S+ s left\nloss \S+  energy \S+ meV/atom  force \S+ meV/Å", text)
    header = next(line for line in lines if "train loss" in line)
    assert header.split("  ")[-1].strip() == "samples/s"
    assert text.count("train loss") == 1
    row = next(line for line in lines if re.search(r"^ +1  +1\.00e-02 ", line))
    errors = [line for line in rows(folder, "errors.csv") if line["split"] == "val"]
    assert f"{1000 * float(errors[1]['neg_dy_mae']):.3g}"[:3] in row


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_logged_stands_on_lines_of_its_own_above_the_bar(monkeypatch):
    screen = FakeTerminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    logger = logging.getLogger("torchmdnet.tests.terminal")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    callback = Terminal(EV, Console(force_terminal=True, width=80, color_system=None))
    trainer = SimpleNamespace(
        is_global_zero=True, current_epoch=0, max_epochs=2, num_training_batches=4, lightning_module=None
    )
    module = SimpleNamespace(keep_latest=False, latest=None, running_loss=lambda: None)
    try:
        callback.on_train_start(trainer, module)
        logger.warning("Compiled loops for 3 s.")
        callback.on_train_end(trainer, module)
        assert handler.stream is screen
    finally:
        logger.removeHandler(handler)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"[\r\n]Compiled loops for 3 s\. *\n", text)


def test_the_time_left_leaves_out_that_the_first_batch_compiles(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: clock.now))
    callback = Terminal(EV, Console(file=io.StringIO()))
    trainer = SimpleNamespace(
        current_epoch=0,
        max_epochs=2,
        num_training_batches=4,
        is_global_zero=False,
        world_size=1,
        lightning_module=None,
    )
    module = SimpleNamespace(epoch_samples=4)
    callback.on_train_epoch_start(trainer, module)
    for batch, clock.now in enumerate((100.0, 101.0)):
        callback.on_train_batch_end(trainer, module, None, None, batch)
        left = callback._seconds_left(trainer, (batch + 1) / 4)
        assert left == (None if batch == 0 else pytest.approx(6.0))
    callback._train_ended, clock.now = 103.0, 104.0
    callback.epoch_line(trainer, module, is_best=False)
    assert callback._seconds_left(trainer, 1.0) == pytest.approx(5.0)  # four batches, and a second of validation


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_cut_on_a_narrow_terminal(tmp_path, monkeypatch, width):
    lines, folder = on_a_terminal(monkeypatch, tmp_path / "run", width, num_epochs=2, test_interval=1)
    lines = [line for line in lines if str(folder) not in line]  # paths are left whole, to be copied
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if "…" in line]
    text = "\n".join(lines)
    assert re.search(r"epoch 1 of 2 .+ batch 2 of 3  \S+ s left\n", text)
    headings = [line for line in lines if re.search(r"^\s*epoch  ", line)]
    assert len(headings) == 1
    assert all(words in headings[0] for words in ("val energy", "val force"))
    assert ("samples/s" in headings[0]) == (width >= 80)
    assert re.search(r"test energy MAE \S+ meV/atom  test force MAE \S+ meV/Å", text)


def test_the_time_left_is_that_of_the_whole_run(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    lines, _ = on_a_terminal(monkeypatch, tmp_path / "run", 120, num_epochs=3)
    left = [int(match[1]) for match in (re.search(r"(\d+) s left", line) for line in lines) if match]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1] + 10
    assert 0 <= left[-1] < 5


def test_the_lowest_loss_and_the_epochs_of_this_run_are_told_in_words(tmp_path):
    from torchmdnet.training.report import RunFacts, _monitor_words

    facts = RunFacts(
        folder=tmp_path, options={"y_weight": 2.0, "derivative": True}, units=EV, splits={}, train_facts=None,
        evaluation=None, provenance={}, monitor="val_total_mse_loss", best_score=1.0, tested="best.ckpt",
        tested_epoch=4, num_epochs=5, num_parameters=3, device="CPU", seconds=1.0, samples_per_second=1.0,
    )  # fmt: skip
    loss = "2 × mse_loss(energies) + 1 × mse_loss(force components), in eV and Å"
    assert _monitor_words(facts) == f"lowest validation loss, {loss}"
    facts.monitor, facts.units = "train_total_l1_loss", Units()
    words = "2 × l1_loss(energies) + 1 × l1_loss(force components), in the units of the data"
    assert _monitor_words(facts) == f"lowest training loss, {words}"
    assert facts.epochs_in_words == "5 epochs"
    facts.epochs_before = 3
    assert facts.epochs_in_words == "2 epochs (5 in all)"


def test_energies_relative_to_elements_are_labelled_so(tmp_path, monkeypatch):
    from torchmdnet.training import plots

    titles = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: titles.append(figure.axes[0].get_title()))
    points = {"y": (np.array([1.0, 2.0]), np.array([1.1, 2.1]))}
    evaluation = Evaluation("test", Errors(1, *([0.1] * 4), 3, 0.1, 0.1), points)
    assert draw_parity(tmp_path / "parity.png", evaluation, EV, relative=True)
    assert draw_parity(tmp_path / "parity.png", evaluation, EV)
    assert titles == ["Energy relative to elements", "Energy"]


def test_a_signal_that_comes_after_that_of_another_process_is_the_first_here(caplog):
    """Clusters send one to every process; the later ones would else end theirs at once, in the middle of saving."""
    from torchmdnet.training.callbacks import PoliteStop

    asked = []

    def reduce(number, reduce_op):
        asked.append((int(number), reduce_op))
        return torch.tensor(15 + 1000 * 2)  # process 1 has received SIGTERM

    strategy = SimpleNamespace(root_device="cpu", reduce=reduce)
    trainer = SimpleNamespace(world_size=2, global_rank=0, strategy=strategy)
    polite = PoliteStop(None)
    assert polite._is_asked(trainer)
    assert polite._is_asked(trainer)
    assert (polite.signal, polite.signal_elsewhere) == (None, 15)
    assert caplog.text.count("Process 1 received SIGTERM: all stop at this step.") == 1
    polite._note(15, None)  # does not raise
    assert polite.signal == 15
    assert polite._is_asked(trainer)
    assert asked == [(0, "max"), (0, "max"), (1015, "max")]
    with pytest.raises(KeyboardInterrupt):
        polite._note(15, None)


def test_a_signal_while_loops_compile_ends_at_once(monkeypatch):
    from torchmdnet import loop_cache
    from torchmdnet.training.callbacks import PoliteStop

    polite = PoliteStop(None)
    polite._note(15, None)
    assert polite.signal == 15  # between two steps
    polite = PoliteStop(None)
    monkeypatch.setattr(loop_cache._progress, "_depth", 1)
    monkeypatch.setattr(loop_cache._progress, "_thread", threading.get_ident())
    polite._note(15, None)  # an error from a handler would be lost in a callback of LLVM
    assert polite.signal == 15
    with pytest.raises(KeyboardInterrupt):
        loop_cache._progress.on_start(None)
