"""The constant matrices of ``convolution.py``, and how they are applied: see there for the algorithm and the shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .workers import empty, room, share

__all__ = ["MOST_HELD", "Kernel", "Transforms", "held", "transforms"]

TILE = 16  # outputs of a tile along an axis, at most
TILES = 96  # in a round, about: what is in between takes memory, but the kernels are transformed in every round
SPECTRUM = 2**19  # elements of B w at a time, about: they stay in the cache
MOST_HELD = 2**28  # elements of B w that are held for evaluation: 1 GiB in float32


@dataclass(frozen=True)
class Tile:
    """A tile along an axis: pixels, and the matrix ``[L, pixels]`` between them and their real Fourier transform."""

    start: int
    stop: int
    matrix: Tensor


class _Axis:
    """How n pixels are cut into tiles, whose inputs reach ``half`` farther than their outputs."""

    def __init__(self, n: int, half: int, dtype: torch.dtype):
        self.n, self.half, self.dtype = n, half, dtype
        self.size = math.ceil(n / math.ceil(n / TILE))  # all tiles the same, but the last
        self.starts = range(0, n, self.size)
        self.origin = half if len(self.starts) > 1 else 0  # of the first output of a tile in the transform
        L = self.size + self.origin + half
        self.length = L = max(4, L + L % 2)
        f = torch.tensor([0, L // 2, *range(1, L // 2)])
        angles = (f[:, None] * torch.arange(L) % L).double() * (2 * math.pi / L)
        self.dft = torch.cat([angles.cos(), angles[2:].sin()])  # [L, L]; 0 and L/2 have no sine

    def tiles(self, more: int, weight: float = 1.0, ends: float = 1.0) -> list[Tile]:
        """``more`` pixels than the outputs on either side, as far as they are in the map; the matrix times ``weight``,
        for the frequencies 0 and L/2 times ``ends``.
        """
        matrix, tiles = self.dft * weight, []
        matrix[:2] = self.dft[:2] * ends
        for first in self.starts:
            start, stop = max(0, first - more), min(self.n, first + self.size + more)
            zero = first - self.origin
            tiles.append(Tile(start, stop, matrix[:, start - zero : stop - zero].to(self.dtype).contiguous()))
        return tiles

    def of_kernel(self, k: int) -> Tensor:
        """``[L, k]``. The kernel is correlated with x, so it lies in the transform from its last tap to its first."""
        return self.dft[:, (k // 2 - torch.arange(k)) % self.length]


class Transforms:
    """The matrices A, B and D for maps of H x W pixels and kernels that reach ``half`` pixels."""

    def __init__(self, H: int, W: int, half: int, dtype: torch.dtype):
        self.rows, self.columns = rows, columns = _Axis(H, half, dtype), _Axis(W, half, dtype)
        self.area = rows.length * columns.length
        # The columns have the real and the imaginary part of a frequency one after the other: "two planes".
        middle = range(2, columns.length // 2 + 1)
        columns.dft = columns.dft[[0, 1, *(row for f in middle for row in (f, f + len(middle)))]]
        self.frequencies = [slice(2 * f - 2, 2 * f) for f in middle] + [slice(0, 1), slice(1, 2)]
        self.x = _Side(columns.tiles(half), {planes: rows.tiles(half) for planes in (1, 2)}, columns.length, True)
        real, complex_ = (  # an inverse transform to real numbers has each frequency but the ends twice
            lambda axis: axis.tiles(0, 2 / axis.length, 1 / axis.length),
            lambda axis: axis.tiles(0, 1 / axis.length, 1 / axis.length),
        )
        self.y = _Side(real(columns), {1: real(rows), 2: complex_(rows)}, columns.length, False)

    @cache  # noqa: B019 (transforms are few, and stay)
    def of_kernel(self, k: int) -> tuple[Tensor, dict[int, Tensor]]:
        """B for k x k taps: ``[L, k]`` along the columns, and by planes ``[R, planes * k]`` along the rows."""
        columns, rows = self.columns.of_kernel(k), self.rows.of_kernel(k)
        along_rows = {}
        for planes in (1, 2):
            waves = torch.einsum("lk,pq->plqk", rows, torch.eye(planes, dtype=rows.dtype)).flatten(2)
            matrix = _combine(waves, waves.new_empty(_products(len(rows), planes), planes * k), True)
            both, a, b = (one.clone() for one in _thirds(matrix, planes, True))
            for one, value in zip(_thirds(matrix, planes, True), (a, b - a, -both), strict=True):
                one.copy_(value)
            along_rows[planes] = matrix.to(self.rows.dtype)
        return columns.to(self.columns.dtype), along_rows

    def rounds(self, N: int) -> Iterator[slice]:
        """The samples, so many at a time that they make about ``TILES`` tiles."""
        count = math.ceil(N / max(1, TILES // (len(self.rows.starts) * len(self.columns.starts))))
        size = math.ceil(N / count)
        return (slice(start, min(N, start + size)) for start in range(0, N, size))


@cache
def transforms(H: int, W: int, half: int, dtype: torch.dtype) -> Transforms:
    with torch.inference_mode(False):  # they serve training, too
        return Transforms(H, W, half, dtype)


@dataclass(frozen=True)
class _Side:
    """The transforms on the side of x, or the transposes of those on the side of y.

    ``gather`` and ``encode`` go from pixels to the spectrum, ``decode`` and ``scatter`` are their transposes: forward
    goes there on the side of x and back on that of y, backward the other way round.
    """

    columns: list[Tile]
    rows: dict[int, list[Tile]]  # by the planes of a column frequency
    length: int  # L of the columns
    of_x: bool  # whose tiles overlap

    def gather(self, image: Tensor, name: str) -> Tensor:
        """``columns [L, H, J, n, C]`` of ``image [n, C, H, W]``."""
        n, C, H, _ = image.shape
        columns = room(name, image.dtype, self.length, H, len(self.columns), n, C)

        def row(h: int) -> None:
            pixels = image.flatten(0, 1)[:, h]
            for j, tile in enumerate(self.columns):
                torch.mm(tile.matrix, pixels[:, tile.start : tile.stop].T, out=columns[:, h, j].flatten(1))

        share(row, range(H))
        return columns

    def scatter(self, columns: Tensor, image: Tensor) -> None:
        """Into ``image``; tiles that overlap are added to what is there."""

        def row(h: int) -> None:
            pixels = image.flatten(0, 1)[:, h]
            for j, tile in enumerate(self.columns):
                part = pixels[:, tile.start : tile.stop]
                part.addmm_(columns[:, h, j].flatten(1).T, tile.matrix, beta=int(self.of_x))

        share(row, range(columns.shape[1]))

    def encode(self, columns: Tensor, frequency: slice, name: str) -> Tensor:
        """The spectrum ``[R, I, J, n, C]`` of one column frequency."""
        planes = columns[frequency]
        tiles = self.rows[len(planes)]
        waves = room("waves", columns.dtype, len(planes), len(tiles[0].matrix), len(tiles), *columns.shape[2:])
        for i, tile in enumerate(tiles):
            for wave, plane in zip(waves, planes, strict=True):
                torch.mm(tile.matrix, plane[tile.start : tile.stop].flatten(1), out=wave[:, i].flatten(1))
        return _combine(
            waves, room(name, columns.dtype, _products(waves.shape[1], len(planes)), *waves.shape[2:]), self.of_x
        )

    def decode(self, spectrum: Tensor, columns: Tensor, frequency: slice) -> None:
        """Into ``columns``; overwrites ``spectrum``."""
        planes = columns[frequency]
        tiles = self.rows[len(planes)]
        waves = room("waves", columns.dtype, len(planes), len(tiles[0].matrix), *spectrum.shape[1:])
        _combine_transposed(spectrum, waves, self.of_x)
        if self.of_x:
            planes.zero_()
        for i, tile in enumerate(tiles):
            for wave, plane in zip(waves, planes, strict=True):
                part = plane[tile.start : tile.stop].flatten(1)
                part.addmm_(tile.matrix.T, wave[:, i].flatten(1), beta=int(self.of_x))


def _products(L: int, planes: int) -> int:
    """R of a column frequency. A real one (one plane) has L/2 + 1 row frequencies; the outer two take one product."""
    return 3 * L if planes == 2 else 2 + 3 * (L // 2 - 1)


def _thirds(spectrum: Tensor, planes: int, of_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``a + b``, a and b in a spectrum ``[R, ...]``; on the side of y it is b that meets the kernel's d - c."""
    both, second, third = spectrum[0 if planes == 2 else 2 :].chunk(3)
    return (both, second, third) if of_x else (both, third, second)


