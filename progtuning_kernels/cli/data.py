"""Rows of files, of a folder or of a hub data set: a `datasets.Dataset` for each split.

JSON and tables are parsed by the standard library, and their rows lie in memory. The builders of
`datasets` take the cell 007 for the number 7 and the JSON text "2020-01-01" for a time, they name
no line, and a file that changes while its time stays is served from their cache as it was.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import tempfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import Any, TextIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..backend import one_line
from .docstrings import load_docstrings
from .errors import UserError, as_user_error
from .options import TRAINER_DEFAULTS, TrainOptions

Row = dict[str, Any]

_HELD_OUT = ("validation", "validation_matched", "test")


def load_splits(
    options: TrainOptions, wanted: Collection[str] = ("train", "validation")
) -> dict[str, Dataset]:
    """Rows of the splits `wanted`: "train", "validation" (both or none), "predict"."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    splits = _training_splits(options) if "train" in wanted else {}
    if "predict" in wanted:
        if not options.predict_file:
            raise UserError("no data: give --predict-file")
        splits |= _read({"predict": options.predict_file}, options.separator)
    most = {"train": options.max_train_rows, "validation": options.max_validation_rows}
    return {
        name: rows if most.get(name) is None else rows.select(range(min(most[name], len(rows))))
        for name, rows in splits.items()
    }


def _training_splits(options: TrainOptions) -> dict[str, Dataset]:
    name, share = options.dataset, options.validation_split
    files = {"train": options.train_file, "validation": options.validation_file}
    if name is None and not options.train_file:
        raise UserError("no data: give --train-file and --validation-file, or --dataset")
    if name is not None and any(files.values()):
        option = "train" if options.train_file else "validation"
        raise UserError(f"--dataset and --{option}-file exclude each other")
    if options.validation_file and share is not None:
        raise UserError("--validation-split and --validation-file exclude each other")
    if name is None and not options.validation_file and share is None:
        raise UserError("--train-file needs --validation-file or --validation-split")

    if name is None:
        splits = _read({k: v for k, v in files.items() if v}, options.separator)
    elif name == "docstrings":
        splits = _docstrings(options)
    elif Path(name).is_dir():
        splits = _read_folder(Path(name), options.separator)
    else:
        path, _, configuration = name.partition(":")
        with as_user_error(Exception, said=f"cannot load data set {name!r}"):
            splits = dict(datasets.load_dataset(path, configuration or None))

    held_out = next((split for split in _HELD_OUT if split in splits), None)
    if "train" not in splits or (share is None and held_out is None):
        raise UserError(
            f"data set {name!r} has splits {list(splits)}; train and validation needed"
            + (", or --validation-split" if "train" in splits else "")
        )
    if share is None:
        return {"train": splits["train"], "validation": splits[held_out]}
    seed = options.trainer.get("seed", TRAINER_DEFAULTS["seed"])
    with as_user_error(said=f"--validation-split {share}"):
        parts = splits["train"].train_test_split(share, seed=seed, keep_in_memory=True)
    return {"train": parts["train"], "validation": parts["test"]}


def _docstrings(options: TrainOptions) -> dict[str, Dataset]:
    """The same rows for every seed of a run, so that seeds differ in training alone."""
    with as_user_error():
        data = load_docstrings(
            train_rows=options.max_train_rows or 2400,
            validation_rows=options.max_validation_rows or 800,
        )
    return {
        split: _dataset([{"text": text, "label": data.label_names[y]} for text, y in rows], split)
        for split, rows in (("train", data.train), ("validation", data.validation))
    }


def _read_folder(folder: Path, separator: str | None) -> dict[str, Dataset]:
    """A folder of files or of images whose names or folders say train, validation (dev) or test."""
    try:
        patterns = get_data_patterns(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"no data files in {folder}") from error
    found = DataFilesDict.from_patterns(patterns, base_path=str(folder))
    paths = {str(k): [path for path in map(Path, v) if _kind(path)] for k, v in found.items()}
    if any(_kind(path) == "image" for path in chain.from_iterable(paths.values())):
        return _read_images(data_dir=str(folder))
    return {split: _read_files(of_split, split, separator) for split, of_split in paths.items()}


