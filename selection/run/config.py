"""Every key of an experiment's YAML: type, default, meaning and, in brackets, source: paper; released (the authors'
code); LLaMA-Factory (its key of the same name); ours. And the paths of a run folder."""

import itertools
import json
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from selection.run.errors import UserError
from selection.run.yaml_file import check_keys, override, read_yaml

REPOSITORY = Path(__file__).resolve().parents[2]

# Keys of LLaMA-Factory that cannot be given under `training`: a stage sets them, or they would make tuning see other
# rows or another model than scoring and evaluation do, split a coreset again, or resume silently.
_NOT_FOR_TUNING = {
    "model_name_or_path", "adapter_name_or_path", "stage", "do_train", "do_eval", "do_predict", "dataset",
    "eval_dataset", "dataset_dir", "tokenized_path", "val_size", "max_samples", "template", "cutoff_len",
    "output_dir", "overwrite_output_dir", "overwrite_cache", "resume_from_checkpoint", "predict_with_generate",
    "bf16", "fp16", "use_cpu", "do_sample", "packing", "neat_packing", "streaming", "trust_remote_code",
    "include_num_input_tokens_seen", "train_on_prompt", "mask_history", "default_system", "enable_thinking",
    "preserve_thinking", "tool_format", "split_special_tokens", "use_fast_tokenizer", "ignore_pad_token_for_loss",
    "add_tokens", "add_special_tokens", "new_special_tokens_config", "resize_vocab", "model_revision", "rope_scaling",
    "train_from_scratch",
    # These read or write outside the run folder, or send something away:
    "cache_dir", "offload_folder", "adapter_folder", "media_dir", "export_dir", "logging_dir", "profiler_output_dir",
    "swanlab_logdir", "push_to_hub", "hub_model_id", "export_hub_model_id", "generation_config",
}  # fmt: skip

