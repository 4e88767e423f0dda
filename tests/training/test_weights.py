"""Weights of configurations and labels: the exact loss, its gradient, and nothing else changed."""

import copy

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch
from toy_data import Toy
from toy_labels import ToyLabels

from torchmdnet import losses
from torchmdnet.errors import ConfigError
from torchmdnet.training.lightning import LNNP

MODEL = {
    "model": "tensornet",
    "output_model": "Scalar",
    "embedding_dimension": 8,
    "num_layers": 1,
    "num_rbf": 8,
    "cutoff_upper": 5.0,
    "max_z": 20,
    "derivative": True,
    "precision": 64,
    "neg_dy_weight": 3.0,
}
ROWS = [4, 0, 2, 7]
CONFIG = torch.tensor([2.0, 0.5, 0.0, 1.25], dtype=torch.float64)
ENERGY = torch.tensor([1.0, 4.0, 1.0, 0.5], dtype=torch.float64)
FORCES = torch.tensor([0.25, 1.0, 3.0, 2.0], dtype=torch.float64)


def module(**changes):
    torch.manual_seed(0)
    return LNNP({**MODEL, **changes})


def weighted(batch, **weights):
    batch = copy.copy(batch)
    for name, values in weights.items():
        batch[name] = values.to(torch.float32)
    return batch


def gradient(lnnp, loss):
    return torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, [p for p in lnnp.parameters() if p.requires_grad])]
    )


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss"])
def test_a_weight_multiplies_the_elements_of_its_row(name):
    rng = np.random.default_rng(1)
    x, target, weight = rng.normal(size=(5, 3)) * 2, rng.normal(size=(5, 3)), rng.uniform(0, 3, 5)
    d = np.abs(x - target)
    formula = {"mse_loss": d**2, "l1_loss": d, "huber_loss": np.where(d <= 1, d**2 / 2, d - 0.5)}[name]
    loss = losses.LossFunction(losses.LOSSES[name])(*map(torch.from_numpy, (x, target, weight)))
    assert float(loss) == pytest.approx((weight[:, None] * formula).sum() / 15, rel=1e-12)


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss"])
def test_weights_of_one_change_no_bit_of_the_loss(name):
    x, target = torch.randn(7, 3), torch.randn(7, 3)
    loss = losses.LossFunction(losses.LOSSES[name])
    assert torch.equal(loss(x, target), loss(x, target, torch.ones(7)))


def test_loss_and_gradient_are_those_of_the_configurations_one_by_one():
    """An independent answer: every configuration in a batch of its own, without weights, added up by hand."""
    lnnp, data = module(), Toy()
    batch = weighted(data.batch(ROWS), config_weight=CONFIG, y_weight=ENERGY, neg_dy_weight=FORCES)
    loss = lnnp.training_step(batch)
    expected = torch.zeros((), dtype=torch.float64)
    atoms = [len(data[row].z) for row in ROWS]
    for number, row in enumerate(ROWS):
        parts = {}
        for term in ("y", "neg_dy"):
            alone = module(y_weight=float(term == "y"), neg_dy_weight=float(term == "neg_dy"))
            alone.model = lnnp.model
            parts[term] = alone.training_step(data.batch([row]))
        expected = expected + CONFIG[number] * ENERGY[number] * parts["y"] / len(ROWS)
        expected = expected + 3.0 * CONFIG[number] * FORCES[number] * parts["neg_dy"] * atoms[number] / sum(atoms)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(lnnp, loss), gradient(lnnp, expected), rtol=1e-9, atol=1e-12)


def test_the_epoch_does_not_depend_on_the_batches():
    data = Toy()
    whole, apart = module(), module()
    names = {"config_weight": CONFIG, "neg_dy_weight": FORCES}
    whole.step(weighted(data.batch(ROWS), **names), [("mse_loss", whole.train_loss_fn)], "train")
    for rows in ([0], [1, 2, 3]):
        part = weighted(data.batch([ROWS[i] for i in rows]), **{name: value[rows] for name, value in names.items()})
        apart.step(part, [("mse_loss", apart.train_loss_fn)], "train")
    one, two = whole._take_means("train"), apart._take_means("train")
    assert one.keys() == two.keys()
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-12)


