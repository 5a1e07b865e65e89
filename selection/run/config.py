"""An experiment's YAML: every key, its type and its default. One file serves every stage of an experiment."""

import itertools
import json
import math
import os
import re
import reprlib
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from selection.run.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]

# Keys of LLaMA-Factory that cannot be given under `training`. Some a stage sets itself; the others change tokens or
# model for tuning alone. Either would break a promise made here: that scores, tuning and evaluation see the same rows
# and the same model, that a coreset is never split again, that nothing resumes silently.
_SET_BY_THE_STAGE = {
    "model_name_or_path", "adapter_name_or_path", "stage", "do_train", "do_eval", "do_predict", "dataset",
    "eval_dataset", "dataset_dir", "tokenized_path", "val_size", "max_samples", "template", "cutoff_len",
    "output_dir", "overwrite_output_dir", "overwrite_cache", "resume_from_checkpoint", "predict_with_generate",
    "bf16", "fp16", "use_cpu", "do_sample", "packing", "neat_packing", "streaming", "trust_remote_code",
    "include_num_input_tokens_seen", "train_on_prompt", "mask_history", "default_system", "enable_thinking",
    "preserve_thinking", "tool_format", "split_special_tokens", "use_fast_tokenizer", "ignore_pad_token_for_loss",
    "add_tokens", "add_special_tokens", "new_special_tokens_config", "resize_vocab", "model_revision", "rope_scaling",
    "train_from_scratch",
    # These read or write elsewhere than in the run folder, or send something away.
    "cache_dir", "offload_folder", "adapter_folder", "media_dir", "export_dir", "logging_dir", "profiler_output_dir",
    "swanlab_logdir", "push_to_hub", "hub_model_id", "export_hub_model_id", "generation_config",
}  # fmt: skip


Method = Literal["staff", "random", "length", "grand", "el2n", "ccs", "d2", "moderate", "entropy"]


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy and transformers take


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


Mode = Literal["paper", "released", "extended"]


def rules_of(mode: str) -> str:
    """Whose rules a mode follows, "paper" or "released": extended is the published method with additions."""
    return "released" if mode == "released" else "paper"


