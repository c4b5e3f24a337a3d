"""From the command line and a file to `TrainOptions`, and from these to the Trainer's arguments."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click

from .errors import UserError, as_user_error
from .options import TRAINER_DEFAULTS, ShownOfTrainer, TrainOptions, described
from .tasks import TASKS

if TYPE_CHECKING:
    import torch

    from ..schedules import Schedule

_LATER = "progtuning.trainer"  # in a context: options of the Trainer that --help leaves out
_TASK_NAMES = {"classification": "text-classification"}
# What `--schedule NAME` stands for: LISA's 20 steps (its published scripts), the 50 of BAdam in
# LLaMA-Factory, and AutoFreeze's percentile.
_NAMED_SCHEDULES = {
    "random": {"blocks": 2, "period": 20},
    "cyclic": {"blocks": 1, "period": 50},
    "adaptive": {"interval": 50, "percentile": 50},
    "plateau": {"stages": 3},
}


class _Converted(click.ParamType):
    """A text that `convert` takes; lists and mappings, which a file may hold, stay as they are."""

    name = "text"

    def __init__(self, convert: Any = str) -> None:
        self._convert = convert

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, Mapping | list):
            return value
        try:
            return self._convert(str(value))
        except Exception as error:  # argparse has an error of its own beside ValueError
            self.fail(str(error), param, ctx)


def finite(_: click.Context, option: click.Parameter, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):  # neither below nor above a range
        raise click.BadParameter(f"{value} is no number to work with.", param=option)
    return value


def _grouped_option(field: dataclasses.Field[Any], hint: Any, default: Any) -> click.Option:
    """The option of a field of `TrainOptions` or `ShownOfTrainer`."""
    name = field.name.replace("_", "-")
    names = [f"--{one}" for one in (name, *field.metadata.get("names", ()))]
    kinds = {*get_args(hint)} - {type(None)} or {hint}
    more: dict[str, Any] = {"default": default}
    if field.name == "task":
        names_of_tasks = [*TASKS, *_TASK_NAMES, *({"auto"} & {default})]
        more |= {"type": click.Choice(names_of_tasks), "metavar": "TASK"}
    elif choices := next(
        (get_args(kind) for kind in (hint, *kinds) if get_origin(kind) is Literal), ()
    ):
        more |= {"type": click.Choice(choices), "metavar": f"[{'|'.join(choices)}]"}
    elif get_origin(hint) in (tuple, dict):
        more |= {"multiple": True, "default": default or ()}
    elif dict in map(get_origin, kinds):
        more["type"] = _Converted()
    elif bool in kinds and default is None:  # --bf16 and --bf16 true, as for the Trainer
        more |= {"type": bool, "is_flag": False, "flag_value": True}
    elif bool in kinds:
        names[0] += f"/--no-{name}"
    elif int in kinds or float in kinds:
        kind = click.IntRange if int in kinds else click.FloatRange
        more["type"] = kind(field.metadata.get("least"), field.metadata.get("most"))
    return click.Option([field.name, *names], callback=finite, **more)


def _grouped_options(defaults: Mapping[str, Any]) -> list[click.Option]:
    made = []
    for cls in (TrainOptions, ShownOfTrainer):
        hints, about = get_type_hints(cls), described(cls)
        for field in dataclasses.fields(cls):
            if field.name == "trainer":
                continue
            default = defaults.get(field.name, field.default)
            default = None if default is dataclasses.MISSING else default
            made.append(option := _grouped_option(field, hints[field.name], default))
            # under python -OO there are no docstrings
            option.group, option.help = about.get(field.name, ("Options", None))
    groups = list(dict.fromkeys(option.group for option in made))
    return sorted(made, key=lambda option: groups.index(option.group))


def _trainer_classes() -> Iterable[type]:
    from transformers import Seq2SeqTrainingArguments

    yield Seq2SeqTrainingArguments
    try:
        from trl import SFTConfig
    except ImportError:
        return
    yield SFTConfig


def _options_of_trainer(known: Collection[str], wanted: Collection[str]) -> list[click.Option]:
    """Options for the Trainer's arguments that are not `known`; TRL's if one of `wanted` is left.

    TRL takes seconds to import.
    """
    from transformers import HfArgumentParser

    made: dict[str, click.Option] = {}
    for cls in _trainer_classes():
        for action in HfArgumentParser(cls)._actions:
            if action.dest in {"help", *known, *made} or action.nargs == 0:
                continue
            more: dict[str, Any] = {"type": _Converted(action.type), "hidden": True}
            if action.choices:
                more["type"] = click.Choice([str(choice) for choice in action.choices])
            if action.nargs == "?":  # --full_determinism and --full_determinism true
                more |= {"is_flag": False, "flag_value": "true"}
            more["multiple"] = action.nargs == "+"
            names = [action.dest, f"--{action.dest.replace('_', '-')}"]
            made[action.dest] = click.Option(names, **more)
        if made.keys() >= {*wanted}:
            break
    return [*made.values()]


def _key(name: str) -> str:
    return name.strip("-").replace("_", "-")


class RunCommand(click.Command):
    """A command whose options are the fields of `TrainOptions` and of the Trainer's arguments.

    Its function gets `options`, a `TrainOptions`, beside what it declares itself. An argument
    CONFIG names a file with the same options; the command line goes before it.

    Args:
        shown: the fields in `--help`; None: all.
        defaults: of fields, where they differ from those of a training.
    """

    def __init__(
        self,
        *args: Any,
        shown: Collection[str] | None = None,
        defaults: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        declared = {name for param in self.params for name in param.opts}
        fields = [f for f in _grouped_options(defaults or {}) if not declared & {*f.opts}]
        for option in fields:
            option.hidden = shown is not None and option.name not in shown
        for name in ("text", "pair", "label"):
            column = click.Option([f"--{name}-column"], help=f"The same as --column {name}=NAME.")
            column.group = fields[0].group
            column.hidden = shown is not None and "columns" not in shown
            fields.append(column)
        file = click.Argument(["config"], required=False, metavar="[CONFIG]")
        self.params = [file, *fields, *self.params]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *ctx.meta.get(_LATER, ())]

    def _learn_of_trainer(self, ctx: click.Context, wanted: Collection[str]) -> None:
        """Take all that the Trainer takes, which needs the import of transformers."""
        if _LATER not in ctx.meta:
            known = {param.name for param in self.params}
            ctx.meta[_LATER] = _options_of_trainer(known, wanted)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            given, *_ = self.make_parser(ctx).parse_args([*args])
        except click.NoSuchOption:
            asked = {_key(one.partition("=")[0]) for one in args if one.startswith("--")}
            self._learn_of_trainer(ctx, {one.replace("-", "_") for one in asked})
            given, *_ = self.make_parser(ctx).parse_args([*args])
        path = given.get("config")
        if not isinstance(path, str) or "help" in given:
            return super().parse_args(ctx, args)
        ctx.default_map = self._read(ctx, path)
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param is None or error.param.name in given:
                raise
            raise UserError(f"{path}: {error.format_message()}") from error

    def _read(self, ctx: click.Context, path: str) -> dict[str, Any]:
        """Values of a file, by the names of the parameters that take them."""
        from ..schedules.files import read_settings

        with as_user_error(said=path):
            content = read_settings(Path(path))
        if not isinstance(content, Mapping):
            raise UserError(f"{path}: expected options, one per line")

        def find() -> dict[str, click.Option]:
            options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
            return {_key(one): p for p in options for one in (p.name, *p.opts)}

        names = find()
        unknown = {str(key) for key in content if _key(str(key)) not in names}
        if unknown:
            self._learn_of_trainer(ctx, {one.replace("-", "_") for one in unknown})
            names = find()
        values: dict[str, Any] = {}
        for key, value in content.items():
            option = names.get(_key(str(key)))
            if option is None or option.name in ("help", "dry_run"):
                close = get_close_matches(_key(str(key)), names.keys() - {"help", "dry-run"}, 1)
                like = f"; did you mean {close[0].replace('-', '_')}?" if close else ""
                raise UserError(f"{path}: there is no option {str(key)!r}{like}")
            if option.name in values:
                raise UserError(f"{path}: {key} is there under another name, too")
            if value is not None:
                values[option.name] = _as_given(option, value, f"{path}: {key}")
        return values

    def options(self, ctx: click.Context) -> tuple[TrainOptions, dict[str, Any]]:
        """What was parsed: the options of a run, and those that the command declares itself."""
        declared = {p.name for p in self.params if not hasattr(p, "group")}
        own = {name: v for name, v in ctx.params.items() if name in declared and name != "config"}
        return _options_from({k: v for k, v in ctx.params.items() if k not in declared}), own

    def invoke(self, ctx: click.Context) -> Any:
        options, own = self.options(ctx)
        ctx.params = own | {"options": options}
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "group", "This command"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _as_given(option: click.Option, value: Any, where: str) -> Any:
    """A value of a file as the command line would give it, so that the same checks hold."""
    if isinstance(option.type, click.Choice) and isinstance(value, bool):  # YAML reads off so
        words = ("on", "yes") if value else ("off", "no")
        value = next((word for word in words if word in option.type.choices), value)
    if isinstance(value, Mapping) and option.multiple:
        value = [f"{role}={name}" for role, name in value.items()]
    several = isinstance(value, list) and not (option.multiple or option.hidden)
    if several or (isinstance(value, Mapping) and not isinstance(option.type, _Converted)):
        raise UserError(f"{where} takes one value, got {short(value)}")
    if option.multiple:
        return [str(one) for one in value] if isinstance(value, list) else [str(value)]
    return value if isinstance(value, Mapping | list) else str(value)


def _options_from(values: Mapping[str, Any]) -> TrainOptions:
    """The options of a run, from what the command line and a file say together."""
    own = {f.name for f in dataclasses.fields(TrainOptions)}
    ours = {name: value for name, value in values.items() if name in own}
    trainer = {name: v for name, v in values.items() if name not in own and v not in (None, ())}
    columns = columns_from(ours["columns"])
    for role in ("text", "pair", "label"):
        if (name := trainer.pop(f"{role}_column", None)) is not None:
            columns[role] = name
    ours |= {"columns": columns, "task": _TASK_NAMES.get(ours["task"], ours["task"])}
    bf16 = trainer.pop("bf16", None)
    if bf16 is not None:
        meant = "bf16" if bf16 else "fp32"
        if ours["precision"] not in ("auto", meant):
            raise UserError(f"--bf16 {bf16} and --precision {ours['precision']} exclude each other")
        ours["precision"] = meant
    if trainer.get("save_steps") == 0:
        del trainer["save_steps"]
        trainer["save_strategy"] = "no"
    return TrainOptions(**ours, trainer=trainer)


def columns_from(given: Iterable[str]) -> dict[str, str]:
    """role -> name of the column, from texts such as "text=sentence"."""
    columns = {}
    for text in given:
        role, sign, name = text.partition("=")
        if not (role and sign and name):
            raise UserError(f"--column takes ROLE=NAME, such as text=sentence, got {text!r}")
        columns[role] = name
    return columns


def as_yaml(options: TrainOptions) -> str:
    """All options in one file, which a command reads back to the same options."""
    import yaml

    values = dataclasses.asdict(options)
    values |= values.pop("trainer")
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def build_schedule(options: TrainOptions, total_steps: int | None) -> Schedule:
    """The schedule that `--schedule` asks for, bound to the length of the run if that is known."""
    from ..schedules import ProgressiveSchedule
    from ..schedules.blocks import is_block_set
    from ..schedules.files import KINDS, make_schedule, schedule_from_file

    wanted = options.schedule
    with as_user_error():
        if wanted == "progressive":
            return ProgressiveSchedule(options.stages, total_steps, embeddings=options.embeddings)
        if isinstance(wanted, Mapping):
            schedule = make_schedule(wanted, Path())
        elif wanted in _NAMED_SCHEDULES:
            schedule = make_schedule({"schedule": wanted, **_NAMED_SCHEDULES[wanted]})
        elif is_block_set(wanted):
            schedule = make_schedule({"schedule": "fixed", "blocks": wanted})
        elif wanted in KINDS or "." not in wanted:
            names = ", ".join(("progressive", *_NAMED_SCHEDULES, "budget"))
            raise UserError(
                f"--schedule is {names}, a set of blocks as in 0-3,8, or a file, got {wanted!r}"
            )
        else:
            schedule = schedule_from_file(wanted)
        if schedule.total_steps is None and total_steps is not None:
            schedule.bind(total_steps)
    return schedule


def choose_device(name: str) -> str:
    """Make `--device` the one device of the process; return its type, "cpu" or "cuda".

    One GPU of several is made the only one that CUDA shows, so this comes before CUDA starts. Under
    torchrun every process has its own already.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"--device is auto, cpu, cuda or cuda:1, got {name!r}")
    count = _gpu_count() if kind != "cpu" else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise UserError(f"device {name!r} cannot be used: there are {count} GPUs here")
    if index or (count > 1 and "LOCAL_RANK" not in os.environ):
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = shown.split(",") if shown else [str(i) for i in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = numbers[int(index or 0)]
    return "cuda" if count else "cpu"


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()  # by NVML: `is_available` would start CUDA


def autocast_dtype(options: TrainOptions, device: str) -> torch.dtype | None:
    """What the forward of a run computes in under autocast; None: there is no autocast.

    "auto" is bfloat16 on GPUs that compute in it, and none on a CPU, where it rarely pays.

    Args:
        device: "cpu" or "cuda"; a GPU that is not here is taken for one that does.
    """
    import torch

    if options.of_trainer("fp16"):
        if device == "cpu":  # Accelerate would compute in fp32
            raise UserError("--fp16 needs a GPU; --precision bf16 computes on CPUs, too")
        return torch.float16
    if options.precision not in ("auto", "bf16"):
        return None
    if device == "cpu":
        return torch.bfloat16 if options.precision == "bf16" else None
    if not _gpu_count() or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if options.precision == "bf16":
        raise UserError("this GPU does not compute in bf16; use --precision fp32")
    return None


def training_arguments(options: TrainOptions, cls: type | None = None, **more: Any) -> Any:
    """The Trainer's arguments: what the run demands over what was asked over our defaults.

    `eval_strategy` "stage" becomes "no" here: who trains evaluates at the end of a stage.
    `choose_device` has been called.
    """
    import torch
    from transformers import TrainingArguments

    cls = cls or TrainingArguments
    values = TRAINER_DEFAULTS | options.trainer | more
    values.setdefault("per_device_eval_batch_size", values["per_device_train_batch_size"])
    if "bf16" not in values:
        device = "cuda" if options.device != "cpu" and _gpu_count() else "cpu"
        values["bf16"] = autocast_dtype(options, device) == torch.bfloat16
        values.setdefault("use_cpu", device == "cpu")
    best = values.get("metric_for_best_model")
    if best is None and (values.get("load_best_model_at_end") or options.early_stopping_patience):
        best = values["metric_for_best_model"] = "loss"
    if best is not None and values.get("greater_is_better") is None:
        values["greater_is_better"] = not best.endswith(("loss", "perplexity"))
    loads_best = False
    if values["eval_strategy"] == "stage":
        values["eval_strategy"] = "no"
        # its check wants strategies that match, and it has no name for this one
        loads_best = values.pop("load_best_model_at_end", False)
    values.setdefault("log_level_replica", "error")  # rank 0 says it
    known = {field.name for field in dataclasses.fields(cls)}
    for old in {"gradient_checkpointing", "gradient_checkpointing_kwargs"} & values.keys():
        new = old.replace("gradient", "activation")
        if new in known:  # transformers 5.23 warns of the old name
            values.setdefault(new, values.pop(old))
    foreign = sorted(values.keys() - known)
    if foreign:
        raise UserError(f"{foreign[0]} is no option of {cls.__name__}, which trains {options.task}")
    with as_user_error():
        made = cls(**{name: [*v] if isinstance(v, tuple) else v for name, v in values.items()})
    made.load_best_model_at_end |= loads_best
    return made
