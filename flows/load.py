"""Finding the flow that a command line names: in a file or in a module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import ModuleType

from chainwax.flows.agents.load import agent_files, load_agents
from chainwax.flows.graph import Flow
from chainwax.router.config import AgentsConfig
from chainwax.router.errors import ConfigError, UnknownName, nearest

__all__ = ["load_flow", "run_file", "user_frame"]

_OURS = Path(__file__).resolve().parents[1]


def load_flow(
    spec: str,
    *,
    agents: AgentsConfig | None = None,
    sources: Iterable[str] | None = None,
    sinks: Iterable[str] | None = None,
) -> Flow:
    """The flow that ``path/to/file.py[:attr]`` or ``package.module[:attr]`` names.

    Without ``attr`` it is the only flow in there. A file that imports ``chainstream``, and a folder of such
    files, are agents, which become a flow with ``sources`` and ``sinks`` for its bound streams; None takes
    all streams that it needs or names. The file's folder can be imported from, first of all
    while the file runs and last of all from then on; modules are looked for in the current folder too.

    Raises :class:`ConfigError` with the file and the line of the user's code that is to blame, chained to
    the user's own exception.
    """
    place, attr = _parted(spec)
    files = agent_files(Path(place))
    if files or Path(place).is_dir():
        if not files:
            raise ConfigError(f"{place}: there is no agent in this folder: a file that imports chainstream")
        modules = [(str(path), partial(run_file, path)) for path in files]
        return load_agents(place, modules, agents or AgentsConfig(), sources, sinks)
    if place.endswith(".py") or "/" in place or "\\" in place:
        path = Path(place)
        module = run_file(path)
        where = str(path)
    else:
        module = _import_module(place)
        where = f"module '{place}'"
    return _flow_in(module, where, attr)


def user_frame(error: BaseException) -> tuple[str, int] | None:
    """File and line of the innermost code in a traceback that is neither ours nor a library's."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return _shown(error.filename), error.lineno
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_file() and not _is_library(file.resolve()):
            return _shown(frame.filename), frame.lineno or 0
    return None


def _parted(spec: str) -> tuple[str, str]:
    place, colon, attr = spec.rpartition(":")
    if not colon:
        return spec, ""
    if not attr.isidentifier():
        # A drive's colon, or none of ours.
        if attr.startswith(("\\", "/")):
            return spec, ""
        raise ConfigError(f"'{spec}': behind the colon stands the flow's name in the code, not '{attr}'")
    return place, attr


def run_file(path: Path) -> ModuleType:
    """The module of a file. Raises :class:`ConfigError` that blames the line."""
    if not path.is_file():
        folder = path.parent
        if not folder.is_dir():
            raise ConfigError(f"no flow file '{path}': there is no folder '{folder}'")
        files = [p.name for p in folder.glob("*.py")]
        raise ConfigError(f"no flow file '{path}': {nearest(path.name, files)}")
    # A file inside a package is imported as a part of it, so that its relative imports work.
    root, parts = path.resolve().parent, [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    if len(parts) > 1:
        return _guarded(root, str(path), lambda: importlib.import_module(".".join(parts)))
    return _guarded(root, str(path), lambda: _execute(path))


def _execute(path: Path) -> ModuleType:
    # The module keeps its name from run to run, for a recovery store may hold values of its classes.
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None or name in sys.stdlib_module_names or not name.isidentifier():
        name = f"chainwax_flow_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"'{name}' is neither a file that ends in .py nor a module's name")
    return _guarded(Path.cwd(), f"module '{name}'", lambda: importlib.import_module(name), name)


def _guarded(folder: Path, where: str, load: object, name: str = "") -> ModuleType:
    assert callable(load)
    place = str(folder)
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        module: ModuleType = load()
        return module
    except ModuleNotFoundError as error:
        if name and error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(f"there is no module '{error.name}' (looked in '{place}' too)") from None
        raise _blamed(error, where) from error
    except (Exception, SystemExit) as error:
        raise _blamed(error, where) from error
    finally:
        # What the flow's functions import when they run is still found, but hides nobody's modules.
        sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)


def _blamed(error: BaseException, where: str) -> ConfigError:
    frame = user_frame(error)
    place = f"{frame[0]}:{frame[1]}" if frame else where
    if isinstance(error, ConfigError):
        return ConfigError(f"{place}: {error}")
    if isinstance(error, SystemExit):
        return ConfigError(f"{place}: it ends the program (exit {error.code!r}) instead of making a flow")
    if isinstance(error, SyntaxError):
        return ConfigError(f"{place}: {type(error).__name__}: {error.msg}")
    return ConfigError(f"{place}: {type(error).__name__}: {error}")


def _flow_in(module: ModuleType, where: str, attr: str) -> Flow:
    found: dict[str, Flow] = {}
    for name, value in vars(module).items():
        if isinstance(value, Flow) and not any(value is flow for flow in found.values()):
            found[name] = value
    if attr:
        if not hasattr(module, attr):
            raise UnknownName(f"flow in {where}:", attr, found)
        flow = getattr(module, attr)
        if not isinstance(flow, Flow):
            raise ConfigError(f"{where}: '{attr}' is a {type(flow).__name__}, not a Flow")
        return flow
    if not found:
        raise ConfigError(f"{where}: there is no Flow in it, such as: flow = Flow('name')")
    if len(found) > 1:
        raise ConfigError(
            f"{where}: there are {len(found)} flows in it: say which by adding one of "
            + ", ".join(f":{name}" for name in found)
        )
    return next(iter(found.values()))


def _is_library(file: Path) -> bool:
    if any(part in ("site-packages", "dist-packages") for part in file.parts):
        return True
    stdlib = Path(importlib.__file__ or "").resolve().parents[1]
    rooms = [_OURS / room for room in ("flows", "operators", "connectors", "router")]
    return any(file.is_relative_to(folder) for folder in (stdlib, *rooms))


def _shown(file: str) -> str:
    """The path as a person would write it: relative where it lies below the current folder."""
    path = Path(file)
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return file
