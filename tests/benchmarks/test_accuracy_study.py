"""benchmarks/accuracy_study.py: order and resume of its runs, its statistics, and tiny training."""

from __future__ import annotations

import copy
import json
import statistics
import sys
from functools import partial

import pytest
import torch
from benchmark_scripts import load_script
from scipy.stats import t, ttest_1samp
from tiny_models import VOCABULARY, tiny_model

from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.schedules.files import read_settings

SCRIPT = load_script("accuracy_study")
PLAN, TABLES, TASKS, TRAINING = (
    sys.modules[f"study_{name}"] for name in ("plan", "tables", "tasks", "training")
)
EXPERIMENT = read_settings(PLAN.EXPERIMENT)


def experiment() -> dict:
    """Two methods and one that shares runs, on a tuning task and another."""
    found = {key: EXPERIMENT[key] for key in ("common", "tuning", "tasks", "margin_points")}
    names = ("full", "full-packed", "full-fewer", "progtuning", "progtuning-cache")
    part = {"model": "minilm", "tasks": ["cola", "rte"], "seeds": 2}
    own = {"tuning_tasks": ["cola"], "rates": [5e-5, 1.5e-4, 4.5e-4]}
    methods = {name: EXPERIMENT["methods"][name] for name in names}
    methods["progtuning-cache"] = {"title": "cache", "way": "packed", "stages": 3, "cache": True}
    methods["progtuning-cache"] |= {"rate_of": "progtuning"}
    return found | {
        "confidence": 0.9,
        "first_seed": 0,
        "comparisons": [["progtuning-cache", "progtuning"], ["progtuning", "full-fewer"]],
        "models": {"minilm": EXPERIMENT["models"]["minilm"] | own},
        "methods": methods,
        "parts": [
            part | {"methods": ["full", "full-packed", "progtuning"]},
            part | {"methods": ["progtuning-cache", "full"]},
        ],
    }


def record(score: float, **more) -> dict:
    meta = {"commit": "c0ffee12", "dirty": False, "device": "a machine"}
    numbers = {"steps": 100, "updates": 500, "num_params": 10, "peak_state_bytes": 2**20}
    return {"score": score, **numbers, "meta": meta, **more}


def tuned(folder) -> object:
    """A study with its tuning runs: full is best at the middle rate, progtuning at the highest."""
    study = PLAN.Study(experiment(), folder)
    for job in study.jobs():
        if job.tunes:
            best = {"full": 1, "progtuning": 2}[job.method]
            near = study.rates("minilm", job.method).index(job.rate) == best
            study.add(job, record(50.0 + near))
    return study


def test_tuning_comes_first_and_every_run_once(tmp_path):
    study = PLAN.Study(experiment(), tmp_path)
    jobs = study.jobs()
    assert len(jobs) == len(set(jobs)) == 6 + 2 * 2 * 3
    assert all(job.tunes and job.task == "cola" for job in jobs[:6])
    assert [job.rate for job in jobs[6:]] == [None] * 12
    seeds = [(job.seed, job.task, job.method) for job in jobs[6:10]]
    assert seeds == [(0, t, m) for t in ("cola", "rte") for m in ("full", "progtuning")]
    study = tuned(tmp_path)
    assert study.rate("minilm", "full") == 1.5e-4
    assert study.rate("minilm", "progtuning-cache") == study.rate("minilm", "progtuning") == 4.5e-4


def test_stored_runs_are_not_made_again_and_a_line_cut_off_costs_one(tmp_path):
    study = tuned(tmp_path)
    first, second = study.jobs()[6:8]
    study.add(first, record(1.0))
    path = tmp_path / PLAN.RUNS
    path.write_bytes(path.read_bytes()[:-40])  # as a killed process leaves it
    again = PLAN.Study(experiment(), tmp_path)
    assert len(again.records) == 6 and first not in again.records
    again.add(first, record(1.0))
    again.add(second, record(2.0))
    again = PLAN.Study(experiment(), tmp_path)
    assert [again.records[job]["score"] for job in (first, second)] == [1.0, 2.0]
    other = experiment()
    other["common"] = other["common"] | {"epochs": 4}
    changed = PLAN.Study(other, tmp_path)
    assert not changed.records and changed.strangers == 8


