"""Random projections of gradient matrices and factors: statistics for a fraction of the cost, each with its error.

Projections are Rademacher signs from a counter-based generator, drawn from the layer's name alone: the same on every
machine, for every batch size and number of threads. With d [tokens, o] and z [tokens, i] a layer projects P = d Ψ and
Q = z Ω once, and everything here follows from them:

- the spectrum of G = Σ dᵀz from G Ω = Σ dᵀQ and Ψᵀ G = Σ Pᵀz (generalised Nyström; Tropp et al. 2017,
  arXiv:1609.00048). A sketch from one side alone loses the tail; how much this one loses is estimated from columns of
  Ω that the approximation does not see (Halko et al. 2011, section 4.3);
- a Kronecker factor A = Σ zᵀz from A Ω = Σ zᵀQ (Nyström; Tropp et al. 2017, arXiv:1706.05736), which loses exactly the
  trace that is missing;
- inner products ⟨g_n, g_m⟩ from Σ_t p_t q_tᵀ of each sample (see ``kernel_sketch``).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from layerlens import kernels
from layerlens.models import FactorSketch
from layerlens.profiling.spectra import MAX_VALUES

COLUMNS = 80
"""Columns of Ω that the approximation is made from; some more than the 64 values that are read."""

ROWS = 160
"""Columns of Ψ: twice as many, so that solving for the core does not amplify the tail."""

PROBES = 8
"""Further columns of Ω, from which the error is estimated."""


def worth_sketching(shape: tuple[int, int, int]) -> bool:
    """Whether the sketched spectrum of a (g, o, i) matrix takes fewer multiplications than the matrix itself."""
    groups, n_out, n_in = shape
    return groups == 1 and (COLUMNS + PROBES + ROWS) * (n_out + n_in) < n_out * n_in


def signs(seed_text: str, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """±1 [rows, columns] that depend on the text alone, in the dtype and on the device of ``like``."""
    seed = int.from_bytes(hashlib.sha256(seed_text.encode()).digest()[:8], "big") >> 1
    flat = np.asarray(kernels.rademacher(rows * columns, seed=seed), dtype=np.float32)
    return torch.from_numpy(flat.reshape(rows, columns)).to(like)


class Projection:
    """Ω and Ψ of one layer, drawn when they are first needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._drawn: dict[str, torch.Tensor] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def omega__ik(self, n_in: int, like: torch.Tensor) -> torch.Tensor:
        """Ω [n_in, COLUMNS + PROBES], in the dtype and on the device of ``like``."""
        return self._signs("inputs", n_in, COLUMNS + PROBES, like)

    def psi__ol(self, n_out: int, like: torch.Tensor) -> torch.Tensor:
        """Ψ [n_out, ROWS], in the dtype and on the device of ``like``."""
        return self._signs("gradients", n_out, ROWS, like)

    def of_inputs(self, z: torch.Tensor) -> torch.Tensor:
        """z Ω, [..., COLUMNS + PROBES]; of the same rows as the last time without another product."""
        if self._last is None or not _same_rows(self._last[0], z):
            self._last = z, z @ self.omega__ik(z.shape[-1], z)
        return self._last[1].view(*z.shape[:-1], -1)

    def forget(self) -> None:
        """Let go of the rows that were last projected."""
        self._last = None

    def of_gradients(self, d: torch.Tensor) -> torch.Tensor:
        """d Ψ, [..., ROWS]."""
        return d @ self.psi__ol(d.shape[-1], d)

    def _signs(self, side: str, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        if side not in self._drawn:
            self._drawn[side] = signs(f"{self.name}|{side}", rows, columns, like)
        return self._drawn[side].to(like)  # exact in every dtype


def _same_rows(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same memory, maybe in another shape; ``one`` is alive, so its address is its own."""
    return (
        one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.dtype == other.dtype
        and one.is_contiguous() and other.is_contiguous()
    )  # fmt: skip


class SpectrumSketch:
    """G Ω and Ψᵀ G of both halves of the samples, float32 or wider."""

    def __init__(self, n_out: int, n_in: int, like: torch.Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.right__hok = torch.zeros(2, n_out, COLUMNS + PROBES, dtype=dtype, device=like.device)
        self.left__hli = torch.zeros(2, ROWS, n_in, dtype=dtype, device=like.device)

    def add(
        self, half: int, d__no: torch.Tensor, z__ni: torch.Tensor, p__nl: torch.Tensor, q__nk: torch.Tensor
    ) -> None:
        """Add rows of one half: output gradients, inputs, and the projections of both."""
        wide = self.right__hok.dtype
        self.right__hok[half].addmm_(d__no.to(wide).mT, q__nk.to(wide))
        self.left__hli[half].addmm_(p__nl.to(wide).mT, z__ni.to(wide))

    def result(self, n_samples: list[int], projection: Projection) -> tuple[np.ndarray, float]:
        """The split-half spectrum (see ``split_half_spectrum``), and the relative error ‖G − Ĝ‖_F / ‖G‖_F of a half.

        No singular value of a half is off by more than its ‖G − Ĝ‖_F (Weyl).
        """
        like = self.right__hok.new_empty(0, dtype=torch.float64)
        omega__ik = projection.omega__ik(self.left__hli.shape[2], like)
        psi__ol = projection.psi__ol(self.right__hok.shape[1], like)
        parts, errors = [], []
        for half, count in enumerate(n_samples):
            right, left = self.right__hok[half].double() / count, self.left__hli[half].double() / count
            basis__oc, _ = torch.linalg.qr(right[:, :COLUMNS])
            rotation__lc, triangle__cc = torch.linalg.qr(psi__ol.mT @ basis__oc)  # of full rank: twice as many rows
            core__ci = torch.linalg.solve_triangular(triangle__cc, rotation__lc.mT @ left, upper=True)
            parts.append((basis__oc, core__ci))
            probes__op = right[:, COLUMNS:]
            missed = probes__op - basis__oc @ (core__ci @ omega__ik[:, COLUMNS:])
            norm = float(probes__op.square().sum())
            errors.append(float(missed.square().sum()) / norm if norm > 0.0 else 0.0)
        estimates = []
        for (basis, core), (other_basis, other_core) in (parts, parts[::-1]):
            left_c, values, right_t = torch.linalg.svd(core, full_matrices=False)
            to_half = (basis @ left_c).mT @ other_basis @ (other_core @ right_t.mT)
            estimates.append(values * to_half.diagonal())
        both = (estimates[0] + estimates[1]) / 2
        spectrum = both.sort(descending=True).values[:MAX_VALUES].cpu().numpy().copy()
        return spectrum, float(np.sqrt(np.mean(errors)))


class FactorSum:
    """A Ω = Σ zᵀ(z Ω), and tr A."""

    def __init__(self) -> None:
        self.total__ik: torch.Tensor | None = None
        self.trace = 0.0

    def add(self, rows__ni: torch.Tensor, projected__nk: torch.Tensor, squares: float) -> None:
        """Add rows, their projection and the sum of their squares."""
        columns = min(COLUMNS, projected__nk.shape[1])
        wide = torch.promote_types(rows__ni.dtype, torch.float32)
        if self.total__ik is None:
            self.total__ik = torch.zeros(rows__ni.shape[1], columns, dtype=wide, device=rows__ni.device)
        self.total__ik.addmm_(rows__ni.to(wide).mT, projected__nk[:, :columns].to(wide))
        self.trace += squares

    def result(self, signs__ik: torch.Tensor, count: int) -> FactorSketch:
        """The Nyström approximation of A / count by its eigenvalues and vectors."""
        assert self.total__ik is not None
        total, omega = self.total__ik.double() / count, signs__ik[:, : self.total__ik.shape[1]].double()
        # Shifted by some rounding errors of the sum, so that rounding leaves no eigenvalue below 0.
        shift = 10.0 * torch.finfo(self.total__ik.dtype).eps * float(torch.linalg.matrix_norm(total, 2))
        shifted = total + shift * omega
        core = omega.mT @ shifted
        core_values, core_vectors = torch.linalg.eigh((core + core.mT) / 2)
        usable = core_values > 1e-3 * shift  # fewer than the columns where the factor has fewer features
        half = shifted @ (core_vectors[:, usable] * core_values[usable].rsqrt())
        vectors, singular, _ = torch.linalg.svd(half, full_matrices=False)
        values = (singular.square() - shift).clamp_min(0.0)
        trace = self.trace / count
        error = max(0.0, 1.0 - float(values.sum()) / trace) if trace > 0.0 else 0.0
        return FactorSketch(values.cpu().numpy().copy(), vectors.float().cpu().numpy().copy(), trace, error)
