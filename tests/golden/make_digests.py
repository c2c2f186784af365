"""Write tests/golden/digests.json: `python tests/golden/make_digests.py`. Others open the same bundles and compare."""

import hashlib
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def bundle(files: dict[str, str], *, indent: int | None, **changes: Any) -> dict[str, Any]:
    """The texts of a bundle's files, manifest.json among them, and its digest."""
    document = json.loads((HERE.parent / "data" / "hostile" / "no_files.json").read_bytes()) | changes
    document["files"] = {
        name: {"sha256": hashlib.sha256(text.encode()).hexdigest(), "size": len(text.encode()), "role": "graph"}
        for name, text in files.items()
    }
    manifest = json.dumps(document, indent=indent, ensure_ascii=False)
    return {"files": files | {"manifest.json": manifest}, "digest": hashlib.sha256(manifest.encode()).hexdigest()}


def main() -> None:
    graph = {"decoder/model.onnx": "\x08\x08\x12\x04sana"}  # the least that is one: ONNX's version and who made it
    cases = [
        bundle(graph, indent=1),
        bundle(graph, indent=None),
        bundle(graph, indent=2, licence="frei für alle 🍎\n"),
        bundle(graph | {"decoder/more.txt": "ein Apfel, ½\r\n"}, indent=1),
    ]
    (HERE / "digests.json").write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