def _combine(waves: Tensor, spectrum: Tensor, of_x: bool) -> Tensor:
    """The spectrum from the cosines and sines along the rows, ``waves [planes, L, ...]``."""
    planes, ends = len(waves), waves.shape[1] // 2 + 1
    cos, sin = waves[:, :ends], waves[:, ends:]
    both, a, b = _thirds(spectrum, planes, of_x)
    if planes == 1:
        spectrum[:2] = cos[0, :2]
        a.copy_(cos[0, 2:])
        torch.neg(sin[0], out=b)
    else:  # of complex numbers also the frequencies -1, -2, ...: they come after the others
        a[:2], b[:2] = cos[:, :2]
        torch.add(cos[0, 2:], sin[1], out=a[2:ends])
        torch.sub(cos[0, 2:], sin[1], out=a[ends:])
        torch.sub(cos[1, 2:], sin[0], out=b[2:ends])
        torch.add(cos[1, 2:], sin[0], out=b[ends:])
    torch.add(a, b, out=both)
    return spectrum


def _combine_transposed(spectrum: Tensor, waves: Tensor, of_x: bool) -> None:
    planes, ends = len(waves), waves.shape[1] // 2 + 1
    cos, sin = waves[:, :ends], waves[:, ends:]
    both, a, b = _thirds(spectrum, planes, of_x)
    a += both
    b += both
    if planes == 1:
        cos[0, :2] = spectrum[:2]
        cos[0, 2:] = a
        torch.neg(b, out=sin[0])
    else:
        cos[0, :2], cos[1, :2] = a[:2], b[:2]
        torch.add(a[2:ends], a[ends:], out=cos[0, 2:])
        torch.sub(a[2:ends], a[ends:], out=sin[1])
        torch.add(b[2:ends], b[ends:], out=cos[1, 2:])
        torch.sub(b[ends:], b[2:ends], out=sin[0])


