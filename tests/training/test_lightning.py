import copy
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch
from toy_data import Toy

import torchmdnet.module
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.training.lightning import LNNP

MODEL = {
    "model": "tensornet",
    "output_model": "Scalar",
    "embedding_dimension": 8,
    "num_layers": 1,
    "num_rbf": 8,
    "activation": "silu",
    "rbf_type": "expnorm",
    "trainable_rbf": False,
    "cutoff_lower": 0.0,
    "cutoff_upper": 5.0,
    "max_z": 20,
    "max_num_neighbors": 32,
    "equivariance_invariance_group": "O(3)",
    "reduce_op": "add",
    "derivative": True,
    "precision": 64,
    "prior_model": None,
}


def module(**changes):
    torch.manual_seed(0)
    return LNNP({**MODEL, **changes})


def batch_of(*numbers, **changes):
    batch = Toy(**changes).batch(np.array(numbers))
    return batch


def predictions(lnnp, batch):
    batch = lnnp.data_transform(copy.copy(batch))
    with torch.enable_grad():
        return lnnp(batch.z, batch.pos, batch=batch.batch)


# ------------------------------------------------------------------------------------------------ construction


def test_the_established_address_gives_the_same_objects():
    assert torchmdnet.module.LNNP is LNNP
    assert torchmdnet.module.FloatCastDatasetWrapper(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("kind", [dict, lambda options: Namespace(**options)])
def test_options_are_copied_and_missing_training_options_take_their_defaults(kind):
    given = kind(MODEL)
    before = copy.deepcopy(given)
    lnnp = LNNP(given)
    assert given == before
    assert lnnp.hparams.lr == 1e-4
    assert lnnp.hparams["train_loss"] == "mse_loss"
    assert lnnp.hparams.ema_alpha_y == 1.0
    assert lnnp.hparams.load_model is None


def test_an_unknown_loss_is_refused_with_the_three_there_are():
    with pytest.raises(ValueError, match=r"mse_loss.*l1_loss.*huber_loss"):
        module(train_loss="rmse_loss")


def test_an_impossible_precision_is_refused():
    with pytest.raises(ConfigError, match=r"precision: 48.*32, 64"):
        module(precision=48)


def test_delta_learning_without_an_atomref_says_what_to_append():
    with pytest.raises(ConfigError, match=r"remove_ref_energy.*Atomref"):
        module(remove_ref_energy=True)


# ------------------------------------------------------------------------------------------------ one step


def test_the_total_is_the_weighted_sum_of_both_terms():
    lnnp, batch = module(y_weight=0.3, neg_dy_weight=7.0), batch_of(0, 1, 2)
    y, forces = predictions(lnnp, batch)
    expected = 0.3 * ((y - batch.y) ** 2).mean() + 7.0 * ((forces - batch.neg_dy) ** 2).mean()
    torch.testing.assert_close(lnnp.training_step(batch), expected, rtol=1e-10, atol=0)


def test_validation_returns_the_training_loss_and_records_l1_beside():
    lnnp, batch = module(train_loss="huber_loss", train_loss_arg={"delta": 0.5}).eval(), batch_of(0, 1, 2)
    lnnp.validation_step(copy.copy(batch))
    y, _ = predictions(lnnp, batch)
    d = (y.detach() - batch.y).abs()
    means = lnnp.losses["val"]["y"]
    assert set(means) == {"l1_loss", "huber_loss"}
    assert means["l1_loss"].mean() == pytest.approx(float(d.mean()))
    huber = torch.where(d <= 0.5, d**2 / 2, 0.5 * (d - 0.25)).mean()
    assert means["huber_loss"].mean() == pytest.approx(float(huber))


def test_training_with_l1_records_it_once_in_validation():
    lnnp = module(train_loss="l1_loss").eval()
    lnnp.validation_step(batch_of(0, 1))
    assert len(lnnp.losses["val"]["y"]["l1_loss"]) == 1


def test_the_second_validation_loader_is_the_test_set():
    lnnp = module().eval()
    lnnp.validation_step(batch_of(0, 1), 0, 1)
    assert set(lnnp.losses) == {"test"}
    assert set(lnnp.losses["test"]["y"]) == {"l1_loss"}


def test_means_weigh_molecules_and_atoms():
    lnnp, parts = module().eval(), [(0, 1, 2, 4), (3,)]  # the last batch is short, and molecules differ in size
    for numbers in parts:
        lnnp.validation_step(batch_of(*numbers))
    whole = batch_of(0, 1, 2, 4, 3)
    y, forces = (value.detach() for value in predictions(lnnp, whole))
    assert lnnp.losses["val"]["y"]["l1_loss"].mean() == pytest.approx(float((y - whole.y).abs().mean()))
    assert lnnp.losses["val"]["neg_dy"]["l1_loss"].mean() == pytest.approx(float((forces - whole.neg_dy).abs().mean()))


def test_labels_of_one_dimension_become_columns():
    lnnp, batch = module(), batch_of(0, 1, 2)
    expected = lnnp.training_step(copy.copy(batch))
    batch.y = batch.y.squeeze(1)
    torch.testing.assert_close(lnnp.training_step(batch), expected)


def test_a_label_of_another_shape_is_refused_instead_of_broadcast():
    batch = batch_of(0, 1, 2)
    batch.y = batch.y.repeat(1, 2)
    with pytest.raises(DataError, match=r"y has shape \(3, 2\).*\(3, 1\)"):
        module().training_step(batch)


def test_forces_alone_reach_every_parameter():
    """Without energies in the loss the additive bias of the head has no influence, but must not miss its gradient."""
    lnnp = module()
    lnnp.training_step(batch_of(0, 1, 2, fields=("neg_dy",))).backward()
    assert [name for name, p in lnnp.model.named_parameters() if p.grad is None] == []


def test_a_batch_without_labels_says_so():
    with pytest.raises(DataError, match="y is missing"):
        module(derivative=False).training_step(batch_of(0, fields=("neg_dy",)))


def test_energies_alone_are_recorded_without_an_empty_force_column():
    lnnp = module(derivative=False)
    lnnp.training_step(batch_of(0, 1))
    assert set(lnnp.losses["train"]) == {"y"}


def test_a_missing_charge_names_the_option():
    with pytest.raises(DataError, match=r"charge: true needs 'q'.*neg_dy"):
        module(charge=True).training_step(batch_of(0))


def test_charge_reaches_the_model_and_other_fields_travel_as_extra_arguments():
    lnnp, seen = module(charge=True), {}

    def spy(z, pos, **arguments):
        seen.update(arguments)
        return pos.sum().reshape(1, 1).repeat(2, 1), pos

    lnnp.model.forward = spy
    batch = batch_of(0, 1, fields=("y", "neg_dy", "q"))
    batch["dp"] = torch.ones(2, 3)
    lnnp.training_step(batch)
    torch.testing.assert_close(seen["q"], torch.zeros(2, dtype=torch.float64))
    assert seen["num_systems"] == 2
    assert {"ptr", "dp"} <= set(seen["extra_args"])
    assert not {"y", "neg_dy", "z", "pos", "batch", "q"} & set(seen["extra_args"])


def test_floats_are_cast_to_the_precision_of_the_model():
    lnnp = module(precision=32)
    assert lnnp.training_step(batch_of(0, 1)).dtype == torch.float32


def test_prediction_needs_no_labels_and_without_derivative_gives_no_forces():
    batch = Batch.from_data_list([Toy()[0], Toy()[1]])
    del batch.y, batch.neg_dy
    with torch.no_grad():
        y, forces = module().eval().predict_step(copy.copy(batch))
        assert (tuple(y.shape), tuple(forces.shape)) == ((2, 1), (8, 3))
        y, forces = module(derivative=False).eval().predict_step(batch)
        assert (tuple(y.shape), forces.numel()) == ((2, 1), 0)


# ------------------------------------------------------------------------------------------------ smoothing


def test_a_smoothed_loss_mixes_with_the_one_before():
    lnnp = module(ema_alpha_y=0.2, y_weight=1.0, neg_dy_weight=0.0)
    plain = [float(module(neg_dy_weight=0.0).training_step(batch_of(n, n + 1))) for n in (0, 4, 8)]
    smooth = [float(lnnp.training_step(batch_of(n, n + 1))) for n in (0, 4, 8)]
    second = 0.2 * plain[1] + 0.8 * plain[0]
    assert smooth == pytest.approx([plain[0], second, 0.2 * plain[2] + 0.8 * second], rel=1e-12)
    assert float(lnnp.ema["train"]["y"]["mse_loss"]) == pytest.approx(smooth[2])


def test_smoothing_scales_the_gradient_by_alpha():
    def norms(alpha):
        lnnp, sizes = module(ema_alpha_y=alpha, neg_dy_weight=0.0), []
        for _ in range(2):
            lnnp.zero_grad()
            lnnp.training_step(batch_of(0, 1)).backward()
            sizes.append(sum(float(p.grad.square().sum()) for p in lnnp.parameters() if p.grad is not None) ** 0.5)
        return sizes

    plain, smooth = norms(1.0), norms(0.05)
    assert smooth[1] / plain[1] == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_of_zero_or_one_does_not_smooth(alpha):
    lnnp = module(ema_alpha_y=alpha, ema_alpha_neg_dy=alpha)
    lnnp.training_step(batch_of(0, 1))
    assert lnnp.ema == {}


def test_validation_is_smoothed_and_test_errors_are_not():
    lnnp = module(ema_alpha_y=0.1).eval()
    for number in (0, 1):
        lnnp.validation_step(batch_of(number))
        lnnp.test_step(batch_of(number))
    values = [float((predictions(lnnp, batch_of(n))[0] - batch_of(n).y).abs()) for n in (0, 1)]
    mixed = 0.1 * values[1] + 0.9 * values[0]
    assert lnnp.losses["val"]["y"]["l1_loss"].mean() == pytest.approx((values[0] + mixed) / 2)
    assert lnnp.losses["test"]["y"]["l1_loss"].mean() == pytest.approx(sum(values) / 2)


# ------------------------------------------------------------------------------------------------ optimizer


def test_the_optimizer_and_scheduler_are_the_established_ones():
    lnnp = module(lr=3e-3, weight_decay=0.1, lr_factor=0.4, lr_patience=3, lr_min=1e-7)
    (optimizer,), (schedule,) = lnnp.configure_optimizers()
    group, scheduler = optimizer.param_groups[0], schedule.pop("scheduler")
    assert type(optimizer) is torch.optim.AdamW
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (3e-3, 0.1, (0.9, 0.999), 1e-8)
    assert (scheduler.factor, scheduler.patience, scheduler.min_lrs) == (0.4, 3, [1e-7])
    assert (scheduler.threshold, scheduler.mode, scheduler.eps) == (1e-4, "min", 1e-8)
    assert schedule == {"strict": True, "monitor": "val_total_mse_loss", "interval": "epoch", "frequency": 1}


def test_the_scheduler_follows_the_chosen_loss_and_stage():
    _, (schedule,) = module(train_loss="huber_loss", lr_metric="train").configure_optimizers()
    assert schedule["monitor"] == "train_total_huber_loss"


def test_positions_get_no_gradient_when_weights_are_trained(monkeypatch):
    """Gradients of the weights are those of a plain backward pass."""
    lnnp = module()
    lnnp.training_step(batch_of(0, 1, 2)).backward()
    expected = {name: p.grad.clone() for name, p in lnnp.named_parameters() if p.grad is not None}
    lnnp.zero_grad()
    asked, plain = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda x, *a, **k: asked.append(k["inputs"]) or plain(x, *a, **k))
    lnnp.backward(lnnp.training_step(batch_of(0, 1, 2)))
    found = {name: p.grad for name, p in lnnp.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert asked
    assert all(isinstance(weight, torch.nn.Parameter) for weight in asked[0])
