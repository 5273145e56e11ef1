"""Every class of error, provoked for real: it says what happened, was found, was expected, and what to type next."""

import ast
import importlib
import pickle
import pkgutil
import re
from pathlib import Path

import pytest
from provoked import PROVOKED, World

import mta
from mta import errors
from mta.errors import MtaError
from mta.serving.api.errors import error_of

SOURCE = Path(mta.__file__).parent
PARSED = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
VLLM = {"mta.serving.vllm.plugin"}  # imports vLLM, which lives in another environment
REPORTED = {
    "UnknownOrForbidden",
    "Refused",
    "QueueFull",
    "NeedsRebuild",
    "ModelRemoved",
    "EngineGone",
    "AnswerLost",
}  # to callers of the server, hint and all


def subclasses(cls):
    return [found for child in cls.__subclasses__() for found in (child, *subclasses(child))]


for module in pkgutil.walk_packages(mta.__path__, "mta."):
    if module.name not in {*VLLM, "mta.__main__"}:
        importlib.import_module(module.name)
TREE = {cls.__name__: cls for cls in subclasses(MtaError) if cls.__module__.startswith("mta.")}


# the tree


def test_the_drawing_is_the_tree():
    drawn, above = {}, ["MtaError"]
    for line in errors.__doc__.splitlines():
        if found := re.match(r"((?:│   |    )*)(?:├── |└── )(\w+)", line):
            depth = len(found[1]) // 4
            above[depth + 1 :] = [found[2]]
            drawn[found[2]] = above[depth]
    assert drawn == {name: cls.__mro__[1].__name__ for name, cls in TREE.items()}


def test_every_class_is_raised_somewhere_and_the_root_never():
    called = {name for tree in PARSED.values() for name, _, _ in calls(tree)}
    assert called & {*TREE, "MtaError"} == {*TREE}


def test_an_error_without_a_hint_cannot_be_made():
    with pytest.raises(TypeError, match="hint"):
        errors.InputError("something is wrong")


# every place that raises one


def calls(tree):
    """(name, call, the functions around it) of everything that is called by its name."""
    found = []

    def visit(node, around):
        if isinstance(node, ast.Call):
            found.append((getattr(node.func, "id", getattr(node.func, "attr", "")), node, around))
        inside = (node, *around) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else around
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, ())
    return found


def assigned(scope, name):
    """What a name is set to in a module or a function."""
    nodes = [node for node in ast.walk(scope) if isinstance(node, ast.Assign)]
    return [node.value for node in nodes if any(getattr(target, "id", None) == name for target in node.targets)]


def says(node, scopes):
    """Whether an expression is a text that is not empty, as far as can be told without running it."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and bool(node.value.strip())
    if isinstance(node, ast.JoinedStr):
        return any(says(part, scopes) for part in node.values)
    if isinstance(node, ast.BinOp):
        return says(node.left, scopes) or says(node.right, scopes)
    if isinstance(node, ast.BoolOp):
        return says(node.values[-1], scopes)
    if isinstance(node, ast.IfExp):
        return says(node.body, scopes) and says(node.orelse, scopes)
    if isinstance(node, ast.Attribute):  # another error's, or a constant of another module
        return node.attr == "hint" or any(says_of(tree, node.attr) for tree in PARSED.values())
    if isinstance(node, ast.Call):
        returns = [n for f in functions(node.func.id) for n in ast.walk(f) if isinstance(n, ast.Return)]
        return bool(returns) and all(says(one.value, scopes) for one in returns)
    if not isinstance(node, ast.Name):
        return False
    if node.id == "hint" and any(getattr(scope, "name", "") in MAKERS for scope in scopes):
        return True  # whoever calls the maker is looked at instead
    return any(says_of(scope, node.id) for scope in (PARSED.values() if node.id.isupper() else scopes))


def says_of(scope, name):
    values = assigned(scope, name)
    return bool(values) and all(says(value, (scope,)) for value in values)


def functions(name):
    return [node for tree in PARSED.values() for node in ast.walk(tree) if getattr(node, "name", None) == name]


# functions that make errors, and which argument is their hint
MAKERS = {"data_error": 3, "loading": 2, "opened_json": 4, "only_file": 2}


@pytest.mark.parametrize("path", PARSED, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_place_that_raises_says_what_to_type_next(path):
    bare = []
    for name, call, around in calls(PARSED[path]):
        if name not in {*TREE, *MAKERS}:
            continue
        at = MAKERS.get(name, 1)
        given = [word.value for word in call.keywords if word.arg == "hint"] or call.args[at : at + 1]
        if not given or not says(given[0], (*around, PARSED[path])):
            bare.append(f"{path.name}:{call.lineno}")
    assert bare == []


def test_every_class_of_the_tree_is_provoked():
    assert set(PROVOKED) == set(TREE)


@pytest.mark.parametrize("name", PROVOKED)
def test_it_says_what_was_found_and_expected_and_what_to_type_next(tiny_bank_folder, tmp_path, cache, name):
    provoke, said, typed = PROVOKED[name]
    world = World(tiny_bank_folder, tmp_path)
    with pytest.raises(TREE[name]) as caught:
        provoke(world)
    error = caught.value
    assert type(error) is TREE[name]
    for part in said:
        assert re.search(part, error.message), part
    assert re.search(typed, error.hint)
    assert str(error) == f"{error.message}\n  {error.hint}"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args, again.message, again.hint) == (type(error), error.args, error.message, error.hint)
    reported = error_of(error)[1]["error"]["message"]
    assert (error.message in reported and error.hint in reported) == (name in REPORTED)
    assert name in REPORTED or not {error.message, error.hint} & {reported}
