"""Finding the flow in a file or a module, and whose line is to blame where there is none."""

import sys

import pytest

from chainwax.flows.load import load_flow
from chainwax.router.errors import ConfigError

FLOW = """
from chainwax.flows import Flow
flow = Flow("one")
flow.source("tickets").sink("out")
"""


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith("chainwax."):
            del sys.modules[name]


def refused(spec):
    with pytest.raises(ConfigError) as caught:
        load_flow(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_only_flow_of_a_file_needs_no_name(tmp_path):
    (tmp_path / "support.py").write_text(FLOW + "same = flow\n")
    assert load_flow("support.py").id == "one"
    assert load_flow(str(tmp_path / "support.py")).id == "one"
    assert load_flow("./support.py:same").id == "one"


def test_a_module_is_found_in_the_current_folder(tmp_path):
    package = tmp_path / "mine_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "flows_here.py").write_text(FLOW)
    assert load_flow("mine_pkg.flows_here").id == "one"
    assert load_flow("mine_pkg.flows_here:flow").id == "one"


def test_a_file_of_a_package_keeps_its_relative_imports(tmp_path):
    package = tmp_path / "rel_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "words.py").write_text("NAME = 'from_words'\n")
    (package / "it.py").write_text("from .words import NAME\n" + FLOW.replace('"one"', "NAME"))
    assert load_flow("rel_pkg/it.py").id == "from_words"


def test_the_files_folder_can_be_imported_from_also_later_but_hides_nobody(tmp_path):
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "neighbour_mod.py").write_text("NAME = 'near'\n")
    (folder / "late_mod.py").write_text("VALUE = 7\n")
    code = "from neighbour_mod import NAME\n" + FLOW.replace('"one"', "NAME")
    (folder / "it.py").write_text(code + "def later():\n    import late_mod\n    return late_mod.VALUE\n")
    assert load_flow("sub/it.py").id == "near"
    assert sys.modules["it"].later() == 7
    assert sys.path[-1] == str(folder)


def test_a_file_named_like_a_module_takes_nobodys_place(tmp_path):
    import json

    (tmp_path / "json.py").write_text(FLOW)
    assert load_flow("json.py").id == "one"
    assert sys.modules["json"] is json


def test_a_file_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "support.py").write_text(FLOW)
    assert "did you mean 'support.py'?" in refused("suport.py")
    assert "there is no folder 'nowhere'" in refused("nowhere/support.py")
    assert "there is no module 'nonesuch_module'" in refused("nonesuch_module.flow")
    assert "neither a file that ends in .py nor a module" in refused("what is this")
    assert "not '7up'" in refused("support.py:7up")


def test_a_name_that_is_not_there_or_is_no_flow(tmp_path):
    (tmp_path / "support.py").write_text(FLOW + "number = 3\n")
    assert "did you mean 'flow'?" in refused("support.py:flwo")
    assert "'number' is a int, not a Flow" in refused("support.py:number")


def test_no_flow_and_several_flows(tmp_path):
    (tmp_path / "none.py").write_text("x = 1\n")
    assert "there is no Flow in it" in refused("none.py")
    (tmp_path / "two.py").write_text(FLOW + "other = Flow('two')\n")
    assert refused("two.py").endswith("adding one of :flow, :other")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nonesuch_library\n", "it.py:1: ModuleNotFoundError: No module named 'nonesuch_library'"),
        ("x = 1\n\ny = x / 0\n", "it.py:3: ZeroDivisionError"),
        ("def f(:\n", "it.py:1: SyntaxError"),
        ("raise SystemExit(3)\n", "it.py:1: it ends the program (exit 3)"),
        (
            "from chainwax.flows import Flow\nflow = Flow('x')\nflow.source('s').query('q', '{')\n",
            "it.py:3: node 'q': the prompt is no valid template",
        ),
        (
            "import json\njson.loads('{')\n",
            "it.py:2: JSONDecodeError",
        ),
    ],
)
def test_a_mistake_in_the_code_is_shown_with_file_and_line(tmp_path, code, said):
    (tmp_path / "it.py").write_text(code)
    message = refused("it.py")
    assert message.startswith(said)
    assert "chainwax/" not in message


def test_the_blame_goes_to_the_users_innermost_line(tmp_path):
    (tmp_path / "inner_mod.py").write_text("def go():\n    return [][1]\n")
    (tmp_path / "it.py").write_text("import inner_mod\ninner_mod.go()\n")
    assert refused("it.py").startswith("inner_mod.py:2: IndexError")


def test_a_file_that_failed_can_be_loaded_once_it_is_mended(tmp_path):
    (tmp_path / "it.py").write_text("1 / 0\n")
    refused("it.py")
    (tmp_path / "it.py").write_text(FLOW)
    assert load_flow("it.py").id == "one"


def test_binary_and_wrongly_encoded_files_are_one_line(tmp_path):
    (tmp_path / "bin.py").write_bytes(b"\x00\xff\xfe" * 100)
    assert refused("bin.py").startswith(("bin.py", str(tmp_path)))
    (tmp_path / "latin.py").write_bytes("x = 'é'\n".encode("latin-1"))
    assert "latin.py" in refused("latin.py")