class Selection(_Section):
    """Keys under `selection:`."""

    mode: Mode = "paper"
    """Follow the published method or the authors' code wherever the two differ (the table in README.md). extended: as
    published, and the additions of neither may be switched on (verify: adaptive, length_control). Source: ours."""
    verify: Literal["by_mode", "sampled", "all", "adaptive"] = "by_mode"
    """Which rows the target scores: the verified samples or the whole training split; by_mode: as `mode` says.
    adaptive (extended alone): at most num_strata x verify_per_stratum samples, drawn where V_i leaves the budgets most
    uncertain, until they are settled (selection/method/adaptive.py).
    Source: paper (sampled); as released (all); ours (adaptive)."""
    length_control: Literal["none", "residual"] = "none"
    """residual (extended alone): strata and V_i are of what response length leaves unexplained of the effort scores
    (length_residual in selection/method/length_control.py). Source: ours."""
    methods: list[Method] = Field(default=["staff", "random"], min_length=1)
    """Coresets to cut. All but staff, random and length need the scores of the tuned target.
    Source: paper; moderate and entropy as released; length ours."""
    variant: Literal["by_mode", "published", "released"] = "by_mode"
    """Whose EL2N, CCS and D2: the papers' or those of STAFF's released code; by_mode: as `mode` says. Source: ours."""
    rates: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[0.8, 0.5, 0.3, 0.2, 0.1], min_length=1)
    """Fractions of the training split to keep; the paper's pruning rate is 1 − rate. Source: paper, Table 1."""
    num_strata: int = Field(default=50, ge=1, le=100_000)
    """K, equal-width score ranges. Source: paper (50)."""
    verify_per_stratum: int = Field(default=10, ge=1)
    """b_v, samples of each stratum that the target scores. Source: paper (10)."""
    hardest_cutoff: float = Field(default=0.1, ge=0, lt=1)
    """Fraction with the highest scores that is dropped before stratifying. Source: paper (a tenth)."""
    phi: Literal["v_lora_b", "v_weight", "last_layer", "all_lora"] = "v_lora_b"
    """φ, the parameters of the gradient. v_lora_b: B of a fresh LoRA on the last layer's value projection; v_weight:
    that projection's own weight; last_layer: all weight matrices of the last layer; all_lora: every A and B of the
    tuned LoRA (a model that has none gets a fresh one, as tuning puts it on).
    Source: as released (v_lora_b); the others ours."""
    phi_rank: int = Field(default=81, ge=1)
    """Rank r of v_lora_b's fresh LoRA. Source: as released."""
    phi_alpha: int = Field(default=16, ge=1)
    """α of v_lora_b's fresh LoRA. Source: as released."""
    columns: list[Literal["el2n", "el2n_released", "entropy", "hidden_state"]] = []
    """More columns of the score files, from the same pass: see EffortScorer.score in selection/method/effort.py.
    Source: ours."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of scoring; auto takes bf16 where the device computes in it. Source: ours."""
    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Tokens of one scoring batch, padding included; absent: 2,048 on a CPU and 16,384 on a
    GPU, under all_lora 512 and 4,096. Halved by itself, for the rest of a run, where the memory does not hold them.
    Source: ours."""
    device_map: Literal["auto"] | None = None
    """Where the target lies while it scores. auto: spread by accelerate over all visible GPUs, then the CPU's memory,
    in one process; absent: on one device. The speculative model is small and always lies on one. Source: ours."""
    quantization_bit: Literal[8, 4] | None = None
    """Weights of the target's linear maps in 8 or 4 bits while it scores, through bitsandbytes (LLM.int8; NF4, doubly
    quantised), as LLaMA-Factory's key of this name does when it tunes. The scores are others; the speculative model
    and every tuning stay as they are. Absent: nothing is quantised while it scores, whatever `training` says.
    Source: ours, named as LLaMA-Factory's key."""
    self_test: int = Field(default=4, ge=0)
    """Rows that are also scored one by one, by plain autograd, before a scoring run; it stops where they differ.
    Source: ours."""
    seed: Seed = 42
    """Of the fresh LoRA's A, the verification draws, and every random choice of rows.
    Source: ours; the released code draws without a seed."""

    @field_validator("verify", "length_control")
    @classmethod
    def _only_extended(cls, value: str, info: ValidationInfo) -> str:
        if value in ("adaptive", "residual") and info.data.get("mode") != "extended":
            raise ValueError("neither the paper nor the released code has it: give selection.mode extended with it")
        return value

    @property
    def rules(self) -> str:
        """ "paper" or "released"."""
        return rules_of(self.mode)

    @property
    def baseline_variant(self) -> str:
        """ "published" or "released"."""
        return {"paper": "published", "released": "released"}[self.rules] if self.variant == "by_mode" else self.variant

    @property
    def verify_all(self) -> bool:
        return self.verify == "all" or (self.verify == "by_mode" and self.rules == "released")


class DatasetFormat(_Section):
    """Keys under `dataset_format:`, LLaMA-Factory's own (its data/README.md)."""

    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    """Form of a row: instruction, input and output (alpaca), or a conversation. Messages with role and content are best
    read as sharegpt, with `tags`: under openai LLaMA-Factory adds "detailed thinking off" to the system prompt of rows
    without tools. In a conversation every turn of the assistant is trained on, and the effort score is of all their
    tokens; only the last one is generated in the evaluation. Source: LLaMA-Factory's key of this name."""
    columns: dict[str, str] = {}
    """What the columns are called, e.g. `prompt: question`; empty: LLaMA-Factory's defaults. Where one is given, only
    those given are read (keys prompt, query, response, history, messages, system, tools). An empty system prompt is
    the template's own one. Source: LLaMA-Factory's key of this name."""
    tags: dict[str, str] = {}
    """What roles and contents are called inside a conversation: role_tag, content_tag, user_tag, assistant_tag,
    system_tag, observation_tag, function_tag. Empty: LLaMA-Factory's defaults; where one is given, give all in use.
    Source: LLaMA-Factory's key of this name."""

    @property
    def entry(self) -> dict[str, Any]:
        """As it stands in `dataset_info.json`; an empty mapping there would mean "no column at all"."""
        return {key: value for key, value in self.model_dump().items() if value}


# The form in which the rows of a run stand where its data sets come in different ones.
COMMON_FORM = DatasetFormat(
    formatting="sharegpt",
    columns={"messages": "messages", "tools": "tools"},
    tags={
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
        "observation_tag": "observation", "function_tag": "function", "system_tag": "system",
    },
)  # fmt: skip