def test_several_commands_share_the_runs(tmp_path):
    jobs = PLAN.Study(experiment(), tmp_path).jobs()[:2]
    with SCRIPT.claimed(jobs, tmp_path) as first, SCRIPT.claimed(jobs, tmp_path) as second:
        assert [first, second] == jobs
        with SCRIPT.claimed(jobs, tmp_path) as third:
            assert third is None
    with SCRIPT.claimed(jobs, tmp_path) as again:
        assert again == jobs[0]
    study, other = (PLAN.Study(experiment(), tmp_path) for _ in range(2))
    other.add(jobs[0], record(1.0))
    assert jobs[0] not in study.records
    study.read()
    assert study.records == other.records


def test_nothing_is_timed_beside_runs(tmp_path):
    with SCRIPT.undisturbed(tmp_path, timing=False), SCRIPT.undisturbed(tmp_path, timing=False):
        with pytest.raises(UserError, match="another command is timing or making runs"):
            with SCRIPT.undisturbed(tmp_path, timing=True):
                pass
    with SCRIPT.undisturbed(tmp_path, timing=True):
        with pytest.raises(UserError, match="another command"):
            with SCRIPT.undisturbed(tmp_path, timing=False):
                pass


def test_a_stopped_run_goes_on_under_the_same_settings_only(tmp_path):
    study = PLAN.Study(experiment(), tmp_path)
    job, settings = study.jobs()[0], study.settings("minilm", "cola", "full")
    folder = partial(SCRIPT.work_folder, tmp_path, job)
    assert folder(settings, 300) == folder(dict(reversed(settings.items())), 300)
    assert folder(settings, 300) != folder(settings, 111)
    assert folder(settings, 300) != folder(settings | {"tokens": 7}, 300)


def test_a_model_may_have_fewer_rows_of_a_task(tmp_path):
    changed = copy.deepcopy(experiment())
    changed["models"]["minilm"]["train_rows"] = {"rte": 7}
    study = PLAN.Study(changed, tmp_path)
    rows = [study.settings("minilm", task, "full")["train_rows"] for task in ("rte", "cola")]
    assert rows == [7, EXPERIMENT["tasks"]["cola"]["train_rows"]]
    assert SCRIPT.with_rows(changed, 20)["models"]["minilm"]["train_rows"] == {}


def test_seconds_are_steps_times_measured_steps(tmp_path):
    rounds_ms = [[90, 12, 10, 40, 90, 20, 20], [70, 12, 10, 60, 70, 20, 22]]
    warm = [True, True, False, True, True, True, False]
    found = TRAINING.warm_steps([0, 0, 0, 0, 0, 1, 1, 1], 4)
    assert found == [True, True, False, False, True, True, True, False]
    stages = PLAN.by_stage([0] * 4 + [1] * 3, warm, rounds_ms)
    assert [s["step_ms"] for s in stages] == [10, 21]
    assert [s["first_extra_ms"] for s in stages] == [70 + 2, 59 - 1]
    seconds = (700 * (4 / 7 * 10 + 3 / 7 * 21) + 72 + 58) / 1e3
    assert PLAN.run_seconds({"stages": stages}, 700) == pytest.approx(seconds)
    one = {"share": 1.0, "first_extra_ms": 0.0}
    methods = {
        name: {
            "stages": [one | {"step_ms": ms}],
            "settings": PLAN.Study(experiment(), tmp_path).settings("minilm", "cola", name),
        }
        for name, ms in (("full-packed", 10), ("full-fewer", 10), ("progtuning", 7.5))
    }
    content = {"model": "minilm", "task": "cola", "steps": 400, "train_rows": 4000}
    content |= {"evaluation_s": 2.0, "methods": methods}
    study = PLAN.Study(experiment(), tmp_path)
    with pytest.raises(ValueError, match="full-fewer"):
        study.steps("minilm", "cola", "full-fewer", 400)
    (tmp_path / PLAN.TIMES).mkdir()
    (tmp_path / PLAN.TIMES / "minilm-cola.json").write_text(json.dumps(content))
    study = PLAN.Study(experiment(), tmp_path)
    assert study.steps("minilm", "cola", "full-fewer", 400) == 300
    assert study.steps("minilm", "cola", "progtuning", 400) == 400
    job = PLAN.Job("minilm", "cola", "progtuning", 0, None)
    assert study.about_seconds(job) == 3 + 2
    other = experiment()
    other["methods"]["progtuning"] = other["methods"]["progtuning"] | {"clip": 2.0}
    assert PLAN.Study(other, tmp_path).seconds("minilm", "cola", "progtuning", 400) is None
    assert study.about_seconds(PLAN.Job("minilm", "rte", "full", 0, None)) is None


