from __future__ import annotations
from .options import TRAINER_DEFAULTS
def training_arguments(options, cls, **more):
    from transformers import TrainingArguments
    values = {**TRAINER_DEFAULTS, **options.trainer, **more}
    values["output_dir"] = str(values["output_dir"])
    values.pop("eval_strategy", None)
    return cls(**values, use_cpu=True)
