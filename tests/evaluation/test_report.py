import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from mta.data.tasks import load_task
from mta.evaluation.asking import Asked, Interview
from mta.evaluation.metrics import Answers, measure, query_nll
from mta.evaluation.reports import figures
from mta.evaluation.reports.html import Section, page, plain, to_json, write_html
from mta.evaluation.reports.summary import headline, judge, verdict
from mta.evaluation.reports.tables import columns_of, table
from mta.evaluation.statistics import Comparison, Interval, Row
from mta.personalize.merge import Merge

HOSTILE = "<script>alert('x')</script><img src=https://evil.example/x.png onerror=\"go()\"> & {{ 7 * 7 }}"
SECTIONS = [
    "The comparison",
    "Score against bytes kept per person",
    "Map of anchors and people",
    "Chosen anchors and coefficients",
    "The same questions, before and after",
    "How this was made",
]
EVERY = {"1": 0.1, "2": 0.1, "3": 0.2, "4": 0.5, "5": 0.1}
ASKED = Interview(
    questions=(HOSTILE, "Fargo"),
    labels=("1", "2", "3", "4", "5"),
    pooled=(EVERY, EVERY),
    people=(
        Asked("c1", "3 shots, 1.7 on average", ((HOSTILE, "2"), ("Alien", "1")), ({**EVERY, "1": 0.9}, EVERY)),
        Asked("c2", "3 shots, 5.0 on average", (("Heat", "5"),), (EVERY, EVERY)),
    ),
)


def rated(task, name, people=40, queries=8, gain=0.0, seconds=0.0, kept=0.0, merge=None, seed=1):
    """A row whose model sees the true ratings through noise; ``gain`` raises the true label's score."""
    generator = torch.Generator().manual_seed(0)
    golds = torch.randint(5, (people, queries), generator=generator)
    blurred = golds[..., None] + 1.5 * torch.randn(people, queries, 1, generator=generator)
    noise = 0.05 * torch.randn(people, queries, 5, generator=torch.Generator().manual_seed(seed))
    scores = noise - (torch.arange(5) - blurred) ** 2 / 3
    scores.scatter_add_(2, golds[..., None], torch.full((people, queries, 1), gain))
    texts = [[task.labels[i] for i in row] for row in golds.tolist()]
    answers = [Answers([task.labels[i] for i in s.argmax(1).tolist()], s) for s in scores]
    measured = [measure(task, a, g).metrics for a, g in zip(answers, texts)]
    values = {metric: torch.tensor([m[metric] for m in measured], dtype=torch.float64) for metric in measured[0]}
    nll = torch.stack([query_nll(task, Answers([], s), g) for s, g in zip(scores, texts)])
    return Row(name, values, nll, seconds, kept, merge, answers)


def constant(task, people=40):
    values = {"MAE": torch.full((people,), 1.25), "RMSE": torch.ones(people), "accuracy": torch.full((people,), 0.2)}
    return Row("global constant", values, None, 0.0, 0.0, None)


def comparison_of(task, gain=0.3, oppu=-0.3, people=40, queries=8):
    merge = Merge(torch.arange(3).expand(people, 3).contiguous(), torch.tensor([[0.5, 0.2, 0.05]]).repeat(people, 1))
    size = {"people": people, "queries": queries}
    rows = [
        constant(task, people),
        rated(task, "task LoRA", **size),
        rated(task, "OPPU", gain=oppu, seconds=412.0, kept=9.77e6, seed=2, **size),
        rated(task, "MTA", gain=gain, seconds=3.04, kept=1.22e6, merge=merge, seed=3, **size),
    ]
    return Comparison(task, rows)


@pytest.fixture
def comparison(task):
    return comparison_of(task)


def shown(made, width=140, **how):
    console = Console(file=io.StringIO(), width=width, record=True, **how)
    console.print(made)
    return console


def test_table_shows_every_method_and_its_numbers(comparison):
    text = shown(table(comparison)).export_text()
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "movielens-rating: 40 people, 8 questions each" in text
    assert lines["global constant"].split()[2:] == ["1.250", "0.200", "-", "-", "-", "-", "0", "0"]
    assert "baseline" in lines["task LoRA"]
    score, paired = comparison.score("MTA", "MAE"), comparison.difference("MTA", "task LoRA", "NLL")
    assert f"{score.mean:.3f}" in lines["MTA"]
    assert f"[{score.low:.3f}, {score.high:.3f}]" in text
    assert f"{paired.mean:+.3f} better" in lines["MTA"]
    assert f"[{paired.low:+.3f}, {paired.high:+.3f}]" in text
    assert re.search(r"\+0\.\d{3} worse", lines["OPPU"])
    assert lines["MTA"].replace("\xa0", " ").endswith("3.0 s 1.2 MB")
    assert lines["OPPU"].replace("\xa0", " ").endswith("6.9 min 9.8 MB")
    assert "RMSE" not in text