def test_intervals_are_those_of_students_t():
    one, two = [0.5, -1.0, 2.5, 0.0], [3.0, 1.0]
    found = TABLES.over_seeds(one, 0.95)
    right = ttest_1samp(one, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((right.low, right.high))
    # equal spreads and counts: the mean of 2 tasks has twice the degrees of freedom of one
    both = TABLES.over_tasks([one, [v + 7 for v in one]], 0.95)
    width = t.ppf(0.975, 6) * statistics.stdev(one) / 4**0.5 / 2**0.5
    assert (both.low, both.high) == pytest.approx((both.mean - width, both.mean + width))
    assert both.mean == statistics.mean(one) + 3.5
    assert TABLES.over_tasks([one, two], 0.95).mean == 1.25  # tasks count alike
    assert TABLES.over_seeds([1.5], 0.95) == TABLES.Interval(1.5, None, None)
    assert TABLES.over_seeds([2.0, 2.0], 0.95) == TABLES.Interval(2.0, None, None)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.9, 0.3, "within the margin"),
        (0.2, 0.9, "within the margin, better"),
        (-0.9, -0.2, "within the margin, worse"),
        (-1.1, 3.0, "undecided"),
        (-1.1, -0.1, "undecided, worse"),
        (-3.0, -1.1, "worse by more than the margin"),
        (None, None, "no interval"),
    ],
)
def test_what_an_interval_says_of_the_margin(low, high, words):
    assert TABLES.verdict(TABLES.Interval(0.0, low, high), 1.0) == words


def test_table_pairs_runs_by_seed_and_fills_a_page(tmp_path):
    study = tuned(tmp_path)
    scores = {"full": (10.0, 20.0), "progtuning": (11.0, 24.0), "progtuning-cache": (10.0, 20.0)}
    for job in study.jobs():
        # of the cache, one seed ran, the second: it is compared with full's second
        if not job.tunes and (job.method, job.seed) != ("progtuning-cache", 0):
            updates = 500 if job.method == "full" else 250
            study.add(job, record(scores[job.method][job.seed], updates=2 * updates))
    shown = TABLES.table(study)
    lines = {line.split(" | ")[0]: line for line in shown.splitlines()}
    assert "| 15.0 ± 5.0 | 15.0 ± 5.0 |" in lines["| full (HF)"]
    assert "full, packed" not in shown  # it has the runs of full, and was not timed
    assert "| +2.5 [-7.0, +12.0] |" in lines["| Progtuning, packed"]  # t.ppf(0.95, 1) * 1.5
    assert "| 50.0 | 1.0 |" in lines["| Progtuning, packed"]
    assert " | 1 | +0.0 | +0.0 | +0.0 | no interval |" in lines["| cache"]
    cached = lines["| cache – Progtuning, packed"]
    assert cached == f"{cached.split(' | ')[0]} | 1 | -4.0 | -4.0 | -4.0 | no interval | -4.0 |  |"
    assert "fewer epochs" not in shown  # it did not run
    cells = partial(TABLES._mean_cells, study, "minilm", tasks=["cola", "rte"])
    assert cells({"cola": [1.0, 2.0]}) == ["", "", ""]
    two = {"cola": [1.0, 2.0], "rte": [7.0, 9.0]}
    assert cells(two)[2] == str(TABLES.over_seeds([1.0, 2.0], 0.9)) != cells(two)[0]
    assert "Progtuning, packed (0.00045)" in shown and "not run yet: cache 2." in shown
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study:begin -->\nold\n<!-- study:end -->\nafter\n")
    TABLES.fill(page, shown)
    TABLES.fill(page, shown)
    assert page.read_text() == f"before\n{TABLES.MARKERS[0]}{shown}{TABLES.MARKERS[1]}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(UserError, match="study:begin"):
        TABLES.fill(page, shown)
    with pytest.raises(UserError, match="accuracy_study.py times"):
        TABLES.figure(study)
    one, half = (
        {"stages": [{"share": 1.0, "step_ms": ms, "first_extra_ms": 0.0}]} for ms in (20.0, 10.0)
    )
    methods = dict.fromkeys(("full", "progtuning", "progtuning-cache"), one) | {"full-packed": half}
    meta = {"device": "a clock"}
    study.times = {("minilm", task): {"meta": meta, "methods": methods} for task in ("cola", "rte")}
    points, times = TABLES.figure(study).axes
    names = [label.get_text() for label in points.get_yticklabels()]
    drawn = methods.keys() - {"progtuning-cache"}  # of which one seed ran
    assert {*names} == {experiment()["methods"][name]["title"] for name in drawn}
    at = names.index("Progtuning, packed")
    means = {line.get_label(): line.get_xdata()[0] for line in points.lines}
    assert means["progtuning"] == 2.5
    hollow = {line.get_label() for line in points.lines if line.get_markerfacecolor() == "#ffffff"}
    assert hollow == {"full-packed"}  # it has the runs of full
    assert times.patches[at].get_width() == 2 * 100 * 20 / 1e3  # seconds of both tasks
    assert names[0] == "full, packed" and times.patches[0].get_width() == 2 * 100 * 10 / 1e3
    shown = TABLES.table(study)
    assert "; seconds: a clock; " in shown
    assert "| full (HF) | 2 s | 2 s | 4 s |" in shown
    assert "| full, packed | 2.00 x | 2.00 x | 2.00 x |" in shown


