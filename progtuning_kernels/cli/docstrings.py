"""Text classification without a download: which library does a docstring come from?

The rows are first paragraphs of docstrings of installed packages, the label is the package. Files
are parsed, never imported. Whole files are held out for validation, no text stands in both parts,
and words that name a library are taken out (`_leaks`): what is left to learn is the subject.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

# Brought by torch (networkx, sympy), by the library itself, or by the `train` and `demo` extras.
_PACKAGES = ("matplotlib", "networkx", "scipy", "sklearn", "sympy", "torch", "transformers")
_MIN_LABELS = 4
_MIN_WORDS = 8
# 96 of 100 first paragraphs are shorter; the rest (the longest: 1026 words) would only pad batches.
_MAX_WORDS = 50
# One file may not fill a label: sympy and torch have files of several hundred docstrings that
# repeat one sentence pattern. 10 a file makes a label's 500 rows come from 50 files or more.
_MAX_ROWS_PER_FILE = 10
# Tests describe the tests; vendored code belongs to another library than its folder says.
_SKIPPED = re.compile(
    r"(^|/)((tests?|testing|idle_test|_vendor|vendored|externals|third_party|(site|dist)-packages"
    r"|__pycache__)/|(test_[^/]*|[^/]*_test|conftest)\.py$)"
)

# A word that contains one of these names its library: PyTorch, torchvision, scikit-learn, CPython.
_BRANDS = (
    "hugging face|huggingface|matplotlib|networkx|numpy|pandas|python|scikit|scipy|sklearn|sympy"
    "|torch"
)
# Whole words only: "transformer" and "tensor" stay, because sklearn and sympy use them too and
# they are what the text is about. DataFrame, Axes, Estimator stay for the same reason.
_ALIASES = "transformers|hf|mpl|nn|np|nx|pd|plt|pylab|pyplot|sp"

_URL = re.compile(r"https?://\S+")
# How a library writes, not what about: Sphinx markup, :func:`x`, and paragraphs that open with a
# signature or an argument list, `size (int, *optional*):`, of which transformers has most.
_ROLE = re.compile(r":[a-z:]+:(?=`)")
_SIGNATURE = re.compile(r"[\w`*.]+\s*\([^)]*\)\s*(?::|->|=)")


class DocstringDataset(NamedTuple):
    """Rows are (text, index into `label_names`)."""

    label_names: list[str]
    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]


def load_docstrings(
    *,
    seed: int = 0,
    train_rows: int = 3200,
    validation_rows: int = 800,
    roots: Mapping[str, Path] | None = None,
) -> DocstringDataset:
    """Read a balanced data set out of installed packages: the same one for the same installation.

    Args:
        seed: which files are read, and the order of the rows.
        train_rows, validation_rows: over all labels, rounded down to a multiple of the labels.
        roots: label -> package folder; None takes those packages that are installed.
    """
    found = dict(sorted((_installed() if roots is None else roots).items()))
    files = {label: names for label, root in found.items() if (names := _source_files(root))}
    if len(files) < _MIN_LABELS:
        raise ValueError(
            f"docstring data needs the sources of {_MIN_LABELS} packages, found {len(files)} "
            f"({', '.join(files) or 'none'}): pip install matplotlib scikit-learn scipy"
        )
    names = list(files)
    shares = {"validation": validation_rows // len(names), "train": train_rows // len(names)}
    if min(shares.values()) < 1:
        raise ValueError(
            f"{train_rows} training and {validation_rows} validation rows are less than one for "
            f"each of the {len(names)} labels"
        )

    leaks = _leaks(names)
    seen: set[str] = set()
    rows: dict[str, list[tuple[str, int]]] = {part: [] for part in shares}
    for index, label in enumerate(names):
        # A str seeds through SHA-512, so the order does not depend on PYTHONHASHSEED.
        random.Random(f"{seed} {label}").shuffle(files[label])
        unread = iter(files[label])
        for part, share in shares.items():
            texts: list[str] = []
            while len(texts) < share:
                if (file := next(unread, None)) is None:
                    rest = f"{len(texts)} of the {share} {part} rows asked of each label"
                    raise ValueError(f"{label} has too few docstrings: {rest}")
                texts += _fresh_texts(found[label] / file, leaks, seen)[: share - len(texts)]
            rows[part] += [(text, index) for text in texts]
    for part in rows:
        random.Random(f"{seed} {part}").shuffle(rows[part])
    return DocstringDataset(names, **rows)


def _installed() -> dict[str, Path]:
    roots = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for name in _PACKAGES:
        try:
            spec = importlib.util.find_spec(name)
        except ValueError:  # a module somebody put into sys.modules without a spec
            continue
        if spec is not None and spec.origin is not None:
            roots[name] = Path(spec.origin).parent
    return roots


def _source_files(root: Path) -> list[str]:
    """Paths inside `root`, sorted: file systems list them in an order of their own."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return sorted(name for name in names if not _SKIPPED.search(name))


def _leaks(labels: list[str]) -> re.Pattern[str]:
    names = "|".join(re.escape(label) for label in labels)
    return re.compile(rf"\b(?:[\w-]*(?:{_BRANDS})[\w-]*|{_ALIASES}|{names})\b", re.IGNORECASE)


def _fresh_texts(path: Path, leaks: re.Pattern[str], seen: set[str]) -> list[str]:
    """At most `_MAX_ROWS_PER_FILE` texts of one file that no earlier file had."""
    texts = []
    for docstring in _docstrings(path):
        words = _first_paragraph(docstring, leaks).split()[:_MAX_WORDS]
        if sum(any(letter.isalpha() for letter in word) for word in words) < _MIN_WORDS:
            continue
        # Letters only: copies that differ in a number or a comma are the same text.
        key = re.sub(r"[^a-z]+", " ", " ".join(words).lower()).strip()
        if key not in seen:
            seen.add(key)
            texts.append(" ".join(words))
        if len(texts) == _MAX_ROWS_PER_FILE:
            break
    return texts


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # templates, other Python versions: a file that cannot be read has no rows
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _first_paragraph(docstring: str, leaks: re.Pattern[str]) -> str:
    text = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    if _SIGNATURE.match(text):
        return ""
    text = _ROLE.sub("", _URL.sub("", text))
    return leaks.sub("", " ".join(re.sub(r"[`*]", "", text).split()))
