"""The page of a comparison: complete, without scripts of others, and without items of people."""

import re
from html.parser import HTMLParser

import pytest
from compared import ASKED, HOSTILE, comparison_of
from compared import comparison as comparison  # the fixture

from mta.data.tasks import load_task
from mta.evaluation.reports.html import Section, page, plain, write_html
from mta.evaluation.reports.summary import verdict
from mta.evaluation.statistics import Comparison

SECTIONS = [
    "What a model of one's own gains",
    "Two people, question by question",
    "In sentences",
    "The comparison",
    "How this was made",
]


class Page(HTMLParser):
    """Checks nesting and collects what a browser would load, headings, descriptions of pictures, and text."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.headings, self.alts, self.text, self.tags = [], [], [], [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        for key, value in attrs:
            assert not key.startswith("on"), key
            if key in {"src", "href", "xlink:href", "srcset", "data", "action"}:
                self.loads.append(value)
            if key == "alt":
                self.alts.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in {"h1", "h2"}:
            self.headings.append(data)
        self.text.append(data)


@pytest.fixture
def written(tiny, comparison, tmp_path):
    """Write the page into a file and read it."""

    def write(name="report.html", **changes):
        what = {
            "comparison": comparison,
            "bank": tiny[1],
            "people": ASKED,
            "meta": {
                "command": "mta compare x.jsonl --bank bank/",
                "seed": 3,
                "note": "dequantized from Q4_1",
                "data": "made up <b>here</b>",
                "terms": "none, see https://example.org/terms",
                "protocol": "first 3 items, then 8",
                "date": "2026-11-25",
                "versions": {"mta": "0.1", "torch": "2.13"},
                "evaluation": {"shots": 3, "oppu": {"rank": 8}},
            },
        }
        write_html(tmp_path / name, **(what | changes))
        return (tmp_path / name).read_text(encoding="utf-8")

    return write


def test_page_is_whole_loads_nothing_and_contains_no_person_and_no_item(written, tmp_path):
    shown = Page(written())
    assert [heading for heading in shown.headings if heading in SECTIONS] == SECTIONS
    text = written(people=())  # as mta compare writes it; a demo shows two people of public data
    found = Page(text)
    assert "MTA against the task LoRA: better in MAE and NLL" in found.headings
    assert "script" not in found.tags
    assert all(value.startswith("data:") for value in found.loads)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"url\(|@import", text)
    assert not re.search(r"\b[ctx]\d\b", "".join(found.text))  # the tiny bank's people are t0.. and c0..
    assert not any(shot in text for shot in ("Alien", "Heat"))
    assert [path.name for path in tmp_path.glob("*.html")] == ["report.html"]
    assert not list(tmp_path.glob(".*report*"))


def test_page_contains_findings_answers_and_settings(written, comparison):
    found = Page(written())
    text = " ".join("".join(found.text).split())
    for sentence in verdict(comparison):
        assert sentence in text
    for part in (
        "mta compare x.jsonl --bank bank/",
        "dequantized from Q4_1",
        "tiny-llama",
        "protocol reconstructed",
        "first 3 items, then 8",
        "2026-11-25",
        "mta 0.1, torch 2.13",
        "shots 3, oppu (rank 8)",
        "person B gave the answers: Heat 5",
        "see https://example.org/terms",
        "made up <b>here</b>",
    ):
        assert part in text
    pictures = " ".join(found.alts)
    assert "Mean errors: everybody's 1.50, their own 0.30." in pictures
    assert "OPPU MAE (median) +0." in pictures


def test_hostile_strings_stay_text(written):
    made = comparison_of(load_task("movielens-rating"))
    made.rows[0].name = HOSTILE + " $x$"
    found = Page(written(meta={"command": HOSTILE, HOSTILE: HOSTILE}, comparison=made))
    assert not {"script", "a"} & found.tags
    assert HOSTILE in "".join(found.text)
    assert not any("evil" in value for value in found.loads)


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        "![x](https://evil.example/x.png) [y](javascript:go()) <https://evil.example>",
        "- a | b",
        "# title",
        "1. one",
        "12) two",
        "*a* __b__ `c` ~~d~~ &lt; \\ |",
        "--- = ***",
    ],
)
def test_escaped_texts_are_shown_as_they_are(text):
    found = Page(page("title", f"- {plain(text)}\n", [Section("table", f"| a |\n| --- |\n| {plain(text)} |\n")]))
    assert "".join(found.text).count(text) == 2
    assert not {"em", "strong", "code", "a", "img", "s", "ol"} & found.tags


def test_page_without_mta_or_people(written, task):
    without = Comparison(task, [row for row in comparison_of(task).rows if row.name != "MTA"])
    found = Page(written(comparison=without, people=()))
    assert "Two people, question by question" not in found.headings
    assert "MTA is not among the methods compared." in "".join(found.text)
