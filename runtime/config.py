"""The configuration: YAML groups under configs/, composed by Hydra, interpolated by OmegaConf, validated by pydantic.

    composed = compose_experiment("sana_600m_1024px", ["optimizer.lr=2e-5", "env=cluster"])
    settings = validate(composed, ExperimentSettings)

Files are merged in the order of the defaults list, then the command line (Hydra's grammar: `key=value`, `group=file`, `+new=value`,
`~key`). Every value knows where it was written, so that a message about a wrong one can say what to edit.

Folders are searched in this order: the one that is given, SANA_CONFIG_DIR, configs/ of the checkout. A file in an earlier folder
hides one of the same name in a later folder. Hydra's own global state is left as it was found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engines.errors import ConfigError
from engines.spec import nearest
from runtime.config_origins import Origin, Origins, leaves, read_origins

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from pydantic import BaseModel

__all__ = ["CONFIGS", "Composed", "ConfigError", "compose", "compose_experiment", "names_in_group", "validate"]

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENT = "train"  # the file that experiments are overlaid on
FIRST_TASK = "transformer"  # the task of that file; others have a file of their own
ENVIRONMENT = "SANA_CONFIG_DIR"
_MAX_COMPLAINTS = 8  # of one configuration

Model = TypeVar("Model", bound="BaseModel")


@dataclass(frozen=True, kw_only=True)
class Composed:
    """values: plain dictionaries, lists and scalars, interpolations resolved. name: of what was composed, for messages."""

    name: str
    values: dict[str, Any]
    origins: Origins

    def leaves(self) -> list[tuple[str, Any, Origin | None]]:
        """(dotted key, value, origin) of every value."""
        return [(".".join(key), value, self.origins.of(key)) for key, value in leaves(self.values)]


def compose(config_name: str, overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> Composed:
    """Compose the file `config_name` (without .yaml, relative to a folder of configurations), with `overrides` on top.

    Raises ConfigError: no such file or group choice, not YAML, an override that is malformed or names no key, a value that is
    missing (???), an interpolation that leads nowhere.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError, YAMLError

    folders = _folders(config_dir)
    _find(folders, config_name)
    everything = list(overrides)
    try:
        with initialize_config_dir(config_dir=str(folders[0]), version_base="1.3", job_name="sana"):
            loader = GlobalHydra.instance().config_loader()
            _search_also(loader, folders[1:])
            merged = loader.compute_defaults_list(config_name=config_name, overrides=everything, run_mode=RunMode.RUN)
            origins = Origins()
            for default in merged.defaults:
                path = default.config_path or ""
                if path and not path.startswith("hydra/") and (file := _file(folders, path)) is not None:
                    read_origins(file, default.package or "", origins)
            for override in merged.config_overrides:
                _override(override, origins)
            config = hydra_compose(config_name=config_name, overrides=everything)
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingConfigException as error:
        _find(folders, (error.missing_cfg_file or config_name))
        raise ConfigError(f"{config_name}: {_first_line(error)}.") from None
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "")
        at = f" ({origins.of(key.split('.'))})" if key else ""
        remedy = f" Give it: {key}=…" if "???" in str(error) or "Missing mandatory" in str(error) else ""
        raise ConfigError(f"{config_name}: {key or 'the configuration'}{at}: {_first_line(error)}.{remedy}") from None
    except OverrideParseException as error:
        said = error.override or "an override"
        raise ConfigError(
            f"command line: {said}: {_first_line(error)}; expected key=value, group=file, +key=value or ~key."
        ) from None
    except (HydraException, YAMLError, ValueError) as error:  # Hydra raises bare ValueErrors, and UnicodeDecodeError is one
        cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ is not None else error
        said = f"{_first_line(error)}{'' if cause is error else f' ({_first_line(cause)})'}"
        if isinstance(cause, MarkedYAMLError) and (mark := cause.problem_mark) is not None:
            said = f"not YAML: {cause.problem or cause.context} ({mark.name}:{mark.line + 1})"
        raise ConfigError(f"{config_name}: {said}.") from None
    assert isinstance(values, dict)
    return Composed(name=config_name, values={str(key): value for key, value in values.items()}, origins=origins)


