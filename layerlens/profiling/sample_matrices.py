"""The gradient matrices of single samples, kept as the factors they are sums of, and what can be said without them.

Axes: b samples, g heads or groups (1 for a plain module), t tokens (or pixels), o outputs, i inputs. The gradient of
sample n is M_n = Σ_t d_t z_tᵀ for a module that multiplies, and Σ_t e(id_t) d_tᵀ for one that looks rows up; a weight
that is used both ways (tied output embeddings) has both sums. Modules called several times have their calls
concatenated along t: the sum over calls comes before the square.

The compiled kernels compute in main memory, torch on a device where tensors are there; both give the same numbers to
rounding, and on a device nothing leaves it but sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from layerlens import kernels
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")

CHUNK_BYTES = 64 * 2**20
"""Per-sample matrices are formed at most this much at a time, where forming them is the cheaper way."""


@dataclass(frozen=True)
class SampleMatrices:
    """M_n of every sample of a batch, as factors.

    Args:
        d__bgto, z__bgti: output gradients and inputs; None for a weight that is only looked up.
        ids__bt, rows__bti: looked up rows and their gradients; None for a weight that only multiplies.
    """

    d__bgto: torch.Tensor | None = None
    z__bgti: torch.Tensor | None = None
    ids__bt: torch.Tensor | None = None
    rows__bti: torch.Tensor | None = None

    @property
    def first(self) -> torch.Tensor:
        """The gradients that they are made from."""
        first = self.d__bgto if self.d__bgto is not None else self.rows__bti
        assert first is not None
        return first

    @property
    def n_samples(self) -> int:
        """Samples in the batch."""
        return len(self.first)

    def as_one(self) -> SampleMatrices:
        """M of the whole batch, Σ_n M_n, as one sample with the tokens of all."""
        d, z, ids, rows = self.d__bgto, self.z__bgti, self.ids__bt, self.rows__bti
        return SampleMatrices(
            None if d is None else d.transpose(0, 1).flatten(1, 2)[None],
            None if z is None else z.transpose(0, 1).flatten(1, 2)[None],
            None if ids is None else ids.reshape(1, -1),
            None if rows is None else rows.reshape(1, -1, rows.shape[-1]),
        )

    def squared_norms(self, threads: int) -> np.ndarray:
        """‖M_n‖²_F of every sample, float64 [b], without forming M_n."""
        total = np.zeros(self.n_samples)
        if self.d__bgto is not None and self.z__bgti is not None:
            total += _dense_norms(self.d__bgto, self.z__bgti, threads)
        if self.ids__bt is not None and self.rows__bti is not None:
            same__btt = self.ids__bt[:, :, None] == self.ids__bt[:, None, :]
            rows = self.rows__bti.to(_at_least_float32(self.rows__bti.dtype))
            total += _sum_products(rows @ rows.mT, same__btt)
            if self.d__bgto is not None and self.z__bgti is not None:
                # <Σ_t d_t z_tᵀ, Σ_s e(id_s) r_sᵀ> = Σ_{t,s} d_t[id_s] (z_t·r_s)
                d__bto, z__bti = self.d__bgto[:, 0].to(rows.dtype), self.z__bgti[:, 0].to(rows.dtype)
                index = self.ids__bt[:, None, :].expand(-1, d__bto.shape[1], -1)
                total += 2.0 * _sum_products(z__bti @ rows.mT, d__bto.gather(2, index))
        return total

    def add_sum_to(self, total__goi: torch.Tensor, chosen__b: slice | torch.Tensor | None = None) -> None:
        """Add Σ_n M_n, over all samples or the ``chosen__b``, to ``total__goi`` in place."""
        if self.d__bgto is not None and self.z__bgti is not None:
            d, z = (_rows(tensor, chosen__b) for tensor in (self.d__bgto, self.z__bgti))
            _add_product(total__goi, d, z)
        if self.ids__bt is not None and self.rows__bti is not None:
            ids = self.ids__bt if chosen__b is None else self.ids__bt[chosen__b]
            rows = self.rows__bti if chosen__b is None else self.rows__bti[chosen__b]
            total__goi[0].index_add_(0, ids.reshape(-1), rows.flatten(0, 1).to(total__goi.dtype))

    def head(self, count: int) -> dict[str, torch.Tensor]:
        """A copy of the factors of the first ``count`` samples by their names, where they are."""
        factors = {name: getattr(self, name) for name in ("d__bgto", "z__bgti", "ids__bt", "rows__bti")}
        return {name: tensor[:count].detach().clone() for name, tensor in factors.items() if tensor is not None}

    def tiles(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """M_n of all samples in pieces: (group, which outputs, [b, outputs · i]); of a matrix that only multiplies."""
        assert self.d__bgto is not None
        assert self.z__bgti is not None
        for group in range(self.d__bgto.shape[1]):
            start = 0
            for tile in _tiles(self.d__bgto[:, group], self.z__bgti[:, group]):
                rows = tile.shape[1] // self.z__bgti.shape[-1]
                yield group, slice(start, start + rows), tile
                start += rows


def join_calls(calls: Sequence[SampleMatrices]) -> SampleMatrices:
    """One for several calls of a module (or uses of a weight) with the same samples."""
    if len(calls) == 1:
        return calls[0]
    dense = [call for call in calls if call.d__bgto is not None]
    lookups = [call for call in calls if call.ids__bt is not None]

    def joined(parts: Sequence[SampleMatrices], name: str, dim: int) -> torch.Tensor | None:
        return torch.cat([getattr(part, name) for part in parts], dim=dim) if parts else None

    return SampleMatrices(
        joined(dense, "d__bgto", 2), joined(dense, "z__bgti", 2), joined(lookups, "ids__bt", 1),
        joined(lookups, "rows__bti", 1),
    )  # fmt: skip


def gram_matrix(batches: Sequence[SampleMatrices], threads: int) -> np.ndarray:
    """⟨M_n, M_m⟩ of all pairs of samples of all batches, float64 [N, N]; the batches may differ in tokens.

    Of matrices that multiply there are two exact ways, by their multiplications: pairs of tokens, N²·t²·(i+o)/2, or
    tiles of the matrices themselves, N·t·i·o + N²·i·o. Of those that are looked up, pairs of tokens with one index. A
    weight used both ways has no Gram matrix here.
    """
    if batches[0].d__bgto is None:
        return _gram_of_lookups(batches)
    d__ngto = _padded([batch.d__bgto for batch in batches if batch.d__bgto is not None])
    z__ngti = _padded([batch.z__bgti for batch in batches if batch.z__bgti is not None])
    n, groups, t, o = d__ngto.shape
    i = z__ngti.shape[-1]
    gram = np.zeros((n, n))
    for group in range(groups):
        d, z = d__ngto[:, group], z__ngti[:, group]
        if n * n * t * t * (i + o) / 2 < n * t * i * o + n * n * i * o:
            gram += kernels.ghost_gram(z, d, threads=threads) if uses_kernels(d) else gram_on_device(d, z)
        else:
            tiles = [(tile__nk @ tile__nk.T).double() for tile__nk in _tiles(d, z)]
            gram += torch.stack(tiles).sum(dim=0).cpu().numpy()
    return gram


def _gram_of_lookups(batches: Sequence[SampleMatrices]) -> np.ndarray:
    """⟨Σ_t e(id_t) r_tᵀ, Σ_s e(id_s) r_sᵀ⟩ = Σ_{t,s: id_t = id_s} r_t·r_s of all pairs of samples."""
    each = [
        (ids, rows.to(_at_least_float32(rows.dtype)))
        for batch in batches
        if batch.ids__bt is not None and batch.rows__bti is not None
        for ids, rows in zip(batch.ids__bt, batch.rows__bti, strict=True)
    ]
    gram = np.zeros((len(each), len(each)))
    for n, (ids_n, rows_n) in enumerate(each):
        for m, (ids_m, rows_m) in enumerate(each[: n + 1]):
            same = ids_n[:, None] == ids_m[None, :]
            gram[n, m] = gram[m, n] = float(((rows_n @ rows_m.T) * same).sum(dtype=torch.float64))
    return gram


def uses_kernels(tensor: torch.Tensor) -> bool:
    """Whether the kernels (and SciPy's BLAS) can read the tensor where it is."""
    return tensor.device.type == "cpu"


def sum_of_squares(rows: torch.Tensor, threads: int) -> float:
    """Sum of squares of rows [n, k], in float64, by rows."""
    if uses_kernels(rows):
        return float(kernels.row_sum_of_squares(rows.contiguous(), threads=threads).sum())
    return float(rows.square().sum(dtype=torch.float64))


def squared_norm(tensor: torch.Tensor, threads: int) -> float:
    """Sum of squares, in float64."""
    if uses_kernels(tensor):
        return kernels.gradient_energy(tensor, threads=threads)
    return float(tensor.square().sum(dtype=torch.float64))


def gram_on_device(d__nto: torch.Tensor, z__nti: torch.Tensor) -> np.ndarray:
    """What ``kernels.ghost_gram`` computes, by torch on the device of the tensors; only the Gram matrix leaves it."""
    rows = [
        ((d__nto @ one_d.mT) * (z__nti @ one_z.mT)).sum(dim=(1, 2), dtype=torch.float64)
        for one_d, one_z in zip(d__nto, z__nti, strict=True)
    ]
    return torch.stack(rows).cpu().numpy()


def _dense_norms(d__bgto: torch.Tensor, z__bgti: torch.Tensor, threads: int) -> np.ndarray:
    b, g = d__bgto.shape[:2]
    d__nto, z__nti = d__bgto.flatten(0, 1), z__bgti.flatten(0, 1)
    if uses_kernels(d__nto):
        norms = kernels.ghost_norms(z__nti, d__nto, threads=threads)
    else:
        norms = norms_on_device(d__nto, z__nti)
    return norms.reshape(b, g).sum(axis=1)


def norms_on_device(d__nto: torch.Tensor, z__nti: torch.Tensor) -> np.ndarray:
    """What ``kernels.ghost_norms`` computes, by torch on the device of the tensors; only the norms leave it."""
    wide = _at_least_float32(d__nto.dtype)
    d, z = d__nto.to(wide), z__nti.to(wide)
    if kernels.ghost_form(d.shape[1], z.shape[-1], d.shape[-1]) == "gram":
        return _sum_products(d @ d.mT, z @ z.mT)
    squares = [tile.square().sum(dim=1, dtype=torch.float64) for tile in _tiles(d, z)]
    return torch.stack(squares).sum(dim=0).cpu().numpy()


def _tiles(d__nto: torch.Tensor, z__nti: torch.Tensor) -> Iterator[torch.Tensor]:
    """Pieces [n, k] of the matrices of all samples, one after the other."""
    n, _, n_out = d__nto.shape
    step = max(1, CHUNK_BYTES // (n * z__nti.shape[-1] * d__nto.element_size()))
    for start in range(0, n_out, step):
        yield (d__nto[..., start : start + step].mT @ z__nti).flatten(1)


def _rows(tensor__bgtk: torch.Tensor, chosen__b: slice | torch.Tensor | None) -> torch.Tensor:
    return tensor__bgtk if chosen__b is None else tensor__bgtk[chosen__b]


def _add_product(total__goi: torch.Tensor, d__bgto: torch.Tensor, z__bgti: torch.Tensor) -> None:
    """total += Σ over b and t of d zᵀ, for each g."""
    d__gno, z__gni = d__bgto.transpose(0, 1).flatten(1, 2), z__bgti.transpose(0, 1).flatten(1, 2)
    if uses_kernels(d__gno):
        # A bfloat16 product of these shapes takes 1.7 times a float32 one on the CPU, and rounds the sum as well.
        d__gno, z__gni = d__gno.to(total__goi.dtype), z__gni.to(total__goi.dtype)
    if d__gno.dtype != total__goi.dtype:
        total__goi += d__gno.mT @ z__gni
    elif len(total__goi) == 1:
        total__goi[0].addmm_(d__gno[0].mT, z__gni[0])
    else:
        total__goi.baddbmm_(d__gno.mT, z__gni)


def _sum_products(one__btt: torch.Tensor, other__btt: torch.Tensor) -> np.ndarray:
    return (one__btt * other__btt).sum(dim=(1, 2), dtype=torch.float64).cpu().numpy()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[b, g, t, k] tensors one after the other along b, padded with zeros to the longest t."""
    longest = max(tensor.shape[2] for tensor in tensors)
    return torch.cat([torch.nn.functional.pad(tensor, (0, 0, 0, longest - tensor.shape[2])) for tensor in tensors]).to(
        _at_least_float32(tensors[0].dtype)
    )
