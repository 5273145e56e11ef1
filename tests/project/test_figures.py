"""Figures in the README and in docs are those of result files."""

import base64
import gzip
import json
import re
from itertools import product
from pathlib import Path

import pytest
from pages import ROOT

from benchmarks.gains import gains, picture, tables
from mta.evaluation import statistics
from mta.evaluation.reports.figures import Picture
from mta_lab.reports.report import report

RESULTS = ROOT / "results"
PUBLISHED = sorted(path.parent for path in RESULTS.rglob("scores.jsonl.gz"))
# Decision records quote what was measured at the time, also in experiments whose results were not kept.
BY_HAND = [RESULTS / "older" / "README.md"]
PAGES = [ROOT / "README.md", *BY_HAND, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/[!dpr]*/*.md"))]
NUMBER = r"[+-]?\d+\.\d+"
INTERVAL = re.compile(rf"({NUMBER})\**\s+\[({NUMBER}),\s+({NUMBER})\]")
THREE_DIGITS = re.compile(r"(?<![\d.])\d\.\d{3}(?![\d.])")
LINKED = re.compile(r"\]\(([^)]*results/[^)]*\.(?:md|json))\)")
Figure = tuple[str, ...]
ZERO = "+0.000 [+0.000, +0.000]"


def signed(mean: float, low: float, high: float) -> Figure:
    return tuple(f"{number:.3f}".replace("-0.000", "0.000") for number in (mean, low, high))


def figure(mean: float, low: float, high: float) -> Figure:
    """The interval or its mirror image: the one with the larger mean."""
    return signed(*max((mean, low, high), (-mean, -high, -low)))


def figures_in(text: str, how=figure) -> set[Figure]:
    """Means with their intervals: a gain of 0.03 and a difference of -0.03 are the same figure, unless ``signed``."""
    return {how(*map(float, found)) for found in INTERVAL.findall(text)}


def figures_of(value: object) -> set[Figure]:
    """The same from JSON, where an interval is an object."""
    if isinstance(value, dict):
        own = [value.get(key) for key in ("mean", "low", "high")]
        found = {figure(*own)} if all(isinstance(number, int | float) for number in own) else set()
        return found.union(*map(figures_of, value.values()))
    return set().union(*map(figures_of, value)) if isinstance(value, list) else set()


@pytest.fixture(scope="module")
def measured():
    pages = [path for path in RESULTS.rglob("*.md") if path not in BY_HAND]
    texts = (path.read_text() for path in pages)
    values = (json.loads(path.read_text()) for path in RESULTS.rglob("*.json"))
    return set().union(*map(figures_in, texts), *map(figures_of, values))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_interval_is_in_a_result_file(page, measured):
    assert sorted(figures_in(page.read_text()) - measured) == []


def test_every_number_of_the_results_is_in_a_file_that_the_page_links():
    """Means in sentences, which have no interval: weaker than the tests of intervals and of rows."""
    pages = [ROOT / "README.md", ROOT / "docs" / "explanation" / "results.md"]
    links = {(page.parent / link).resolve() for page in pages for link in LINKED.findall(page.read_text())}
    links |= {
        path for path in (RESULTS / "controls").rglob("*") if path.suffix in (".json", ".md")
    }  # of decision 023, which the page links
    texts = [one.read_text() for one in links]
    known = {f"{float(number):.3f}" for text in texts for number in re.findall(r"\d+\.\d{3,}", text)}
    found = {number for page in pages for number in THREE_DIGITS.findall(page.read_text())}
    assert len(found) > 100
    assert sorted(found - known) == []


def test_every_p_value_is_in_the_table_of_corrected_comparisons():
    table = (RESULTS / "gradient" / "README.md").read_text().partition("## Primary comparisons")[2]
    rows = [row for row in table.splitlines() if row.startswith("| ") and "[" in row]
    assert len(rows) == 3 * len(TOGETHER)
    table = (RESULTS / "rivals" / "survey" / "README.md").read_text().partition("## Primary comparisons")[2]
    rows += [row for row in table.splitlines() if row.startswith("| ") and "[" in row]
    known = {(abs(float(row.split("|")[6].split()[0])), float(row.split("|")[7].lstrip("< "))) for row in rows}
    found = [
        (abs(float(mean)), float(p))
        for page in PAGES
        for mean, p in re.findall(rf"({NUMBER}) \[[^]]*\][^.()]{{0,60}}?\(?p =\s+(0\.\d+)", page.read_text())
    ]
    assert found
    assert [one for one in found if not any(one[0] == mean and abs(p - one[1]) <= 5e-4 for mean, p in known)] == []


def linked_rows() -> list[tuple[str, str, dict[str, str]]]:
    """Rows of tables that link a result file: the page, the file, and the cells by their headings."""
    return [
        (str(page.relative_to(ROOT)), str((page.parent / link).resolve()), dict(zip(table[0], row, strict=True)))
        for page in PAGES
        for table in tables(page.read_text())
        for row in table[2:]
        if figures_in(" ".join(row))
        for link in LINKED.findall(row[0])
    ]


METHODS = {  # as headings of the docs name them -> as results do
    "merge": "merge only, laplace",
    "rank 1 alone": "adapt only",  # in results without calibrated rivals
    "another person's": "MTA, other person's shots",
    "one LoRA on everything": "pooled on everything",
}


def differences(text: str) -> dict[tuple[str, str], set[str]]:
    """Cells of a set's page by method and reference: over three seeds if there are such, else of any exhibit."""
    three = [part for part in text.split("\n## ") if " people, 3 seeds." in part]
    return _differences(text) | _differences("\n\n".join(three))


def _differences(text: str) -> dict[tuple[str, str], set[str]]:
    cells: dict[tuple[str, str], set[str]] = {}
    for (first, *columns), _, *rows in tables(text):
        for name, *row in rows:
            if first == "method":
                found = {(name, c.removeprefix("NLL against ")): cell for c, cell in zip(columns, row, strict=True)}
            else:  # MTA against | NLL
                found = {(first.removesuffix(" against"), name): row[0]}
            for key, cell in found.items():
                cells.setdefault(key, set()).add(cell)
    return cells


@pytest.mark.parametrize(("page", "file", "row"), linked_rows(), ids=lambda _: "")
def test_a_row_has_the_differences_of_the_file_that_it_links(page, file, row):
    text = Path(file).read_text()
    cells = _differences(text) if "seed 0" in next(iter(row.values())) else differences(text)
    for heading, cell in row.items():
        if named := re.fullmatch(r"(.+) (?:against|minus) (.+)", heading):
            keys = product(*([name, METHODS.get(name, name)] for name in named.groups()))
            found = set().union(*(cells.get(key, set()) for key in keys))
            assert cell in found or (
                cell in ("not run", "no labels", "mu = 0") and not figures_in(" ".join(found - {ZERO}))
            ), heading


def test_the_main_tables_link_their_files():
    pages = [page for page, _, _ in linked_rows()]
    assert pages.count("README.md") >= 3
    assert pages.count("docs/explanation/results.md") >= 10


def test_published_scores_hold_no_texts_and_no_ids_of_questions():
    files = sorted((ROOT / "results").rglob("scores.jsonl*"))
    assert files
    for path in files:
        assert path.suffix == ".gz", path
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        assert not {name for line in lines for name in json.loads(line)} & {"ids", "answers", "golds"}, path


def test_the_figure_of_gains_has_the_numbers_of_the_main_table():
    page = (ROOT / "docs" / "explanation" / "results.md").read_text()
    table = page.partition("## Main table")[2].partition("\n## ")[0]
    assert figures_in(table)
    found = gains()
    for title, rows in found.items():
        one = rows["MTA"]
        assert figure(one.mean, one.low, one.high) in figures_in(table), title
    assert drawn(picture(found)) == (ROOT / "results" / "gains.svg").read_bytes()


def drawn(figure: Picture) -> bytes:
    """The bytes of its SVG file."""
    return base64.b64decode(figure.data_uri().partition(",")[2])


def _adapting(kind: str) -> list[str]:
    return [f"adaptation, {text}, {kind}, {dtype}" for text in ("short", "reviews") for dtype in ("fp32", "bf16")]


SPEED = {  # beginnings of the lines of performance.md -> rows of `make bench`, in the order of the ratios
    "| train one LoRA per person": _adapting("rank 8 (OPPU)"),
    "| stage 3 (the stack)": _adapting("stage 3"),
    "| coefficients of 16": [f"coefficients, 16 anchors, {text}" for text in ("short prompts", "reviews")],
    "| coefficients of 32": [f"coefficients, 32 anchors, {text}" for text in ("short prompts", "reviews")],
    "| stages 2 and 3": ["stages 2 and 3 against OPPU, short prompts", "stages 2 and 3 against OPPU, reviews"],
    "- Exact merges of 256": ["merging, exact against PEFT cat", "merging, svd against PEFT svd"],
    "- Decoding for 16": ["decoding, bf16, against PEFT adapter_names", "decoding, bf16, against the base alone"],
}


def test_the_speeds_of_the_page_are_those_of_the_benchmark():
    rows = {row["name"]: row for row in json.loads((RESULTS / "bench-amd-epyc.json").read_text())["rows"]}
    page = (ROOT / "docs" / "explanation" / "performance.md").read_text()
    section = page.partition("times as fast: short texts")[2].partition("\n\nRows with")[0]
    lines = [line for line in section.splitlines() if re.search(r"\dx", line)]
    assert len(lines) == len(SPEED)
    for line in lines:
        (names,) = [names for start, names in SPEED.items() if line.startswith(start)]
        quoted = re.findall(r"([\d.]+)x", line)
        ratios = [rows[name]["ratio"] for name in names]
        assert quoted == [
            f"{ratio:.{len(shown.partition('.')[2])}f}" for ratio, shown in zip(ratios, quoted, strict=True)
        ], line


@pytest.fixture
def quick(monkeypatch):
    """Reports without HTML, which repeats all pictures, and without PNGs; each difference is resampled once."""
    plain, known = statistics.resample, {}

    def resample(values, seed=0, times=10_000, groups=()):
        key = values.numpy().tobytes(), values.shape, seed, times, tuple(groups)
        if key not in known:
            known[key] = plain(values, seed, times, groups)
        return known[key]

    monkeypatch.setattr(statistics, "resample", resample)
    monkeypatch.setattr("mta_lab.reports.report.page", lambda *parts: "")
    monkeypatch.setattr(Picture, "save", lambda self, path: path.with_suffix(".svg").write_bytes(drawn(self)))


SETS = ("lamp4_huffpost", "lamp2n_huffpost", "movielens-100k", "lamp3_amazon", "lamp5_papers")
TOGETHER = [RESULTS / "gradient" / name for name in SETS]  # as in their common table
REPORTS = [TOGETHER, *([folder] for folder in PUBLISHED if folder not in TOGETHER)]


@pytest.mark.parametrize("folders", REPORTS, ids=lambda folders: str(folders[0].relative_to(RESULTS)))
def test_published_tables_and_pictures_are_drawn_from_the_published_scores(folders, tmp_path, quick):
    """To the last digit: constraints.txt fixes the versions that draw random numbers, and pictures."""
    report(folders, tmp_path)
    for folder, page_at in zip(sorted(folders), sorted(tmp_path.glob("*/README.md")), strict=True):
        page = page_at.read_text()
        assert (folder / "README.md").read_text().strip() == page.strip()
        pictures = re.findall(r"\]\((\S+\.svg)\)", page)
        assert [one for one in pictures if (folder / one).read_bytes() != (page_at.parent / one).read_bytes()] == []
    if folders == TOGETHER:  # whose comparisons are corrected for all sets together
        assert (tmp_path / "README.md").read_text() == (folder.parent / "README.md").read_text()