def compose_experiment(name: str, overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> Composed:
    """Compose experiment/NAME.yaml over train.yaml, or over train_TASK.yaml if it, or what it inherits from, says `task: TASK`.

    Raises as compose does; for an unknown experiment or task, with the nearest name.
    """
    folders = _folders(config_dir)
    _find(folders, f"experiment/{name}")
    if twice := [override for override in overrides if override.lstrip("+").startswith("experiment=")]:
        raise ConfigError(f"command line: {twice[0]}: got a second experiment, after {name!r}; expected one.")
    task = _task_of(folders, name)
    root = EXPERIMENT if task in (None, FIRST_TASK) else f"{EXPERIMENT}_{task}"
    if root != EXPERIMENT and _file(folders, root) is None:
        prefix = f"{EXPERIMENT}_"
        there = sorted({file.stem.removeprefix(prefix) for folder in folders for file in folder.glob(f"{prefix}*.yaml")})
        raise ConfigError(
            f"{name}: task: got {task!r}; {nearest(str(task), [FIRST_TASK, *there])}. A task has a file {prefix}TASK.yaml"
        )
    composed = compose(root, [f"experiment={name}", *overrides], config_dir)
    if (said := composed.values.get("task")) != task:
        at = composed.origins.of(["task"])
        raise ConfigError(
            f"{name}: task: got {said!r} ({at}); expected that of the experiment's file, {task!r}. Choose another one."
        )
    return Composed(name=name, values=composed.values, origins=composed.origins)


def _task_of(folders: Sequence[Path], name: str, seen: frozenset[str] = frozenset()) -> Any:
    """What an experiment's file says of its task, else those that it inherits from. None: nothing.

    Raises ConfigError for one that inherits from itself, where Hydra would not end; other mistakes are Hydra's to find.
    """
    from yaml import YAMLError, safe_load

    file = _file(folders, f"experiment/{name}")
    if name in seen:
        raise ConfigError(f"experiment/{name}: inherits from itself; expected an end. Take it out of a list of defaults ({file}).")
    if file is None:
        return None
    try:
        values = safe_load(file.read_text(encoding="utf-8"))
    except (YAMLError, ValueError):  # UnicodeDecodeError is one
        return None
    if not isinstance(values, dict):
        return None
    if "task" in values:
        return values["task"]
    parents = values.get("defaults")
    inherited = [each for each in parents if isinstance(each, str) and each != "_self_"] if isinstance(parents, list) else []
    return next((task for each in reversed(inherited) if (task := _task_of(folders, each, seen | {name})) is not None), None)


def names_in_group(group: str, config_dir: Path | str | None = None) -> list[str]:
    """What can be chosen in `group` ("experiment", "optimizer", …), in all folders."""
    return sorted({file.stem for folder in _folders(config_dir) for file in (folder / group).glob("*.yaml")})


def validate(composed: Composed, model: type[Model]) -> Model:
    """`composed` as a `model`, types taken strictly: "5" is no number, 1 is no truth value.

    Raises ConfigError: for each value its key, what it is, what was expected and where it was written; for an unknown key, the
    nearest that is valid.
    """
    from pydantic import ValidationError

    try:
        # By way of JSON: in strict mode a list is then a tuple, and a string a path or a member of an enumeration.
        return model.model_validate_json(json.dumps(composed.values), strict=True)
    except ValidationError as error:
        found = [_complaint(composed, model, e) for e in error.errors(include_url=False)]
    more = [f"and {len(found) - _MAX_COMPLAINTS} more"] if len(found) > _MAX_COMPLAINTS else []
    raise ConfigError("\n  ".join([f"{composed.name}: does not fit the schema:", *found[:_MAX_COMPLAINTS], *more]))


def _complaint(composed: Composed, model: type[BaseModel], error: Any) -> str:
    from engines.strict import fields_at

    key = _key(composed.values, error["loc"])
    origin = composed.origins.of(key)
    where = f" ({origin})" if origin is not None else ""
    dotted, kind, message = ".".join(key) or "the configuration", error["type"], str(error["msg"])
    if kind == "extra_forbidden":
        return f"{dotted}: unknown key; {nearest(key[-1], fields_at(model, tuple(error['loc'][:-1])))}{where}"
    if kind == "missing":
        near = composed.origins.of(key[:-1])
        return f"{dotted}: missing; give it on the command line as +{dotted}=…" + (f", or beside {near}" if near else "")
    if kind in ("literal_error", "union_tag_invalid"):
        context = error["ctx"]
        got = error["input"] if kind == "literal_error" else context["tag"]
        valid = str(context.get("expected") or context["expected_tags"]).replace("'", "").replace(" or ", ", ").split(", ")
        tag = composed.origins.of([*key, context["discriminator"].strip("'")]) if "discriminator" in context else origin
        return f"{dotted}: got {got!r}; {nearest(str(got), valid)}" + (f" ({tag})" if tag else "")
    if kind in ("value_error", "assertion_error"):
        return f"{dotted}: {message.split(', ', 1)[-1]}{where}"
    shown = repr(error["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    expected = message.replace("Input should be ", "expected ", 1)
    return f"{dotted}: got {shown}; {expected[0].lower()}{expected[1:]}{where}"


def _key(values: Any, location: Sequence[int | str]) -> list[str]:
    """The key in the YAML: pydantic's locations also name the member of a union that it tried."""
    found, at = [], values
    for number, part in enumerate(location):
        there = part in at if isinstance(at, dict) else isinstance(at, list) and isinstance(part, int) and part < len(at)
        if there or number == len(location) - 1:
            found.append(str(part))
        if there:
            at = at[part]
    return found


def _override(override: Override, origins: Origins) -> None:
    """Note what the command line says. Raises ConfigError for a key that no file has."""
    name, here = str(override.key_or_group), Origin(None)
    key = tuple(name.split("."))
    if not (override.is_add() or override.is_force_add()) and key not in origins:
        known = next(length for length in range(len(key)) if key[: length + 1] not in origins)
        inside = ".".join(key[:known]) or "the configuration"
        valid = nearest(key[known], origins.names_in(key[:known]))
        raise ConfigError(
            f"command line: {override.input_line}: {inside} has no {key[known]!r}; {valid}. "
            f"To add a key, write +{override.input_line}"
        )
    if override.is_delete():
        origins.remove(key)
        return
    value = override.value()
    if isinstance(value, dict) and value:
        for inner, _ in leaves(value, key):
            origins.set(inner, here)
    else:
        origins.set(key, here)


def _folders(config_dir: Path | str | None) -> list[Path]:
    asked = [folder for folder in (config_dir, os.environ.get(ENVIRONMENT)) if folder]
    for folder in asked:
        if not Path(folder).is_dir():
            raise ConfigError(f"{folder}: not a folder; expected one with YAML files (--config-dir, {ENVIRONMENT}).")
    found = [Path(folder).resolve() for folder in asked] + ([CONFIGS] if CONFIGS.is_dir() else [])
    if not found:
        raise ConfigError(f"{CONFIGS}: no such folder. Install from a checkout, or name a folder by --config-dir or {ENVIRONMENT}.")
    return list(dict.fromkeys(found))


def _search_also(loader: Any, folders: Sequence[Path]) -> None:
    """hydra.searchpath would do, were the first file looked for in it too."""
    search = loader.get_search_path()
    for folder in reversed(folders):
        search.append("also", f"file://{folder}", anchor="main")
    loader.repository.initialize_sources(search)


def _file(folders: Iterable[Path], name: str) -> Path | None:
    return next((file for folder in folders if (file := folder / f"{name}.yaml").is_file()), None)


def _find(folders: Sequence[Path], name: str) -> None:
    """Raises ConfigError, with the nearest name, unless there is such a file."""
    if _file(folders, name) is None:
        group, _, word = name.rpartition("/")
        there = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
        what = group or "configuration"
        raise ConfigError(f"{what}: got {word!r}; {nearest(word, there)}. Looked in {', '.join(map(str, folders))}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