# Of a weight, from an evaluation to the next training step: the transforms, its values, and B w by column frequency.
held = WeakIdKeyDictionary()


class Kernel:
    """B w of one branch, for one column frequency at a time and some of its R products; and the gradient of w.

    Args:
        t: the transforms.
        weight: ``[K, C, k, k]``.
        hold: in evaluation, B w for all frequencies is kept for the next time that the weight has these values.
    """

    def __init__(self, t: Transforms, weight: Tensor, hold: bool = False):
        self.t, self.weight = t, weight
        self.K, self.C, self.k, _ = weight.shape
        self.columns, self.rows = t.of_kernel(self.k)
        self.spectra: dict[int, Tensor] = {}
        if hold:
            self._hold()
        if not self.spectra:
            self.by_column = weight.permute(3, 2, 0, 1).reshape(self.k, -1)  # [k, k * K * C]

    def _hold(self) -> None:
        t, values, self.spectra = held.get(self.weight, (None, None, {}))
        if t is self.t and torch.equal(values, self.weight):
            return
        held.pop(self.weight, None)
        products = sum(_products(self.t.rows.length, f.stop - f.start) for f in self.t.frequencies)
        others = sum(one.numel() for _, _, spectra in held.values() for one in spectra.values())
        self.spectra = {}
        if others + products * self.K * self.C <= MOST_HELD:
            one = Kernel(self.t, self.weight)
            whole = share(lambda f: torch.cat([part.clone() for _, part in one.spectrum(f)]), self.t.frequencies)
            self.spectra = {f.start: one for f, one in zip(self.t.frequencies, whole, strict=True)}
            held[self.weight] = self.t, self.weight.detach().clone(), self.spectra

    def spectrum(self, frequency: slice) -> Iterator[tuple[slice, Tensor]]:
        """Some of R at a time, and of these B w, ``[part, K, C]``."""
        if self.spectra:
            yield slice(None), self.spectra[frequency.start]
            return
        columns = self.columns[frequency]  # [planes, k]
        taps = room("taps", self.weight.dtype, len(columns), self.by_column.shape[1])
        torch.mm(columns, self.by_column, out=taps)
        matrix = self.rows[len(columns)]
        size = math.ceil(len(matrix) / math.ceil(len(matrix) * self.K * self.C / SPECTRUM))
        for start in range(0, len(matrix), size):
            part = slice(start, min(len(matrix), start + size))
            spectrum = room("B w", self.weight.dtype, part.stop - start, self.K, self.C)
            torch.mm(matrix[part], taps.view(matrix.shape[1], -1), out=spectrum.flatten(1))
            yield part, spectrum

    def empty_gradient(self, frequency: slice) -> Tensor:
        """For :meth:`add_part`: the gradient of the taps of one column frequency, ``[planes * k, K * C]``."""
        return empty(self.weight.dtype, (frequency.stop - frequency.start) * self.k, self.K * self.C)

    def add_part(self, grad_taps: Tensor, part: slice, grad: Tensor) -> None:
        """The gradient of a part of :meth:`spectrum`; the first part comes first."""
        matrix = self.rows[len(grad_taps) // self.k][part]
        grad_taps.addmm_(matrix.T, grad.flatten(1), beta=int(part.start > 0))

    def add_gradient(self, grad_taps: Tensor, frequency: slice) -> None:
        """All of one column frequency."""
        if not hasattr(self, "grad"):
            self.grad = torch.zeros_like(self.by_column)
        self.grad.addmm_(self.columns[frequency].T, grad_taps.view(frequency.stop - frequency.start, -1))

    def gradient(self) -> Tensor:
        """Of the weight."""
        return self.grad.view(self.k, self.k, self.K, self.C).permute(2, 3, 1, 0).contiguous()
