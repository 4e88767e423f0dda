"""Radial basis functions of distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.nn.cutoff import CosineCutoff

__all__ = ["RADIAL_BASES", "ExpNormalSmearing", "GaussianSmearing", "make_radial_basis"]


def _exp(x: Tensor) -> Tensor:
    """exp(x), with zero for what no sum of basis functions could notice.

    Far from its centre a Gaussian falls below the smallest normal number, and processors multiply what is left a
    hundred times slower: half of a training step was spent there.
    """
    return torch.where(x > 3 * math.log(torch.finfo(x.dtype).eps), torch.exp(x), 0.0)


class GaussianSmearing(nn.Module):
    r"""Evenly spaced Gaussians, :math:`\phi_k(r) = \exp(c (r - \mu_k)^2)` with :math:`c = -1/(2 \Delta\mu^2)`.

    Args:
        cutoff_lower: First centre in Å.
        cutoff_upper: Last centre in Å.
        num_rbf: Number of functions K, at least 2.
        trainable: Whether centres and width are parameters.
        dtype: Precision the initial values are computed in.
    """

    offset: Tensor
    coeff: Tensor

    def __init__(
        self,
        cutoff_lower: float = 0.0,
        cutoff_upper: float = 5.0,
        num_rbf: int = 50,
        trainable: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if num_rbf < 2:
            raise ValueError(
                f"num_rbf={num_rbf} is too small for rbf_type 'gauss': its width is the spacing. Pass 2 or more."
            )
        self.cutoff_lower = cutoff_lower
        self.cutoff_upper = cutoff_upper
        self.num_rbf = num_rbf
        self.trainable = trainable
        self.dtype = dtype
        offset, coeff = self._initial_params()
        if trainable:
            self.coeff = nn.Parameter(coeff)
            self.offset = nn.Parameter(offset)
        else:
            self.register_buffer("coeff", coeff)
            self.register_buffer("offset", offset)

    def _initial_params(self) -> tuple[Tensor, Tensor]:
        offset = torch.linspace(self.cutoff_lower, self.cutoff_upper, self.num_rbf, dtype=self.dtype)
        return offset, -0.5 / (offset[1] - offset[0]) ** 2

    def reset_parameters(self) -> None:
        """Restore the evenly spaced centres."""
        offset, coeff = self._initial_params()
        with torch.no_grad():
            self.offset.copy_(offset)
            self.coeff.copy_(coeff)

    def forward(self, dist: Tensor) -> Tensor:
        """Distances in Å to basis values: (...,) -> (..., K)."""
        return _exp(self.coeff * (dist.unsqueeze(-1) - self.offset).square())

    def continued(self, dist: Tensor) -> Tensor:
        """The same functions, smooth beyond the cutoffs too: (...,) -> (..., K)."""
        return self(dist)


class ExpNormalSmearing(nn.Module):
    r"""Gaussians of :math:`\exp(-\alpha r)`, under a cosine envelope (PhysNet, Unke and Meuwly 2019, eq. 7).

    .. math:: \phi_k(r) = C(r) \exp(-\beta_k (\exp(\alpha (r_l - r)) - \mu_k)^2), \quad \alpha = 5 / (r_c - r_l)

    Args:
        cutoff_lower: :math:`r_l` in Å; it shifts the exponent, the envelope always starts at zero.
        cutoff_upper: :math:`r_c` in Å.
        num_rbf: Number of functions K.
        trainable: Whether :math:`\mu` and :math:`\beta` are parameters.
        dtype: Precision the initial values are computed in.
    """

    means: Tensor
    betas: Tensor

    def __init__(
        self,
        cutoff_lower: float = 0.0,
        cutoff_upper: float = 5.0,
        num_rbf: int = 50,
        trainable: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.cutoff_lower = cutoff_lower
        self.cutoff_upper = cutoff_upper
        self.num_rbf = num_rbf
        self.trainable = trainable
        self.dtype = dtype
        self.cutoff_fn = CosineCutoff(0.0, cutoff_upper)
        self.alpha = 5.0 / (cutoff_upper - cutoff_lower)
        means, betas = self._initial_params()
        if trainable:
            self.means = nn.Parameter(means)
            self.betas = nn.Parameter(betas)
        else:
            self.register_buffer("means", means)
            self.register_buffer("betas", betas)

    def _initial_params(self) -> tuple[Tensor, Tensor]:
        span = torch.scalar_tensor(self.cutoff_lower - self.cutoff_upper, dtype=self.dtype, device="cpu")
        start = torch.exp(span)  # a number also where a model is built on the meta device
        means = torch.linspace(float(start), 1.0, self.num_rbf, dtype=self.dtype)
        betas = torch.full((self.num_rbf,), float((2 / self.num_rbf * (1 - start)) ** -2), dtype=self.dtype)
        return means, betas

    def reset_parameters(self) -> None:
        """Restore the initial means and widths."""
        means, betas = self._initial_params()
        with torch.no_grad():
            self.means.copy_(means)
            self.betas.copy_(betas)

    def forward(self, dist: Tensor) -> Tensor:
        """Distances in Å to basis values: (...,) -> (..., K)."""
        dist = dist.unsqueeze(-1)
        return self.cutoff_fn(dist) * self._gaussians(dist)

    def continued(self, dist: Tensor) -> Tensor:
        """The same functions, smooth beyond the cutoffs too: (...,) -> (..., K)."""
        dist = dist.unsqueeze(-1)
        return self.cutoff_fn.continued(dist) * self._gaussians(dist)

    def _gaussians(self, dist: Tensor) -> Tensor:
        return _exp(-self.betas * (torch.exp(self.alpha * (self.cutoff_lower - dist)) - self.means).square())


RADIAL_BASES = {"gauss": GaussianSmearing, "expnorm": ExpNormalSmearing}


def make_radial_basis(
    rbf_type: str,
    cutoff_lower: float,
    cutoff_upper: float,
    num_rbf: int,
    trainable: bool,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Build a radial basis from its configuration.

    Raises:
        ConfigError: For an unknown ``rbf_type``.
    """
    if rbf_type not in RADIAL_BASES:
        raise ConfigError(
            f"rbf_type: {rbf_type!r} is not available.{did_you_mean(rbf_type, RADIAL_BASES)} "
            f"Choose from {', '.join(RADIAL_BASES)}."
        )
    return RADIAL_BASES[rbf_type](cutoff_lower, cutoff_upper, num_rbf, trainable, dtype=dtype)
