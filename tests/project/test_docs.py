"""The documents: commands that the command line reads, links that lead somewhere, and pages run as they stand."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pages import BUILT, NOT_RUN, PAGES, ROOT, blocks, name_of
from pydantic import BaseModel
from typer import BadParameter
from typer.main import get_command

from mta.cli.app import app
from mta.config import CompareSettings, Run
from mta.data.readers.people import read_people
from mta.errors import HubError
from mta.tools.demo import DemoRecipe
from mta_lab.cli import app as lab
from mta_lab.experiments.recipe import Experiment
from mta_lab.privacy.settings import AttackSettings

OPERATORS = ("&&", "||", "|", ";", ">", "<", "&", ")", "(", "do", "done", "until")
TUTORIAL = ROOT / "docs" / "tutorial" / "your-people.md"
TROUBLES = ROOT / "docs" / "troubleshooting.md"
RUN = [page for page in PAGES if any(b.language in ("bash", "python") and b.mark not in NOT_RUN for b in blocks(page))]
HOW_TO = [page for page in RUN if page.parent.name == "how-to" or page == TROUBLES]
EVERYWHERE = pytest.mark.parametrize("page", PAGES, ids=name_of)


# commands


def commands(code: str) -> list[list[str]]:
    """The commands of a script: simple ones, which is what documents should have."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        try:
            for word in lexer:
                if word in OPERATORS:
                    found.append(words)
                    words = []
                else:
                    words.append(word)
        except ValueError:  # a quoted text of several lines is no command of ours
            continue
        found.append(words)
    return [words for words in found if words]


def verb_table(app):
    """Every verb, doing nothing: the command line reads what it is given and no more."""
    root = get_command(app)

    def silence(command) -> None:
        for child in getattr(command, "commands", {}).values():
            silence(child)
            if not hasattr(child, "commands"):
                child.callback = lambda **_: None

    silence(root)
    return root


VERBS = {"mta": verb_table(app), "mta-lab": verb_table(lab)}


@contextmanager
def suppress_missing():
    """Of a document's own folders not one is there: what may be a hub id is looked for there, and not found."""
    try:
        yield
    except HubError:
        pass
    except BadParameter as error:
        if "does not exist" not in str(error):
            raise


def is_setting(key: str) -> bool:
    return any(_has(kind, key.split(".")) for kind in (Run, CompareSettings, AttackSettings, Experiment, DemoRecipe))


def _has(kind: type[BaseModel], path: list[str]) -> bool:
    field = kind.model_fields.get(path[0])
    if field is None or len(path) == 1:
        return field is not None
    inner = type(field.default) if isinstance(field.default, BaseModel) else field.annotation
    return not hasattr(inner, "model_fields") or _has(inner, path[1:])


@EVERYWHERE
def test_the_command_line_reads_every_command(page):
    for block in blocks(page):
        for words in commands(block.code) if block.language == "bash" else ():
            if words[0] in VERBS and "…" not in words:
                with suppress_missing():
                    VERBS[words[0]].main(words[1:], standalone_mode=False)
                given = [word for before, word in pairwise(words[1:]) if before != "--columns"]
                keys = [w.partition("=")[0] for w in given if re.fullmatch(r"[a-z_.]+=\S.*", w)]
                assert [key for key in keys if not is_setting(key)] == [], f"{page}:{block.line}"


@EVERYWHERE
def test_every_module_and_target_of_a_command_exists(page):
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    for block in blocks(page):
        for words in commands(block.code) if block.language == "bash" else ():
            if words[0] == "make":
                assert set(w for w in words[1:] if "=" not in w) <= targets
            if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
                place = ROOT / words[2].replace(".", "/")
                source = (place / "__main__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
                assert [w for w in words if w.startswith("--") and f'"{w}"' not in source] == []


# blocks


@EVERYWHERE
def test_every_block_has_a_language_and_is_valid(page):
    text, found = page.read_text(encoding="utf-8"), blocks(page)
    assert len(re.findall(r"(?m)^ *```", text)) == 2 * len(found), "a block without a language, or one that is indented"
    for block in found:
        assert block.mark in ("", "shown", "file", "serves", "own", "openai", "curl"), block
        if block.language == "yaml":
            yaml.safe_load(block.code)
        if block.language == "json":
            [json.loads(line) for line in block.code.splitlines()]
        if block.language == "python":
            compile(block.code, str(page), "exec")
        if block.mark in ("shown", "own", "file"):
            assert block.of, f"{page}:{block.line}: say why, or where"


# links


def slug(title: str) -> str:
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title.strip().lower())
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def prose(page: Path) -> str:
    return re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))


