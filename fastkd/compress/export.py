"""What users run: ONNX, int8, and what networks cost when they are measured."""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import measure
from ..checkpoint import replace
from ..population import export_onnx

__all__ = ["compare", "predict", "to_int8", "to_onnx"]

BATCHES = (1, 64)
SECONDS = 2.0  # of timing, per batch size
TOLERANCE = 1e-3  # of the largest logit, between ONNX and torch


def compare(full: nn.Module, small: nn.Module, example_input: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """What two networks cost: parameters, macs (of one image), bytes (of their tensors), and by batch size latency_ms
    (the median of forward passes, those of the two in turn, so that a busy machine delays both) and peak_memory_mb
    (see :func:`fastkd.measure.cost`)."""
    networks, out = (full, small), []
    for model in networks:
        one = measure.cost(model, (example_input,), repeats=1)
        state = model.state_dict().values()
        out.append({"parameters": one["parameters"], "macs": round(1e6 * one["mmacs"]),
                    "bytes": sum(x.nbytes for x in state), "latency_ms": {}, "peak_memory_mb": {}})
    for batch in BATCHES:
        x = example_input.expand(batch, *example_input.shape[1:]).contiguous()
        with torch.no_grad():
            times = _in_turn([partial(model, x) for model in networks])
        for costs, model, milliseconds in zip(out, networks, times, strict=True):
            costs["latency_ms"][str(batch)] = milliseconds
            costs["peak_memory_mb"][str(batch)] = measure.cost(model, (x,), repeats=1)["peak_memory_mb"]
    return out[0], out[1]


def to_onnx(model: nn.Module, path: Path, example_input: Tensor) -> dict[str, Any]:
    """Writes a network on the CPU as ONNX, for any number of images, whole or not at all.

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
        with _quiet():
            export_onnx(model, part, example_input)
        generator = torch.Generator().manual_seed(0)
        for n in (1, 3):
            x = torch.randn(n, *example_input.shape[1:], generator=generator)
            with torch.no_grad():
                expected = model(x)
            largest = float(expected.abs().max().clamp(min=1e-12))
            difference = max(difference, float((predict(part, x) - expected).abs().max()) / largest)
        if not difference <= TOLERANCE:
            raise ArithmeticError(f"the ONNX file of {type(model).__name__} gives logits that differ by "
                                  f"{difference:.2g} of the largest one from torch's; at most {TOLERANCE} is allowed")

    replace(path, write)
    return {**_costs(path, example_input), "max_difference": difference}


def to_int8(path: Path, quantised: Path, calibration: Tensor) -> dict[str, Any]:
    """Weights (per channel) and activations of an ONNX file in int8, with onnxruntime's static quantisation; the file
    appears whole or not at all.

    Args:
        calibration: float32 [n, C, H, W], images of the training part, from which the ranges are taken.

    Returns:
        bytes, and latency_ms by batch size.
    """
    _need("onnx", "onnxruntime")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration.split(32))

        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(self.batches, None)
            return None if x is None else {"images": x.numpy()}

    def write(part: Path) -> None:
        with tempfile.TemporaryDirectory(dir=quantised.parent, prefix=".int8.") as folder, _quiet():
            ready = Path(folder) / "ready.onnx"
            quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
            quantization.quantize_static(str(ready), str(part), Reader(), quant_format=quantization.QuantFormat.QDQ,
                                         per_channel=True, weight_type=quantization.QuantType.QInt8,
                                         activation_type=quantization.QuantType.QUInt8)

    replace(quantised, write)
    return _costs(quantised, calibration[:1])


def predict(path: Path, x: Tensor, batch: int = 250) -> Tensor:
    """Logits [N, classes] of images float32 [N, C, H, W], through onnxruntime."""
    session = _session(path)
    return torch.cat([torch.from_numpy(session.run(None, {"images": piece.numpy()})[0]) for piece in x.split(batch)])


def _costs(path: Path, example_input: Tensor) -> dict[str, Any]:
    session, latency = _session(path), {}
    for batch in BATCHES:
        x = example_input.expand(batch, *example_input.shape[1:]).contiguous().numpy()
        [latency[str(batch)]] = _in_turn([partial(session.run, None, {"images": x})])
    return {"bytes": path.stat().st_size, "latency_ms": latency}


def _in_turn(calls: list[Callable[[], Any]]) -> list[float]:
    """Milliseconds of each, the medians of at least three rounds; the first one does not count."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + SECONDS
    while len(times[0]) < 4 or (time.perf_counter() < end and len(times[0]) < 200):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own.append(time.perf_counter() - start)
    return [1e3 * statistics.median(own[1:]) for own in times]


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _need(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise ImportError(f'the export needs the package {package}: pip install "fastkd[compress]", or leave it '
                              "out with --set export.onnx=false --set export.int8=false") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that exporters and quantisers print; errors stay."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


