import base64
import io
import json
import re
from dataclasses import replace

import torch
from compared import comparison as comparison  # the fixture
from compared import comparison_of
from rich.console import Console

from mta.data.tasks import load_task
from mta.evaluation.metrics import Answers
from mta.evaluation.reports import figures
from mta.evaluation.reports.html import to_json
from mta.evaluation.reports.summary import headline, verdict
from mta.evaluation.reports.tables import table
from mta.evaluation.statistics import Comparison, Interval, Row


def shown(made, width=140, **how):
    console = Console(file=io.StringIO(), width=width, record=True, **how)
    console.print(made)
    return console


def test_table_shows_every_method_and_its_numbers(comparison):
    listed = shown(table(comparison)).export_text().splitlines()
    lines = {name: next(line for line in listed if line.startswith(name)) for name in ("method", *comparison.names)}
    assert lines["method"].split() == ["method", "MAE", "NLL", "change", "harmed", "prompt", "time", "kept"]
    assert lines["global constant"].split() == ["global", "constant", "1.250", "0", "0"]
    score, paired = comparison.score("MTA", "MAE"), comparison.difference("MTA", "task LoRA", "NLL")
    for part in (f"{score.mean:.3f}", f"{paired.mean:+.3f} better", "0 of 40", "3.0 s", "1.2 MB"):
        assert part in lines["MTA"]
    text = shown(table(comparison)).export_text()
    assert f"[{paired.low:+.3f}, {paired.high:+.3f}]" in text
    assert re.search(r"\+0\.\d{3} worse", lines["OPPU"])


def test_table_fits_into_eighty_columns_without_breaking_numbers(comparison):
    comparison.rows[3].name = "merge only, similarity, stacked"
    text = shown(table(comparison), width=80).export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    paired = comparison.difference("OPPU", "task LoRA", "NLL")
    for part in ("1.2 MB", "6.9 min", "harmed", f"[{paired.low:+.3f}, {paired.high:+.3f}]"):
        assert part in text


def test_texts_are_compared_in_their_primary_metric():
    task, people = load_task("lamp4"), 30
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(people, generator=generator, dtype=torch.float64) / 2
    rows = [
        Row(name, {"ROUGE-L": values, "ROUGE-1": values / 2}, None, 1.0, kept, None, [Answers(["a", "b"])] * people)
        for name, values, kept in (("task LoRA", low, 0.0), ("OPPU", low, 2e3), ("MTA", low + 0.1, 1e3))
    ]
    found = Comparison(task, rows)
    head = next(line for line in shown(table(found)).export_text().splitlines() if line.startswith("method"))
    assert head.split() == ["method", "ROUGE-L", "change", "harmed", "prompt", "time", "kept"]
    assert "+0.100 better" in shown(table(found)).export_text()
    said = verdict(found)
    assert said[0].startswith("ROUGE-L: MTA is better than the task LoRA by 0.100")
    assert not any("NLL" in sentence for sentence in said)
    assert to_json(found)["queries_per_person"] == 2


def test_verdict_when_better(comparison):
    said = verdict(comparison)
    gain = comparison.difference("MTA", "task LoRA", "NLL")
    assert (
        f"NLL: MTA is better than the task LoRA by {-gain.mean:.3f} "
        f"(95% interval {-gain.high:.3f} to {-gain.low:.3f})." in said
    )
    assert any(sentence.startswith("MAE: MTA is better than OPPU by 0.") for sentence in said)
    assert "Kept per person: 1.2 MB by MTA, 9.8 MB by OPPU." in said
    assert headline(comparison) == "MTA against the task LoRA: better in MAE and NLL"


def test_verdict_when_unclear(task):
    found = comparison_of(task, gain=0.0, oppu=0.0)
    unclear = [s for s in verdict(found) if s.startswith("MAE: MTA") or s.startswith("MAE: no")]
    for sentence in unclear:
        assert "no clear difference between MTA and " in sentence
        assert "with a 95% interval from 0.0" in sentence
    assert len(unclear) == 2
    assert headline(found).endswith("no clear difference in MAE and NLL")
    assert "better" not in shown(table(found)).export_text().split("Means over people")[0]


