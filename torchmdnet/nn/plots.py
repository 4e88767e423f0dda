"""Pictures of radial bases."""

from __future__ import annotations

import torch

from torchmdnet.nn.radial import make_radial_basis

__all__ = ["visualize_basis"]


def visualize_basis(
    basis_type: str, num_rbf: int = 50, cutoff_lower: float = 0, cutoff_upper: float = 5, show: bool = True
) -> None:
    """Plot the functions of a radial basis over distance.

    Args:
        basis_type: ``gauss`` or ``expnorm``.
        num_rbf: Number of functions.
        cutoff_lower: In Å.
        cutoff_upper: In Å.
        show: Whether to open a window; without, the current figure is left for the caller.
    """
    import matplotlib.pyplot as plt

    distances = torch.linspace(cutoff_lower - 1, cutoff_upper + 1, 1000)
    basis = make_radial_basis(basis_type, float(cutoff_lower), float(cutoff_upper), num_rbf, trainable=False)
    plt.plot(distances.numpy(), basis(distances).numpy())
    plt.axvline(cutoff_lower, color="grey", linestyle="dashed")
    plt.axvline(cutoff_upper, color="grey", linestyle="dashed")
    plt.xlabel("distance (Å)")
    plt.ylabel("basis function")
    if show:
        plt.show()