# They read the small model's scores, as STAFF does.
SMALL_RULES = ("ifd", "middle", "davir", "s2l", "learning_percentage", "clusters", "rds")
Method = Literal["staff", "random", "rs2", "length", "grand", "el2n", "ccs", "d2", "moderate", "entropy", *SMALL_RULES]
NO_SCORES = ("random", "rs2")  # they count rows alone
# Random, Clusters and STAFF with additions (scripts/paper/cells.py), in grids.
_Addition = Literal["staff_length", "staff_size", "staff_neyman", "staff_calibrated", "staff_nearest", "staff_ifd"]
Variant = Literal["cleaned", "rs2_cleaned", "clusters_cleaned", "easier_half", _Addition, "staff_direct"]
ANY_SCORES = (*NO_SCORES, "length")  # rows and tokens alone; other baselines read the tuned target
Mode = Literal["paper", "released", "extended", "recommended"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy and transformers take
_Fraction = Annotated[float, Field(gt=0, le=1)]
_Part = Annotated[float, Field(gt=0, lt=1)]


def rules_of(mode: str) -> str:
    """STAFF's rules under a mode, "paper" or "released"; the others have the paper's, with additions."""
    return "released" if mode == "released" else "paper"


def with_recommended(settings: dict[str, Any]) -> dict[str, Any]:
    """The keys of `selection:`, with what `mode: recommended` means where they are not given."""
    meant = {"speculation": "direct", "leave_out": "suspects", "methods": ["rs2", "clusters", "random"]}
    return meant | settings if settings.get("mode") == "recommended" else settings


class Section(BaseModel):
    """Keys of a YAML file: no others, and no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


_ADDITIONS = "length_control", "speculation", "budgets", "within_stratum", "hardest_by"  # of mode extended


class Share(Section):
    """The small model is tuned on a random share of the training split, drawn by `selection.seed`. (ours)"""

    share: _Fraction
    passes: PositiveInt = 1  # over these rows


class Selection(Section):
    # The published method, or the authors' code where they differ (README.md); extended: published, and
    # length_control, speculation, budgets, within_stratum and hardest_by may be given; recommended: extended, with
    # speculation direct, leave_out suspects and methods [rs2, clusters, random] where these are not given: what gained
    # most where it was measured (data/results). (ours)
    mode: Mode = "paper"
    # Rows that the target scores, the drawn ones or all; by_mode: all under released. (paper: sampled; released: all)
    verify: Literal["by_mode", "sampled", "all"] = "by_mode"
    # residual (extended alone): stratify what response length leaves unexplained of the effort scores. (ours)
    length_control: Literal["none", "residual"] = "none"
    # How every row comes by its score. published: the small model is tuned on the whole training split and scores it;
    # share and passes: tuned on a part of it; untuned: not at all; direct: no small model, the untuned target scores
    # every row, so that V_i is 1 and nothing is left to verify. They go before small_training.num_train_epochs, direct
    # sets small_model. (paper: published)
    speculation: Annotated[
        Annotated[Literal["published", "untuned", "direct"], Tag("(name)")] | Annotated[Share, Tag("(share)")],
        Discriminator(lambda value: "(share)" if isinstance(value, dict | Share) else "(name)"),
    ] = "published"
    # Budgets of the strata. ratio: by V_i; calibrated: by V_i against what the small model's scores lead to expect of
    # the target; size: in proportion to the strata's sizes; neyman: to size · spread of the scores. (paper: ratio)
    budgets: Literal["ratio", "calibrated", "size", "neyman"] = "ratio"
    # Rows of a stratum: at random, or as many k-means clusters of hidden states and of each the nearest to its centre.
    # (paper: random)
    within_stratum: Literal["random", "nearest"] = "random"
    # What the hardest rows are dropped by. ifd: how little the prompt explains of the response, a token;
    # loss_difference: the same summed over the response. (paper: effort)
    hardest_by: Literal["effort", "ifd", "loss_difference"] = "effort"
    # suspects: rows listed in the run folder's pool/suspects.jsonl (scripts/check_pool.py) count as rows without a
    # score: strata, draws and V_i are over the others, which fill a coreset of ⌊rate · all rows⌋ as far as they go. The
    # small model still learns from all. effort_score.py makes the list where there is none. (ours)
    leave_out: Literal["none", "suspects"] = "none"
    # Coresets to cut. staff, length and the rules from ifd on read the small model's scores, random and rs2 none, all
    # others the tuned target's. rs2: a fresh random subset for each pass of target_training. (paper; released:
    # moderate, entropy; ours: length, rs2 and the rules from ifd on, selection/method/rules.py)
    methods: list[Method] = Field(default=["staff", "random"], min_length=1)
    # EL2N, CCS and D2 of their papers or of the authors' code; by_mode: released under released. (ours)
    variant: Literal["by_mode", "published", "released"] = "by_mode"
    # Fractions of the training split to keep: 1 − pruning rate. (paper, Table 1)
    rates: list[_Fraction] = Field(default=[0.8, 0.5, 0.3, 0.2, 0.1], min_length=1)
    num_strata: int = Field(default=50, ge=1, le=100_000)  # K, strata of equal score width (paper)
    verify_per_stratum: PositiveInt = 10  # b_v, samples of each stratum that the target scores (paper)
    hardest_cutoff: float = Field(default=0.1, ge=0, lt=1)  # fraction of highest scores dropped first (paper)
    # φ, the parameters of the gradient. v_lora_b: B of a fresh LoRA on the last layer's value projection; v_weight:
    # that projection's weight; last_layer: all weight matrices of the last layer; all_lora: every A and B of the tuned
    # LoRA, or of a fresh one where there is none. (released: v_lora_b; ours: the others)
    phi: Literal["v_lora_b", "v_weight", "last_layer", "all_lora"] = "v_lora_b"
    phi_rank: PositiveInt = 81  # r of v_lora_b's LoRA (released)
    phi_alpha: PositiveInt = 16  # α of v_lora_b's LoRA (released)
    # More columns of the score files, from the same pass (EffortScorer in selection/method/effort.py); those that
    # `methods` read are there anyway. (ours)
    columns: list[Literal["el2n", "el2n_released", "entropy", "hidden_state"]] = []
    # Number format of scoring; auto: bf16 where the device computes in it, else fp32. (ours)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # Tokens of a scoring batch, with padding, halved where memory runs out; absent: 2,048 on a CPU, 16,384 on a GPU,
    # under all_lora 512 and 4,096. (ours)
    tokens_per_batch: PositiveInt | None = None
    # auto: accelerate spreads the target, while it scores, over all visible GPUs and the CPU's memory, in one process;
    # absent: one device, as always for the speculative model. (ours)
    device_map: Literal["auto"] | None = None
    # Bits of the target's linear weights while it scores (bitsandbytes: LLM.int8, or NF4 doubly quantised); absent: as
    # they are. The speculative model and all tuning do not change. (ours)
    quantization_bit: Literal[8, 4] | None = None
    self_test: int = Field(default=4, ge=0)  # rows that plain autograd scores first; a difference stops the run (ours)
    seed: Seed = 42  # of the fresh LoRA's A, the verification draws and every choice of rows (ours; released: none)

    @field_validator(*_ADDITIONS, "verify", mode="before")
    @classmethod
    def _check_additions(cls, value: Any, info) -> Any:
        if value == "adaptive":
            raise ValueError("adaptive verification was removed (data/results/NOTES.md says why): leave the key out")
        published = cls.model_fields[info.field_name].default
        if info.field_name != "verify" and value != published and info.data.get("mode") in ("paper", "released"):
            raise ValueError("neither the paper nor the released code has it: give selection.mode extended with it")
        return value

    rules = property(lambda self: rules_of(self.mode))

    @property
    def baseline_variant(self) -> str:  # "published" or "released"
        return {"paper": "published", "released": "released"}[self.rules] if self.variant == "by_mode" else self.variant

    @property
    def verify_all(self) -> bool:
        return self.verify == "all" or (self.verify == "by_mode" and self.rules == "released")


class DatasetFormat(Section):
    """Keys under `dataset_format:`, LLaMA-Factory's own (its data/README.md)."""

    # Form of a row: instruction, input, output (alpaca), or a conversation. Every turn of the assistant is trained on
    # and scored, the last is generated in evaluation. Read messages with role and content as sharegpt with `tags`:
    # under openai "detailed thinking off" joins the system prompt of rows without tools.
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    # Names of the columns prompt, query, response, history, messages, system, tools, e.g. `prompt: question`; empty:
    # LLaMA-Factory's. Where one is given, only those given are read. An empty system prompt is the template's own.
    columns: dict[str, str] = {}
    # Names of roles and contents in a conversation: role_tag, content_tag, user_tag, assistant_tag, system_tag,
    # observation_tag, function_tag; empty: LLaMA-Factory's. Where one is given, give all in use.
    tags: dict[str, str] = {}

    @property
    def entry(self) -> dict[str, Any]:
        """As in `dataset_info.json`, where an empty mapping would mean "no column at all"."""
        return {key: value for key, value in self.model_dump().items() if value}


_ROLES = ("role", "content", "user", "assistant", "observation", "function", "system")
# The form of a run's rows where its data sets come in different ones.
COMMON_FORM = DatasetFormat(
    formatting="sharegpt",
    columns={"messages": "messages", "tools": "tools"},
    tags={f"{role}_tag": role for role in _ROLES},
)


class DataSet(Section):
    """An entry of a list under `dataset:`. (ours)"""

    path: str  # JSON, JSONL, CSV, Parquet or Arrow file
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")  # in coresets and messages; absent: the file's stem
    dataset_format: DatasetFormat | None = None  # how to read its rows; absent: the experiment's
    max_samples: PositiveInt | None = None  # only its first rows, before the split; absent: the experiment's
    # Fraction of every coreset from this data set: ⌊quota · m⌋ of m rows, chosen among its own by the method's rule.
    # The data sets without one share what is left, by the same rule.
    quota: _Fraction | None = None


class Evaluation(Section):
    generate: bool = True  # false: only the log likelihood of the reference answers, no answers and no ROUGE (ours)
    # What generates: LLaMA-Factory, or vLLM (pip install vllm), which has to be told; the first answers of both are
    # compared. (ours)
    engine: Literal["llama_factory", "vllm"] = "llama_factory"
    max_new_tokens: PositiveInt = 128  # longest answer (ours; the paper is silent)
    batch_size: PositiveInt = 16  # answers generated at a time (ours)


def _path(*names: str, of: str = "folder") -> Any:
    return property(lambda experiment: getattr(experiment, of).joinpath(*names))


class Experiment(Section):
    """A whole experiment. Relative paths count from the repository, whatever the working directory."""

    output_dir: str  # run folder: split, tuned models, scores, coresets, evaluations, cost ledger (ours)
    # θ_s, the speculative model: a folder or a name on the model hub; under speculation direct the target. (paper)
    small_model: str
    target_model: str  # θ_t: a folder or a name on the model hub (paper)
    template: str  # chat template of the model family (LLaMA-Factory)
    # JSON, JSONL, CSV, Parquet or Arrow file, or a list of data sets: pooled in this order, split once. Rows of other
    # forms become conversations with the same tokens; numbers count as the text in the file. (ours; paper: pooled)
    dataset: Annotated[
        Annotated[str, Tag("(file)")] | Annotated[list[DataSet], Field(min_length=1), Tag("(list)")],
        Discriminator(lambda value: "(list)" if isinstance(value, list) else "(file)"),
    ]
    dataset_format: DatasetFormat = DatasetFormat()
    # Take only the first rows of each file, before the split; rates count the rows that are left. (LLaMA-Factory)
    max_samples: int | None = Field(default=None, ge=2)
    eval_size: _Part = 0.1  # fraction held out (paper)
    # Rows to evaluate on, a file in the form of `dataset_format`: nothing is held out then, and every row of `dataset`
    # is of the training split, in the file's order. (ours)
    eval_data: str | None = Field(default=None, min_length=1)
    # Rows held out: as LLaMA-Factory draws them; keep_copies_together: but every exact copy of a row goes where the
    # first one goes. (LLaMA-Factory; ours)
    split: Literal["llama_factory", "keep_copies_together"] = "llama_factory"
    # Leave out rows without a prompt and text response, which stop a run else; <run folder>/data/bad_rows.jsonl lists
    # them. (ours)
    skip_bad_rows: bool = False
    split_seed: Seed = 42  # of the split, train_test_split of `datasets` (LLaMA-Factory's seed, 42 there too)
    cutoff_len: int = Field(default=1024, ge=2)  # most tokens of a sample, cut as LLaMA-Factory does (paper)
    # Arithmetic of tuning and log likelihood (weights stay as the checkpoint has them, and one of 16 bits generates in
    # these); auto: bf16 where the device computes in it, else fp32. (ours; paper: fp16)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Run folder, finished up to effort_score.py, with the same data, small model, training and scoring settings: this
    # run takes its tuned speculative model and scores, and shares their cost. (ours)
    speculative_run: str | None = Field(default=None, min_length=1)
    selection: Selection = Selection()
    # LLaMA-Factory's keys for all tuning, and for evaluation where they are the model's, such as flash_attn.
    # (LLaMA-Factory; configs/paper/ has the paper's values)
    training: dict[str, Any] = {}
    # Keys added for the speculative model; num_train_epochs 0 leaves it untuned. (paper)
    small_training: dict[str, Any] = {"num_train_epochs": 3}
    target_training: dict[str, Any] = {"num_train_epochs": 4}  # keys added for the target (paper)
    evaluation: Evaluation = Evaluation()

    @field_validator("training", "small_training", "target_training")
    @classmethod
    def _check_training_keys(cls, keys: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_NOT_FOR_TUNING & set(keys)):
            raise ValueError(f"{', '.join(taken)} cannot be given here: selection/run/config.py says why")
        if type(passes := keys.get("num_train_epochs", 0)) not in (int, float) or not 0 <= passes < math.inf:
            raise ValueError("num_train_epochs must be a number, not below 0")
        return keys

    @model_validator(mode="before")
    @classmethod
    def _speculate(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(settings := values.get("selection"), dict):
            values = values | {"selection": with_recommended(settings)}
            if values["selection"].get("speculation") == "direct":
                values["small_model"] = values.get("target_model", "")
        return values

    @model_validator(mode="after")
    def _check_rules(self) -> "Experiment":
        keys, later = self.training | self.speculative_training, {"davir", "s2l", "learning_percentage"}
        by = self.selection.hardest_by
        for method in [*self.selection.methods, *["ifd"] * (by != "effort")]:
            if method == "rds":
                raise ValueError("rds chooses by a file of its own: call coreset.py with --method rds --dev FILE")
            if method in {"ifd", "middle", *later} and keys.get("finetuning_type", "lora") != "lora":
                raise ValueError(f"{method} reads losses with and without the tuned LoRA: finetuning_type must be lora")
            if method in SMALL_RULES and self.selection.rules == "released" and self.passes(self.speculative_training):
                raise ValueError(f"{method} reads the tuned small model, which mode released resets: give mode paper")
            if method in later and not self.passes(self.speculative_training):
                raise ValueError(f"{method} reads what tuning changes: small_training.num_train_epochs must be above 0")
        return self

    @model_validator(mode="after")
    def _check_data_sets(self) -> "Experiment":
        if self.eval_data and self.split != "llama_factory":
            raise ValueError(f"split {self.split}: beside eval_data nothing is split: leave one of the two out")
        names = [each.name for each in self.data_sets]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"more than one data set is called {repeated[0]}: give each a name of its own")
        quotas = [Fraction(str(each.quota)) for each in self.data_sets if each.quota is not None]
        if sum(quotas) > 1 or (len(quotas) == len(names) and sum(quotas) < 1):
            wanted = "at most 1" if sum(quotas) > 1 else "1 where every data set has one"
            raise ValueError(f"the quotas sum to {float(sum(quotas)):g}: they must sum to {wanted}")
        return self

    @property
    def data_sets(self) -> list[DataSet]:
        """The entries of `dataset` in order, with defaults filled in but for the quota."""
        given = [DataSet(path=self.dataset)] if isinstance(self.dataset, str) else self.dataset
        sets, ours = [], {"dataset_format": self.dataset_format, "max_samples": self.max_samples}
        for each in given:
            defaults = {"name": Path(each.path).stem} | ours
            sets.append(each.model_copy(update={k: v for k, v in defaults.items() if getattr(each, k) is None}))
        return sets

    @property
    def eval_set(self) -> list[DataSet]:
        """The entry of `eval_data`; none where a part of `dataset` is held out."""
        return [DataSet(path=self.eval_data, dataset_format=self.dataset_format)] if self.eval_data else []

    @property
    def row_format(self) -> DatasetFormat:
        """Form of the rows in the run folder: that of the data sets, or `COMMON_FORM` where they differ."""
        forms = [each.dataset_format for each in self.data_sets + self.eval_set]
        return forms[0] if all(form == forms[0] for form in forms) else COMMON_FORM

    def passes(self, keys: dict[str, Any]) -> float:  # over the data, when tuning with `keys` beside `training`
        return (self.training | keys).get("num_train_epochs", 3)

    @property
    def tuned_small(self) -> Path | None:  # None: it scores untuned
        return self.speculative_folder / "small" if self.passes(self.speculative_training) else None

    @property
    def speculative_training(self) -> dict[str, Any]:
        """`small_training` with the passes that `selection.speculation` sets."""
        by = self.selection.speculation
        return self.small_training | ({} if by == "published" else {"num_train_epochs": getattr(by, "passes", 0)})

    @property
    def speculative_share(self) -> float:
        """Fraction of the training split that the small model is tuned on."""
        return getattr(self.selection.speculation, "share", 1.0)

    def tuned_target(self, dataset: str) -> Path:
        """The target tuned on "full" or on a coreset, by name."""
        return self.folder / "target" / dataset

    dataset_paths = property(lambda self: ", ".join(each.path for each in self.data_sets))  # for messages
    folder = property(lambda self: from_repository(self.output_dir))
    # The run folder of the tuned speculative model and its scores; `borrows`: it is another run's.
    speculative_folder = property(lambda self: from_repository(self.speculative_run or self.output_dir))
    borrows = property(lambda self: self.speculative_folder != self.folder)
    record = _path("experiment.yaml")  # the exact configuration of the last stage that read the data
    data_folder = _path("data")  # LLaMA-Factory's dataset_dir
    small_scores = _path("scores", "small", of="speculative_folder")
    direct = property(lambda self: self.selection.speculation == "direct")
    target_scores = property(lambda self: self.small_scores if self.direct else self.folder / "scores" / "target")
    tuned_target_scores = _path("scores", "target-full")  # of the target tuned on everything, for the baselines
    verification = _path("verification.json")
    coresets = _path("coresets")
    pool = _path("pool")  # what check_pool.py found in the data


class Task(Section):
    config: str  # YAML of the experiment
    set: list[str] = []  # changes, each as `--set` takes it
    paper_target: str | None = None  # target of data/paper_table1.csv that this reproduces; absent: none
    paper_task: str | None = None  # task of data/paper_table1.csv


class Grid(Section):
    """task × method × rate × seed: what scripts/paper/reproduce.py tunes and evaluates."""

    tasks: Annotated[dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], Task], Field(min_length=1)]  # by name
    # full: the target tuned on everything; staff_…: STAFF with an addition of mode extended; oracle: rows drawn among
    # those that a pool's kinds call clean; cleaned: among those that check_pool.py does not suspect.
    # (paper: full; ours: the others)
    methods: list[Literal["full", "oracle", Variant, Method]] = Field(min_length=1)
    rates: list[_Part] = Field(min_length=1)  # fractions of the training split to keep (paper, Table 1)
    seeds: list[Seed] = Field(min_length=1)  # of tuning, scoring and every choice; the split stays the same (ours)

    @field_validator("methods", "rates", "seeds")
    @classmethod
    def _each_once(cls, values: list) -> list:
        if len(set(values)) < len(values):
            raise ValueError("each may be given once")
        return values