class DataSet(_Section):
    """Keys of one entry in a list under `dataset:`."""

    path: str
    """JSON, JSONL, CSV or Parquet file. Source: ours."""
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """What coresets and messages call it; absent: the file's name without its ending. No two may have the same.
    Source: ours."""
    dataset_format: DatasetFormat | None = None
    """How its rows are to be read; absent: the experiment's `dataset_format`. Source: ours."""
    max_samples: int | None = Field(default=None, ge=1)
    """Take only the first rows of this file, before the split; absent: the experiment's `max_samples`. Source: ours."""
    quota: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of every coreset that comes from this data set: ⌊quota · m⌋ of m rows, chosen among its own by the
    method's rule. The data sets without a quota share what is left, by the same rule. Absent: no quota.
    Source: ours."""


class Evaluation(_Section):
    """Keys under `evaluation:`."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Bound on a generated answer. Source: ours; the paper is silent."""
    batch_size: int = Field(default=16, ge=1)
    """Answers generated at a time. Source: ours; the paper is silent."""


class Experiment(_Section):
    """A whole experiment. Relative paths count from the repository, so no stage depends on the working directory."""

    output_dir: str
    """Run folder: split, tuned models, scores, coresets, evaluations and the cost ledger of this experiment.
    Source: ours."""
    small_model: str
    """θ_s: model folder or model-hub name of the speculative model. Source: paper."""
    target_model: str
    """θ_t: model folder or model-hub name. Source: paper."""
    template: str
    """LLaMA-Factory's chat template of the family. Source: LLaMA-Factory's key of this name."""
    dataset: Annotated[
        Annotated[str, Tag("(file)")] | Annotated[list[DataSet], Field(min_length=1), Tag("(list)")],
        Discriminator(lambda value: "(list)" if isinstance(value, list) else "(file)"),
    ]
    """JSON, JSONL, CSV or Parquet file, or a list of data sets, each with `path` and more keys. All rows are pooled, in
    the order given, and split once. Where data sets come in different forms, all rows are put into one, conversations,
    by LLaMA-Factory's own converter: their tokens stay the same. Numbers in a column of prompts or responses count as
    the text that stands in the file. Source: ours; pooled as in the paper."""
    dataset_format: DatasetFormat = DatasetFormat()
    """How the rows are to be read; absent: alpaca."""
    max_samples: int | None = Field(default=None, ge=2)
    """Take only the first rows of the file, before the split; of several files, as in LLaMA-Factory, of each. Rates
    count rows of the training split, so without those left out here. Source: LLaMA-Factory's key of this name."""
    eval_size: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction held out. Source: paper (a tenth)."""
    split_seed: Seed = 42
    """Seed of the split, `datasets`' train_test_split. Source: LLaMA-Factory's seed, 42 there too."""
    cutoff_len: int = Field(default=1024, ge=2)
    """Tokens of a sample at most, as LLaMA-Factory cuts them.
    Source: paper (1024); LLaMA-Factory's key of this name."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of tuning and generation (LLaMA-Factory keeps the weights as the checkpoint has them); auto takes
    bf16 where the device computes in it. Source: ours; the paper tunes in fp16."""
    speculative_run: str | None = Field(default=None, min_length=1)
    """Another run folder, finished up to effort_score.py, whose tuned speculative model and scores are taken instead of
    made again: it needs the same data, small model, training and settings of scoring. The two share what these cost.
    Absent: this run makes its own. Source: ours; one selection serves several targets."""
    selection: Selection = Selection()
    training: dict[str, Any] = {}
    """LLaMA-Factory's keys for every tuning run, handed over as they are; num_train_epochs is a number from 0. Those
    of the model itself, such as quantization_bit or flash_attn, hold for evaluation too.
    Source: LLaMA-Factory's keys; configs/paper/ has the paper's values."""
    small_training: dict[str, Any] = {"num_train_epochs": 3}
    """Added for the speculative model; num_train_epochs 0 leaves it as it is. With the best of the
    speculators we tried, fewer passes lose agreement with the target (data/results/NOTES.md).
    Source: paper (3 passes)."""
    target_training: dict[str, Any] = {"num_train_epochs": 4}
    """Added for the target. Source: paper (4 passes)."""
    evaluation: Evaluation = Evaluation()

    @field_validator("training", "small_training", "target_training")
    @classmethod
    def _leaves_the_stage_alone(cls, keys: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_SET_BY_THE_STAGE & set(keys)):
            raise ValueError(f"{', '.join(taken)} cannot be given here: finetune/README.md says why")
        if type(passes := keys.get("num_train_epochs", 0)) not in (int, float) or not 0 <= passes < math.inf:
            raise ValueError("num_train_epochs must be a number, not below 0")
        return keys

    @model_validator(mode="after")
    def _data_sets_agree(self) -> "Experiment":
        sets = self.data_sets
        if repeated := [name for name, count in Counter(each.name for each in sets).items() if count > 1]:
            raise ValueError(f"more than one data set is called {repeated[0]}: give each a name of its own")
        quotas = [each.quota for each in sets if each.quota is not None]
        total = sum(Fraction(str(quota)) for quota in quotas)
        if total > 1 or (len(quotas) == len(sets) and total < 1):
            wanted = "at most 1" if total > 1 else "1 where every data set has one"
            raise ValueError(f"the quotas sum to {float(total):g}: they must sum to {wanted}")
        return self

    @property
    def data_sets(self) -> list[DataSet]:
        """What `dataset` names, in order, with nothing left to a default but the quota."""
        given = [DataSet(path=self.dataset)] if isinstance(self.dataset, str) else self.dataset
        return [
            each.model_copy(
                update={
                    "name": each.name or Path(each.path).stem,
                    "dataset_format": each.dataset_format or self.dataset_format,
                    "max_samples": each.max_samples or self.max_samples,
                }
            )
            for each in given
        ]

    @property
    def dataset_paths(self) -> str:
        """As a message names them."""
        return ", ".join(each.path for each in self.data_sets)

    @property
    def row_format(self) -> DatasetFormat:
        """The form of the rows in the run folder: that of the data sets, or `COMMON_FORM` where they differ."""
        first, *others = (each.dataset_format for each in self.data_sets)
        return first if all(each == first for each in others) else COMMON_FORM

    @property
    def folder(self) -> Path:
        return from_repository(self.output_dir)

    @property
    def speculative_folder(self) -> Path:
        """The run folder of the tuned speculative model and its scores: this one, or `speculative_run`."""
        return from_repository(self.speculative_run) if self.speculative_run is not None else self.folder

    @property
    def borrows(self) -> bool:
        """Whether these are another run's: then nothing is made there, and only who shares them is noted."""
        return self.speculative_folder != self.folder

    @property
    def record(self) -> Path:
        """The exact configuration of the last stage that read the data."""
        return self.folder / "experiment.yaml"

    @property
    def data_folder(self) -> Path:
        """What LLaMA-Factory gets as `dataset_dir`."""
        return self.folder / "data"

    @property
    def tuned_small(self) -> Path | None:
        """None where `small_training` asks for no pass: then the speculative model scores as it is."""
        passes = (self.training | self.small_training).get("num_train_epochs", 3)
        return self.speculative_folder / "small" if passes else None

    def tuned_target(self, dataset: str) -> Path:
        """The target tuned on a data set of the run folder: "full" or a coreset's name."""
        return self.folder / "target" / dataset

    @property
    def small_scores(self) -> Path:
        return self.speculative_folder / "scores" / "small"

    @property
    def target_scores(self) -> Path:
        return self.folder / "scores" / "target"

    @property
    def tuned_target_scores(self) -> Path:
        """Of the target tuned on the whole training split, which the baselines read."""
        return self.folder / "scores" / "target-full"

    @property
    def verification(self) -> Path:
        return self.folder / "verification.json"

    @property
    def coresets(self) -> Path:
        return self.folder / "coresets"


