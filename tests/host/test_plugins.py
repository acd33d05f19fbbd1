"""Plug-ins: which words of a command line name them, how they are found, and what is said of one that fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from megatron_fdd.cli import main
from megatron_fdd.host.plugins import FLAG, import_plugins, named_plugins
from tests.harness.command_lines import training_parser


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a package; it is not on the path, and what is imported from it is forgotten."""
    (tmp_path / "plug").mkdir()
    (tmp_path / "plug/__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["elsewhere", *sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "plug"]:
        del sys.modules[name]


def test_both_ways_to_name_one_are_read_and_nothing_else() -> None:
    words = (
        f"--load a {FLAG} b.c --bf16 {FLAG}=d --fdd-plugi e {FLAG}s f --save --{FLAG} x -- {FLAG} g".split()
    )
    assert named_plugins(words) == ["b.c", "d"]
    assert named_plugins([]) == []
    with pytest.raises(ValueError, match=f"argument {FLAG}: expected one argument: give a module"):
        named_plugins([FLAG, "--bf16"])


def test_what_is_read_is_what_the_training_parser_reads() -> None:
    """Which also tells of the flag in --help."""
    words = f"--save a {FLAG} b.c --bf16 {FLAG}=d".split()
    assert training_parser().parse_args(words).fdd_plugin == named_plugins(words)


def test_the_current_folder_is_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "plug/one.py").write_text("from plug import two")
    (folder / "plug/two.py").write_text("")
    import_plugins([])
    assert sys.path[0] == "elsewhere"
    import_plugins(["plug.one"])
    import_plugins(["plug.one", "plug"])
    assert sys.path[:2] == [str(folder), "elsewhere"]
    assert {"plug.one", "plug.two"} <= sys.modules.keys()


FAILING = {
    "absent": (
        None,
        "there is no module absent: install it, add its folder to PYTHONPATH, or start in that folder",
    ),
    "plug.absent": (None, "there is no module plug.absent: install it"),
    "plug/file.py": (None, "must be a module's name, such as package.module"),
    "": (None, "must be a module's name"),
    ".plug": (None, "must be a module's name"),
    "plug.zero": (
        "import json\n1 / 0",
        r"its import fails with ZeroDivisionError: division by zero \({}/plug/zero.py, line 2\); see the whole error "
        'with python -c "import plug.zero"',
    ),
    "plug.deep": (
        "import json\njson.loads(\n'{')",
        r"JSONDecodeError: Expecting .* \({}/plug/deep.py, line 2\)",
    ),
    "plug.needs": (
        "import plug.absent",
        r"ModuleNotFoundError: No module named 'plug.absent' \({}/plug/needs.py, line 1\)",
    ),
    "plug.wrong": ("x = 1\nif:", r"SyntaxError: invalid syntax \(wrong.py, line 2\);"),
    "plug.ends": ("raise SystemExit('enough')", r"SystemExit: enough \({}/plug/ends.py, line 1\)"),
    "plug.leaves": ("raise GeneratorExit('well')", r"GeneratorExit: well \({}/plug/leaves.py, line 1\)"),
    "plug.talks": ("raise OSError('word\\n' * 200)", r"OSError: word word .* word \.\.\. \("),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_plugin_that_cannot_be_imported_is_one_line(name: str, folder: Path) -> None:
    text, message = FAILING[name]
    if text is not None:
        (folder / f"{name.replace('.', '/')}.py").write_text(text)
    with pytest.raises(
        ValueError, match=f"^{FLAG} '?{name}'?: .*{message.replace('{}', str(folder))}"
    ) as error:
        import_plugins([name])
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 700


# What an import changes of the program, and its name in the message.
CHANGING = {
    "arguments": ("import sys; sys.argv.append('--lr')", "sys.argv"),
    "folder": ("import os; os.chdir('/')", r"the current folder \(os.chdir\)"),
    "device": ("import torch; torch.set_default_device('meta')", "torch's default device"),
    "dtype": ("import torch; torch.set_default_dtype(torch.float64)", "torch's default dtype"),
    "gradients": ("import torch; torch.set_grad_enabled(False)", "torch's grad mode"),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_plugin_that_changes_the_program_is_named(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, what = CHANGING[name]
    (folder / f"plug/{name}.py").write_text(text)
    monkeypatch.setattr(sys, "argv", ["fdd"])
    try:
        with pytest.raises(ValueError, match=f"^{FLAG} plug.{name}: its import changes {what}, by which"):
            import_plugins([f"plug.{name}"])
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


def test_an_interrupt_is_no_error_of_a_plugin(folder: Path) -> None:
    (folder / "plug/stopped.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        import_plugins(["plug.stopped"])


@pytest.mark.parametrize(
    "command",
    [
        "import --hf-model nowhere --save new",
        "student --hf-model nowhere --hf-out new --num-layers 2",
        "export --load nowhere --hf-out new",
    ],
)
def test_a_conversion_imports_it_first(command: str, folder: Path) -> None:
    (folder / "plug/good.py").write_text("")
    (folder / "plug/bad.py").write_text("raise OSError('no way')")
    done = CliRunner().invoke(main, [*command.split(), FLAG, "plug.good"])
    assert done.exit_code == 1
    assert "nowhere" in done.output
    assert "plug.good" in sys.modules
    done = CliRunner().invoke(main, [*command.split(), FLAG, "plug.good", FLAG, "plug.bad"])
    assert done.exit_code == 1
    assert done.output.startswith(f"error: {FLAG} plug.bad: its import fails with OSError: no way (")
    assert "nowhere" not in done.output
