"""Rows of files come back as they were written, and every bad file gets one line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from progtuning_kernels.cli.columns import check_texts, find_columns
from progtuning_kernels.cli.data import digest, load_splits
from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.options import TrainOptions


def _load(*paths: object, **options) -> dict[str, datasets.Dataset]:
    files = tuple(map(str, paths))
    return load_splits(TrainOptions(train_file=files, validation_file=files, **options))


def _rows(*paths: object, **options) -> list[dict]:
    return _load(*paths, **options)["train"].to_list()


def _write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


_CHARACTERS = st.characters(exclude_categories=["Cs"])  # no halves of characters
_LINE = st.text(_CHARACTERS.filter(lambda c: c not in "\t\r\n"), max_size=8)
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.integers(-99, 99).map(lambda i: i / 8),  # JSON of `datasets` errs in the 17th digit
    st.text(_CHARACTERS, max_size=8),
    st.sampled_from(["7", "007", "2020-01-01", "nan", "true", "NA", "1e5", '"', "\ufeff"]),
)


@settings(max_examples=60)
@example(kind="tsv", packed=False, mark=False, rows=[('"w1', 'w2 "w3"'), ("w4", '"')])
@given(
    kind=st.sampled_from(["csv", "tsv", "txt"]),
    packed=st.booleans(),
    mark=st.booleans(),
    rows=st.lists(st.tuples(_LINE, _LINE), min_size=1, max_size=4),
)
def test_cells_are_texts_as_they_stand(tmp_path_factory, kind, packed, mark, rows):
    if kind == "txt":
        expected = [{"text": text} for text, _ in rows]
        content = "".join(text + "\n" for text, _ in rows)
    else:
        expected = [{"text": text, "label": label} for text, label in rows]
        file = io.StringIO()
        if kind == "csv":
            expected = [row | {"text": row["text"] + '\r\n"'} for row in expected]
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(row.values() for row in expected)
        else:
            file.write("text\tlabel\n")
            file.writelines(f"{text}\t{label}\n" for text, label in rows)
        content = file.getvalue()
    name = f"rows.{kind}" + (".gz" if packed else "")
    path = _write(tmp_path_factory.mktemp("rows") / name, ("\ufeff" if mark else "") + content)
    assert _rows(path) == expected


def test_a_file_of_squad_itself_has_a_row_for_every_question(tmp_path):
    questions = [{"id": i, "question": f"q{i}", "answers": []} for i in range(2)]
    texts = [{"context": "w1", "qas": questions}, {"context": "w2", "qas": questions[:1]}]
    path = _write(tmp_path / "a.json", json.dumps({"data": [{"title": "t", "paragraphs": texts}]}))
    found = [(row["context"], row["question"]) for row in _rows(path)]
    assert found == [("w1", "q0"), ("w1", "q1"), ("w2", "q0")]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "w1"}]}]}))
    with pytest.raises(UserError, match="a.json: paragraphs have context and qas"):
        _rows(path)


@settings(max_examples=60)
@example(kind="jsonl", packed=False, ascii_=False, rows=[{"a": 1.5}, {"a": True}])
@given(
    kind=st.sampled_from(["jsonl", "json"]),
    packed=st.booleans(),
    ascii_=st.booleans(),
    rows=st.lists(
        st.dictionaries(st.sampled_from("abc"), _VALUES | st.lists(_VALUES, max_size=2)),
        min_size=1,
        max_size=4,
    ).filter(any),
)
def test_json_comes_back_of_the_same_types(tmp_path_factory, kind, packed, ascii_, rows):
    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=ascii_)

    content = text({"data": rows}) if kind == "json" else "\n\n".join(map(text, rows))
    name = f"rows.{kind}" + (".gz" if packed else "")
    names = dict.fromkeys(name for row in rows for name in row)
    found = _rows(_write(tmp_path_factory.mktemp("rows") / name, content))
    wanted = [{name: row.get(name) for name in names} for row in rows]
    assert found == wanted

    def kinds(values: list[dict]) -> list:
        # a whole number beside fractions becomes one; nothing else changes its type
        as_kind = {int: float}
        return [[as_kind.get(type(v), type(v)) for v in row.values()] for row in values]

    assert kinds(found) == kinds(wanted)


def test_nested_values_stay_lists_and_dicts(tmp_path):
    messages = [{"role": "user", "content": "7"}, {"role": "assistant", "content": "w1"}]
    calls = [{"arguments": {"x": "7"}}, {"arguments": {"x": 7, "y": [1, "a"]}}]
    rows = [
        {"messages": messages, "answers": {"text": ["w1"], "answer_start": [3]}, "calls": calls},
        {"messages": messages[:1]},
    ]
    path = _write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    assert _rows(path) == [rows[0], rows[1] | {"answers": None, "calls": None}]
    tools = [
        {"parameters": {"x": "7"}},
        {"parameters": {"y": 7}},
    ]  # neither gets a null of the other
    path = _write(tmp_path / "tools.jsonl", json.dumps({"tools": tools}))
    assert _rows(path) == [{"tools": tools}]


def test_parquet_and_several_files_and_patterns(tmp_path):
    table = pa.table({"text": ["w1", "w2"], "label": [1, 2], "when": pa.array([0, 1], "date32")})
    for name in ("a", "b"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    _write(tmp_path / "c.parquet.gz", (tmp_path / "a.parquet").read_bytes())
    assert _rows(tmp_path / "*.parquet*") == 3 * table.to_pylist()
    buffers = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    half = pa.table({"text": pa.Array.from_buffers(pa.string(), 1, buffers)})
    pq.write_table(half, tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="bad.parquet cannot be read: .*Invalid UTF8"):
        _load(tmp_path / "bad.parquet")
    (tmp_path / "folder").mkdir()
    _write(tmp_path / "folder/1.jsonl", '{"text": "w1"}')
    _write(tmp_path / "folder/2.jsonl", '{"label": 3}')
    for paths in ([tmp_path / "folder"], [tmp_path / "folder/1.jsonl", tmp_path / "*/2.jsonl"]):
        assert _rows(*paths) == [{"text": "w1", "label": None}, {"text": None, "label": 3}]


@pytest.mark.parametrize(
    ("content", "separator"),
    [
        ("text;label\nw1, w2;low\nw3;high\n", None),
        ("\ufefftext\tlabel\n\nw1, w2\tlow\nw3\thigh\n", None),
        ("text|label\nw1, w2|low\nw3|high\n", None),
        ("text~label\nw1, w2~low\nw3~high\n", "~"),
        ("text,x\tlabel\nw1, w2\tlow\nw3\thigh\n", "\\t"),
        (f'\n\ntext,label\n\n"w1, w2",low\n\n{"w3" * 100_000},high\n', None),
        ("text,label,more\n" + '"w1, w2",low\nw3,high\n', None),
    ],
)
def test_tables_as_programs_write_them(tmp_path, content, separator):
    rows = _rows(_write(tmp_path / "rows.csv", content), separator=separator)
    assert [row["label"] for row in rows] == ["low", "high"]
    assert next(iter(rows[0].values())) == "w1, w2"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "w1"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: not an object"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl is not UTF-8: it has the byte 0xff"),
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.jsonl", '{"label": ' + 5000 * "1" + "}", "a.jsonl, line 1: "),
        ("a.jsonl", '{"a": 1}\n{"a": ' + 400 * "1" + "}", "train row 2: a 1111"),
        ("a.jsonl", '\n{"text": "\\uD800"}', "a.jsonl, line 2 holds half a character"),
        ("a.jsonl", '{"a": 1, "label": 1, "label": 2}', "line 1: an object has one of its names"),
        ("a.jsonl", '{"a": ' + "[" * 400 + "]" * 400 + "}", "Recursion level"),
        ("a.json", "[" * 100_000, "recursion"),
        ("a.json", '{"text": "w1"}', "a.json: not a list of objects"),
        ("a.json", '{"data": 3}', "a.json: not a list of objects"),
        ("a.json", "[{}, 3]", "a.json, row 2: not an object"),
        ("a.json", '[{"text":\n\n"w1}]', "a.json, line 3: not JSON"),
        ("a.json", '{"a": 1}\n{"a": \n', "a.json, line 2: not JSON"),
        ("a.csv", "text,label,label\nw1,a,b\n", "a.csv: two columns are named 'label'"),
        ("a.csv", 'text,label\n"w1,a\nw2,b\n', "a.csv, line 3: unexpected end of data"),
        ("a.csv", 'text,label\n"w1" w2,a\n', "a.csv, line 2: ',' expected after"),
        ("a.csv", "text,label\nw1,a\nw1,a,b\n", "a.csv, line 3: more cells than columns"),
        ("a.csv", "text,label\nw1,a,b\n", "a.csv, line 2: more cells than columns"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        ("a.tsv", "text\nw1\tw2\n", "a.tsv, line 2: more cells than columns"),
        ("a.txt", "", "a.txt has no rows"),
        ("a.parquet", "text", "a.parquet cannot be read"),
        ("a.toml", "text", "a.toml: unknown suffix '.toml'; use .jsonl, "),
        ("a.tar.gz", "text", "a.tar.gz: unknown suffix"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_files_get_one_line(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        _load(_write(tmp_path / name, content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_packed_files_that_are_cut_or_are_not_packed(tmp_path):
    path = _write(tmp_path / "a.jsonl.gz", '{"text": "w1"}\n' * 99)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="a.jsonl.gz cannot be read: Compressed file ended"):
        _load(path)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match="a.jsonl.gz cannot be read: Not a gzipped file"):
        _load(path)


def test_options_that_do_not_fit(tmp_path):
    rows = str(_write(tmp_path / "a.jsonl", '{"text": "w1"}\n' * 4))
    table = str(_write(tmp_path / "b.csv", "text\nw1\n"))
    for options, message in (
        ({}, "no data: give --train-file"),
        ({"train_file": (rows,)}, "--train-file needs --validation-file or --validation-split"),
        ({"dataset": "a/b", "train_file": (rows,)}, "--dataset and --train-file exclude"),
        ({"dataset": "a/b", "validation_file": (rows,)}, "--dataset and --validation-file exclude"),
        ({"train_file": (rows,), "validation_file": (rows,), "validation_split": 0.5}, "exclude"),
        ({"train_file": (rows,), "validation_split": 1.5}, "--validation-split 1.5: "),
        (
            {"train_file": (rows, table), "validation_split": 0.5},
            "train files of more than one kin",
        ),
        ({"train_file": ("no.jsonl",), "validation_split": 0.5}, "no such file: no.jsonl"),
        ({"train_file": ("no*.jsonl",), "validation_split": 0.5}, "no such file: no*.jsonl"),
        ({"train_file": (table,), "validation_split": 0.5, "separator": "::"}, "--separator '::'"),
        ({"dataset": "nobody/nothing"}, "cannot load data set 'nobody/nothing'"),
        ({"dataset": str(tmp_path)}, "of more than one kind"),
    ):
        with pytest.raises(UserError) as error:
            load_splits(TrainOptions(**options))
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="give --predict-file"):
        load_splits(TrainOptions(train_file=(rows,)), ("predict",))


def test_a_share_is_held_out_by_the_seed_and_the_first_rows_are_taken(tmp_path):
    path = _write(tmp_path / "a.jsonl", "\n".join(f'{{"a": {i}}}' for i in range(40)))

    def parts(**options) -> list[list[int]]:
        splits = load_splits(TrainOptions(train_file=(str(path),), **options))
        return [list(splits[name]["a"]) for name in ("train", "validation")]

    train, validation = parts(validation_split=0.25)
    assert len(validation) == 10 and sorted(train + validation) == list(range(40))
    assert parts(validation_split=0.25) == [train, validation]
    assert parts(validation_split=0.25, trainer={"seed": 1}) != [train, validation]
    shorter = parts(validation_split=0.25, max_train_rows=4, max_validation_rows=99)
    assert shorter == [train[:4], validation]
    assert parts(validation_file=(str(path),), max_validation_rows=3) == [[*range(40)], [0, 1, 2]]
    predict = load_splits(TrainOptions(predict_file=(str(path),)), ("predict",))
    assert list(predict) == ["predict"] and len(predict["predict"]) == 40


def test_a_data_set_of_the_hub_or_a_folder_has_its_own_splits(tmp_path, monkeypatch):
    for name in ("train", "dev"):
        _write(tmp_path / f"{name}.csv", f"text,label\n{name},007\n")
    _write(tmp_path / "README.md", "what it is")
    splits = load_splits(TrainOptions(dataset=str(tmp_path)))
    assert splits["train"].to_list() == [{"text": "train", "label": "007"}]
    assert splits["validation"].to_list() == [{"text": "dev", "label": "007"}]

    rows = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("train", "test")}
    rows["validation_matched"] = datasets.Dataset.from_dict({"text": ["matched"]})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: asked.append(a) or rows)
    assert load_splits(TrainOptions(dataset="a/b:c"))["validation"]["text"][0] == "matched"
    assert asked == [("a/b", "c")]
    del rows["validation_matched"], rows["train"]
    with pytest.raises(UserError, match=r"data set 'a/b' has splits \['test'\]"):
        load_splits(TrainOptions(dataset="a/b"))


def test_images_have_their_folders_as_labels(tmp_path):
    for split, names in {"train": ("cat", "dog"), "dev": ("dog",)}.items():
        for name in names:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(np.full((4, 4, 3), 9 * i, np.uint8)).save(folder / f"{i}.png")
    train, dev = (str(tmp_path / "images" / split) for split in ("train", "dev"))
    for options in (
        TrainOptions(dataset=str(tmp_path / "images")),
        TrainOptions(train_file=(train,), validation_file=(dev,)),
    ):
        splits = load_splits(options)
        assert splits["validation"].features["label"].names == ["cat", "dog"]
        assert list(splits["train"]["label"]) == [0, 0, 1, 1]
        assert list(splits["validation"]["label"]) == [1, 1]
        assert splits["train"][0]["image"].size == (4, 4)
    assert len(digest(splits)) == 64
    rows = load_splits(TrainOptions(predict_file=(f"{train}/*/0.png",)), ("predict",))["predict"]
    assert rows.column_names == ["image"] and len(rows) == 2


def test_a_file_that_changes_is_read_anew(tmp_path, capfd):
    path = _write(tmp_path / "a.jsonl", '{"text": "w1"}')
    before, first = path.stat(), _load(path)
    _write(path, '{"text": "w2"}')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = _load(path)
    assert second["train"]["text"][0] == "w2"
    doubled = [s["train"].map(lambda row: {"text": 2 * row["text"]}) for s in (first, second)]
    assert [rows["text"][0] for rows in doubled] == ["w1w1", "w2w2"]
    assert not second["train"].cache_files
    assert capfd.readouterr() == ("", "")


def test_the_digest_is_of_the_content(tmp_path):
    rows = [{"text": f"w{i}", "label": str(i % 2)} for i in range(1500)]
    text = "\n".join(map(json.dumps, rows))
    table = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
    one = digest(_load(_write(tmp_path / "a.jsonl", text)))
    parts = [_write(tmp_path / f"b{i}.csv", table) for i in range(2)]
    assert digest(_load(parts[0])) == one
    assert digest(_load(*parts)) != one
    for old, new in (('"w7"', '"w8"'), ('"label": "1"', '"label": 1'), ('"text"', '"texts"')):
        assert digest(_load(_write(tmp_path / "a.jsonl", text.replace(old, new)))) != one
    numbers = text.replace('"label": "0"', '"label": 0').replace('"label": "1"', '"label": 1')
    assert digest(_load(_write(tmp_path / "a.jsonl", numbers))) != one
    splits = load_splits(TrainOptions(train_file=(str(parts[0]),), validation_split=0.5))
    assert digest(splits) == digest({k: v.flatten_indices() for k, v in splits.items()})


def test_columns_by_name_or_by_what_is_usual():
    rows = datasets.Dataset.from_dict({name: ["w1"] for name in ("sentence", "label", "x", "y")})
    roles = {"text": ("text", "sentence"), "pair": ("text_b",), "label": ("label",)}
    assert find_columns({"train": rows}, {}, roles, optional={"pair"}) == {
        "text": "sentence",
        "label": "label",
    }
    found = find_columns({"train": rows}, {"text": "x", "pair": "sentence"}, roles)
    assert found == {"text": "x", "pair": "sentence", "label": "label"}
    for given_, wanted, message in (
        ({"text": "z"}, roles, "--text-column: no column 'z'; the file has sentence, label, x, y"),
        ({}, roles, "which column is the pair? --pair-column; there are sentence, label, x, y"),
        ({}, {"answers": ("answers",)}, "which column is the answers? --column answers=NAME"),
        ({"pair": "label"}, roles, "need columns of their own, got text is sentence, pair is lab"),
        ({"label": "x"}, {"text": ("x",)}, "--label-column: this task has no such column, only t"),
    ):
        with pytest.raises(UserError) as error:
            find_columns({"train": rows}, given_, wanted)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "train row 2 has no value for column 'text'"),
        ("", "train row 2 has no value"),
        (" \u2003\n", "train row 2 has no value"),
        (5, "train row 2, column 'text' holds 5, which is no text"),
        (["w1"], "train row 2, column 'text' holds ['w1'], which is no text"),
        ({"a": 1}, "train row 2, column 'text' holds {'a': 1}, which"),
        (float("nan"), "train row 2, column 'text' holds nan, which"),
    ],
)
def test_texts_are_checked_by_row(tmp_path, value, message):
    for others in (["w1", "w2"], [value]):  # a column of two types, or of one
        rows = [{"text": "w0"}] if others == ["w1", "w2"] else []
        rows += [{"text": value}, *({"text": other} for other in others)]
        found = _load(_write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))["train"]
        said = message if len(rows) == 4 else message.replace("row 2", "row 1")
        if isinstance(value, float) and len(rows) == 4:
            said = "train row 2 has no value for column 'text'"  # in JSON beside texts
        with pytest.raises(UserError) as error:
            check_texts(found, "text", "train")
        assert said in str(error.value)
        if "no value" in said:
            check_texts(found, "text", "train", empty="allow")
        else:
            with pytest.raises(UserError):
                check_texts(found, "text", "train", empty="allow")
