"""Fourier transforms, windows, mel filters, and everything random."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir
import torch

from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, Value, ints

HALVES = (torch.float16, torch.bfloat16)


def _complex(x: torch.Tensor) -> torch.Tensor:
    """[..., 1] or [..., 2] (real, imaginary) -> [...]."""
    x = x.float() if x.dtype in HALVES else x
    return x[..., 0] if x.shape[-1] == 1 else torch.complex(x[..., 0], x[..., 1])


def _transform(signal: torch.Tensor, length: int, axis: int, onesided: bool) -> torch.Tensor:
    """[...] -> [..., 2]."""
    if onesided and not signal.is_complex():
        return torch.view_as_real(torch.fft.rfft(signal, length, axis))
    spectrum = torch.fft.fft(signal, length, axis)
    return torch.view_as_real(spectrum.narrow(axis, 0, length // 2 + 1) if onesided else spectrum)


def _dft_in(node: Node) -> Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor]:
    inverse, onesided = bool(node.get("inverse", 0)), bool(node.get("onesided", 0))

    def run(x: torch.Tensor, length: torch.Tensor | None, axis: int) -> torch.Tensor:
        axis %= x.ndim
        signal = _complex(x)
        if length is not None:
            (size,) = ints(length)
        else:
            size = 2 * (x.shape[axis] - 1) if inverse and onesided else x.shape[axis]
        if not inverse:
            return _transform(signal, size, axis, onesided).to(x.dtype)
        if onesided:
            whole: torch.Tensor = torch.fft.irfft(signal, size, axis)
            return whole[..., None].to(x.dtype)
        # The inverse of a real signal is a conjugate that torch has not written out yet.
        return torch.view_as_real(torch.fft.ifft(signal, size, axis).resolve_conj()).to(x.dtype)

    return run


def _dft_17(node: Node) -> Run:
    axis, transform = int(node.get("axis", 1)), _dft_in(node)
    return lambda x, length=None: transform(x, length, axis)


def _dft(node: Node) -> Run:
    transform = _dft_in(node)
    return lambda x, length=None, axis=None: transform(x, length, -2 if axis is None else ints(axis)[0])


def _stft(node: Node) -> Run:
    """[N, length, 1 or 2] -> [N, frames, bins, 2]; only whole frames."""
    onesided = bool(node.get("onesided", 1))

    def run(
        x: torch.Tensor,
        frame_step: torch.Tensor,
        window: torch.Tensor | None = None,
        frame_length: torch.Tensor | None = None,
    ) -> torch.Tensor:
        length = x.shape[1] if window is None else window.shape[0]
        if frame_length is not None:
            (length,) = ints(frame_length)
        frames = _complex(x).unfold(1, length, ints(frame_step)[0])
        if window is not None:
            frames = frames * (window.float() if window.dtype in HALVES else window)
        return _transform(frames, length, 2, onesided).to(x.dtype)

    return run


def _window(make: Callable[..., torch.Tensor]) -> Callable[[Node], Run]:
    def convert(node: Node) -> Run:
        dtype, periodic = node.dtype("output_datatype"), bool(node.get("periodic", 1))
        exact = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        return lambda size: make(ints(size)[0], periodic, dtype=exact).to(dtype)

    return convert


def _hamming(size: int, periodic: bool, dtype: torch.dtype) -> torch.Tensor:
    return torch.hamming_window(size, periodic, 25 / 46, 21 / 46, dtype=dtype)


def _mel_weights(node: Node) -> Run:
    """[bins of a one-sided spectrum, mel bins]: triangles whose corners are whole bins."""
    dtype = node.dtype("output_datatype")

    def run(
        mel_bins: torch.Tensor, dft_length: torch.Tensor, rate: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor
    ) -> torch.Tensor:
        (bins,), (length,) = ints(mel_bins), ints(dft_length)
        low, high = (2595 * math.log10(1 + float(edge) / 700) for edge in (lower, upper))
        # The step that the standard defines leaves the upper edge one step short.
        mels = low + torch.arange(bins + 2, dtype=torch.float64) * ((high - low) / (bins + 2))
        corners = ((length + 1) * 700 * (10 ** (mels / 2595) - 1) / int(rate)).floor()
        left, centre, right = corners[:-2], corners[1:-1], corners[2:]
        bin_ = torch.arange(length // 2 + 1, dtype=torch.float64)[:, None]
        rising = torch.where(left == centre, (bin_ == centre).double(), (bin_ - left) / (centre - left))
        falling = (right - bin_) / (right - centre)
        inside = (bin_ >= left) & (bin_ <= centre)
        weights = torch.where(inside, rising, torch.where((bin_ > centre) & (bin_ < right), falling, 0.0))
        return weights.to(dtype)

    return run


class _Noise:
    """Random numbers of one node: torch's own generator, or with a seed one for every device that it runs on."""

    def __init__(self, node: Node) -> None:
        seed = node.get("seed")
        # Seeds are floats in ONNX; their bits tell 0.5 from 0.25.
        self.seed = None if seed is None else int.from_bytes(torch.tensor(float(seed)).numpy().tobytes(), "little")
        self.generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator | None:
        if self.seed is None:
            return None
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.rand(shape, dtype=dtype, device=device, generator=self.on(device))

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=self.on(device))