def test_without_weights_loss_and_gradient_keep_every_bit():
    lnnp, batch = module(precision=32), Toy().batch(ROWS)
    comparison = lnnp.compare(copy.copy(batch), "train")
    assert comparison.weights == {}
    by_hand = torch.nn.functional.mse_loss(comparison.y, comparison.y_label)
    by_hand = by_hand + 3.0 * torch.nn.functional.mse_loss(comparison.neg_dy, comparison.neg_dy_label)
    plain, expected = lnnp.training_step(copy.copy(batch)), gradient(lnnp, by_hand)
    assert torch.equal(plain, by_hand)
    assert torch.equal(gradient(lnnp, plain), expected)
    ones = lnnp.training_step(weighted(batch, config_weight=torch.ones(4)))
    torch.testing.assert_close(gradient(lnnp, ones), expected, rtol=1e-4, atol=1e-3)


def test_validation_is_weighted_as_training_is_and_errors_are_not():
    lnnp, batch = module(), Toy().batch(ROWS)
    heavy = weighted(batch, config_weight=CONFIG)
    lnnp.step(copy.copy(heavy), [("l1_loss", losses.l1_loss), ("mse_loss", lnnp.train_loss_fn)], "val")
    lnnp.step(copy.copy(heavy), [("mse_loss", lnnp.train_loss_fn)], "train")
    lnnp.step(copy.copy(heavy), [("l1_loss", losses.l1_loss)], "test")
    val, train, test = (lnnp._take_means(stage) for stage in ("val", "train", "test"))
    assert val["val_total_mse_loss"] == pytest.approx(train["train_total_mse_loss"])
    assert val["val_y_l1_loss"] == pytest.approx(test["test_y_l1_loss"])
    plain = module()
    plain.step(copy.copy(batch), [("l1_loss", losses.l1_loss)], "test")
    assert test == pytest.approx(plain._take_means("test"))
    assert lnnp.epoch_errors["test"].y_mae == pytest.approx(plain.epoch_errors["test"].y_mae)


def test_rows_without_a_label_take_their_weight_along():
    lnnp = module(properties={"dipole": {"weight": 1.0}, "charges": {"weight": 1.0}}, y_weight=0.0, neg_dy_weight=0.0)
    data = ToyLabels()
    batch = weighted(data.batch(ROWS), config_weight=CONFIG)
    batch.dipole = batch.dipole.clone()
    batch.dipole[1] = np.nan
    comparison = lnnp.compare(copy.copy(batch), "train")
    assert comparison.weights["dipole"].tolist() == [2.0, 0.0, 1.25]
    assert comparison.weights["charges"].tolist() == CONFIG[batch.batch].tolist()
    (prediction, label), loss = comparison.others["dipole"], lnnp.training_step(copy.copy(batch))
    charges = comparison.others["charges"]
    expected = (CONFIG[[0, 2, 3], None] * (prediction - label) ** 2).mean()
    expected = (
        expected
        + (CONFIG[batch.batch].reshape(-1, *[1] * (charges[0].dim() - 1)) * (charges[0] - charges[1]) ** 2).mean()
    )
    torch.testing.assert_close(loss, expected)


def test_a_single_system_without_a_batch_index_is_weighted_too():
    lnnp, data = module(), Toy()
    sample = data[3]
    plain = lnnp.training_step(Batch.from_data_list([data[3]]))
    sample.config_weight = torch.tensor([2.0])
    torch.testing.assert_close(lnnp.training_step(sample), 2 * plain)


def test_a_loss_of_ones_own_says_that_it_takes_no_weights():
    def cauchy(prediction, target, scale=1.0):
        return torch.log1p(((prediction - target) / scale) ** 2).mean()

    loss = losses.LossFunction(cauchy, {"scale": 2.0})
    loss(torch.zeros(2), torch.ones(2))
    with pytest.raises(ConfigError, match=r"cauchy takes no weights.*argument 'weight'"):
        loss(torch.zeros(2), torch.ones(2), torch.ones(2))
    with pytest.raises(ConfigError, match="It takes delta"):
        losses.LossFunction(losses.huber_loss, {"weight": 2.0})