class Task(_Section):
    """A task of a grid: an experiment, and what to change in it."""

    config: str
    """YAML of the experiment. Source: ours."""
    set: list[str] = []
    """Changes, each as `--set` takes it: key=value. Source: ours."""
    paper_target: str | None = None
    """Which target of data/paper_table1.csv this is to reproduce; absent: none. Source: paper, Table 1."""
    paper_task: str | None = None
    """Which task of data/paper_table1.csv. Source: paper, Table 1."""


class Grid(_Section):
    """task × method × rate × seed: what scripts/paper/reproduce.py tunes and evaluates."""

    tasks: Annotated[dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], Task], Field(min_length=1)]
    """By name, of letters, digits, `_`, `.` and `-`. Source: ours."""
    methods: list[Literal["full", "staff_length", Method]] = Field(min_length=1)
    """Each once; full is the target tuned on everything, staff_length STAFF in mode extended with length_control
    residual. Source: paper; full is its row of full data; staff_length ours."""
    rates: list[Annotated[float, Field(gt=0, lt=1)]] = Field(min_length=1)
    """Fractions of the training split to keep, each once. Source: paper, Table 1."""
    seeds: list[Seed] = Field(min_length=1)
    """Each, once, seeds tuning (the speculator's too), scoring and every random choice; the split stays the same.
    Source: ours; the paper names none."""

    @field_validator("methods", "rates", "seeds")
    @classmethod
    def _each_once(cls, values: list) -> list:
        if len(set(values)) < len(values):
            raise ValueError("each may be given once")
        return values


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.1 wants 1.0e-4 and would make it text).

    Without aliases: a few lines of them stand for more than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"line {self.peek_event().start_mark.line + 1}: write the value out instead of an alias"
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """SafeDumper of what `_Loader` reads: without aliases, and text that it would take for a number in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _of_yaml in (_Loader, _Dumper):
    _of_yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def from_repository(path: str) -> Path:
    """A path out of a configuration: relative ones count from the repository."""
    try:
        resolved = (REPOSITORY / Path(path).expanduser()).resolve()
        resolved.exists()  # raises for a name that is too long
        return resolved
    except (RuntimeError, ValueError, OSError) as error:  # no such home folder, a NUL byte, a loop of links
        raise UserError(f"path {path!r}: {error}") from None


def load_experiment(config_path: str, overrides: list[str] = ()) -> Experiment:
    """Read an experiment's YAML; `overrides` are the `--set key=value` texts (dots reach into sections).

    Raises: UserError for a file that cannot be read, an unknown key, a wrong type or a value out of range.
    """
    values = _read_yaml(config_path)
    for text in overrides:
        _override(values, text)
    experiment = _validate(Experiment, values, str(config_path))
    for folder in {experiment.folder, experiment.speculative_folder}:
        _refuse_links_out_of(folder)
    return experiment


def as_yaml(experiment: Experiment) -> str:
    """Every key with its value; `load_experiment` reads it."""
    return yaml.dump(experiment.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_STAGE_FOLDERS = ("data", "small", "target", "scores", "coresets", "eval", "tokenised", "export", "tensorboard")


def _refuse_links_out_of(folder: Path) -> None:
    """A run folder from someone else must not make a stage write, or take for its own, what lies elsewhere.

    Only where stages write is looked: an `output_dir` may by mistake be a whole disk.
    """
    try:
        found = [Path(entry.path) for entry in os.scandir(folder)] if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"output_dir {folder}: {error.strerror or error}") from None
    for stage in _STAGE_FOLDERS:
        found += [Path(parent, name) for parent, *names in os.walk(folder / stage) for name in itertools.chain(*names)]
    for path in found:
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(folder):
            raise UserError(f"{path} is a link that leads out of the run folder: put the file itself there")


def load_run(folder: Path) -> Experiment:
    """The experiment of a run folder, wherever that lies now, from its own record. Raises: as `load_experiment`."""
    record = folder / "experiment.yaml"
    if not record.is_file():
        raise UserError(f"{folder} has no experiment.yaml: give a run folder in which a stage has run")
    return load_experiment(str(record), [f"output_dir={json.dumps(str(folder.resolve()))}"])


def load_grid(config_path: str) -> Grid:
    """Read a grid's YAML (configs/reproduce/). Raises: as `load_experiment`."""
    return _validate(Grid, _read_yaml(config_path), str(config_path))


def _read_yaml(config_path: str) -> dict:
    try:
        values = yaml.load(Path(config_path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"--config_path {config_path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that is none
        raise UserError(f"{config_path} is no readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{config_path} holds no keys: write `key: value` lines as in configs/")
    return values


def validated(selection: Selection, changes: dict[str, Any], source: str = "command line") -> Selection:
    """A copy with some keys changed, checked like a file. Raises: UserError."""
    return _validate(Selection, selection.model_dump() | changes, source)


def _validate(section: type[_Section], values: dict, source: str):
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not str(part).startswith("("))
        if first["type"] == "value_error" and not key:  # of keys that do not go together
            raise UserError(f"{source}: {first['ctx']['error']}") from None
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: unknown key {key}: selection/README.md lists the keys") from None
        if first["type"] == "missing":
            or_set = "" if any(isinstance(part, int) for part in first["loc"]) else f", or give --set {key}=…"
            raise UserError(f"{source}: key {key} is missing: add it{or_set}") from None
        raise UserError(f"{source}: key {key}: {first['msg']}, not {reprlib.repr(first['input'])}") from None


def _override(values: dict, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: write it as --set key=value")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {text}: {section} is a value, not a section")
    try:
        values[last] = yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set {text}: the value is no readable YAML") from None