def _normal(node: Node) -> Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]:
    noise, mean, scale = _Noise(node), float(node.get("mean", 0.0)), float(node.get("scale", 1.0))
    return lambda shape, dtype, device: noise.normal(shape, dtype, device) * scale + mean


def _uniform(node: Node) -> Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]:
    noise, low, high = _Noise(node), float(node.get("low", 0.0)), float(node.get("high", 1.0))
    return lambda shape, dtype, device: noise.uniform(shape, dtype, device) * (high - low) + low


def _random(make: Callable[[Node], Callable[..., torch.Tensor]]) -> Callable[[Node], Run]:
    """Of a shape that an attribute names."""

    def convert(node: Node) -> Run:
        draw, dtype = make(node), node.dtype("dtype")
        shape = tuple(int(size) for size in node.get("shape"))
        return lambda: draw(shape, dtype, torch.device("cpu"))

    return convert


def _random_like(make: Callable[[Node], Callable[..., torch.Tensor]]) -> Callable[[Node], Run]:
    """Of the input's shape and, unless an attribute names another, type."""

    def convert(node: Node) -> Run:
        draw, dtype = make(node), node.dtype("dtype") if node.get("dtype") is not None else None
        return lambda x: draw(tuple(x.shape), x.dtype if dtype is None else dtype, x.device)

    return convert


def _bernoulli(node: Node) -> Run:
    noise, dtype = _Noise(node), node.dtype("dtype") if node.get("dtype") is not None else None

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.bernoulli(x.detach(), generator=noise.on(x.device)).to(x.dtype if dtype is None else dtype)

    return run


def _multinomial(node: Node) -> Run:
    noise, dtype, count = _Noise(node), node.dtype("dtype", ir.DataType.INT32), int(node.get("sample_size", 1))

    def run(x: torch.Tensor) -> torch.Tensor:
        chances = x.detach().float().softmax(-1)
        return torch.multinomial(chances, count, True, generator=noise.on(x.device)).to(dtype)

    return run


def _dropped(x: torch.Tensor, ratio: float, noise: _Noise) -> tuple[torch.Tensor, torch.Tensor]:
    mask = noise.uniform(tuple(x.shape), torch.float32, x.device) >= ratio
    return x * mask * (1 / (1 - ratio) if ratio < 1 else 0.0), mask


def _dropout(node: Node) -> Run:
    """Opset 12 and later: ratio and training mode are inputs."""
    noise, single = _Noise(node), len(node.output_types) == 1

    def run(x: torch.Tensor, ratio: torch.Tensor | None = None, training: torch.Tensor | None = None) -> Value:
        if training is None or not bool(training):
            return x if single else (x, torch.ones_like(x, dtype=torch.bool))
        share = 0.5 if ratio is None else float(ratio)
        result = (x, torch.ones_like(x, dtype=torch.bool)) if share == 0 else _dropped(x, share, noise)
        return result[0] if single else result

    return run


def _dropout_7(node: Node) -> Run:
    """Nothing is dropped; the mask has the input's type before opset 10."""
    if len(node.output_types) == 1:
        return lambda x: x
    return lambda x: (x, torch.ones_like(x, dtype=x.dtype if node.version < 10 else torch.bool))


def _dropout_1(node: Node) -> Run:
    """Drops unless `is_test` is set; the values that stay are scaled up."""
    if node.get("is_test", 0):
        return _dropout_7(node)
    noise, ratio, single = _Noise(node), float(node.get("ratio", 0.5)), len(node.output_types) == 1

    def run(x: torch.Tensor) -> Value:
        y, mask = _dropped(x, ratio, noise)
        return y if single else (y, mask.to(x.dtype))

    return run


TABLE: Table = {
    ("Bernoulli", 15): Op(_bernoulli),
    ("BlackmanWindow", 17): Op(_window(torch.blackman_window), host=(0,)),
    ("DFT", 17): Op(_dft_17, host=(1,)),
    ("DFT", 20): Op(_dft, host=(1, 2)),
    ("Dropout", 1): Op(_dropout_1),
    ("Dropout", 7): Op(_dropout_7),
    ("Dropout", 12): Op(_dropout, host=(1, 2)),
    ("HammingWindow", 17): Op(_window(_hamming), host=(0,)),
    ("HannWindow", 17): Op(_window(torch.hann_window), host=(0,)),
    ("MelWeightMatrix", 17): Op(_mel_weights, host=(0, 1, 2, 3, 4)),
    ("Multinomial", 7): Op(_multinomial),
    ("RandomNormal", 1): Op(_random(_normal)),
    ("RandomNormalLike", 1): Op(_random_like(_normal)),
    ("RandomUniform", 1): Op(_random(_uniform)),
    ("RandomUniformLike", 1): Op(_random_like(_uniform)),
    ("STFT", 17): Op(_stft, host=(1, 3)),
}
