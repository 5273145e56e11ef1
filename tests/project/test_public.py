"""Imports stay light, public names resolve, every command has an example, and every public name has a docstring."""

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
import typer

import mta
from mta.cli.app import app

SOURCE = Path(mta.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
HEAVY = {"torch", "transformers", "numpy", "sklearn", "sentence_transformers", "matplotlib", "huggingface_hub"}


def verbs(command: click.Command, path: tuple[str, ...] = ()) -> dict[str, click.Command]:
    """Every command that does something, by the words it is called with."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return {" ".join(path): command}
    return {name: verb for word, child in inner.items() for name, verb in verbs(child, (*path, word)).items()}


VERBS = verbs(typer.main.get_command(app))


# imports


@pytest.mark.parametrize(
    "code",
    [
        "import mta",
        "from mta import Item, Person, MtaError, Run, load_task, read_people",
        "import sys; from mta.cli import main; sys.argv = ['mta', '--version']; main()",
        "import sys; from mta.cli import main; sys.argv = ['mta', 'person', 'show', '--help']; main()",
    ],
)
def test_light_imports_load_no_heavy_package(code):
    noting = f"import atexit, sys\natexit.register(lambda: print('\\n' + ' '.join(set(sys.modules) & {HEAVY})))\n"
    done = subprocess.run([sys.executable, "-c", noting + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


# the command line


def test_the_installed_command_is_the_same_function():
    from mta.cli import main

    installed = [entry.load() for entry in entry_points(group="console_scripts", name="mta")]
    assert installed
    assert all(function is main for function in installed)


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_an_example_in_its_help(verb):
    assert f"Example:  mta {verb} " in VERBS[verb].help


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_a_json_option(verb):
    assert "--json" in [option for parameter in VERBS[verb].params for option in parameter.opts]


# the source


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_module_public_class_and_public_function_has_a_docstring(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]
    assert [getattr(node, "name", "the module") for node in [tree, *public] if not ast.get_docstring(node)] == []


def test_no_source_file_contains_a_local_path():
    suspects = ("/home/", "/root/", "/tmp/", "localhost:")
    texts = {file: file.read_text(encoding="utf-8") for file in FILES}
    assert [(str(file), word) for file, text in texts.items() for word in suspects if word in text] == []