def from_repository(path: str) -> Path:
    """A path of a configuration; relative ones count from the repository. Raises: UserError for an impossible one."""
    try:
        resolved = (REPOSITORY / Path(path).expanduser()).resolve()
        resolved.exists()  # raises for a name that is too long
        return resolved
    except (RuntimeError, ValueError, OSError) as error:  # no such home folder, a NUL byte, a loop of links
        raise UserError(f"path {path!r}: {error}") from None


def load_experiment(config_path: str | Path, overrides: list[str] = ()) -> Experiment:
    """Read an experiment's YAML, changed by `--set key=value` texts. Raises: UserError naming the file and key."""
    values = read_yaml(config_path)
    for text in overrides:
        override(values, text)
    experiment = check_keys(Experiment, values, str(config_path))
    for folder in {experiment.folder, experiment.speculative_folder}:
        _refuse_links_out_of(folder)
    return experiment


_STAGE_FOLDERS = ("data", "small", "target", "scores", "coresets", "pool", "eval", "tokenised", "export", "tensorboard")


def _refuse_links_out_of(folder: Path) -> None:
    """No stage may write outside its run folder. Only the stages' folders are searched: it may be a whole disk."""
    try:
        found = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"output_dir {folder}: {error.strerror or error}") from None
    for path in itertools.chain(found, *((folder / name).rglob("*") for name in _STAGE_FOLDERS)):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(folder):
            raise UserError(f"{path} is a link that leads out of the run folder: put the file itself there")


def load_run(folder: Path, overrides: list[str] = ()) -> Experiment:
    """The experiment of a run folder, wherever that lies now. Raises: as `load_experiment`."""
    record = folder / "experiment.yaml"
    if not record.is_file():
        raise UserError(f"{folder} has no experiment.yaml: give a run folder in which a stage has run")
    return load_experiment(record, [f"output_dir={json.dumps(str(folder.resolve()))}", *overrides])


def load_grid(config_path: str | Path) -> Grid:
    """Read a grid's YAML (configs/reproduce/). Raises: as `load_experiment`."""
    return check_keys(Grid, read_yaml(config_path), str(config_path))


def validated(selection: Selection, changes: dict[str, Any], source: str = "command line") -> Selection:
    """A copy with some keys changed, checked like a file. Raises: UserError."""
    return check_keys(Selection, selection.model_dump() | changes, source)
