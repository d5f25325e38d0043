"""The convolutions of all branches of SMA at once, for a CPU: one transform of the input, products, inverse transforms.

The branches read the same input ``x [N, C, H, W]``, each with a kernel of its own odd size (stride 1, "same" padding).
Directly this takes ``sum of k^2 = 84`` multiplications a pixel and channel pair for kernels 1, 3, 5, 7; here it is 9.5
and the transforms, which do not grow with C.

**One tile, one axis.** A tile has v outputs, and with ``h = 7 // 2`` more inputs on either side it needs
``L = v + 2h`` inputs. Correlation with a kernel on these is circular, so with the discrete Fourier transform F of length L
(real input: only frequencies 0 to L/2) it is ``y = F^-1 (F x * F w)``, of which the v outputs away from the seam are right
(overlap-save). A map that is one tile needs only ``L = H + h``, since its zero padding is shared by both sides.

**Two axes, real numbers.** Along the columns F gives L real rows: real and imaginary part of L/2 + 1 column
frequencies (0 and L/2 are real). For each of them F along the rows gives complex numbers ``a + ib``, to be multiplied by
the kernel's ``c + id``. Gauss's three products do it: ``p1 = c (a + b)``, ``p2 = a (d - c)``, ``p3 = b (c + d)``, and
``p1 - p3 + i (p1 + p2)`` is the result. The sums are part of the matrices of the row transforms, so that a tile's
convolution is

    y = D ((A x) * (B w))          A: a + b, a, b      B: c, d - c, c + d      D: back to v x v pixels

with constant real matrices, and ``*`` for each of the R products on its own. Over the channels each product is a matrix
product, ``P_r [tiles N, K] = X_r [tiles N, C] W_r [C, K]``, and these are nearly all of the arithmetic. DFTs as matrix
products work for any L and run near the peak of a core, FFTs of such lengths do not.

**Backward** is the adjoint of this, with the same matrices: with ``G = D' grad_y``, ``grad_x = A' sum over s (G_s * B w_s)``
and ``grad_w_s = B' (A x * G_s)``, so all branches share the inverse transform, too. Only x and w are kept.

Shapes (I x J tiles of v x u outputs; f counts the L rows of column frequencies, R products of one of them):

    x         [N, C, H, W]
    columns   [L, H, J, N, C]           A along the columns
    X         [R, I, J, N, C]           A along the rows, one column frequency at a time
    W_s       [R, K, C]                 B along both, the same
    P_s       [R, I, J, N, K]           X_r W_s,r'
    columns   [I, L, v, J, N, K]        D along the rows
    y_s       [N, K, H, W]              D along the columns

The loop over column frequencies never holds more than one of X, W and P a thread. Threads share column frequencies, image
rows and samples, never a sum: the result does not depend on their number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from threading import Barrier, get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["applies", "branch_convolutions"]

TILE = 16  # outputs of a tile along an axis, at most: larger ones make the transforms dearer than they save products
ROWS = 128  # tiles times samples of one round, about: what all frequencies of it need stays small
PART = 2**19  # elements of the kernels' spectra that are made at once, about: they stay in the cache
LEAST_PIXELS, LEAST_VALUES = 2**10, 2**18  # of an input for which this is faster than direct convolutions


def applies(x: Tensor, weights: Sequence[Tensor], samples: int) -> bool:
    """Whether :func:`branch_convolutions` computes these convolutions, and sooner than one after the other.

    Args:
        x: ``[N, C, H, W]``.
        weights: of every branch.
        samples: the least N that x can have (T of SMA): what is chosen must not depend on the size of a batch.

    The environment variable ``SMA_CONVOLUTIONS`` overrides the choice where there is one: ``direct`` or ``shared``.
    """
    C, H, W = x.shape[1:]
    kernels = [weight.shape[-1] for weight in weights]
    possible = (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and all(
            w.dtype == x.dtype and w.shape[1:] == (C, k, k) and k % 2 for w, k in zip(weights, kernels, strict=True)
        )
        and max(kernels) > 1
    )
    choice = os.environ.get("SMA_CONVOLUTIONS", "")
    if not possible or choice in ("direct", "shared"):
        return possible and choice == "shared"
    return x.dtype == torch.float32 and samples * H * W >= LEAST_PIXELS and samples * H * W * C >= LEAST_VALUES


def branch_convolutions(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """``conv2d(x, weight, bias, padding="same")`` of every branch.

    Args:
        x: ``[N, C, H, W]``, float32 or float64, on a CPU.
        weights: of branch s ``[K_s, C, k_s, k_s]`` with odd ``k_s``.
        biases: ``[K_s]`` or None.

    Returns:
        ``[N, K_s, H, W]`` of every branch.
    """
    wide = [s for s, weight in enumerate(weights) if weight.shape[-1] > 1]
    found = iter(_SharedTransform.apply(x.contiguous(), *(weights[s] for s in wide), *(biases[s] for s in wide)))
    return tuple(
        next(found) if s in wide else nn.functional.conv2d(x, weight, bias)
        for s, (weight, bias) in enumerate(zip(weights, biases, strict=True))
    )


@dataclass(frozen=True)
class _Tile:
    """A tile along one axis: a window of pixels, and the matrix between these and what they are transformed to."""

    start: int
    stop: int
    matrix: Tensor


class _Transforms:
    """The matrices of the algorithm for maps of H x W pixels."""

    def __init__(self, H: int, W: int, half: int, dtype: torch.dtype):
        self.rows, self.columns, self.dtype = _Axis(H, half), _Axis(W, half), dtype
        self.area = self.rows.length * self.columns.length
        # Of every column frequency the real part, then the imaginary part.
        middle = range(2, self.columns.length // 2 + 1)
        self.columns.dft = self.columns.dft[[0, 1, *(row for f in middle for row in (f, f + len(middle)))]]
        self.frequencies = [slice(2 * f - 2, 2 * f) for f in middle] + [slice(0, 1), slice(1, 2)]
        self.columns_in, self.columns_out = self.columns.inputs(dtype), self.columns.outputs(dtype, real=True)
        self.rows_in = dict.fromkeys((1, 2), self.rows.inputs(dtype))
        self.rows_out = {planes: self.rows.outputs(dtype, real=planes == 1) for planes in (1, 2)}

    @cache  # noqa: B019 (transforms are few and stay)
    def of_kernel(self, k: int) -> tuple[Tensor, dict[int, Tensor]]:
        """B for a kernel of k taps an axis: ``[L, k]`` along the columns, by planes ``[R, planes k]`` along the rows."""
        columns, rows = (axis.kernel(k) for axis in (self.columns, self.rows))
        along_rows = {}
        for planes in (1, 2):
            each = torch.zeros(planes, len(rows), planes, k, dtype=torch.float64)
            for plane in range(planes):
                each[plane, :, plane] = rows
            _combine(each, into := torch.empty(_products(len(rows), planes), planes, k, dtype=torch.float64), "x")
            both, a, b = into[-(len(into) // 3) * 3 :].clone().chunk(3)
            into[-3 * len(a) :] = torch.cat([a, b - a, -both])
            along_rows[planes] = into.flatten(1).to(self.dtype)
        return columns.to(self.dtype), along_rows


class _Axis:
    """How n pixels are cut into tiles, with ``half`` more inputs than outputs on either side."""

    def __init__(self, n: int, half: int):
        count = math.ceil(n / TILE)
        self.n, self.half, self.size = n, half, math.ceil(n / count)
        self.starts = range(0, n, self.size)
        self.origin = 0 if count == 1 else half  # of a tile's first output in the transform
        self.length = self.size + half + self.origin
        self.length = max(4, self.length + self.length % 2)

        self.dft = _real_dft(self.length)

    def inputs(self, dtype: torch.dtype) -> list[_Tile]:
        """The pixels that tiles take, as far as they are in the map."""
        return [self._tile(start, self.half, self.dft.to(dtype)) for start in self.starts]

    def outputs(self, dtype: torch.dtype, real: bool) -> list[_Tile]:
        """The pixels that tiles give, with the inverse transform to ``real`` or to complex numbers, transposed."""
        weight = torch.full((self.length, 1), (2.0 if real else 1.0) / self.length, dtype=torch.float64)
        weight[:2] = 1.0 / self.length
        return [self._tile(start, 0, (self.dft * weight).to(dtype)) for start in self.starts]

    def kernel(self, k: int) -> Tensor:
        """``[L, k]``. It is correlated with the input, so it lies in the transform from its last tap to its first."""
        return self.dft[:, (k // 2 - torch.arange(k)) % self.length]

    def _tile(self, start: int, more: int, matrix: Tensor) -> _Tile:
        origin = start - self.origin
        first, last = max(0, start - more), min(self.n, start + self.size + more)
        return _Tile(first, last, matrix[:, first - origin : last - origin].contiguous())


def _real_dft(L: int) -> Tensor:
    """``[L, L]``: real parts of the frequencies 0, L/2, 1, 2, ...; then minus the imaginary parts of 1, 2, ..."""
    f = torch.tensor([0, L // 2, *range(1, L // 2)])
    angles = (f[:, None] * torch.arange(L) % L).double() * (2 * math.pi / L)
    return torch.cat([angles.cos(), angles[2:].sin()])


@cache
def _transforms(H: int, W: int, half: int, dtype: torch.dtype) -> _Transforms:
    with torch.inference_mode(False):  # for whoever comes next
        return _Transforms(H, W, half, dtype)


class _SharedTransform(torch.autograd.Function):
    """The algorithm at the top of this file and its adjoint."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        """``x`` contiguous; ``parameters``: the weights of all branches, then their biases."""
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        N, _, H, W = x.shape
        t, room = _transforms_for(x, weights), _Rooms(x.dtype)
        outputs = [_room(x.dtype, N, len(weight), H, W) for weight in weights]
        taps = _share(partial(_to_taps, t), weights)

        def multiply(columns: Tensor, results: list[Tensor], frequency: slice) -> None:
            spectrum = _encode(columns, frequency, t.rows_in, room, "X", "x")
            for kernel_taps, bias, result in zip(taps, biases, results, strict=True):
                products = room("P", *spectrum.shape[:-1], kernel_taps.shape[2])
                for part, kernel in _kernel_spectrum(t, kernel_taps, frequency, room):
                    torch.bmm(spectrum[part].flatten(1, 3), kernel.mT, out=products[part].flatten(1, 3))
                if frequency.start == 0 and bias is not None:
                    products[0] += bias * t.area
                _decode(products, result, frequency, t.rows_out, room, "y")

        for samples in _rounds(t, N):
            columns = _gather(x[samples], t, t.columns_in, room, "columns")
            results = [room(f"columns {s}", *columns.shape[:-1], len(w)) for s, w in enumerate(weights)]
            _share(partial(multiply, columns, results), t.frequencies)
            for result, output in zip(results, outputs, strict=True):
                _scatter(result, output[samples], t.columns_out)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and of ``parameters``."""
        x, *weights = ctx.saved_tensors
        present = [s for s, grad in enumerate(grads) if grad is not None]
        if not present:
            return (None,) * len(ctx.needs_input_grad)
        grads = [grads[s].contiguous() for s in present]
        t, room = _transforms_for(x, weights), _Rooms(x.dtype)
        taps = _share(partial(_to_taps, t), [weights[s] for s in present])
        grad_x = _room(x.dtype, *x.shape).zero_()
        grad_taps = [_room(x.dtype, *one.shape).zero_() for one in taps]
        grad_biases = [x.new_zeros(len(weights[s])) for s in present]

        def multiply(columns: Tensor, grad_columns: Tensor, results: list[Tensor], frequency: slice) -> None:
            spectrum = _encode(columns, frequency, t.rows_in, room, "X", "x")
            grad_spectrum = room("grad X", *spectrum.shape)
            for s, result in enumerate(results):
                grad = _encode(result, frequency, t.rows_out, room, "P", "y")
                for part, kernel in _kernel_spectrum(t, taps[s], frequency, room):
                    grad_part = grad[part].flatten(1, 3)
                    grad_spectrum[part].flatten(1, 3).baddbmm_(grad_part, kernel, beta=int(s > 0))
                    torch.bmm(grad_part.mT, spectrum[part].flatten(1, 3), out=kernel)
                    _kernel_spectrum_backward(t, kernel, grad_taps[s], frequency, part)
                if frequency.start == 0:
                    grad_biases[s] += grad[0].sum((0, 1, 2)) * t.area
            _decode(grad_spectrum, grad_columns, frequency, t.rows_in, room, "x", add=True)

        for samples in _rounds(t, len(x)):
            columns = _gather(x[samples], t, t.columns_in, room, "columns")
            grad_columns = room("grad columns", *columns.shape)
            results = [_gather(grad[samples], t, t.columns_out, room, f"columns {s}") for s, grad in enumerate(grads)]
            _share(partial(multiply, columns, grad_columns, results), t.frequencies)
            _scatter(grad_columns, grad_x[samples], t.columns_in, add=True)
        found: list[Tensor | None] = [grad_x, *[None] * (2 * len(weights))]
        for s, grad_weight, grad_bias in zip(
            present, _share(partial(_from_taps, t), grad_taps), grad_biases, strict=True
        ):
            found[1 + s], found[1 + len(weights) + s] = grad_weight, grad_bias
        return tuple(grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad, strict=True))


