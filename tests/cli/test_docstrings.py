import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from progtuning_kernels.cli import docstrings
from progtuning_kernels.cli.docstrings import DocstringDataset, load_docstrings

LABELS = ("amber", "birch", "cedar", "dune")
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def sentence(subject: str, number: int) -> str:
    digits = " ".join(DIGIT_WORDS[int(digit)] for digit in str(number))
    return f"Count the {subject} items of basket {digits} and return their sum."


def write_module(path: Path, texts: list[str], *, module_docstring: str = "Short.") -> None:
    functions = [f"def f{i}():\n    {text!r}\n" for i, text in enumerate(texts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([repr(module_docstring), *functions]), encoding="utf-8")


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    """Four packages of 12 files with 4 texts each, every text of its own."""
    for subject in LABELS:
        for file in range(12):
            texts = [sentence(f"{subject}ish", 10 * file + row) for row in range(4)]
            write_module(tmp_path / subject / f"part{file % 3}" / f"m{file}.py", texts)
    return {label: tmp_path / label for label in LABELS}


def load(roots: dict[str, Path], seed: int = 0, train_rows: int = 80) -> DocstringDataset:
    return load_docstrings(seed=seed, train_rows=train_rows, validation_rows=32, roots=roots)


def test_rows_are_balanced(roots: dict[str, Path]) -> None:
    data = load(roots)
    assert data.label_names == sorted(LABELS)
    assert Counter(label for _, label in data.train) == dict.fromkeys(range(4), 20)
    assert Counter(label for _, label in data.validation) == dict.fromkeys(range(4), 8)
    assert all(f"{data.label_names[label]}ish" in text for text, label in data.train)


def held_out(data: DocstringDataset, rows_per_module: int) -> bool:
    """Whether no module, which the number in a text tells, is in both parts."""

    def modules(rows: list[tuple[str, int]]) -> set[tuple[int, int]]:
        words = [(label, re.search(r"basket (.*) and", text)[1].split()) for text, label in rows]
        numbers = [(y, int("".join(str(DIGIT_WORDS.index(d)) for d in own))) for y, own in words]
        return {(label, number // rows_per_module) for label, number in numbers}

    return not modules(data.train) & modules(data.validation)


def test_whole_modules_are_held_out(roots: dict[str, Path]) -> None:
    assert held_out(load(roots), 10)


def test_file_read_for_validation_is_not_read_again_for_training(roots: dict[str, Path]) -> None:
    for label, root in roots.items():
        for file, path in enumerate(sorted(root.rglob("*.py"))):
            write_module(path, [sentence(label + "ish", 30 * file + row) for row in range(30)])
    data = load_docstrings(train_rows=100, validation_rows=60, roots=roots)
    assert held_out(data, 30)


def test_no_text_stands_twice(roots: dict[str, Path]) -> None:
    copied = "Copy these words from one library to another library without a change"
    for root in roots.values():
        for path in sorted(root.rglob("*.py")):
            texts = [ast.get_docstring(node) for node in ast.parse(path.read_text()).body[1:]]
            variants = [f"{copied}.", f"{copied}, 2!", copied.upper()]
            write_module(path, variants + [text for text in texts if text])
    data = load(roots)
    keys = [re.sub(r"[^a-z]+", "", text.lower()) for text, _ in data.train + data.validation]
    assert max(Counter(keys).values()) == 1
    assert len(keys) == 112


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        (
            "Wrap a PyTorch module so that scikit-learn, SciPy and pandas can call it as usual.",
            "Wrap a module so that , and can call it as usual.",
        ),
        (
            "Use np.asarray, plt.figure and torch.nn.Linear where the HF transformers or CPython "
            "would do the same work.",
            "Use .asarray, .figure and ..Linear where the or would do the same work.",
        ),
        (
            "A Transformer keeps every tensor of the scipyish supply, the input and the spring.",
            "A Transformer keeps every tensor of the supply, the input and the spring.",
        ),
        (
            "Call :func:`scipy.fft` as *shown* at https://pytorch.org/docs/x.html for\n   the "
            "Hugging Face hub of the AMBER models.",
            "Call .fft as shown at for the hub of the models.",
        ),
    ],
    ids=["brands", "aliases", "subject words stay", "markup, links and labels"],
)
def test_words_that_name_a_library_are_dropped(
    roots: dict[str, Path], docstring: str, text: str
) -> None:
    for path in roots["amber"].rglob("*.py"):
        path.unlink()
    write_module(roots["amber"] / "a.py", [docstring])
    write_module(roots["amber"] / "b.py", [sentence("acorn", 1)])
    data = load_docstrings(train_rows=4, validation_rows=4, roots=roots)
    rows = [row for row, label in data.train + data.validation if label == 0]
    assert sorted(rows) == sorted([text, sentence("acorn", 1)])


def test_only_first_paragraphs_of_enough_words_are_rows(roots: dict[str, Path]) -> None:
    for path in roots["dune"].rglob("*.py"):
        path.unlink()
    rejected = [
        "Too short to tell anything about it.",
        "Too short = - + * / == with signs only here.",
        "fill(size, value) -> array: make an array of that size and fill it at once",
        "size (int, *optional*, defaults to 8): number of items in each of the baskets",
    ]
    second = "And a second paragraph that nobody should ever see in the rows."
    first = [f"{sentence('desert', row)}\n\n    {second}" for row in (1, 2)]
    write_module(roots["dune"] / "a.py", rejected + first)
    write_module(roots["dune"] / "b.py", [sentence("other", 3)], module_docstring="word " * 80)
    write_module(roots["dune"] / "tests" / "c.py", [sentence("hidden", 4)])
    write_module(roots["dune"] / "test_d.py", [sentence("hidden", 5)])
    write_module(roots["dune"] / "_vendor" / "e.py", [sentence("hidden", 6)])
    (roots["dune"] / "f.py").write_text("def broken(:\n")
    (roots["dune"] / "g.py").write_bytes(b"'''\xff\xfe not utf-8'''")
    data = load_docstrings(train_rows=8, validation_rows=8, roots=roots)
    rows = {row for row, label in data.train + data.validation if label == 3}
    desert = {sentence("desert", 1), sentence("desert", 2)}
    assert rows == desert | {sentence("other", 3), ("word " * 50).strip()}


def test_one_file_does_not_fill_a_label(roots: dict[str, Path]) -> None:
    write_module(roots["cedar"] / "big.py", [sentence("giant", row) for row in range(200)])
    for seed in range(5):
        data = load(roots, seed=seed)
        rows = [text for text, _ in data.train + data.validation if "giant" in text]
        assert len(rows) <= 10


def test_same_seed_same_rows_whatever_the_file_system_answers(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(roots, seed=3)
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *arguments: [*rglob(*arguments)][::-1])
    assert load(dict(reversed(roots.items())), seed=3) == first
    assert load(roots, seed=4) != first


def test_rows_do_not_depend_on_hash_randomisation(roots: dict[str, Path]) -> None:
    program = (  # the file alone: the package imports torch, for seconds
        "import sys, hashlib, runpy; from pathlib import Path\n"
        "load = runpy.run_path(sys.argv[1])['load_docstrings']\n"
        "roots = {Path(root).name: Path(root) for root in sys.argv[2:]}\n"
        "data = load(seed=1, train_rows=80, validation_rows=32, roots=roots)\n"
        "print(hashlib.sha256(repr(data).encode()).hexdigest())"
    )
    command = [sys.executable, "-c", program, docstrings.__file__, *map(str, roots.values())]
    digests = [
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert digests[0] == digests[1]


def test_too_little_data_is_one_clear_error(roots: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    three = {label: roots[label] for label in LABELS[:3]}
    with pytest.raises(ValueError, match=r"found 3 \(amber, birch, cedar\): pip install") as error:
        load({**three, "empty": tmp_path / "empty", "absent": tmp_path / "absent"})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="amber has too few docstrings: 40 of the 250 train"):
        load(roots, train_rows=1000)
    with pytest.raises(ValueError, match="less than one for each of the 4 labels"):
        load(roots, train_rows=3)


def test_installed_packages_give_a_data_set_without_library_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only networkx, scipy, sympy, torch and the standard library: a third of the files to parse.
    monkeypatch.setattr(docstrings, "_PACKAGES", ("networkx", "scipy", "sympy", "torch", "absent"))
    modules = set(sys.modules)
    data = load_docstrings(train_rows=400, validation_rows=100)
    assert not {name.split(".")[0] for name in set(sys.modules) - modules} & {"networkx", "sympy"}
    assert data.label_names == ["networkx", "scipy", "stdlib", "sympy", "torch"]
    assert (len(data.train), len(data.validation)) == (400, 100)
    assert set(Counter(label for _, label in data.train).values()) == {80}
    names = re.compile(r"(?i)torch|scipy|sympy|networkx|numpy|python|\b(nn|np|nx|plt)\b")
    assert [text for text, _ in data.train + data.validation if names.search(text)] == []
    texts = [text for text, _ in data.train + data.validation]
    assert len(set(texts)) == 500
    assert all(8 <= len(text.split()) <= 50 for text in texts)
