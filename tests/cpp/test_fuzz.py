"""What libFuzzer found worth keeping, once more: none of it crashes the targets of tests/cpp/fuzz."""

import subprocess
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"


@pytest.mark.parametrize("target", ["manifest", "tokenizer", "png"])
def test_corpus(cpp, target):
    files = sorted((FUZZ / "corpus" / target).iterdir())
    assert len(files) > 20
    done = subprocess.run([cpp / "sana_fuzz_replay", target, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(len(files))


def test_the_targets_notice(cpp, tmp_path):
    """A target that is not there, or a file that cannot be read as it should, is no success."""
    assert subprocess.run([cpp / "sana_fuzz_replay", "nothing"], check=False).returncode == 2
