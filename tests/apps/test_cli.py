"""The `sana` command as a whole: what goes where, exit codes, and errors as one message."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from apps.cli import inspect
from apps.cli.main import COMMANDS, main
from apps.cli.program import PROGRAMS
from engines.errors import DigestError
from engines.spec import Target

PATIENCE_S = 120  # until a process has started, or ended: a busy machine takes long


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, with pipes for a terminal."""
    command = [sys.executable, "-m", "apps.cli", *arguments]
    where = {"PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | where, check=False)


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert all(f"{name} " in printed.out for name in (*COMMANDS, *PROGRAMS))
    assert not printed.err
    assert main([]) == 2  # nothing was asked for: the help goes where messages go
    printed = capsys.readouterr()
    assert not printed.out
    assert "usage: sana" in printed.err
    for name in COMMANDS:
        assert main([name, "--help"]) == 0


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sana ")


@pytest.mark.parametrize(("word", "meant"), [("genrate", "generate"), ("verfy", "verify"), ("biuld", "build")])
def test_an_unknown_command_names_the_nearest(word, meant, capsys):
    assert main([word, "x"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"sana: error: unknown command {word!r}; did you mean {meant!r}? Valid: generate, replay")
    assert len(printed.err.splitlines()) == 1


def test_usage_errors_are_argparse_messages(capsys):
    assert main(["generate"]) == 2
    assert "the following arguments are required: bundle, prompt" in capsys.readouterr().err
    assert main(["generate", "b", "p", "--steps", "many"]) == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err
    assert main(["generate", "b", "p", "--scheduler", "a", "--schedule", "b.yaml"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    assert main(["generate", "b", "p", "--neg", "x"]) == 2  # no guessing of half an option
    assert "unrecognized arguments: --neg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DigestError("b: x was changed"), "sana: error: b: x was changed\n"),
        (OSError(errno.EACCES, "Permission denied", "/x"), "sana: error: [Errno 13] Permission denied: '/x'\n"),
    ],
)
def test_errors_are_one_message(error, message, capsys, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(inspect, "run", fail)
    assert main(["inspect", "b"]) == 2
    assert capsys.readouterr().err == message
    monkeypatch.setenv("SANA_DEBUG", "1")
    assert main(["inspect", "b"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith(message)


def test_other_errors_are_bugs_and_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(inspect, "run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "b"])


def test_interrupted(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupt)
    assert main(["inspect", "b"]) == 130
    assert capsys.readouterr().err == "sana: interrupted\n"


def test_a_closed_pipe_is_no_error(tmp_path):
    from fakes import write_fake_bundle

    write_fake_bundle(tmp_path / "b")
    shell = f"{sys.executable} -m apps.cli inspect {tmp_path / 'b'} --json | true; echo ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "0\n"
    assert not done.stderr


class TestBuild:
    """`sana build` is another program; here it is replaced by one line."""

    @pytest.fixture
    def program(self, tmp_path, monkeypatch):
        def write(code: str) -> dict[str, str]:
            package = tmp_path / "stub_export"
            package.mkdir()
            (package / "__init__.py").touch()
            (package / "build_engine.py").write_text(code)
            monkeypatch.syspath_prepend(tmp_path)
            monkeypatch.setenv("PYTHONPATH", str(tmp_path))
            stub = replace(PROGRAMS["build"], module="stub_export.build_engine")
            monkeypatch.setitem(PROGRAMS, "build", stub)

        return write

    def test_arguments_and_exit_code_are_passed_on(self, program, capfd):
        program("import sys; print(sys.argv[1:]); sys.exit(7)")
        assert main(["build", "--model", "x", "--help", "--", "-v"]) == 7
        assert capfd.readouterr().out == "['--model', 'x', '--help', '--', '-v']\n"

    def test_a_signal_becomes_an_exit_code(self, program):
        program("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        assert main(["build"]) == 128 + signal.SIGKILL

    def test_without_the_extra(self, monkeypatch, capsys):
        stub = replace(PROGRAMS["build"], needs=("sys", "a_package_that_is_not_there"))
        monkeypatch.setitem(PROGRAMS, "build", stub)
        assert main(["build", "--model", "x"]) == 2
        printed = capsys.readouterr().err
        assert "a_package_that_is_not_there not installed" in printed
        assert "pip install 'sana-deploy[export]'" in printed

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_ctrl_c_waits_for_the_builder_to_clean_up(self, tmp_path, number):
        package = tmp_path / "stub_export"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "build_engine.py").write_text(
            "import signal, sys, time, pathlib\n"
            "def stop(number, frame):\n    time.sleep(0.3); pathlib.Path('cleaned').touch(); sys.exit(130)\n"
            "signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)\n"
            "pathlib.Path('ready').touch(); time.sleep(60)\n"
        )
        code = (
            "from apps.cli.program import PROGRAMS, Program\n"
            "PROGRAMS['build'] = Program(module='stub_export.build_engine', help='', needs=())\n"
            "from apps.cli.main import main\nraise SystemExit(main(['build']))"
        )
        environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}"}
        child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, start_new_session=True)
        deadline = time.monotonic() + PATIENCE_S
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if number == signal.SIGINT:
            os.killpg(child.pid, number)  # as a terminal does
        else:
            child.send_signal(number)
        assert child.wait(timeout=PATIENCE_S) == 130
        assert (tmp_path / "cleaned").exists()


def test_ctrl_c_while_drawing(tmp_path):
    from fakes import write_fake_bundle

    write_fake_bundle(tmp_path / "b")
    code = (
        "import signal, sys, time, pathlib, runtime.engine as e\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits that it is ignored
        "def slow(*a, **k):\n    pathlib.Path('ready').touch(); time.sleep(60)\n"
        "e.SanaEngine.generate = slow\n"
        "from apps.cli.main import main; sys.exit(main(['generate', 'b', 'x', '--out', 'x.png']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE_S)
    finally:
        child.kill()
    assert child.returncode == 130
    assert err.splitlines()[-1] == "sana: interrupted"
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"b", "ready"}


def test_as_a_process_where_there_is_no_terminal(tmp_path):
    """Paths on stdout, one line of choice on stderr, no bar, no colours."""
    from fakes import write_fake_bundle

    write_fake_bundle(tmp_path / "b", targets=(Target.SM80,))
    done = run("generate", "b", "a red apple", "--backend", "onnxruntime", "--out", "pictures", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "pictures/a-red-apple-0.png\n"
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("sana: backend: onnxruntime on CPU")
    assert "\x1b" not in done.stdout + done.stderr