def _transforms_for(x: Tensor, weights: Sequence[Tensor]) -> _Transforms:
    return _transforms(*x.shape[-2:], max(weight.shape[-1] for weight in weights) // 2, x.dtype)


def _rounds(t: _Transforms, N: int) -> Iterator[slice]:
    """The samples in rounds of about ``ROWS`` tiles."""
    rounds = math.ceil(N / max(1, ROWS // (len(t.rows.starts) * len(t.columns.starts))))
    size = math.ceil(N / rounds)
    return (slice(start, min(N, start + size)) for start in range(0, N, size))


def _room(dtype: torch.dtype, *shape: int) -> Tensor:
    """``torch.empty`` by NumPy, which asks the system for large pages: several times cheaper than small ones."""
    return torch.from_numpy(np.empty(shape, np.float32 if dtype == torch.float32 else np.float64))


class _Rooms:
    """Memory for what is in between, by name and thread, used again until the call ends: fresh memory is dear."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.kept: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        key, size = (name, get_ident()), math.prod(shape)
        if key not in self.kept or len(self.kept[key]) < size:
            self.kept[key] = _room(self.dtype, size)
        return self.kept[key][:size].view(shape)


# The passes. The forward pass goes from a window of inputs to a window of outputs; backward the other way round.


def _gather(image: Tensor, t: _Transforms, tiles: Sequence[_Tile], room: _Rooms, name: str) -> Tensor:
    """``columns [L, H, J, n, C]`` of ``image [n, C, H, W]``."""
    n, C, H, _ = image.shape
    columns = room(name, t.columns.length, H, len(tiles), n, C)

    def gather(row: int) -> None:
        pixels = image.flatten(0, 1)[:, row]
        for j, tile in enumerate(tiles):
            torch.mm(tile.matrix, pixels[:, tile.start : tile.stop].T, out=columns[:, row, j].flatten(1))

    _share(gather, range(H))
    return columns


def _scatter(columns: Tensor, image: Tensor, tiles: Sequence[_Tile], add: bool = False) -> None:
    """The transpose of :func:`_gather`; ``add`` for tiles that overlap, to what is there."""

    def scatter(row: int) -> None:
        pixels = image.flatten(0, 1)[:, row]
        for j, tile in enumerate(tiles):
            pixels[:, tile.start : tile.stop].addmm_(columns[:, row, j].flatten(1).T, tile.matrix, beta=int(add))

    _share(scatter, range(columns.shape[1]))


def _encode(
    columns: Tensor, frequency: slice, by_planes: dict[int, list[_Tile]], room: _Rooms, name: str, order: str
) -> Tensor:
    """The spectrum ``[R, I, J, n, C]`` of one column frequency."""
    planes = columns[frequency]
    tiles = by_planes[len(planes)]
    waves = room("waves", len(planes), len(tiles[0].matrix), len(tiles), *columns.shape[2:])
    spectrum = room(name, _products(waves.shape[1], len(planes)), *waves.shape[2:])
    for i, tile in enumerate(tiles):
        for wave, column in zip(waves, planes, strict=True):
            torch.mm(tile.matrix, column[tile.start : tile.stop].flatten(1), out=wave[:, i].flatten(1))
    _combine(waves, spectrum, order)
    return spectrum


def _decode(
    spectrum: Tensor,
    columns: Tensor,
    frequency: slice,
    by_planes: dict[int, list[_Tile]],
    room: _Rooms,
    order: str,
    add: bool = False,
) -> None:
    """The transpose of :func:`_encode`, which overwrites ``spectrum``; ``add`` for tiles that overlap."""
    planes = columns[frequency]
    tiles = by_planes[len(planes)]
    waves = room("waves", len(planes), len(tiles[0].matrix), *spectrum.shape[1:])
    _combine_transposed(spectrum, waves, order)
    if add:
        planes.zero_()
    for i, tile in enumerate(tiles):
        for wave, column in zip(waves, planes, strict=True):
            column[tile.start : tile.stop].flatten(1).addmm_(tile.matrix.T, wave[:, i].flatten(1), beta=int(add))


def _products(L: int, planes: int) -> int:
    """R of a column frequency. A real one (one plane) has L/2 + 1 row frequencies, of which the outer two are real."""
    return 3 * L if planes == 2 else 2 + 3 * (L // 2 - 1)


def _combine(waves: Tensor, spectrum: Tensor, order: str) -> None:
    """From the real transforms along the rows ``[planes, L, ...]`` to what is multiplied, ``[R, ...]``.

    The complex numbers ``a + ib`` of the row frequencies give ``a + b``, then a and b, in the order for x or for y.
    """
    cos, sin = waves[:, : waves.shape[1] // 2 + 1], waves[:, waves.shape[1] // 2 + 1 :]
    if len(waves) == 1:
        spectrum[:2] = cos[0, :2]
        both, a, b = _in_order(spectrum[2:], order)
        a.copy_(cos[0, 2:])
        torch.neg(sin[0], out=b)
    else:
        both, a, b = _in_order(spectrum, order)
        plus, minus = slice(2, cos.shape[1]), slice(cos.shape[1], None)  # frequencies 1, 2, ... and -1, -2, ...
        a[:2], b[:2] = cos[:, :2]
        torch.add(cos[0, 2:], sin[1], out=a[plus])
        torch.sub(cos[0, 2:], sin[1], out=a[minus])
        torch.sub(cos[1, 2:], sin[0], out=b[plus])
        torch.add(cos[1, 2:], sin[0], out=b[minus])
    torch.add(a, b, out=both)


def _combine_transposed(spectrum: Tensor, waves: Tensor, order: str) -> None:
    """The transpose of :func:`_combine`, which overwrites ``spectrum``."""
    cos, sin = waves[:, : waves.shape[1] // 2 + 1], waves[:, waves.shape[1] // 2 + 1 :]
    both, a, b = _in_order(spectrum if len(waves) == 2 else spectrum[2:], order)
    a += both
    b += both
    if len(waves) == 1:
        cos[0, :2] = spectrum[:2]
        cos[0, 2:] = a
        torch.neg(b, out=sin[0])
        return
    plus, minus = slice(2, cos.shape[1]), slice(cos.shape[1], None)
    cos[0, :2], cos[1, :2] = a[:2], b[:2]
    torch.add(a[plus], a[minus], out=cos[0, 2:])
    torch.sub(a[plus], a[minus], out=sin[1])
    torch.add(b[plus], b[minus], out=cos[1, 2:])
    torch.sub(b[minus], b[plus], out=sin[0])


def _in_order(spectrum: Tensor, order: str) -> list[Tensor]:
    """Parts of ``spectrum [3 F, ...]``: a + b, a and b."""
    both, one, other = spectrum.chunk(3)
    return [both, one, other] if order == "x" else [both, other, one]


def _to_taps(t: _Transforms, weight: Tensor) -> Tensor:
    """``weight [K, C, k, k]`` transformed along the columns: ``[L, k, K, C]``."""
    K, C, k, _ = weight.shape
    taps = _room(weight.dtype, t.columns.length, k, K, C)
    torch.mm(t.of_kernel(k)[0], weight.permute(3, 2, 0, 1).reshape(k, -1), out=taps.flatten(1))
    return taps


def _from_taps(t: _Transforms, taps: Tensor) -> Tensor:
    """The transpose of :func:`_to_taps`."""
    _, k, K, C = taps.shape
    return (t.of_kernel(k)[0].T @ taps.flatten(1)).view(k, k, K, C).permute(2, 3, 1, 0).contiguous()


def _kernel_spectrum(t: _Transforms, taps: Tensor, frequency: slice, room: _Rooms) -> Iterator[tuple[slice, Tensor]]:
    """``taps`` transformed along the rows, too, for one column frequency: some of R at a time, ``[part, K, C]``."""
    planes, k, K, C = taps[frequency].shape
    matrix = t.of_kernel(k)[1][planes]
    size = math.ceil(len(matrix) / math.ceil(len(matrix) * K * C / PART))
    for start in range(0, len(matrix), size):
        part = slice(start, min(len(matrix), start + size))
        spectrum = room("W", part.stop - start, K, C)
        torch.mm(matrix[part], taps[frequency].view(planes * k, K * C), out=spectrum.flatten(1))
        yield part, spectrum


def _kernel_spectrum_backward(t: _Transforms, grad: Tensor, grad_taps: Tensor, frequency: slice, part: slice) -> None:
    """The transpose of a part of :func:`_kernel_spectrum`, added to ``grad_taps``."""
    planes, k, K, C = grad_taps[frequency].shape
    grad_taps[frequency].view(planes * k, K * C).addmm_(t.of_kernel(k)[1][planes][part].T, grad.flatten(1))


# Threads. Small products do not share well among the threads of one operation, so every thread takes operations of its
# own. Which thread takes which does not matter: no two write to the same place.


def _share(work: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
    """``work(part)`` for every part, on as many threads as torch may use."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(part) for part in parts]
    inference = torch.is_inference_mode_enabled()

    def work_without_gradient(part: Any) -> Any:  # modes belong to a thread
        with torch.inference_mode(inference), torch.no_grad():
            return work(part)

    return list(_workers(os.getpid(), threads).map(work_without_gradient, parts))


@cache
def _workers(process: int, count: int) -> ThreadPoolExecutor:
    """``count`` threads, in each of which torch uses one. A forked process needs its own."""
    started = Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # sets what torch set for the process; after that the thread has its own number
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, "convolution", start)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(count)  # the threads' setting is the default of threads that start later
    return pool