def _read(files: Mapping[str, Sequence[str]], separator: str | None) -> dict[str, Dataset]:
    """Rows of files, of folders and of patterns such as data/*.jsonl, by split."""
    paths = {split: [*chain.from_iterable(map(_expand, names))] for split, names in files.items()}
    images = {k: v for k, v in files.items() if any(_kind(p) == "image" for p in paths[k])}
    splits = {k: _read_files(v, k, separator) for k, v in paths.items() if k not in images}
    if images:  # at once, so that a number means the same class in all splits
        patterns = {split: [*map(_pattern, names)] for split, names in images.items()}
        # rows to predict have no labels; None: found from the folders
        splits |= _read_images(data_files=patterns, drop_labels="predict" in images or None)
    return splits


def _pattern(name: str) -> str:
    path = Path(name).absolute()
    if path.exists():
        name = glob.escape(str(path))
    return f"{name}/**" if path.is_dir() else name


def _expand(name: str) -> list[Path]:
    if Path(name).is_file():
        return [Path(name)]
    paths = map(Path, sorted(glob.glob(_pattern(name), recursive=True)))
    found = [path for path in paths if path.is_file() and _kind(path)]
    if not found:
        raise UserError(f"no such file: {name}")
    return found


def _kind(path: Path) -> str | None:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in ImageFolder.EXTENSIONS:
        return "image"
    return suffix if suffix in _READERS else None


def _read_images(**arguments: Any) -> dict[str, Dataset]:
    said, more = "cannot read the images", {"keep_in_memory": True, **arguments}
    with as_user_error(Exception, said=said), tempfile.TemporaryDirectory() as cache:
        # another cache would serve a changed folder as it was
        return dict(datasets.load_dataset("imagefolder", cache_dir=cache, **more))


