"""The rooms, and which way the arrows point. Fails on the import that would start a year of drift.

Imports are read from the syntax tree, so those inside functions count too. What loads only on use is proved by loading.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERYTHING = ("sana_ref", "plugins", "engines", "runtime", "export", "train", "apps", "benchmarks")
MAY_IMPORT = {  # room: what of ours it may import
    "engines": (),
    "plugins": (),
    "runtime": ("engines", "plugins.shell"),
    "sana_ref": ("plugins", "runtime", "engines.errors"),
    "export": ("sana_ref", "plugins", "engines", "runtime"),
    "train": ("sana_ref", "plugins", "runtime", "engines.errors"),
    "apps": ("runtime", "engines"),
    "benchmarks": EVERYTHING,
}
HEAVY = {"torch", "triton", "onnx", "onnxscript", "onnx_ir", "transformers", "diffusers", "accelerate"}
NEVER = {  # room: packages that it does not import, not even lazily
    **{room: {"diffusers", "accelerate"} for room in MAY_IMPORT},  # what the reference is compared with, never what it is made of
    "benchmarks": set(),  # times are measured beside diffusers'
    "engines": HEAVY,
    "runtime": HEAVY,
    "apps": HEAVY,
}
NEVER_IN_FILE = {f"plugins/{name}.py": HEAVY for name in ("shell", "launch", "work")}
ONLY_IN = {"tensorrt": ("engines/tensorrt.py", "engines/tensorrt_library.py")}  # the one place; others are given the module
MAX_LINES = 450

FILES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@functools.cache
def imported(path: Path) -> tuple[tuple[str, str | None, int], ...]:
    """(module, name or None, line) of each import, wherever it is; `from a import b` gives ("a", "b")."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[tuple[str, str | None, int]]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name of the module"
            yield from ((node.module or "", alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and name_of(node.func) in ("importlib.import_module", "import_module", "__import__"):
            if isinstance(node.args[0], ast.Constant):
                yield node.args[0].value, None, node.lineno


def name_of(function: ast.expr) -> str:
    """`a` and `a.b` as they are written; all else, which is no import, is "": to write everything out takes seconds."""
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return ""


def is_within(module: str, name: str | None, allowed: str) -> bool:
    """`from plugins import shell` and `import plugins.shell.x` are both within plugins.shell."""
    return any(f"{whole}.".startswith(f"{allowed}.") for whole in (module, f"{module}.{name}"))


def test_there_is_something_to_check():
    assert len(FILES) > 40
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_down(room):
    for path in (ROOT / room).rglob("*.py"):
        file = path.relative_to(ROOT).as_posix()
        for module, name, line in imported(path):
            top = module.split(".")[0]
            ours = top in EVERYTHING and top != room
            assert not ours or any(is_within(module, name, allowed) for allowed in MAY_IMPORT[room]), (
                f"{file}:{line}: {room} may import {', '.join(MAY_IMPORT[room]) or 'nothing of ours'}, not {module}"
            )
            never = NEVER[room] | NEVER_IN_FILE.get(file, set())
            assert top not in never, f"{file}:{line}: must not import {top}, not even lazily"
            assert top != "tests", f"{file}:{line}: nothing imports tests"
            if top in ("tensorrt", "tensorrt_rtx"):
                assert file in ONLY_IN["tensorrt"], f"{file}:{line}: TensorRT is imported in {ONLY_IN['tensorrt']} alone"


def test_the_check_sees_what_it_should(tmp_path):
    (tmp_path / "x.py").write_text(
        "def f():\n    import torch.nn\n    from plugins import shell\nimportlib.import_module('onnx')\n"
    )
    assert set(imported(tmp_path / "x.py")) == {("torch.nn", None, 2), ("plugins", "shell", 3), ("onnx", None, 4)}
    assert is_within("plugins", "shell", "plugins.shell")
    assert is_within("plugins.shell", "register", "plugins.shell")
    assert not is_within("plugins.shell_game", None, "plugins.shell")
    assert not is_within("plugins", "relu_linear_attention", "plugins.shell")


def run(code: str) -> list[str]:
    """What a fresh process prints that ran `code` in the root of the project."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Refuse())
"""


def test_what_ships_loads_where_the_rest_is_absent():
    code = f"refused = {HEAVY!r}{REFUSE}"
    code += """
import importlib, pkgutil
names = ["plugins.shell"]
for room in ("engines", "runtime", "apps"):
    names += [module.name for module in pkgutil.walk_packages([room], room + ".")]
for name in names:
    importlib.import_module(name)
import runtime
runtime.SanaEngine
print(*names)
"""
    assert {"engines.bundle", "runtime.engine", "apps.cli.main", "plugins.shell"} <= set(run(code))


def test_importing_is_light():
    """Nothing that takes long to load or looks for a GPU, before it is used."""
    slow = {"tensorrt", "tensorrt_rtx", "cuda", "onnxruntime", "PIL", "tokenizers", "rich"} | HEAVY
    for name in ("engines, runtime, plugins, export, sana_ref, train, apps, benchmarks", "apps.cli.main", "engines.bundle"):
        found = run(f"import {name}, sys; print(*({slow!r} & {{m.split('.')[0] for m in sys.modules}}))")
        assert not found, f"import {name} also loads {', '.join(found)}"


@pytest.mark.parametrize("module", ["runtime.noise", "runtime.schedule", "engines.errors"])
def test_what_training_needs_of_the_runtime_needs_numpy_alone(module):
    refused = {"pydantic", "yaml", "rich", "PIL", "tokenizers", "onnxruntime", "tensorrt_rtx", "cuda"} | HEAVY
    run(f"refused = {refused!r}{REFUSE}\nimport {module}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short(path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{num_lines} lines; expected at most {MAX_LINES}: look for a seam"


def public_names(path: Path) -> list[str] | None:
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def file_of(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@pytest.mark.parametrize("room", ["engines", "runtime", "apps"])
def test_what_ships_says_what_it_offers(room):
    without = [path for path in (ROOT / room).rglob("*.py") if path.read_text().strip() and public_names(path) is None]
    assert {path.name for path in without} <= {"__main__.py"}


def test_rooms_use_only_what_others_offer():
    """A name that another room imports is in its module's __all__, and what is in __all__ is there."""
    wrong = []
    for path in FILES:
        room, file = path.relative_to(ROOT).parts[0], path.relative_to(ROOT).as_posix()
        offered = public_names(path)
        if offered is not None and "def __getattr__" not in path.read_text(encoding="utf-8"):
            defined = {
                name
                for node in tree_of(path).body
                for name in (
                    [node.name]
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                    else [alias.asname or alias.name for alias in node.names]
                    if isinstance(node, (ast.Import, ast.ImportFrom))
                    else [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
                )
            }
            wrong += [f"{file}: __all__ offers {name}, which is not there" for name in offered if name not in defined]
        for module, name, line in imported(path):
            target = file_of(module) if module.split(".")[0] in EVERYTHING and module.split(".")[0] != room else None
            if target is None or name is None or file_of(f"{module}.{name}"):
                continue
            names = public_names(target)
            if name.startswith("_") or (names is not None and name not in names):
                wrong.append(f"{file}:{line}: {module}.{name} is not in its __all__")
    assert not wrong, "\n".join(wrong)
