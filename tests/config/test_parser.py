"""The command line by itself."""

from __future__ import annotations

import logging

import pytest

from torchmdnet import __version__
from torchmdnet.config import OPTIONS, get_argparse
from torchmdnet.errors import ConfigError


def parse(*words):
    return get_argparse().parse_args(list(words))


@pytest.mark.parametrize("key", [key for key, option in OPTIONS.items() if option.type == "bool"])
def test_true_false_flags_mean_what_they_say(key):
    flag = OPTIONS[key].flag
    for words, value in [
        ((flag,), True), ((flag, "true"), True), ((flag, "1"), True), ((flag, "yes"), True),
        ((f"{flag}=false",), False), ((flag, "false"), False), ((flag, "0"), False), ((flag, "no"), False),
        ((flag, ""), False),
        ((f"--no-{flag[2:]}",), False), ((flag, f"--no-{flag[2:]}"), False), ((f"--no-{flag[2:]}", flag), True),
    ]:  # fmt: skip
        assert getattr(parse(*words), key) is value, words


def test_the_version_does_not_take_a_shortened_flag_away(capsys):
    assert parse("--ve", "true").vector_cutoff is True
    with pytest.raises(SystemExit) as end:
        parse("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"torchmd-train {__version__}\n"


def test_a_bare_flag_does_not_swallow_the_next():
    args = parse("--derivative", "--lr", "0.5", "--remove-ref-energy", "--seed", "3")
    assert (args.derivative, args.lr, args.remove_ref_energy, args.seed) == (True, 0.5, True, 3)


def test_a_word_that_is_neither_is_refused():
    with pytest.raises(ConfigError, match=r"--derivative: derivative='maybe' .*true or false"):
        parse("--derivative", "maybe")
    with pytest.raises(ConfigError, match=r"--no-derivative takes no value"):
        parse("--no-derivative", "true")


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_both_spellings_are_accepted(option, tmp_path):
    (tmp_path / "x.yaml").write_text("seed: 1")
    samples = {
        "int": "1", "float": "0.5", "size": "0.5", "path": "here", "paths": "here", "text": "word", "priors": "D2",
        "mapping": "a=1", "properties": "dipole", "weights": "[1]", "box": "[[1,0,0],[0,1,0],[0,0,1]]", "bool": "1",
        "duration": "00:10:00",
    }  # fmt: skip
    if option.key in ("load_model", "prior_args"):
        return  # these need more than a word to make sense
    value = str(option.names[0]) if option.choices else samples[option.type]
    if option.type == "float" and (option.ge or 0) > 0.5:
        value = str(option.ge)
    if option.key == "conf":
        value = str(tmp_path / "x.yaml")
    if option.key.endswith("monitor"):
        value = "val_total_l1_loss"
    dashes, underscores = (getattr(parse(f"--{name}", value), option.key)
                           for name in (option.key.replace("_", "-"), option.key))  # fmt: skip
    assert dashes == underscores


@pytest.mark.parametrize(("words", "key", "value"), [
    (["--num-e", "5"], "num_epochs", 5), (["--num_e=5"], "num_epochs", 5),
    (["--embedding", "8"], "embedding_dimension", 8),
    (["--prior", "D2"], "prior_model", ["D2"]), (["--pri", "D2"], "prior_model", ["D2"]),
    (["-l", "here"], "log_dir", "here"), (["--deriv", "false"], "derivative", False),
    (["--no-deriv"], "derivative", False),
    (["--static", "1"], "static_shapes", True),
])  # fmt: skip
def test_flags_can_be_shortened_while_unique(words, key, value):
    assert getattr(parse(*words), key) == value


def test_a_shortening_of_several_flags_is_refused():
    with pytest.raises(ConfigError, match=r"ambiguous option: --num .*--num-epochs"):
        parse("--num", "3")


def test_of_two_equal_flags_the_later_wins():
    assert parse("--lr", "1", "--lr", "2").lr == 2


def test_priors_on_the_command_line_replace_each_other():
    assert parse("--prior-model", "Atomref", "--prior-model", "D2").prior_model == ["D2"]
    assert parse("--prior-model", "Atomref", "D2").prior_model == ["Atomref", "D2"]
    assert parse("--prior-model", '{"ZBL": {"cutoff_distance": 4}}', "D2").prior_model == [
        {"ZBL": {"cutoff_distance": 4}},
        "D2",
    ]


def test_dictionaries_are_accepted_on_the_command_line():
    args = parse("--dataset-arg", '{"label": "energy_U0"}', "--train-loss-arg", '{"delta": 0.5}')
    assert (args.dataset_arg, args.train_loss_arg) == ({"label": "energy_U0"}, {"delta": 0.5})
    assert parse("--dataset-arg", "label=homo", "version=1.1.4").dataset_arg == {"label": "homo", "version": "1.1.4"}
    assert parse("--dataset-arg", "null").dataset_arg is None
    values = ("label=homo", '{"version": "1.1.4", "size": 3}', "size=4")
    twice = [word for value in values for word in ("--dataset-arg", value)]
    assert parse(*twice).dataset_arg == {"label": "homo", "version": "1.1.4", "size": 4}
    assert parse("--dataset-arg", "a=b", "--dataset-arg", "null").dataset_arg is None
    args = parse("--prior-model", "ZBL", "--prior-args", '{"cutoff_distance": 4}')
    assert args.prior_model == [{"ZBL": {"cutoff_distance": 4}}]


def test_negative_numbers_are_values():
    assert parse("--ngpus", "-1", "--test-interval", "-1").test_interval == -1


@pytest.mark.parametrize(("words", "message"), [
    (["--nmu-epochs", "5"], "unknown option --nmu-epochs. Did you mean '--num-epochs'"),
    (["--learning-rate", "1"], "unknown option --learning-rate. Did you mean '--lr'"),
    (["--config", "x.yaml"], "unknown option --config. Did you mean '--conf'"),
    (["--no-lr"], "lr is not a true/false option"),
    (["x.yaml"], "'x.yaml' belongs to no flag. Did you mean '--conf x.yaml'"),
    (["--lr"], "argument --lr: expected one argument"),
    (["--conf", "missing.yaml"], "there is no file 'missing.yaml'"),
    (["--conf", "settings.txt"], "does not end in .yaml or .yml"),
])  # fmt: skip
def test_usage_errors_name_the_word_and_the_nearest_flag(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        parse(*words)
    assert message in str(error.value)


def test_flags_of_earlier_releases_are_accepted_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        args = parse("--check-errors", "true", "--force-weight", "3", "--distributed_backend", "ddp", "--lr", "1")
    assert (args.neg_dy_weight, args.lr) == (3, 1)
    assert "--check-errors is set aside" in caplog.text
    assert "--force-weight is now spelt --neg-dy-weight" in caplog.text
    assert not hasattr(args, "check_errors")


def test_a_script_can_add_flags_of_its_own():
    parser = get_argparse()
    parser.add_argument("--my_flag", type=int, default=3)
    parser.add_argument("--atom", default="H")
    args = parser.parse_args(["--my_flag", "7", "--atom", "He", "--num-epochs", "2"])
    assert (args.my_flag, args.atom, args.num_epochs, args.atom_filter) == (7, "He", 2, -1)


def test_unknown_words_can_be_left_to_a_script():
    args, unknown = get_argparse().parse_known_args(["--lr", "1", "--mine", "x"])
    assert args.lr == 1
    assert unknown == ["--mine", "x"]


def test_help_shows_every_flag_once(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in OPTIONS.values():
        assert sum(line.strip().startswith((option.flag + " ", f"{option.short}, {option.flag} ")) or
                   line.strip() == option.flag for line in text.splitlines()) == 1, option.flag  # fmt: skip
    assert "equivariant-transformer" in text
    assert "A flag wins over every file" in text
