"""A picture of a radial basis has one line for each function."""

from __future__ import annotations

import matplotlib
import pytest

from torchmdnet.nn.plots import visualize_basis


@pytest.mark.parametrize("basis", ["gauss", "expnorm"])
def test_each_function_is_drawn(basis: str) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure()
    visualize_basis(basis, num_rbf=7, show=False)
    lines = [line for line in figure.gca().get_lines() if len(line.get_xdata()) > 2]
    plt.close(figure)
    assert len(lines) == 7
