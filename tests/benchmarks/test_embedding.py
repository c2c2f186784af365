"""benchmarks/embedding.py on a bundle of trivial graphs."""

import sys

import pytest
from cpp_bundles import letters_bundle
from cpp_pictures import onnxruntime_library

from benchmarks import embedding
from engines.errors import SanaError


def test_it_compares(cpp, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SANA_ONNXRUNTIME", str(onnxruntime_library()))
    bundle = letters_bundle(tmp_path / "b")
    written = []
    monkeypatch.setattr(embedding, "record", lambda *line, **more: written.append((line, more)))
    arguments = [str(bundle), "--program", str(cpp / "sana"), "--rounds", "1", "--more", "1", "--steps", "2", "--record"]
    assert embedding.main(arguments) == 0
    assert [line[0] for line, _ in written] == ["cpp_start_s", "cpp_picture_s", "cpp_peak_mb"]
    (start, start_peer), _, (peak, peak_peer) = written
    assert 0 < start[1] < start_peer["peer"]["python"]  # an interpreter and its packages are slower to start
    assert 10 < peak[1] < peak_peer["peer"]["python"]
    assert capsys.readouterr().out.count("Python") == 3
    assert embedding.main([str(tmp_path / "none"), "--program", str(cpp / "sana")]) == 2
    assert embedding.main([str(bundle), "--program", str(cpp / "sana"), "--rounds", "0"]) == 2


@pytest.mark.slow
def test_peak_memory_and_failures():
    code = "data = bytearray(100_000_000)\nfor i in range(0, len(data), 1024): data[i] = 1"
    small, large = (embedding.run([sys.executable, "-c", each], {}) for each in ("", code))
    assert 90 < large.peak_mb - small.peak_mb < 115
    with pytest.raises(SanaError, match=r"ended with 3\. It said: no"):
        embedding.run([sys.executable, "-c", "import sys; sys.stderr.write('no'); sys.exit(3)"], {})
