"""What users run: ONNX, int8, and what networks cost when they are measured."""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._text import installs
from ..population import export_onnx
from ..runtime import measure
from ..runtime.checkpoint import replace

__all__ = ["costs", "predict", "to_int8", "to_onnx"]

BATCHES = (1, 64)
SECONDS = 2.0  # of timing, per batch size
TOLERANCE = 1e-3  # of the largest logit, between ONNX and torch


def costs(
    networks: Sequence[nn.Module], example_input: Tensor, batches: Sequence[int] = BATCHES
) -> list[dict[str, Any]]:
    """What each network costs in eval mode: parameters, macs (of one image), bytes (of its tensors), and by batch size
    latency_ms (the median of forward passes, those of all networks in turn, so that a busy machine delays all) and
    peak_memory_mb (see :func:`fastkd.runtime.measure.peak_memory`); threads.

    Args:
        example_input: [N, C, H, W] on the networks' device; its first image is the one that is repeated.
        batches: numbers of images.
    """
    out: list[dict[str, Any]] = [
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": measure.multiply_adds(model, (example_input[:1],)),
            "bytes": sum(x.nbytes for x in model.state_dict().values()),
            "latency_ms": {},
            "peak_memory_mb": {},
            "threads": torch.get_num_threads(),
        }
        for model in networks
    ]
    for batch in batches:
        x = _repeated(example_input, batch)
        for costs_of, model in zip(out, networks, strict=True):  # before the times: also the pass that warms up
            costs_of["peak_memory_mb"][str(batch)] = measure.peak_memory(model, (x,))
        with contextlib.ExitStack() as stack:
            for model in networks:
                stack.enter_context(measure.evaluating(model))
            times = _in_turn([partial(model, x) for model in networks])
        for costs_of, milliseconds in zip(out, times, strict=True):
            costs_of["latency_ms"][str(batch)] = milliseconds
    return out


def _repeated(example_input: Tensor, batch: int) -> Tensor:
    return example_input[:1].expand(batch, *example_input.shape[1:]).contiguous()


def to_onnx(model: nn.Module, path: Path, example_input: Tensor) -> dict[str, Any]:
    """Writes a network on the CPU, in eval mode, as ONNX, for any number of images, whole or not at all.

    Returns:
        bytes, latency_ms by batch size, and max_difference: of the logits of onnxruntime from torch's, relative to the
        largest logit, over batches of 1 and 3 images of noise.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ArithmeticError: the file does not compute what the network does; nothing is written.
        CheckpointError: the disk is full, or whatever else the system says.
    """
    _need("onnx", "onnxscript", "onnxruntime")
    difference = 0.0

    def write(part: Path) -> None:
        nonlocal difference
        with measure.evaluating(model):
            with _quiet():
                export_onnx(model, part, example_input)
            generator = torch.Generator().manual_seed(0)
            found = []
            for n in (1, 3):  # it is exported with two
                x = torch.randn(n, *example_input.shape[1:], generator=generator)
                expected = model(x)
                found.append((predict(part, x) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        difference = float(torch.stack(found).max())  # NaN if any is, unlike Python's max
        if not difference <= TOLERANCE:
            raise ArithmeticError(
                f"the ONNX file of {type(model).__name__} gives logits that differ by "
                f"{difference:.2g} of the largest one from torch's; at most {TOLERANCE:g} is allowed"
            )

    replace(path, write)
    return {**_costs_of_file(path, example_input), "max_difference": difference}


def to_int8(path: Path, quantised: Path, calibration: Tensor) -> dict[str, Any]:
    """Weights (per channel, of seven bits) and activations of an ONNX file in int8, with onnxruntime's static
    quantisation; the file appears whole or not at all.

    Args:
        calibration: float32 [n, C, H, W], images of the training part, from which the ranges are taken.

    Returns:
        bytes, and latency_ms by batch size.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        ValueError: there are no calibration images, or they are not float32 [n, C, H, W].
        CheckpointError: the disk is full, or whatever else the system says.
    """
    _need("onnx", "onnxruntime")
    if calibration.dtype != torch.float32 or calibration.dim() != 4 or not len(calibration):
        raise ValueError(
            "calibration must be float32 [n, C, H, W] with at least one image, got "
            f"{str(calibration.dtype).removeprefix('torch.')} {list(calibration.shape)}"
        )
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration.split(32))

        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(self.batches, None)
            return None if x is None else {"images": x.cpu().numpy()}

    def write(part: Path) -> None:
        with tempfile.TemporaryDirectory(dir=quantised.parent, prefix=".int8.") as folder, _quiet():
            ready = Path(folder) / "ready.onnx"
            quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
            # Weights of seven bits: processors without VNNI add pairs of products in 16 bits, and larger ones saturate.
            quantization.quantize_static(
                str(ready),
                str(part),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType.QUInt8,
                reduce_range=True,
            )

    replace(quantised, write)
    return _costs_of_file(quantised, calibration[:1])


def predict(path: Path, x: Tensor, batch: int = 250) -> Tensor:
    """Logits float32 [N, classes] of images float32 [N, C, H, W], through onnxruntime, with torch's number of threads.

    Args:
        batch: images at once.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: no such file.
    """
    _need("onnxruntime")
    session = _session(path)
    return torch.cat(
        [torch.from_numpy(session.run(None, {"images": piece.float().cpu().numpy()})[0]) for piece in x.split(batch)]
    )


def _costs_of_file(path: Path, example_input: Tensor) -> dict[str, Any]:
    session, latency = _session(path), {}
    for batch in BATCHES:
        x = _repeated(example_input, batch).cpu().numpy()
        [latency[str(batch)]] = _in_turn([partial(session.run, None, {"images": x})])
    return {"bytes": path.stat().st_size, "latency_ms": latency}


def _in_turn(calls: list[Callable[[], Any]]) -> list[float]:
    """Milliseconds of each, the medians of at least three rounds; the first one does not count."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + SECONDS
    while len(times[0]) < 4 or (time.perf_counter() < end and len(times[0]) < 200):
        for call, measured in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            measured.append(time.perf_counter() - start)
    return [1e3 * statistics.median(measured[1:]) for measured in times]


def _session(path: Path) -> Any:
    import onnxruntime

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _need(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ModuleNotFoundError as error:  # one that is there and broken tells what it lacks itself
            if error.name != package:
                raise
            raise ImportError(
                f"the export needs the package {package}: {installs('compress')}; or leave it "
                "out with --set export.onnx=false --set export.int8=false"
            ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that exporters and quantisers print; errors stay."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
