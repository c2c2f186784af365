"""Write tests/golden/noise.json: `python tests/golden/make_noise.py`. Other implementations of docs/noise.md compare with it."""

import hashlib
import json
from pathlib import Path

from runtime.noise import MAX_SEED, normal

CASES = [
    (0, (4, 2, 2), 0),
    (0, (4, 2, 2), 1),
    (1, (3, 3, 5), 0),
    (42, (32, 32, 32), 0),
    (42, (32, 24, 40), 2),
    (MAX_SEED, (1, 1, 1), 2**32 - 1),
]


def golden() -> list[dict[str, object]]:
    found = []
    for seed, shape, stream in CASES:
        values = normal(seed, shape, stream).astype("<f4")
        found.append(
            {
                "seed": str(seed),  # as text: a JSON number may lose the low bits
                "shape": list(shape),
                "stream": stream,
                "first_bits": [f"{word:08x}" for word in values.reshape(-1)[:8].view("<u4")],
                "sha256": hashlib.sha256(values.tobytes()).hexdigest(),  # of the little-endian float32 bytes, C order
            }
        )
    return found


if __name__ == "__main__":
    Path(__file__).with_name("noise.json").write_text(json.dumps(golden(), indent=1) + "\n")
