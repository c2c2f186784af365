import json
from pathlib import Path

from benchmarks.tables import newest


def line(commit: str, value: float, *peers: str) -> str:
    return json.dumps({"figure": "step_ms", "value": value, "commit": commit, "peer": dict.fromkeys(peers, 1.0)})


def test_the_newest_line_counts_and_of_one_commit_one_with_peers(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    lines = [line("a", 1, "eager"), line("b", 2, "floor"), line("b", 3, "floor", "eager"), line("b", 4, "floor")]
    for count, value in enumerate((1, 2, 3, 3), 1):
        path.write_text("\n".join(lines[:count]) + "\n")
        assert newest(path)["step_ms"]["value"] == value
    path.write_text("\n".join([*lines, line("b", 5, "eager"), line("c", 6)]) + "\n")
    assert newest(path)["step_ms"]["value"] == 6
