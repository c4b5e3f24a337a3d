"""Images in classes: folders of classes, or a column of paths beside a column of labels."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from PIL import Image, ImageOps

from ..columns import find_columns
from ..errors import UserError, as_user_error
from ..options import TrainOptions
from . import classes

_ROLES = {
    "image": ("image", "img", "image_path", "file_name", "path", "file"),
    "label": ("label", "labels", "fine_label"),
}


class ImageClassification:
    processor = "AutoImageProcessor"
    trainer = "Trainer"
    metrics = ("accuracy", "f1", "matthews")

    def __init__(self, options: TrainOptions, splits: dict[str, Dataset]) -> None:
        self.columns = find_columns(splits, options.columns, _ROLES, targets=["label"])
        files = {
            "train": options.train_file,
            "validation": options.validation_file or options.train_file,
            "predict": options.predict_file,
        }
        self._folders = {s: [Path(file).parent for file in files[s]] for s in splits}
        self.names: list[str] | None = None
        for split, rows in splits.items():
            for number, stored in enumerate(self._stored(rows)["image"], 1):
                self._read(stored, split, number)
        labels = {s: self._labels(rows, s) for s, rows in splits.items() if s != "predict"}
        if not labels:
            return
        self.names = sorted(set(classes.learnt(labels, options)), key=classes.order)
        classes.check(self.names, {split: zip(own) for split, own in labels.items()})

    def summary(self) -> str:
        return f"{len(self.names)} classes of images: {classes.shown(self.names)}"

    def _labels(self, rows: Dataset, split: str) -> list[str]:
        column = self.columns["label"]
        named = getattr(rows.features[column], "names", None)  # of folders, and of the hub
        labels = []
        for number, label in enumerate(rows[column], 1):
            if not isinstance(label, str | int) or not str(label).strip():
                raise UserError(f"{split} row {number}: column {column!r} holds no label")
            labels.append(named[label] if named else str(label))
        return labels

    def _stored(self, rows: Dataset) -> Dataset:
        """One column, "image": a path, or {"path": ..., "bytes": ...} that are not decoded."""
        column = self.columns["image"]
        if isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        return rows.select_columns([column]).rename_columns({column: "image"})

    def _read(self, stored: Any, split: str, number: int, mode: str | None = None) -> Image.Image:
        """The image in a mode of Pillow; None: only its header is read."""
        where = f"{split} row {number}"
        stored = stored if isinstance(stored, dict) else {"path": stored}
        path, content = stored["path"], stored.get("bytes")
        if content is None:
            if not isinstance(path, str) or not path:
                raise UserError(f"{where}: column {self.columns['image']!r} holds no image")
            paths = [folder / path for folder in self._folders[split]] or [Path(path)]
            files = [path for path in dict.fromkeys(paths) if path.is_file()]
            if not files:
                raise UserError(f"{where}: no such file: {paths[0]}")
            if len(files) > 1:  # of rows from several folders
                raise UserError(f"{where}: {path} is {files[0]} or {files[1]}: give whole paths")
            file = files[0]
        refusals = OSError, Image.DecompressionBombError
        with (
            as_user_error(*refusals, said=f"{where}: cannot read its image"),
            Image.open(file if content is None else BytesIO(content)) as image,
        ):
            # a photo may say in its EXIF data how it was held
            return image if mode is None else ImageOps.exif_transpose(image).convert(mode)

    def configure(self, config: Any) -> None:
        if self.names is None:  # to predict
            self.names = classes.own_classes(config)
            return
        self.names, self._places = classes.fit_head(
            config, self.names, "single_label_classification"
        )

    def encode(self, rows: Dataset, processor: Any, model: Any, split: str) -> Dataset:
        mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"

        def pixels(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            numbered = zip(batch["image"], batch["row"], strict=True)
            images = [self._read(stored, split, number, mode) for stored, number in numbered]
            read = {"pixel_values": [*processor(images, return_tensors="pt")["pixel_values"]]}
            return read | ({"labels": batch["labels"]} if "labels" in batch else {})

        found = self._stored(rows).add_column("row", [*range(1, len(rows) + 1)])
        if split != "predict":
            labels = [self._places[label] for label in self._labels(rows, split)]
            found = found.add_column("labels", labels)
        return found.with_transform(pixels)

    def collator(self, processor: Any, model: Any) -> Callable[[list[dict]], dict]:
        from transformers import default_data_collator

        return default_data_collator

    def preprocess_logits(self, logits: Any, labels: Any) -> Any:
        return logits[0] if isinstance(logits, tuple) else logits

    def figures(self, predictions: Any, labels: Any) -> dict[str, float]:
        """predictions (N, classes) logits; labels (N,)."""
        return classes.figures_of(predictions.argmax(-1), labels, len(self.names))

    def answers(self, predictions: Any, rows: Dataset) -> list[dict[str, Any]]:
        return classes.likeliest(predictions, self.names)
