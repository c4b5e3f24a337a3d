"""The notebook runs as it stands, on a tiny model and few rows; its stored outputs are whole."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from tiny_folders import word_tokenizer
from tiny_models import tiny_model
from transformers import BertForSequenceClassification

from progtuning_kernels.cli import docstrings, models

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"
CELLS = [
    cell
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


def _run(source: str, namespace: dict[str, Any]) -> Any:
    """The value of the cell's last line, which a notebook shows, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


def test_cells_run_in_order_and_show_what_is_stored(tmp_path, monkeypatch, capsys):
    config = tiny_model("bert-sequence").config
    config.max_position_embeddings = 64  # as many as the notebook plans for
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    labels = ["low", "middle", "high"]
    rows = [(f"w{i % 90} w3" + " w7" * (i % 5), i % 90 // 30) for i in range(96)]
    data = docstrings.DocstringDataset(labels, rows, rows[:40])
    monkeypatch.setattr(models, "minilm_folder", lambda: tmp_path)
    monkeypatch.setattr(docstrings, "load_docstrings", lambda **sizes: data)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    namespace: dict[str, Any] = {}
    for cell in CELLS:
        shown = _run("".join(cell["source"]), namespace)
        printed = capsys.readouterr().out
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert ("execute_result" in kinds) == (shown is not None)
        assert ("stream" in kinds) == bool(printed)
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                assert "text/html" in output["data"] and hasattr(shown, "_repr_html_")
    step_ms, accuracies = namespace["progressive"]
    assert len(step_ms) == 9 and len(accuracies) == 3


def test_stored_outputs_are_of_one_run_without_errors_and_name_no_folder():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    text = json.dumps([cell["outputs"] for cell in CELLS])
    assert '"error"' not in text and '"stderr"' not in text
    assert not any(folder in text for folder in ("/home/", "/root/", "/tmp/", "site-packages"))