def test_settings_of_the_experiment_are_ones_that_training_reads():
    common, methods = EXPERIMENT["common"], EXPERIMENT["methods"]
    about = {"title", "way", "runs_of", "rate_of", "seconds_of"}
    for method in methods.values():
        assert method.keys() <= common.keys() | about and method["way"] in (
            "hf",
            "padded",
            "packed",
        )
        assert method.get("schedule", "progressive") in TRAINING.SCHEDULES
        assert {method[k] for k in ("runs_of", "rate_of", "seconds_of") if k in method} <= {
            *methods
        }
    for part in EXPERIMENT["parts"]:
        assert "full" in part["methods"] or part["model"] == "minilm"
        assert EXPERIMENT["models"][part["model"]] and {*part["tasks"]} <= {*EXPERIMENT["tasks"]}


def _task(rows: int = 24) -> object:
    def row(i: int) -> dict:
        return {"input_ids": [5 + (7 * i + j) % (VOCABULARY - 5) for j in range(3 + i % 6)]}

    known = [row(i) | {"labels": i % 3} for i in range(rows)]
    return TASKS.Task("toy", known, known[:7], 3, 0, "digest")


def _settings(**more) -> dict:
    return EXPERIMENT["common"] | {"rows": 4, "metric": "accuracy", "stages": 2, **more}


def test_a_run_that_is_killed_goes_on_to_the_same_end(tmp_path, monkeypatch):
    def weights(model, *_) -> dict:
        return {"score": sum(p.detach().double().abs().sum().item() for p in model.parameters())}

    build = partial(tiny_model, "bert-sequence", dropout=True)
    monkeypatch.setattr(TRAINING, "load_model", lambda *_: build())
    monkeypatch.setattr(TRAINING, "evaluate", weights)
    task, settings = _task(), _settings()
    job = PLAN.Job("toy", "toy", "progtuning", 3, 1e-2)

    def run(folder) -> dict:
        found = TRAINING.train(job, settings, task, 18, cache=tmp_path, work=tmp_path / folder)
        assert found.pop("wall_s")["training"] > 0 and "packed" in found.pop("packing")
        return found

    truth = run("whole")
    assert truth["steps"] == 18 and not (tmp_path / "whole").exists()
    parameters = truth["num_params"]
    assert 0.5 * 18 * parameters < truth["updates"] < 18 * parameters
    monkeypatch.setattr(TRAINING, "CHECKPOINT_S", 0)
    step = TRAINING.Trainee.step

    def killed_at_11(self, number, batch):
        if number == 11:
            raise KeyboardInterrupt
        step(self, number, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TRAINING.Trainee, "step", killed_at_11)
        run("cut")
    steps = []
    monkeypatch.setattr(
        TRAINING.Trainee, "step", lambda self, n, batch: (steps.append(n), step(self, n, batch))
    )
    assert run("cut") == truth and steps == [*range(11, 18)]


def test_methods_of_a_seed_have_their_rates_boundaries_and_rows():
    def trainee(**more) -> object:
        settings = _settings(**more)
        first = TRAINING.first_batches(_task(), settings, 0)
        return TRAINING.Trainee(tiny_model("bert-sequence"), settings, 1.0, 100, first)

    frozen = trainee(schedule="frozen-third")
    assert frozen.handle.boundary == 4 // 3 and frozen.handle.plan.embeddings is False
    assert trainee(stages=1).handle.schedule.plan(99, 4).embeddings
    decayed = trainee(layer_decay=0.5)
    rates = {
        g["unit"]: r for g, r in zip(decayed.optimizer.param_groups, decayed.peaks, strict=True)
    }
    assert rates == {-1: 0.5**5, 0: 0.5**4, 1: 0.5**3, 2: 0.25, 3: 0.5, 4: 1.0}
    task, batch = _task(), _task().batch(_task().train[:4])
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 5, 6]
    seen = []
    for number in (0, 5, 6, 52, 99):
        decayed.handle.seek(number)
        decayed.step(number, batch)
        seen.append(decayed.optimizer.param_groups[-1]["lr"])
    assert seen == pytest.approx([1 / 6, 1.0, 1.0, 48 / 94, 1 / 94])
    one, two = (TRAINING.epoch_batches(task, _settings(stages=stages), 3, 1) for stages in (1, 2))
    assert one == two != TRAINING.epoch_batches(task, _settings(), 3, 2) and len(one) == 6
    held = task.split(0.25, 20)
    texts = {json.dumps(row) for row in held.train}
    assert (len(held.train), len(held.validation)) == (15, 5)
    assert not texts & {json.dumps(row) for row in held.validation}


