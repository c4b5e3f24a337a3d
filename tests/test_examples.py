"""The examples run as the README calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForSequenceClassification

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_progressive_lora(model_folders, tmp_path):
    rows = [{"text": f"w{i % 90} w3 w7", "label": int(i % 90 < 45)} for i in range(48)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", model_folders["bert"], "--train-file", tmp_path / "rows.jsonl"]
    arguments += ["--batch-size", 4, "--stages", 4, "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "progressive_lora.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), "a first run should print no warnings"
    numbers = [line.split("│")[1:7] for line in done.stdout.splitlines() if "│" in line]
    stages = [[cell.strip() for cell in row] for row in numbers]
    assert [row[:2] for row in stages] == [["1", "0"], ["2", "1"], ["3", "2"], ["4", "3"]]
    for column in (2, 3, 4):  # adapter parameters, saved bytes, optimizer state
        values = [float(row[column].split()[0].replace(",", "")) for row in stages]
        assert values == sorted(values, reverse=True) and values[0] > values[-1]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()
