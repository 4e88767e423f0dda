import math

import numpy as np
import pytest
import torch

from torchmdnet.training.metrics import Errors, ErrorSums, RunningMean


def test_a_short_last_batch_counts_for_what_it_holds():
    """Batches of 2, 2 and 1 molecules with losses 0, 0 and 10: the mean over molecules is 2, over batches 3.33."""
    mean = RunningMean()
    for loss, size in ((0.0, 2), (0.0, 2), (10.0, 1)):
        mean.update(torch.tensor(loss), size)
    assert mean.mean() == pytest.approx(2.0)
    assert len(mean) == 3


def test_an_interrupted_mean_goes_on_where_it_stopped():
    values = torch.rand(7, dtype=torch.float32)
    whole, first = RunningMean(), RunningMean()
    for value in values:
        whole.update(value, 3)
    for value in values[:4]:
        first.update(value, 3)
    rest = RunningMean.from_state(first.state_dict(), torch.device("cpu"))
    for value in values[4:]:
        rest.update(value, 3)
    assert rest.mean() == whole.mean()


def test_float32_losses_are_summed_in_double_precision():
    mean = RunningMean()
    mean.update(torch.tensor(1.0), 2**25)
    for _ in range(8):
        mean.update(torch.tensor(1.0), 1)  # lost in float32, whose integers end at 2**24
    assert float(mean.total) == 2**25 + 8


def test_errors_agree_with_numpy_whatever_the_batches():
    rng = np.random.default_rng(0)
    sizes = np.array([3, 5, 1, 4, 2])
    dy, df = rng.normal(size=(5, 1)), rng.normal(size=(15, 3))
    sums = ErrorSums()
    for rows in (slice(0, 2), slice(2, 5)):
        atoms = slice(sizes[: rows.start].sum(), sizes[: rows.stop].sum())
        sums.update(
            torch.from_numpy(dy[rows]), torch.from_numpy(sizes[rows, None].astype(float)), torch.from_numpy(df[atoms])
        )
    errors = Errors.from_sums(sums.sums.tolist())
    expected = Errors(
        5,
        abs(dy).mean(),
        math.sqrt((dy**2).mean()),
        (abs(dy[:, 0]) / sizes).mean(),
        math.sqrt(((dy[:, 0] / sizes) ** 2).mean()),
        15,
        abs(df).mean(),
        math.sqrt((df**2).mean()),
    )
    np.testing.assert_allclose(list(errors.table().values()), list(expected.table().values()), rtol=1e-12)


def test_further_terms_have_errors_of_their_own_and_nan_without_labels():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 3)), rng.normal(size=(4, 3))
    sums = ErrorSums(("stress", "dipole"))
    for error in (first, second):
        sums.update(None, None, None, {"dipole": torch.from_numpy(error)})
    errors = Errors.from_sums(sums.sums.tolist(), sums.terms)
    both = np.concatenate([first, second])
    np.testing.assert_allclose(errors.others["dipole"], (abs(both).mean(), math.sqrt((both**2).mean())), rtol=1e-12)
    assert np.isnan(errors.others["stress"]).all()
    assert errors.table()["dipole_mae"] == errors.others["dipole"][0]


def test_a_mean_over_nothing_is_nan_and_can_be_added_to():
    mean = RunningMean()
    mean.update(torch.tensor(0.0), 0)
    assert math.isnan(mean.mean())
    mean.update(torch.tensor(2.0), 3)
    assert mean.mean() == 2.0


def test_a_term_without_labels_has_no_error():
    sums = ErrorSums()
    sums.update(None, None, torch.ones(2, 3))
    errors = Errors.from_sums(sums.sums.tolist())
    assert math.isnan(errors.y_mae)
    assert errors.neg_dy_mae == 1.0