def test_scores_of_rows_in_batches_are_in_the_order_of_the_rows():
    model = tiny_model("bert-sequence").eval()
    task = _task()
    with torch.no_grad():
        alone = [int(model(**_one(task, row)).logits.argmax()) for row in task.validation]
    right = statistics.mean(
        c == row["labels"] for c, row in zip(alone, task.validation, strict=True)
    )
    assert TASKS.evaluate(model, task, "accuracy") == {"accuracy": right, "score": 100 * right}
    numbers = [torch.tensor([v]) for v in (1.0, 2.0, 4.0)]
    assert TASKS.metric_of("pearson", numbers, [2, 4, 8]) == pytest.approx(1)
    assert TASKS.metric_of("pearson", [torch.tensor([float("nan")])] * 2, [2, 4]) == 0
    two = [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])]
    assert TASKS.metric_of("f1", two, [1, 1]) == pytest.approx(2 / 3)


def _one(task, row) -> dict:
    return {k: v for k, v in task.batch([row]).items() if k != "labels"}


def test_decoders_choose_among_answers():
    def answer(ids: list[int]) -> dict:
        return {"input_ids": [9, 8, *ids], "labels": [-100, -100, *ids]}

    own = [answer([5, 6]), answer([7]), answer([10, 11, 12]), answer([13, 14])]
    task = TASKS.Task("toy", [], [own[0] | {"choices": own}], None, 0, "digest")
    model = tiny_model("llama-causal-lm")
    with torch.no_grad():
        losses = [float(model(**task.batch([choice])).loss) for choice in own]
    found = TASKS.evaluate(model, task, "accuracy")
    assert found["accuracy"] == float(min(losses) == losses[0])
    assert found["perplexity"] == pytest.approx(torch.tensor(losses[0]).exp().item(), rel=1e-5)


class _Letters:
    """A tokenizer of one token per character."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict:
        return {"input_ids": [*map(ord, text)]}


def test_answers_of_a_library_stand_in_one_part(tmp_path):
    doc = '"""Give back the number {}.\n\n    More."""'
    for i in range(10):
        same = doc.format("of all")
        code = f"def shown(a, b={i}):\n    {doc.format(i)}\n\ndef same():\n    {same}\n"
        (tmp_path / f"m{i}.py").write_text(code + f"\ndef _hidden():\n    {same}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "m.py").write_text(code)
    train, validation = TASKS.stdlib_answers(tmp_path)
    assert (len(train), len(validation)) == (8, 4)
    assert not {r["answer"] for r in train} & {r["answer"] for r in validation}
    assert all(row["ask"].startswith("What does shown(a, b=") for row in train)


def test_wrong_answers_are_of_the_rows_that_are_scored():
    rows = [{"file": f"{i % 2}", "ask": "?", "answer": f"{i}"} for i in range(8)]
    rows += [{"file": "alone", "ask": "?", "answer": "8"}]
    made = [TASKS._chat(_Letters(), row, 128) for row in rows]
    for row, scored in zip(rows, TASKS.with_choices(made), strict=True):
        said = [chr(c["input_ids"][-2]) for c in scored["choices"]]
        assert len({*said}) == 4 and said[0] == row["answer"] and scored["labels"][-1] == 2
        asked = {c["labels"].count(-100) for c in scored["choices"]}
        assert asked == {made[0]["labels"].count(-100)}
        if row["file"] != "alone":
            assert {*said} == {r["answer"] for r in rows if r["file"] == row["file"]}
    # every answer twice: no copy of one that is scored trains
    held = TASKS.Task("toy", made * 2, [], None, 0, "digest").split(0.22, 18)
    trained = {row["answer"] for row in held.train}
    said = {chr(c["input_ids"][-2]) for row in held.validation for c in row["choices"]}
    assert len(held.validation) == 4 and len(trained) >= 5 and not said & trained