def _read_files(paths: Sequence[Path], split: str, separator: str | None) -> Dataset:
    kinds = {_kind(path): path for path in paths}
    if None in kinds:
        path, known = kinds[None], ", ".join(_READERS)
        raise UserError(f"{path}: unknown suffix {path.suffix!r}; use {known}, each also with .gz")
    if len(kinds) > 1:
        raise UserError(f"{split} files of more than one kind: {', '.join(map(str, kinds))}")
    (kind,) = kinds
    rows: list[Row] = []
    tables: list[Dataset] = []
    for path in paths:
        open_ = gzip.open if path.suffix.lower() == ".gz" else open
        try:
            if kind == ".parquet":
                with open_(path, "rb") as file:
                    table = pq.read_table(pa.BufferReader(file.read()))
                table.validate(full=True)
                tables.append(Dataset(table))
                found = table.num_rows
            else:
                # UTF-8, with or without the mark that spreadsheets put in front
                with open_(path, "rt", encoding="utf-8-sig", newline="") as file:
                    new = _READERS[kind](file, str(path), separator)
                rows += new
                found = len(new)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"{path} is not UTF-8: it has the byte {byte:#x}") from error
        except (OSError, EOFError, zlib.error, RecursionError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from error
        if not found:
            raise UserError(f"{path} has no rows")
    # a type against another
    with as_user_error(RecursionError, pa.ArrowException, said=f"the {split} rows make no table"):
        return concatenate_datasets(tables) if tables else _dataset(rows, split)


def _dataset(rows: Sequence[Row], split: str) -> Dataset:
    """Columns of one type each; a column of several types is kept as JSON, so nothing is cast."""
    columns = {}
    for name in dict.fromkeys(chain.from_iterable(rows)):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
            kind = columns[name].type
            if pa.types.is_floating(kind) and bool in map(type, values):
                raise pa.ArrowTypeError  # it has made true 1.0
            of_objects = pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
            if of_objects and columns[name].to_pylist() != values:
                raise pa.ArrowTypeError  # it has given each object the names of all
        except (pa.ArrowException, OverflowError) as error:
            for number, value in enumerate(values, 1):  # such a number would come back as text
                if isinstance(value, int) and abs(value) >= 2**63:
                    raise UserError(
                        f"{split} row {number}: {name} {short(value)} is too large"
                    ) from error
            texts = [None if value is None else json.dumps(value) for value in values]
            columns[name] = pa.array(texts, datasets.Json().pa_type)
    return Dataset(pa.table(columns))


def _parse_jsonl(file: TextIO, where: str, _: str | None) -> list[Row]:
    rows = []
    for number, line in enumerate(file, 1):
        if line.strip():
            rows.append(row := _json(line, where, number))
            if type(row) is not dict or "\\ud" in line.lower():
                _check_row(row, f"{where}, line {number}")
    return rows


def _parse_json(file: TextIO, where: str, separator: str | None) -> list[Row]:
    text = file.read()
    try:
        rows = _json(text, where)
    except UserError as error:
        if "Extra data" not in str(error):
            raise
        file.seek(0)  # a row to the line, under another suffix
        return _parse_jsonl(file, where, separator)
    if isinstance(rows, dict):
        rows = rows.get("data")
    if not isinstance(rows, list):
        raise UserError(f"{where}: not a list of objects, nor one under the name data")
    if rows and isinstance(rows[0], dict) and "paragraphs" in rows[0]:  # SQuAD's own files
        with as_user_error(KeyError, TypeError, said=f"{where}: paragraphs have context and qas"):
            texts = [text for article in rows for text in article["paragraphs"]]
            rows = [{"context": text["context"], **row} for text in texts for row in text["qas"]]
    for number, row in enumerate(rows, 1):
        _check_row(row, f"{where}, row {number}")
    return rows


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("an object has one of its names twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)  # json.loads makes one for each line


def _json(text: str, where: str, line: int | None = None) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where, error_ = f"{where}, line {line or error.lineno}", f"not JSON ({error.msg})"
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets
        where, error_ = f"{where}, line {line}" if line else where, one_line(error)
    raise UserError(f"{where}: {error_}")


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character: {short(row)}") from None


def _parse_csv(file: TextIO, where: str, separator: str | None) -> list[Row]:
    header = next((line for line in file if line.strip()), "")
    file.seek(0)
    # Excel separates by semicolons where the comma is the decimal sign
    found = separator or next((d for d in ",;\t|" if d in header), ",")
    return _parse_table(file, where, found, strict=True)  # strict: an open quotation mark


def _parse_tsv(file: TextIO, where: str, separator: str | None) -> list[Row]:
    # unquoted, as GLUE's own files: a cell that opens with a quotation mark is only that
    return _parse_table(file, where, separator or "\t", quoting=csv.QUOTE_NONE)


def _parse_table(file: TextIO, where: str, separator: str, **dialect: Any) -> list[Row]:
    """Rows of texts, each cell as it stands."""
    delimiter = separator.replace("\\t", "\t")  # as a shell passes '\t'
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UserError(f"--separator {separator!r} is not one character that can part cells")
    rows: list[Row] = []
    limit = csv.field_size_limit(2**31 - 1)  # characters of a cell; 131,072 unless told
    reader = csv.reader(file, delimiter=delimiter, **dialect)
    try:
        lines = filter(None, reader)
        header = next(lines, [])
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{where}: two columns are named {twice!r}")
        for cells in lines:
            if len(cells) > len(header):
                raise UserError(f"{where}, line {reader.line_num}: more cells than columns")
            rows.append(dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _parse_text(file: TextIO, _: str, __: str | None) -> list[Row]:
    return [{"text": line.rstrip("\r\n")} for line in file]


_Parser = Callable[[TextIO, str, "str | None"], list[Row]]

_READERS: dict[str, _Parser | None] = {
    ".jsonl": _parse_jsonl,
    ".json": _parse_json,
    ".csv": _parse_csv,
    ".tsv": _parse_tsv,
    ".txt": _parse_text,
    ".parquet": None,
}


def digest(splits: Mapping[str, Dataset]) -> str:
    """A digest of the splits' names, columns and values, whatever files they come from.

    Images are told apart by their path, or by their bytes where those are in the row.
    """
    found = hashlib.sha256()
    for split, rows in splits.items():
        found.update(repr((split, rows.column_names)).encode())
        for batch in rows.with_format("arrow").iter(batch_size=1000):
            found.update(repr(batch.to_pydict()).encode())
    return found.hexdigest()