def test_verdict_when_surely_as_good_and_when_equal(task):
    found = comparison_of(task, gain=0.0, oppu=0.0, people=400)
    difference = found.difference("MTA", "OPPU", "NLL")
    assert max(-difference.low, difference.high) < 0.02
    interval = f"(95% interval from {-difference.low:.3f} better to {difference.high:.3f} worse)"
    assert f"NLL: MTA is as good as OPPU, to within 0.02 {interval}." in verdict(found)
    mta = found.row("MTA")
    found.rows[found.names.index("OPPU")] = replace(mta, name="OPPU")
    found.rows[found.names.index("task LoRA")] = replace(mta, name="task LoRA")
    said = " ".join(verdict(found))
    assert "95% interval from equal to equal" in said
    assert "-0.000" not in said
    assert "0.000 worse" not in said


def test_verdict_when_worse(task):
    found = comparison_of(task, gain=-0.4, oppu=0.0)
    loss = found.difference("MTA", "task LoRA", "NLL")
    said = verdict(found)
    assert (
        f"NLL: MTA is worse than the task LoRA by {loss.mean:.3f} "
        f"(95% interval {loss.low:.3f} to {loss.high:.3f})." in said
    )
    assert any(sentence.startswith("NLL: MTA is worse than OPPU") for sentence in said)
    share, clearly = found.worse_off("MTA", "task LoRA")
    counts = f"{share * 40:.0f} of 40 people are worse off with MTA than with the task LoRA"
    assert any(s.startswith(counts) and f"{clearly * 40:.0f} of them clearly" in s for s in said)


def test_verdict_where_prompts_show_earlier_items(task):
    for gain, alone in ((0.0, True), (0.4, False)):
        found = comparison_of(task, gain=gain, oppu=0.0)
        plain = replace(found.row("task LoRA"), name="task LoRA, no history")
        plain.people = {name: values + 0.3 for name, values in plain.people.items()}
        found.rows.append(plain)
        said = " ".join(verdict(found))
        assert (
            "NLL: the task LoRA with earlier items in its prompts is better than the same without them by 0.3" in said
        )
        assert ("not clearly better than history in the prompt alone" in said) == alone


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


def test_json_comes_back_whole(comparison):
    meta = {"base": "tiny-llama", "note": "dequantized from Q4_1", "data": "made up", "seed": 3, "command": "mta x"}
    made = to_json(comparison, **meta)
    back = json.loads(json.dumps(made, allow_nan=False))
    assert back == made
    assert back["meta"] == meta
    assert (back["people"], back["queries_per_person"], back["primary"]) == (40, 8, "MAE")
    rows = {row["name"]: row for row in back["methods"]}
    assert list(rows) == ["global constant", "task LoRA", "OPPU", "MTA"]
    score, paired = comparison.score("MTA", "accuracy"), comparison.difference("MTA", "OPPU", "MAE")
    assert rows["MTA"]["metrics"]["accuracy"] == {"mean": score.mean, "low": score.low, "high": score.high}
    assert rows["MTA"]["differences"]["OPPU"]["MAE"]["mean"] == paired.mean
    assert rows["MTA"]["worse_off"]["task LoRA"] == {"share": 0.0, "clearly": 0.0}
    assert (rows["MTA"]["seconds"], rows["MTA"]["bytes_per_person"]) == (3.04, 1.22e6)
    assert "task LoRA" not in rows["task LoRA"]["differences"]
    assert rows["global constant"]["worse_off"] == {}
    assert back["verdict"] == verdict(comparison)


def svg(picture):
    return base64.b64decode(picture.data_uri().partition(",")[2]).decode()


def test_gains_point_to_the_right_where_a_metric_gets_better():
    rows = {"MTA\n708 B, 0.3 s": [Interval(-0.2, -0.3, -0.1), Interval(0.1, 0.05, 0.15)]}
    drawn = figures.gains(rows, ["MAE", "accuracy"])
    for part in ("MAE: better to the right", "+0.200", "+0.100", ">708 B, 0.3 s<"):
        assert part in svg(drawn)
    assert drawn.alt == "Differences to everybody's model: MTA MAE -0.200 and accuracy +0.100."


def test_predictions_say_how_far_each_model_is_off():
    means = {"everybody's": [3.0, 3.0], "their own": [1.5, 5.0]}
    unspaced = "x" * 60
    drawn = figures.predictions("person A", [unspaced, "two"], ["1", "5"], ("1", "2", "3", "4", "5"), means)
    assert drawn.alt.endswith("Mean errors: everybody's 2.00, their own 0.25.")
    for part in (">true<", ">their own<", ">two<", f">{unspaced[:47]}…<"):
        assert part in svg(drawn)
