"""Principal components of data that comes in batches (Ross et al., 2008; computed as scikit-learn does)."""

from __future__ import annotations

import torch
from torch import Tensor


class IncrementalPCA:
    """The first n components of all rows seen so far, kept as n scaled directions, a mean and a variance.

    The singular vectors are those of a randomised SVD with a fixed seed, so that the result is a function of the data.

    Attributes:
        components: (n, K), or None before the first batch.
        singular_values: (n,).
        explained_variance_ratio: (n,), of the variance of all data.
    """

    def __init__(self, n_components: int) -> None:
        self.n_components = n_components
        self.components: Tensor | None = None
        self.singular_values = torch.empty(0)
        self.explained_variance_ratio = torch.empty(0)
        self._mean = self._variance = torch.zeros((), dtype=torch.float64)
        self._seen = 0

    def partial_fit(self, x: Tensor) -> None:
        """Take in the rows of x (M, K), at least n of them, n at most K.

        Raises `ValueError` if there are too few rows or columns.
        """
        rows, columns = x.shape
        if self.n_components > min(rows, columns):
            raise ValueError(
                f"{self.n_components} components cannot be had of {rows} rows and {columns} features; lower `r` or "
                "`rho`, or use larger batches."
            )
        x, before, seen = x.float(), self._mean, self._seen
        self._count_in(x)
        if self.components is None:
            x = (x - self._mean).to(x.dtype)
        else:
            mean = x.mean(dim=0)
            shift = (torch.tensor(seen, dtype=torch.float64) / self._seen * rows).sqrt() * (before - mean)
            x = torch.vstack((self.singular_values.unsqueeze(1) * self.components, x - mean, shift))
        S, Vh = self._svd(x)
        self.explained_variance_ratio = (S.square() / (self._variance * self._seen).sum())[: self.n_components]
        self.singular_values, self.components = S[: self.n_components], Vh[: self.n_components]

    def _count_in(self, x: Tensor) -> None:
        """Mean and variance of all rows so far, in float64; in two passes over the batch, for accuracy."""
        rows, seen = x.shape[0], self._seen
        self._mean, self._variance = self._mean.to(x.device), self._variance.to(x.device)
        total, before = x.sum(dim=0, dtype=torch.float64), self._mean * seen
        centred = x - total / rows
        spread = centred.square().sum(dim=0, dtype=torch.float64)
        spread -= centred.sum(dim=0, dtype=torch.float64).square() / rows
        self._seen = seen + rows
        if seen:
            ratio = seen / rows
            spread = spread + self._variance * seen + ratio / self._seen * (before / ratio - total).square()
        self._mean, self._variance = (before + total) / self._seen, spread / self._seen

    def _svd(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(42)
            _, S, V = torch.svd_lowrank(x, q=min(2 * self.n_components, *x.shape), niter=4)
        Vh = V.mH
        largest = Vh.abs().argmax(dim=1, keepdim=True)  # whose sign decides that of the row
        return S, Vh * Vh.gather(1, largest).sign()
