"""Tables as plain text and as HTML."""

from __future__ import annotations

import re
from html import unescape

import pytest
from tiny_models import tiny_inputs, tiny_model

from progtuning_kernels import (
    FreezePlan,
    ProgressiveSchedule,
    RandomBlockSchedule,
    backend_report,
    patch_model,
)
from progtuning_kernels.planner.training_plan import Remedy, StagePlan, TrainingPlan
from progtuning_kernels.text_table import Table, as_html, as_text, text_table

ROWS = [("unit", "bytes", "why"), ("block 10", "7", ""), ("head", "1,024", "tied")]


def test_columns_are_aligned_and_lines_end_with_their_text():
    assert text_table(ROWS, left=(0, 2)) == [
        "unit      bytes  why",
        "block 10      7",
        "head      1,024  tied",
    ]


def test_html_escapes_names_and_has_no_colour_of_its_own():
    rows = [("<b>unit</b>", "n"), ("a & b", "1")]
    html = as_html(["<script>", "", Table(rows, left=(0,))])
    assert "&lt;script&gt;" in html and "&lt;b&gt;unit&lt;/b&gt;" in html and "a &amp; b" in html
    assert "<script>" not in html and "<b>" not in html and "color" not in html
    assert html.count("<th ") == 2 and html.count("<td ") == 2
    assert "<th" not in as_html([Table(rows, left=(0,), head=False)])
    assert as_text(["one", Table(rows, left=(0,)), "two"]).splitlines()[::3] == ["one", "two"]


def _words(html: str) -> list[str]:
    return unescape(re.sub(r"<[^>]*>", " ", html)).split()


@pytest.fixture(scope="module")
def handle():
    model = tiny_model("bert-sequence")
    handle = patch_model(model, ProgressiveSchedule(2, 8), cache="auto", step=4)
    model(**tiny_inputs("bert-sequence")).loss.backward()
    yield handle
    handle.unpatch()


@pytest.mark.parametrize(
    "report",
    ["truncation_report", "cache_report", "packing_report", "kernel_report", "plan", "backend"],
)
def test_reports_show_the_same_characters_as_html(handle, report):
    if report == "plan":
        stage = StagePlan(0, 8, 2, "blocks 2-3", 10**6, *[2**21] * 5, 10**9, 10**9, 0.5)
        remedies = (Remedy("in_backward=True", 2**20),)
        shown = TrainingPlan("tiny", (stage,), stage, 2**30, remedies, ("a <note>",), False)
    elif report == "backend":
        shown = backend_report()
    else:
        shown = getattr(handle, report)()
    assert len(str(shown).split()) > 3
    assert _words(shown._repr_html_()) == str(shown).split()


def test_a_plan_is_a_strip_of_units():
    html = FreezePlan((False, True, True))._repr_html_()
    assert _words(html)[-10:] == ["embeddings", "0", "1", "2", "head", "□", "□", "■", "■", "■"]
    assert "trains: blocks 1-2, head; boundary 1" in html
    assert "trains: nothing" in FreezePlan((False,), head=False)._repr_html_()


def test_a_handle_shows_every_stage(handle):
    words = _words(handle._repr_html_())
    assert words[-16:-8] == ["1", "0-3", "■", "■", "■", "■", "■", "■"]
    assert words[-8:] == ["2", "4-7", "□", "□", "□", "■", "■", "■"]


def test_a_handle_shows_no_stages_that_nobody_knows_and_not_too_many():
    def shown(schedule):
        with patch_model(tiny_model("bert-sequence"), schedule) as handle:
            return handle._repr_html_()

    assert "<table>" not in shown(ProgressiveSchedule(2))
    html = shown(RandomBlockSchedule(1, period=2).bind(1000))
    assert html.count("<tr>") == 34 and "64-999" in html
