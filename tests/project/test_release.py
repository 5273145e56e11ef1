"""What a release says of itself agrees: version, changelog, citation, ranges and the lowest versions tried."""

import re
import tomllib
from datetime import date
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import mta

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
EXTRAS = ("assets", "eval", "lab", "serve", "tables", "ray")  # whose oldest versions are tested
RELEASES = re.findall(r"^## (\S+)(?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def pins(name: str) -> dict[str, Version]:
    """Package -> version of a file of constraints."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    wanted = [Requirement(line) for line in lines]
    return {key(one): Version(next(iter(one.specifier)).version) for one in wanted}


def key(requirement: Requirement) -> str:
    return re.sub("[-_.]+", "-", requirement.name).lower()


def asked(*extras: str) -> dict[str, Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return {key(one): one for one in map(Requirement, lines)}


def test_the_changelog_begins_with_what_is_not_released_and_then_this_version():
    assert RELEASES[0] == ("Unreleased", "")
    if not Version(mta.__version__).is_devrelease:
        assert RELEASES[1][0] == mta.__version__
    days = [date.fromisoformat(day) for _, day in RELEASES[1:]]
    assert days == sorted(days, reverse=True)


def test_the_citation_is_of_the_last_release():
    assert CITATION["version"] == RELEASES[1][0]
    assert CITATION["date-released"] == date.fromisoformat(RELEASES[1][1])
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["abstract"].rstrip(".") == PROJECT["description"]
    assert CITATION["references"][0]["url"] == PROJECT["urls"]["Paper"] == "https://arxiv.org/abs/2511.20072"


def test_the_oldest_versions_are_the_floors_of_the_ranges():
    oldest, ranges = pins("constraints-oldest.txt"), asked(*EXTRAS, "dev")
    assert asked(*EXTRAS).keys() <= oldest.keys()
    for name, version in oldest.items():
        (floor,) = ranges[name].specifier
        assert (floor.operator, Version(floor.version)) == (">=", version), name


def test_published_figures_were_made_with_versions_in_the_ranges():
    used = pins("constraints.txt")
    assert [name for name, one in asked(*EXTRAS).items() if used[name] not in one.specifier] == []