def test_table_marks_with_colour_and_words(comparison):
    styled = shown(table(comparison), force_terminal=True, color_system="standard").export_text(styles=True)
    assert "\x1b[32m better" in styled
    assert "\x1b[31m worse" in styled
    best = comparison.score("MTA", "NLL").mean
    assert f"\x1b[1m{best:.3f}" in styled
    assert f"\x1b[1m{comparison.score('OPPU', 'NLL').mean:.3f}" not in styled


def test_table_fits_into_eighty_columns_without_breaking_numbers(comparison):
    text = shown(table(comparison), width=80).export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    for part in ("1.2\xa0MB", "6.9\xa0min", "baseline", "accuracy", f"{comparison.score('MTA', 'MAE').low:.3f},"):
        assert part in text


def test_best_of_a_column_follows_the_metrics_direction(comparison):
    columns = columns_of(comparison)
    assert list(columns) == [
        "MAE",
        "accuracy",
        "median\nMAE",
        "NLL",
        "NLL against\ntask LoRA",
        "people\nworse off",
        "training",
        "kept\neach",
    ]
    for title in ("MAE", "accuracy", "NLL", "people\nworse off"):
        assert [cell.best for cell in columns[title]] == [False, False, False, True]
    assert [cell.best for cell in columns["kept\neach"]] == [True, True, False, False]


def test_without_the_reference_nothing_is_compared(comparison):
    rows = [row for row in comparison.rows if row.name != "task LoRA"]
    titles = list(columns_of(Comparison(comparison.task, rows)))
    assert titles == ["MAE", "accuracy", "median\nMAE", "NLL", "training", "kept\neach"]


def test_texts_are_compared_in_their_primary_metric():
    task, people = load_task("lamp4"), 30
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(people, generator=generator, dtype=torch.float64) / 2
    rows = [
        Row(name, {"ROUGE-L": values, "ROUGE-1": values / 2}, None, 1.0, kept, None, [Answers(["a", "b"])] * people)
        for name, values, kept in (("task LoRA", low, 0.0), ("OPPU", low, 2e3), ("MTA", low + 0.1, 1e3))
    ]
    found = Comparison(task, rows)
    assert list(columns_of(found)) == ["ROUGE-L", "ROUGE-1", "ROUGE-L against\ntask LoRA", "training", "kept\neach"]
    assert "+0.100 better" in shown(table(found)).export_text()
    said = verdict(found)
    assert said[0].startswith("ROUGE-L: MTA is better than the pooled model (task LoRA) by 0.100")
    assert not any("NLL" in sentence for sentence in said)
    assert to_json(found)["queries_per_person"] == 2


def test_verdict_when_better(comparison):
    said = verdict(comparison)
    gain = comparison.difference("MTA", "task LoRA", "NLL")
    assert (
        f"NLL: MTA is better than the pooled model (task LoRA) by {-gain.mean:.3f} "
        f"(95% interval {-gain.high:.3f} to {-gain.low:.3f})." in said
    )
    assert any(sentence.startswith("MAE: MTA is better than OPPU by 0.") for sentence in said)
    assert "Kept per person: 1.2 MB by MTA, 9.8 MB by OPPU." in said
    assert headline(comparison) == "MTA against the pooled model: better in MAE and NLL"


def test_verdict_when_unclear(task):
    found = comparison_of(task, gain=0.0, oppu=0.0)
    unclear = [s for s in verdict(found) if s.startswith("MAE: MTA") or s.startswith("MAE: no")]
    for sentence in unclear:
        assert "no clear difference between MTA and " in sentence
        assert "with a 95% interval from 0.0" in sentence
    assert len(unclear) == 2
    assert headline(found).endswith("no clear difference in MAE and NLL")
    assert "better" not in shown(table(found)).export_text().split("Means over people")[0]


