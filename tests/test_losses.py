import pickle
import re

import numpy as np
import pytest
import torch

import torchmdnet.loss
from torchmdnet.errors import ConfigError
from torchmdnet.losses import LOSSES, LossFunction, huber_loss, loss_class_mapping, loss_name

X = np.array([[0.0, 1.5], [-2.0, 0.3]])
TARGET = np.array([[0.2, 0.0], [1.0, 0.3]])

FORMULAS = {
    "mse_loss": lambda d: d**2,
    "l1_loss": abs,
    "huber_loss": lambda d: np.where(abs(d) <= 1, d**2 / 2, abs(d) - 0.5),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_the_mean_of_its_formula_over_all_elements(name):
    loss = LOSSES[name](torch.from_numpy(X), torch.from_numpy(TARGET))
    assert float(loss) == pytest.approx(FORMULAS[name](X - TARGET).mean(), rel=1e-12)


def test_huber_is_linear_beyond_delta():
    d = np.abs(X - TARGET)
    expected = np.where(d <= 0.5, d**2 / 2, 0.5 * (d - 0.25)).mean()
    assert float(LossFunction(huber_loss, {"delta": 0.5})(torch.from_numpy(X), torch.from_numpy(TARGET))) == (
        pytest.approx(expected, rel=1e-12)
    )


def test_the_established_address_gives_the_same_losses():
    assert torchmdnet.loss.loss_class_mapping is loss_class_mapping
    assert set(loss_class_mapping) == set(LOSSES) == set(FORMULAS)
    assert all(getattr(torchmdnet.loss, name) is LOSSES[name] for name in LOSSES)


def test_a_loss_function_survives_pickling():
    copy = pickle.loads(pickle.dumps(LossFunction(huber_loss, {"delta": 0.25})))
    assert copy.extra_args == {"delta": 0.25}
    assert copy.loss_fn is huber_loss


def test_an_argument_the_loss_does_not_take_is_refused_with_those_it_takes():
    with pytest.raises(ConfigError, match=r"train_loss_arg.*beta.*huber_loss.*It takes delta"):
        LossFunction(huber_loss, {"beta": 1})


def test_the_caller_keeps_the_arguments_it_gave():
    given = {"delta": 0.5}
    LossFunction(huber_loss, given).extra_args["delta"] = 2.0
    assert given == {"delta": 0.5}


def test_a_loss_of_another_package_is_logged_under_its_own_name():
    assert loss_name("my_package.losses:cauchy") == "cauchy"
    assert loss_name("mse_loss") == "mse_loss"


@pytest.mark.parametrize(
    ("loss", "arguments", "words"),
    [
        (huber_loss, {"delta": -1.0}, "train_loss_arg: {'delta': -1.0} cannot be used: "),
        (huber_loss, {"delta": "abc"}, "train_loss_arg: {'delta': 'abc'} cannot be used: "),
        (lambda x, y: x.sum() / 0, {}, "gives inf for two predictions"),
        (lambda x, y: x - y, {}, "gives a tensor of shape (2, 1) for two predictions"),
        (lambda x, y: None, {}, "gives None for two predictions"),
        (lambda x, y: x.nothing, {}, "cannot be used: 'Tensor' object has no attribute 'nothing'"),
    ],
)
def test_a_loss_that_gives_no_number_is_refused(loss, arguments, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        LossFunction(loss, arguments).check()


def test_losses_with_usable_arguments_pass():
    LossFunction(huber_loss, {"delta": 0.5}).check()
