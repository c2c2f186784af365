"""Writes lpips_golden.json: what the package `lpips` 0.1.4 itself says of the pictures of `pairs`, with fp32 weights and with ours.

    python tests/export/lpips_golden.py DOWNLOADS      (the two files of benchmarks/lpips_weights.py)

Its own code runs, from its wheel; only torchvision, which it wants for AlexNet's layers, is replaced by the same layers.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

GOLDEN = Path(__file__).with_name("lpips_golden.json")
SIZES = ((64, 64), (67, 96), (128, 130))  # height and width


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Smooth pictures of waves and disturbed ones, (2, 3, H, W) fp32, -1 to 1, made alike on every machine."""
    found = []
    for number, (height, width) in enumerate(SIZES):
        rng = np.random.default_rng(number)
        y, x = np.mgrid[:height, :width] / 16
        phase, speed = rng.uniform(0, 6, (2, 3, 1, 1)), rng.uniform(0.2, 2, (2, 3, 1, 1))
        a = np.sin(speed * x + phase) * np.cos(speed[::-1] * y)
        b = np.clip(0.9 * a + 0.1 * (number + 1) * rng.standard_normal(a.shape), -1, 1)
        found.append((torch.from_numpy(a).float(), torch.from_numpy(b).float()))
    return found


def alexnet(weights: dict[str, torch.Tensor]) -> nn.Module:
    """The layers of torchvision.models.alexnet(), as its source has them."""
    features = nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(kernel_size=3, stride=2),
    )  # fmt: skip
    for index, place in enumerate((0, 3, 6, 8, 10)):
        names = {part: weights[f"convolutions.{index}.{part}"].float() for part in ("weight", "bias")}
        features[place].load_state_dict(names)
    return types.SimpleNamespace(features=features)


def main(downloads: Path) -> None:
    from safetensors.torch import load_file

    from benchmarks.lpips_weights import TORCH, read
    from export.metrics.lpips import WEIGHTS

    weights = {"fp32": read(downloads)[0], "stored": load_file(WEIGHTS)}
    fake = types.ModuleType("torchvision")
    fake.models = types.ModuleType("torchvision.models")
    sys.modules |= {"torchvision": fake, "torchvision.models": fake.models}
    sys.path.insert(0, str(downloads / TORCH))  # a wheel is a zip, and can be imported
    for module in ("skimage", "tqdm"):  # imported by parts of the package that do not run here
        sys.modules.setdefault(module, types.ModuleType(module))
    import lpips

    golden = {"lpips": "0.1.4", "torch": torch.__version__}
    for name, state in weights.items():
        fake.models.alexnet = lambda pretrained, state=state: alexnet(state)
        network = lpips.LPIPS(net="alex", pretrained=False, verbose=False)
        network.load_state_dict(
            {f"lin{i}.model.1.weight": state[f"linears.{i}"].float().reshape(1, -1, 1, 1) for i in range(5)}, strict=False
        )
        with torch.inference_mode():
            golden[name] = [network.double()(a.double(), b.double()).flatten().tolist() for a, b in pairs()]
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
