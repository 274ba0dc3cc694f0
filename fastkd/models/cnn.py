"""Convolutional networks to compress, with the parameter names under which their weights are published.

==================  ==========================================  =============  ==========  ===================
name                class or function                           input          parameters  names of parameters
==================  ==========================================  =============  ==========  ===================
``lenet``           :class:`LeNet`: Caffe's, 20-50-500          [N, 1, 28, 28]     431,080  its own
``alexnet``         :class:`AlexNet`                            224 x 224       61,100,840  torchvision
``vgg16``           :func:`vgg16`                               224 x 224      138,357,544  torchvision
``vgg16_cifar``     :func:`vgg16_cifar`: with batch norm        32 x 32         14,728,266  pytorch-cifar
``resnet20``        :func:`resnet20`: option-A shortcuts        32 x 32            269,722  pytorch_resnet_cifar10
``resnet56``        :func:`resnet56`                            32 x 32            853,018  pytorch_resnet_cifar10
``resnet50``        :func:`resnet50`: stride in the 3x3         224 x 224       25,557,032  torchvision
``mobilenet_v1``    :class:`MobileNetV1`                        224 x 224        4,231,976  AMC
==================  ==========================================  =============  ==========  ===================

All are called as ``model(images)`` with [N, C, H, W] and give logits [N, num_classes].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import integer, probability
from .._text import installs, suggestion
from ..runtime import tensorfile

__all__ = [
    "CNNS",
    "VGG",
    "AlexNet",
    "CifarResNet",
    "LeNet",
    "MobileNetV1",
    "ResNet",
    "build_cnn",
    "load_weights",
    "resnet20",
    "resnet50",
    "resnet56",
    "vgg16",
    "vgg16_cifar",
]


class LeNet(nn.Module):
    """Caffe's LeNet for MNIST: 20 and 50 filters of 5 x 5, 500 hidden units."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))
        return logits


