"""Pages and README: tables are those of the stored results; which page holds one, markers say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmark_scripts import load_script
from family_table import family_table

from progtuning_kernels import report
from progtuning_kernels.schedules.files import read_settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
STORED = sorted(RESULTS.glob("*/demo/*.json"))


def _between(name: str) -> str:
    """What stands between the markers `name:begin` and `name:end`, on every page that has them."""
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    texts = [text for page in PAGES if begin in (text := page.read_text(encoding="utf-8"))]
    (shown,) = {text.split(begin)[1].split(end)[0] for text in texts}
    return shown


def test_readme_is_one_screen_and_a_few():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_outside_the_site_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))
    missing = [to for to in links if "://" not in to and not (ROOT / to).exists()]
    assert not missing


def test_table_of_families_is_that_of_the_tests():
    assert _between("families") == family_table()


def test_table_of_ranks_is_what_the_planner_computes():
    assert _between("ranks") == load_script("planned_ranks").table()


@pytest.mark.parametrize(
    ("script", "marker"), [("predicted_times", "predicted"), ("ceilings", "ceilings")]
)
def test_what_is_counted_without_a_gpu_is_stored(script, marker):
    pytest.importorskip("triton")
    stored = json.loads((RESULTS / "compiled" / f"{script}.json").read_text())
    assert _between(marker) == load_script(script).table(stored)


@pytest.mark.parametrize(
    ("script", "marker"),
    [
        ("optimizer", "optimizer"),
        ("prefix_cache", "cache"),
        ("dropout", "dropout"),
        ("communication", "communication"),
        ("budget", "budget"),
        ("host_update", "host_update"),
        ("rows", "rows"),
    ],
)
def test_table_of_a_benchmark_is_that_of_the_stored_results(script, marker):
    benchmark = load_script(script)
    stored = [json.loads(path.read_text()) for path in RESULTS.glob(f"*/{script}.json")]
    assert stored and all(benchmark.table(contents) in _between(marker) for contents in stored)


def test_training_table_is_that_of_the_stored_results():
    stored = load_script("result_tables")
    tables = [stored.table(stored.load(folder.parent)) for folder in RESULTS.glob("*/training")]
    assert tables and all(table in _between("training") for table in tables)


def test_packing_table_is_that_of_the_stored_results():
    tables = load_script("result_tables")
    stored = [tables.load_packing(folder) for folder in RESULTS.iterdir() if folder.is_dir()]
    tables = [tables.packing_table(contents) for contents in stored if contents]
    assert tables and all(table in _between("packing") for table in tables)


def test_table_of_contributions_is_that_of_the_stored_results():
    paths = sorted(RESULTS.glob("*/contribution/*.json"))
    assert load_script("result_tables").contribution_table(paths) == _between("contribution")


def test_table_of_the_accuracy_study_is_that_of_the_stored_runs():
    tables, plan = load_script("study_tables"), load_script("study_plan")
    for folder in RESULTS.glob("*/study"):
        study = plan.Study(read_settings(plan.EXPERIMENT), folder)
        assert tables.table(study) in _between("study")


def test_intervals_that_pages_quote_stand_in_the_table():
    interval = re.compile(r"[+-][0-9.]+\s+\[[+-][0-9.]+,\s+[+-][0-9.]+\]")
    known = {" ".join(found.split()) for found in interval.findall(_between("study"))}
    quoted = {
        page: {" ".join(found.split()) for found in interval.findall(page.read_text("utf-8"))}
        for page in PAGES
    }
    assert quoted[ROOT / "README.md"] and set().union(*quoted.values()) <= known


def test_survey_of_architectures_is_the_stored_one():
    architectures = load_script("architectures")
    (stored,) = RESULTS.glob("*/architectures.json")
    stored = json.loads(stored.read_text())
    assert " ".join(_between("architectures").split()) == architectures.summary(stored)


def test_survey_of_packing_is_the_stored_one():
    survey = load_script("packing_architectures")
    (stored,) = RESULTS.glob("*/packing_architectures.json")
    shown = " ".join(_between("packing-architectures").split())
    assert shown == survey.summary(json.loads(stored.read_text()))


def test_table_is_that_of_the_stored_results():
    assert STORED
    table = report.markdown_table([report.load_run(path) for path in STORED])
    assert table.strip() in _between("results")
