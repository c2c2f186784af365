"""Paths from files stay inside the folder, whatever is written in them."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engines.errors import MissingFileError, UnsafePathError
from engines.paths import check_relative, inside

# Mostly the characters that paths are attacked with, so that random text finds something.
NASTY = st.text(alphabet=st.one_of(st.sampled_from("./\\:~ \0\n%*a"), st.characters()), max_size=30)


@given(NASTY)
@example("..")
@example("a/..")
@example("a/../../b")
@example("/")
@example("//server/share")
@example("a\\..\\..\\b")
@example("C:")
@example("~root/x")
@example("a/\u2024\u2024/b")
@example("nul\0byte")
def test_what_is_accepted_stays_inside_on_every_system(path):
    try:
        check_relative(path, source="test")
    except UnsafePathError:
        return
    root = "/bundle"
    assert os.path.normpath(f"{root}/{path}") == f"{root}/{path}"  # nothing to normalise: no way out, one spelling a file
    assert not PureWindowsPath(path).drive
    assert not PureWindowsPath(path).is_absolute()
    assert PureWindowsPath(path).parts == PurePosixPath(path).parts
    assert path.isascii()
    assert path.isprintable()


@given(st.lists(st.from_regex(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,10}", fullmatch=True), min_size=1, max_size=8).map("/".join))
def test_plain_paths_are_accepted(path):
    assert check_relative(path, source="test") == path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "decoder").mkdir(parents=True)
    (folder / "decoder" / "model.onnx").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    return folder


def test_links_that_stay_inside_are_followed(root):
    (root / "again").symlink_to("decoder/model.onnx")
    (root / "folder").symlink_to("decoder")
    assert inside(root, "again", source="test").read_bytes() == b"inside"
    assert inside(root, "folder/model.onnx", source="test").read_bytes() == b"inside"


def test_a_bundle_behind_a_link_is_opened(root):
    link = root.parent / "link"
    link.symlink_to(root)
    assert inside(link, "decoder/model.onnx", source="test").read_bytes() == b"inside"


@pytest.mark.parametrize("target", ["../secret", "../nothing", "decoder/../../secret", "/etc/hostname"])
def test_links_that_lead_out_are_refused(root, target):
    (root / "evil").symlink_to(target)
    with pytest.raises(UnsafePathError, match="is a link that leads out"):
        inside(root, "evil", source="test")


def test_a_folder_that_leads_out_is_refused(root):
    (root / "evil").symlink_to("..")
    with pytest.raises(UnsafePathError, match="leads out"):
        inside(root, "evil/secret", source="test")
    with pytest.raises(UnsafePathError, match="leads out"):
        inside(root, "evil/nothing", source="test")


def test_loops_and_special_files_are_refused(root):
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")  # opening it for reading would wait for ever
    with pytest.raises(UnsafePathError):
        inside(root, "loop", source="test")
    with pytest.raises(UnsafePathError, match="not a regular file"):
        inside(root, "fifo", source="test")
    with pytest.raises(UnsafePathError, match="not a regular file"):
        inside(root, "decoder", source="test")


@pytest.mark.parametrize("name", ["nothing", "decoder/nothing", "decoder/model.onnx/nothing"])
def test_missing_files_are_named(root, name):
    with pytest.raises(MissingFileError, match=f"names '{name}', which is not in"):
        inside(root, name, source="test")