def test_verdict_when_surely_as_good(task):
    found = comparison_of(task, gain=0.0, oppu=0.0, people=400)
    difference = found.difference("MTA", "OPPU", "NLL")
    assert max(-difference.low, difference.high) < 0.02
    interval = f"(95% interval from {-difference.low:.3f} better to {difference.high:.3f} worse)"
    assert f"NLL: MTA is as good as OPPU, to within 0.02 {interval}." in verdict(found)


def test_verdict_when_worse(task):
    found = comparison_of(task, gain=-0.4, oppu=0.0)
    loss = found.difference("MTA", "task LoRA", "NLL")
    said = verdict(found)
    assert (
        f"NLL: MTA is worse than the pooled model (task LoRA) by {loss.mean:.3f} "
        f"(95% interval {loss.low:.3f} to {loss.high:.3f})." in said
    )
    assert any(sentence.startswith("NLL: MTA is worse than OPPU") for sentence in said)
    share, clearly = found.worse_off("MTA", "task LoRA")
    counts = f"{share * 40:.0f} of 40 people are worse off with MTA than with the pooled model"
    assert any(s.startswith(counts) and f"{clearly * 40:.0f} of them clearly" in s for s in said)


def test_verdict_says_how_little_it_rests_on(task):
    few = comparison_of(task, people=3, queries=1)
    said = verdict(few)
    assert "Only 3 people were tested: the intervals are too narrow to be trusted." in said
    assert not any("clearly" in sentence for sentence in said)  # one question each cannot tell
    assert to_json(few)["methods"][3]["worse_off"]["task LoRA"]["clearly"] is None
    one = comparison_of(task, people=1)
    assert "better than" not in " ".join(verdict(one))
    without = Comparison(task, [row for row in few.rows if row.name != "MTA"])
    assert verdict(without) == ["MTA is not among the methods compared."]


def test_one_person_decides_nothing():
    assert judge("NLL", Interval(-0.1, -0.1, -0.1), units=1) == "unclear"
    assert judge("NLL", Interval(-0.1, -0.2, -0.01), units=9) == "better"
    assert judge("accuracy", Interval(-0.1, -0.2, -0.01), units=9) == "worse"


