"""Images in classes: folders and paths, a head's own classes, answers, and images that are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image
from task_runs import predict_from_file, task_of, train_from_files, write_rows
from tiny_models import tiny_model

from progtuning_kernels.cli.errors import UserError

NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 x 24 pixels of noise in which the channel of the class is brighter."""
    path, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 60), ("validation", 15)):
        for i in range(count):
            pixels = random.integers(0, 90, (20, 24, 3))
            pixels[..., i % 3] += 150
            file = path / split / NAMES[i % 3] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit")
    tiny_model("vit-image").save_pretrained(path)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": False,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def rows_of(folder, split: str = "train", count: int = 6) -> list[dict]:
    pairs = [(NAMES[i % 3], i) for i in range(count)]
    return [{"image": f"{split}/{name}/{i}.png", "label": name} for name, i in pairs]


def task_of_paths(folder, rows: list[dict]):
    files = {"train_file": (str(folder / "train.jsonl"),)}
    return task_of("image-classification", files, train=rows)


def test_paths_become_pixels_and_labels_the_places_of_the_head(folder, model):
    rows = rows_of(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(model)
    for own, wanted in (
        (["green", "blue", "red"], [2, 0, 1]),  # a head's order
        (["cat", "dog", "cow"], [2, 1, 0]),  # a head of others: sorted
    ):
        task = task_of_paths(folder, rows)
        config = transformers.ViTConfig(id2label=dict(enumerate(own)), num_channels=3)
        task.configure(config)
        encoded = task.encode(Dataset.from_list(rows), processor, tiny_model("vit-image"), "train")
        batch = task.collator(processor, None)([encoded[i] for i in range(3)])
        assert batch["labels"].tolist() == wanted
        assert [config.id2label[i] for i in wanted] == NAMES
    image = Image.open(folder / rows[1]["image"]).resize((16, 16), Image.Resampling.BILINEAR)
    expected = np.asarray(image).transpose(2, 0, 1) / 255
    assert np.abs(batch["pixel_values"][1].numpy() - expected).max() < 1e-6


def test_numbers_are_the_classes_that_the_head_has_names_for(folder):
    rows = [row | {"label": NAMES.index(row["label"])} for row in rows_of(folder)]
    task = task_of_paths(folder, rows)
    task.configure(transformers.ViTConfig(id2label=dict(enumerate(NAMES))))
    assert task.names == NAMES
    encoded = task.encode(Dataset.from_list(rows), lambda images, **_: {"pixel_values": images},
                          tiny_model("vit-image"), "train")  # fmt: skip
    assert encoded[:]["labels"] == [0, 1, 2, 0, 1, 2]


def test_folders_of_classes_are_trained_and_predicted(folder, model, tmp_path):
    run = train_from_files(
        tmp_path,
        *("--task", "image-classification", "--model", model, "--epochs", 3),
        *("--train-file", folder / "train", "--validation-file", folder / "validation"),
    )
    assert [stage["boundary"] for stage in run["stages"]] == [0, 1, 2]
    assert run["summary"]["metric"] > 0.9 and run["data"]["label_names"] == sorted(NAMES)
    classify = transformers.pipeline("image-classification", str(run["folder"]))
    paths = [folder / row["image"] for row in rows_of(folder, "validation")]
    assert [classify(str(path))[0]["label"] for path in paths] == NAMES * 2
    rows = write_rows(folder / "to-predict.jsonl", rows_of(folder, "validation"))
    answers = predict_from_file(run["folder"], rows)
    assert [answer["label"] for answer in answers] == NAMES * 2
    assert all(1 / 3 < answer["score"] <= 1 for answer in answers)


def test_a_photo_is_turned_as_it_was_held(folder, model, tmp_path):
    """By EXIF, which the pipeline of a saved model reads as well."""
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    rows = [{"image": str(tmp_path / "turned.png"), "label": name} for name in "ab"]
    task = task_of_paths(tmp_path, rows)
    task.configure(transformers.ViTConfig())
    processor = transformers.AutoImageProcessor.from_pretrained(model)
    own = task.encode(Dataset.from_list(rows), processor, tiny_model("vit-image"), "train")
    expected = processor(image.transpose(Image.Transpose.ROTATE_270), return_tensors="pt")
    assert torch.equal(own[0]["pixel_values"], expected["pixel_values"][0])


def test_an_image_that_is_none_is_one_line(folder, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    whole = (folder / "train/red/0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    good = str(folder / "train/red/0.png")  # an absolute path stays

    def error_of(second) -> str:
        rows = [{"image": good, "label": "a"}, {"image": second, "label": "b"}]
        with pytest.raises(UserError) as error:
            task = task_of_paths(tmp_path, rows)
            task.configure(transformers.ViTConfig())
            task.encode(Dataset.from_list(rows), None, tiny_model("vit-image"), "train")[:]
        assert "\n" not in str(error.value)
        return str(error.value)

    assert error_of("text.png").startswith("train row 2: cannot read its image: cannot identify")
    assert error_of("half.png").startswith("train row 2: cannot read its image: image file is trun")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(whole)
    files = {"train_file": (str(tmp_path / "a/rows.csv"), str(tmp_path / "b/rows.csv"))}
    with pytest.raises(UserError, match=r"train row 1: 0.png is .*a/0.png or .*: give whole paths"):
        task_of("image-classification", files, train=[{"image": "0.png", "label": "a"}])
    assert error_of("none.png") == f"train row 2: no such file: {tmp_path / 'none.png'}"
    assert error_of(None) == "train row 2: column 'image' holds no image"


def test_a_label_of_its_own_is_one_line(folder):
    rows = rows_of(folder)
    files = {"train_file": (str(write_rows(folder / "train.jsonl", rows)),)}
    others = [{**rows[0], "label": "pink"}]
    with pytest.raises(UserError, match="validation row 1: label 'pink' is outside the set"):
        task_of("image-classification", files, train=rows, validation=others)
    with pytest.raises(UserError, match="the training rows have one label only: 'red'"):
        task_of_paths(folder, rows[:1])
    with pytest.raises(UserError, match="train row 1: column 'label' holds no label"):
        task_of_paths(folder, [rows[0] | {"label": None}])