@EVERYWHERE
def test_every_link_has_a_target(page):
    lost = []
    for target, fragment in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        if path.name in BUILT:
            continue  # made by docs/reference_pages.py
        if not path.exists():
            lost.append(target)
        elif fragment and fragment not in map(slug, re.findall(r"(?m)^#+ (.*)$", prose(path))):
            lost.append(f"{target}#{fragment}")
    assert lost == []


@EVERYWHERE
def test_every_named_file_exists(page):
    named = re.findall(r"`((?:src|tests|benchmarks|docs|results)/[\w./-]+)`", prose(page))
    made = ("results/report.html", "results/results.json")  # what a command of the page writes
    assert [name for name in named if not (ROOT / name).exists() and name not in made] == []


def test_the_committed_reference_is_current(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from reference_pages import write_all

    write_all(tmp_path)
    stale = [p.name for p in tmp_path.iterdir() if p.read_text() != (ROOT / "docs" / "reference" / p.name).read_text()]
    assert stale == [], "write it anew:  make docs"


# running


@pytest.fixture(scope="session")
def tutorial(tmp_path_factory, fetched):
    """The folder that somebody has who has walked through the tutorial."""
    for asset in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
        fetched(asset)
    folder = tmp_path_factory.mktemp("tutorial")
    walk(TUTORIAL, folder)
    return folder


def walk(page: Path, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "pages.py", page, folder],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.network
def test_the_tutorial_runs(tutorial):
    made = {path.name for path in tutorial.iterdir()}
    assert {"bank", "people", "results", "ann-adapter"} <= made
    assert (tutorial / "results" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.network
@pytest.mark.parametrize("page", HOW_TO, ids=name_of)
def test_every_how_to_runs(page, tutorial, tmp_path):
    # The copied store knows only where the tutorial exported ann's adapter: a copy of that would be another adapter.
    shutil.copytree(tutorial, tmp_path / "here", ignore=shutil.ignore_patterns("ann-adapter"))
    kept = shutil.copytree(tutorial / "ann-adapter", tmp_path / "kept")
    walk(page, tmp_path / "here")
    if not (tutorial / "ann-adapter").exists():  # forgotten there
        shutil.copytree(kept, tutorial / "ann-adapter")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.network
@pytest.mark.timeout(3000)  # a slow machine passed 900 s
def test_the_readme_runs(tmp_path):
    people = read_people("survey", "survey")[:120]
    rows = [(person.id, *item.fields.values()) for person in people for item in person.items]
    with open(tmp_path / "answers.csv", "w", newline="") as file:
        csv.writer(file).writerows([("person", *people[0].items[0].fields), *rows])
    walk(ROOT / "README.md", tmp_path)
    assert {"bank", "people", "comparison"} <= {path.name for path in tmp_path.iterdir()}


def test_every_page_with_code_is_run():
    """Whatever is neither a how-to nor named here has its blocks marked."""
    elsewhere = [name_of(page) for page in RUN if page not in HOW_TO]
    assert elsewhere == ["README.md", name_of(TUTORIAL)]


@pytest.mark.integration
def test_the_site_is_built_without_a_warning(tmp_path):
    words = ["-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "html"]
    done = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("index", "reference/cli", "reference/settings", "decisions/001-dependencies", "results/README"):
        assert (tmp_path / "html" / f"{name}.html").stat().st_size > 5000
