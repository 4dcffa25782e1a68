"""What the tests of the command line share: a folder to be in, and the command in this process."""

import sys

import pytest

from chainwax.flows.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that the process is in; what a flow in it imported is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith(("chainwax.", "matplotlib", "numpy", "PIL")):
            del sys.modules[name]


class Cli:
    """The command ``chainwax``, called as ``cli("run", …)``."""

    def __init__(self, monkeypatch, capfd):
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def __call__(self, *args):
        """Its exit code, what it wrote to standard output, and to standard error."""
        self._monkeypatch.setattr(sys, "argv", ["chainwax", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capfd.readouterr()
        return ended.value.code or 0, out, err

    def good(self, *args):
        """What it wrote to standard output; it must end well."""
        code, out, err = self(*args)
        assert code == 0, (out, err)
        return out

    def mistake(self, *args):
        """What it said of a mistake: one line, no traceback, exit code 2."""
        code, out, err = self(*args)
        assert code == 2, (out, err)
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
        return err.removeprefix("error: ").strip()


@pytest.fixture
def cli(folder, monkeypatch, capfd):
    return Cli(monkeypatch, capfd)
