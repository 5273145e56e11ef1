"""The classes of errors: the tree that is drawn, and what every error carries."""

import ast
import importlib
import pickle
import pkgutil
import re
from pathlib import Path

import pytest

import mta
from mta import errors
from mta.errors import MtaError
from mta.serving.api.errors import error_of

VLLM = {"mta.serving.vllm.plugin"}  # imports vLLM, which lives in another environment
REPORTED = {  # to callers of the server, hint and all
    *("UnknownOrForbidden", "Refused", "QueueFull", "NeedsRebuild", "ModelRemoved", "EngineGone", "AnswerLost"),
}


def subclasses(cls):
    return [found for child in cls.__subclasses__() for found in (child, *subclasses(child))]


for module in pkgutil.walk_packages(mta.__path__, "mta."):
    if module.name not in {*VLLM, "mta.__main__"}:
        importlib.import_module(module.name)
TREE = {cls.__name__: cls for cls in subclasses(MtaError) if cls.__module__.startswith("mta.")}


def test_the_drawing_is_the_tree():
    drawn, above = {}, ["MtaError"]
    for line in errors.__doc__.splitlines():
        if found := re.match(r"((?:│   |    )*)(?:├── |└── )(\w+)", line):
            depth = len(found[1]) // 4
            above[depth + 1 :] = [found[2]]
            drawn[found[2]] = above[depth]
    assert drawn == {name: cls.__mro__[1].__name__ for name, cls in TREE.items()}


def test_every_class_is_raised_somewhere_and_the_root_never():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(mta.__file__).parent.rglob("*.py")]
    calls = [node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {getattr(function, "id", getattr(function, "attr", "")) for function in calls}
    assert called & {*TREE, "MtaError"} == {*TREE}


def test_an_error_without_a_hint_cannot_be_made():
    with pytest.raises(TypeError, match="hint"):
        errors.InputError("something is wrong")


@pytest.mark.parametrize("name", TREE)
def test_an_error_keeps_its_hint_and_tells_callers_of_the_server_no_more_than_it_may(name):
    error = TREE[name]("no file at /mine/bank", "ls /mine")
    assert str(error) == "no file at /mine/bank\n  ls /mine"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args, again.message, again.hint) == (type(error), error.args, error.message, error.hint)
    reported = error_of(error)[1]["error"]["message"]
    assert (error.message in reported and error.hint in reported) == (name in REPORTED)
    assert name in REPORTED or "/mine" not in reported