class AlexNet(nn.Module):
    """AlexNet in one column (arXiv:1404.5997), as in torchvision."""

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2),
            nn.ReLU(True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(True),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


class VGG(nn.Module):
    """The convolutions of VGG-16 (arXiv:1409.1556) and what follows them.

    Args:
        batch_norm: after every convolution.
        positions: the last feature maps [512, h, w] are averaged to this size before the classifier.
        classifier: takes [N, 512 * positions ** 2].
    """

    WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: max pooling

    def __init__(self, batch_norm: bool, positions: int, classifier: nn.Module) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in self.WIDTHS:
            if width == 0:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(True))
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(positions)
        self.classifier = classifier
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def vgg16(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-16 without batch normalisation, as in torchvision: three linear layers after the convolutions."""
    return VGG(
        False,
        7,
        nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        ),
    )


def vgg16_cifar(num_classes: int = 10) -> VGG:
    """With batch normalisation and one linear layer as classifier, as is common for CIFAR."""
    return VGG(True, 1, nn.Linear(512, num_classes))


class OptionA(nn.Module):
    """The shortcut without parameters (arXiv:1512.03385): every second position, and zeros for the channels
    that are new; [N, C, H, W] -> [N, C + 2 * pad, H / 2, W / 2]."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 and a shortcut; [N, channels, H, W] -> [N, width, H / stride, W / stride]."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else OptionA((width - channels) // 2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The residual networks of 6 * blocks + 2 layers for CIFAR (arXiv:1512.03385), with option-A shortcuts."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        _initialise(self)

    @staticmethod
    def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(channels, width, stride), *(BasicBlock(width, width, 1) for _ in range(blocks - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 for CIFAR: three blocks in each of three stages."""
    return CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet-56 for CIFAR: nine blocks in each of three stages."""
    return CifarResNet(9, num_classes)


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3, 1 x 1 and a shortcut; [N, channels, H, W] -> [N, 4 width, H / stride, W / stride].

    With `project`, the shortcut is a convolution of 1 x 1.
    """

    def __init__(self, channels: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return out


class ResNet(nn.Module):
    """Residual networks of bottlenecks (arXiv:1512.03385), the stride in the 3 x 3 convolution as in torchvision."""

    def __init__(self, blocks: Sequence[int], num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for i, count in enumerate(blocks):
            width = 64 << i
            stage = [Bottleneck(channels, width, 1 if i == 0 else 2, True)]
            channels = 4 * width
            stage += [Bottleneck(channels, width, 1, False) for _ in range(count - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.stages = len(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def resnet50(num_classes: int = 1000) -> ResNet:
    """ResNet-50: 3, 4, 6 and 3 bottlenecks."""
    return ResNet((3, 4, 6, 3), num_classes)


class MobileNetV1(nn.Module):
    """Depthwise separable convolutions (arXiv:1704.04861), width 1."""

    BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(True))
        blocks, channels = [], 32
        for width, stride in self.BLOCKS:
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(True),
                    nn.Conv2d(channels, width, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(True),
                )
            )
            channels = width
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Linear(channels, num_classes))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(self.conv1(x)).mean((2, 3)))
        return logits


def _initialise(model: nn.Module) -> None:
    """He's initial values by the filters' outputs; torch's own for batch normalisation."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # kaiming_normal_ does not know groups, and makes depthwise filters far too small.
            outputs = module.weight.numel() // module.weight.shape[1] // module.groups
            nn.init.normal_(module.weight, 0, (2 / outputs) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


CNNS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "alexnet": AlexNet,
    "vgg16": vgg16,
    "vgg16_cifar": vgg16_cifar,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet50": resnet50,
    "mobilenet_v1": MobileNetV1,
}


def build_cnn(name: str, **hyperparameters: Any) -> nn.Module:
    """A new network.

    Args:
        name: one of ``CNNS``.
        hyperparameters: the arguments of its class or function: num_classes, and for some dropout.

    Raises:
        ValueError: unknown name or hyperparameter (the message lists the valid ones).

    >>> build_cnn("resnet20", num_classes=100).linear.out_features
    100
    """
    if name not in CNNS:
        raise ValueError(f"name must be one of {', '.join(CNNS)}, got {name!r}{suggestion(name, CNNS)}")
    valid = list(inspect.signature(CNNS[name]).parameters)
    for key in hyperparameters:
        if key not in valid:
            raise ValueError(f"{name} has no hyperparameter {key!r}: it has {', '.join(valid)}")
    if "num_classes" in hyperparameters:
        integer("num_classes", hyperparameters["num_classes"], 1)
    if "dropout" in hyperparameters:
        probability("dropout", hyperparameters["dropout"])
    return CNNS[name](**hyperparameters)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fills `model` with the tensors of an ``.npz`` or ``.safetensors`` file, by parameter name.

    The counters ``num_batches_tracked`` may be absent; every other name must be in both. Floating-point numbers of
    another precision are converted.

    >>> import tempfile
    >>> model, other = build_cnn("lenet"), build_cnn("lenet")
    >>> with tempfile.NamedTemporaryFile(suffix=".npz") as file:
    ...     np.savez(file, **{name: x.numpy() for name, x in model.state_dict().items()})
    ...     load_weights(other, file.name)
    >>> torch.equal(model.conv1.weight, other.conv1.weight)
    True

    Raises:
        FileNotFoundError: no such file.
        ImportError: a .safetensors file, and safetensors is not installed.
        ValueError: another file type; a file that is damaged; names, shapes or kinds of numbers that differ. The model
            is then as it was.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"path must end in .npz or .safetensors, got {str(path)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    found = _npz(path) if path.suffix == ".npz" else _safetensors(path)
    state = model.state_dict()
    missing = [key for key in state if key not in found and not key.endswith("num_batches_tracked")]
    wrong = [f"unknown: {key}" for key in found if key not in state] + [f"missing: {key}" for key in missing]
    for key, x in state.items():
        if key in found and found[key].shape != x.shape:
            wrong.append(f"{key} is {list(found[key].shape)} in the file and {list(x.shape)} in the model")
        elif key in found and found[key].is_floating_point() != x.is_floating_point():
            wrong.append(f"{key} is {found[key].dtype} in the file and {x.dtype} in the model")
    if wrong:
        more = f", and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(wrong[:10])}{more}")
    model.load_state_dict(found, strict=False)


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    except Exception as error:  # numpy, zipfile and zlib raise a dozen of types for a damaged file
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path} is no whole .npz file of numbers ({said}): put a copy in its place, or give another file"
        ) from None


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return tensorfile.read(path)[0]
    except tensorfile.DamagedFile as error:
        raise ValueError(f"{error}: put a copy in its place, or give another file") from None
    except ImportError:
        raise ImportError(f"{path} needs the package safetensors: {installs('compress')}") from None