def test_json_comes_back_whole(comparison):
    meta = {"base": "tiny-llama", "note": "dequantized from Q4_1", "data": "made up", "seed": 3, "command": "mta x"}
    made = to_json(comparison, **meta)
    back = json.loads(json.dumps(made, allow_nan=False))
    assert back == made
    assert back["meta"] == meta
    assert (back["people"], back["queries_per_person"], back["primary"]) == (40, 8, "MAE")
    rows = {row["name"]: row for row in back["methods"]}
    assert list(rows) == ["global constant", "task LoRA", "OPPU", "MTA"]
    score, paired = comparison.score("MTA", "RMSE"), comparison.difference("MTA", "OPPU", "MAE")
    assert rows["MTA"]["metrics"]["RMSE"] == {"mean": score.mean, "low": score.low, "high": score.high}
    assert rows["MTA"]["differences"]["OPPU"]["MAE"]["mean"] == paired.mean
    assert rows["MTA"]["worse_off"]["task LoRA"] == {"share": 0.0, "clearly": 0.0}
    assert (rows["MTA"]["seconds"], rows["MTA"]["bytes_per_person"]) == (3.04, 1.22e6)
    assert "task LoRA" not in rows["task LoRA"]["differences"]
    assert rows["global constant"]["worse_off"] == {}
    assert back["verdict"] == verdict(comparison)


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

    def write(name="report.html", people=True, **changes):
        people_vectors = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) if people else None
        what = {
            "comparison": comparison,
            "bank": tiny[1],
            "people_vectors": people_vectors,
            "asked": ASKED,
            "meta": {
                "command": "mta evaluate x.jsonl --bank bank/",
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


def test_page_is_whole_and_loads_nothing(written):
    text = written()
    found = Page(text)
    assert [heading for heading in found.headings if heading in SECTIONS] == SECTIONS
    assert "MTA against the pooled model: better in MAE and NLL" in found.headings
    assert "script" not in found.tags
    assert all(value.startswith("data:") for value in found.loads)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"url\(|@import", text)


def test_page_contains_findings_answers_and_settings(written, comparison):
    found = Page(written())
    text = " ".join("".join(found.text).split())
    for sentence in verdict(comparison):
        assert sentence in text
    for part in (
        "mta evaluate x.jsonl --bank bank/",
        "dequantized from Q4_1",
        "tiny-llama",
        "protocol reconstructed",
        "first 3 items, then 8",
        "2026-11-25",
        "mta 0.1, torch 2.13",
        "shots 3, oppu (rank 8)",
        "person A, 3 shots, 1.7 on average",
        "everybody: 3.4 on average",
        "see https://example.org/terms",
        "made up <b>here</b>",
    ):
        assert part in text
    pictures = " ".join(found.alts)
    assert "MAE, lower is better, over bytes kept per person: global constant 1.250 with 0" in pictures
    assert "Map of" in pictures
    assert "probability of each answer to 'Fargo': everybody, person A, person B." in pictures
    assert "Coefficients of person A: anchor 0 (6 items) 0.50" in pictures


def test_page_contains_no_items_of_the_people_who_were_asked(written):
    text = written()
    assert not any(shot in text for shot in ("Alien", "Heat"))


def test_hostile_strings_stay_text(written):
    found = Page(written(meta={"command": HOSTILE, HOSTILE: HOSTILE}, comparison=hostile_names()))
    assert not {"script", "a"} & found.tags
    assert HOSTILE in "".join(found.text)
    assert not any("evil" in value for value in found.loads)


def hostile_names():
    made = comparison_of(load_task("movielens-rating"))
    made.rows[0].name = HOSTILE + " $x$"
    return made


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


def test_pages_are_the_same_to_the_byte(written):
    assert written("one.html") == written("two.html")


def test_page_without_vectors_merge_or_questions(written, task):
    without = Comparison(task, [row for row in comparison_of(task).rows if row.name != "MTA"])
    found = Page(written(people=False, comparison=without, asked=None))
    assert "Map of anchors and people" not in found.headings
    assert "Chosen anchors and coefficients" not in found.headings
    assert "The same questions, before and after" not in found.headings
    assert "MTA is not among the methods compared." in "".join(found.text)


def test_page_contains_no_person_and_no_other_file_is_written(written, tmp_path):
    text = written()
    assert not re.search(r"\b[ctx]\d\b", "".join(Page(text).text))  # the tiny bank's people are t0.. and c0..
    assert [path.name for path in tmp_path.glob("*.html")] == ["report.html"]
    assert not list(tmp_path.glob(".*report*"))


def svg(picture):
    return base64.b64decode(picture.data_uri().partition(",")[2]).decode()


def test_scatter_shows_methods_that_store_nothing_and_outliers():
    near = [(f"m{i}", i * 1e3, Interval(0.7 + i / 100, 0.6, 0.9)) for i in range(4)]
    far = ("base", 0.0, Interval(2.5, 2.4, 2.6))
    drawn = figures.scatter([*near, far], "MAE")
    assert "base (2.50)" in svg(drawn)
    assert drawn.alt.startswith("MAE, over bytes kept per person: m0 0.700 with 0, m1 0.710 with 1 kB")
    assert ">m0<" in svg(figures.scatter([near[0]], "MAE"))


def test_bars_show_the_rest_and_coefficients_below_zero():
    merge = Merge(torch.tensor([[4, 1, 2], [0, 1, 2]]), torch.tensor([[0.5, -0.2, 0.1], [0.7, 0.2, 0.1]]))
    one, other = map(svg, figures.coefficient_bars(merge, items=[10, 11, 12, 13, 14], most=2))
    for part in (
        "anchor 4 (14 items)",
        "anchor 1 (11 items)",
        "-0.20",
        "1 other anchors",
        "pooled model alone",
        "0.60",
    ):
        assert part in one
    assert "pooled model alone" not in other


def test_map_is_the_same_every_time():
    generator = torch.Generator().manual_seed(0)
    anchors, people = torch.randn(6, 5, generator=generator), torch.randn(9, 5, generator=generator)
    drawn = figures.anchor_map(anchors, people)
    assert svg(drawn) == svg(figures.anchor_map(anchors, people))
    assert svg(drawn).count(">person ") == 3
    assert "Map of 6 numbered anchors and 9 people" in drawn.alt
    assert "Strongest" not in drawn.alt
    merge = Merge(torch.tensor([[5, 2]]).repeat(9, 1), torch.tensor([[0.6, 0.4]]).repeat(9, 1))
    assert "Strongest of person A: anchor 5, anchor 2." in figures.anchor_map(anchors, people, merge).alt
