"""The option table: every setting of ``torchmd-train``, once.

The command line, the reading of YAML files, defaults, checks, ``input.yaml``, the reference page of the documentation,
and what models, data and training read from a configuration are all made from :data:`OPTIONS`. To add an option, add
a line.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torchmdnet.limits import LARGEST, LARGEST_COUNT, NARROWEST

__all__ = [
    "OPTIONS",
    "RENAMED",
    "RETIRED",
    "SYNONYMS",
    "TYPES",
    "Option",
    "Reader",
    "defaults_of",
    "has_fixed_default",
    "keys_read_by",
    "value_of",
]

#: What reads options: :func:`torchmdnet.build.create_model`, beside the parameters of the architecture; heads, by
#: parameters of the same name; :class:`torchmdnet.data.DataModule`; :class:`torchmdnet.training.lightning.LNNP`.
Reader = Literal["model", "head", "data", "training"]


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting.

    Args:
        key: Name in YAML files and in the parsed ``Namespace``.
        type: How a value is written; a row of :data:`TYPES`.
        default: Value if the option is not given.
        help: What it means, with its unit.
        choices: Accepted values, or the address of the catalogue whose names (and whose kind of addresses,
            ``my_package.module:Class``) are accepted.
        nullable: Whether YAML ``null`` is a value; always so when the default is None.
        ge, le, lt: Bounds of a number.
        least: The smallest number beside 0, which means off.
        short: One-letter flag.
        established: Whether release 3 has the flag. It refuses an ``hparams.yaml`` with any other key, so files hold
            other options only where they differ from the default.
        read_by: What reads it, one or more of :data:`Reader`, separated by spaces; empty where the run itself does, or
            only an architecture.
        fixed: Whether a configuration without the key means the default, although the constructor of an architecture
            has another one; see :func:`has_fixed_default`.
        free: Whether a model file may be loaded with another value without a warning: the physics stays the same.
        transient: Whether the value is chosen each time a model is made, and model files do not keep it.
        in_card: Whether the card of a model file tells it among the facts about training.
        group: Heading in ``--help`` and in the documentation.
    """

    key: str
    type: str
    default: Any
    help: str
    choices: tuple[Any, ...] | str = ()
    nullable: bool = False
    ge: float | None = None
    le: float | None = None
    lt: float | None = None
    least: float | None = None
    short: str | None = None
    established: bool = True
    read_by: str = ""
    fixed: bool = False
    free: bool = False
    transient: bool = False
    in_card: bool = False
    group: str = ""

    @property
    def flag(self) -> str:
        """The flag as documented; the spelling with underscores is accepted as well."""
        return "--" + self.key.replace("_", "-")

    @property
    def most(self) -> float | None:
        """The largest value: every whole number has one."""
        return LARGEST_COUNT if self.le is None and self.lt is None and self.type in ("int", "size") else self.le

    @property
    def takes_none(self) -> bool:
        """Whether None is a value."""
        return self.nullable or self.default is None

    @property
    def takes_address(self) -> bool:
        """Whether ``my_package.module:Class`` is accepted beside the listed names."""
        return isinstance(self.choices, str)

    @property
    def names(self) -> tuple[Any, ...]:
        """The accepted values, empty when any value of the type will do."""
        if not isinstance(self.choices, str):
            return self.choices
        module, _, attribute = self.choices.partition(":")
        return tuple(getattr(importlib.import_module(module), attribute))

    @property
    def expects(self) -> str:
        """Accepted values, in words: ``"a number of 0 or more"``."""
        if self.choices and self.type != "priors":
            words = f"one of {', '.join(map(str, self.names))}"
            words += " or 'my_package.module:Class'" if self.takes_address else ""
            return words + (f", or {TYPES['head']}" if self.type == "head" else "")
        low = self.least if self.least is not None else self.ge
        high = self.le if self.le is not None else self.lt
        if low is not None and high is not None:
            bounds = f" between {low:.10g} and {high:.10g}" + ("" if self.lt is None else " (exclusive)")
        elif low is not None:
            bounds = f" of {low:g} or more"
        else:
            bounds = ""
        return TYPES[self.type] + bounds + ("" if self.least is None else ", or 0")


#: How a value of each type is described to people.
TYPES: dict[str, str] = {
    "int": "a whole number",
    "float": "a number",
    "duration": "a time in seconds, or hours:minutes:seconds,",
    "bool": "true or false",
    "text": "a word or text",
    "path": "a path",
    "paths": "a path, or a list of paths",
    "size": "a count (20), a fraction (0.2) or None for the rest",
    "mapping": 'a mapping, written {"key": value} or key=value',
    "properties": 'names of properties, or a mapping {"dipole": {"weight": 1.0}}',
    "head": 'one name with its arguments, {"Name": {"argument": value}}',
    "priors": 'names of priors, or a mapping {"Name": {"argument": value}}',
    "prior_args": "a mapping of arguments, or a list with one mapping per prior",
    "box": "three rows of three numbers, e.g. [[20, 0, 0], [0, 20, 0], [0, 0, 20]]",
    "weights": "a list of numbers, or of lists of numbers",
}

#: Bounds of numbers that have no natural one: a learning rate, a weight, a batch beyond them is a slip of the pen.
MOST_RATE, MOST_DECAY, MOST_WEIGHT, MOST_SYSTEMS, MOST_PROCESSES = 100, 10_000, 1e12, 1_000_000, 1024
#: A term that weighs less, a loss smoothed with less, a rate reduced to less would not train in single precision, and
#: more nodes or steps of warm-up than these do not exist before a run ends.
LEAST_WEIGHT, LEAST_FACTOR, MOST_NODES, MOST_WARMUP = 1e-12, 1e-6, 65_536, 10_000_000
#: A learning rate falls over some part of a run, and a run ends within ten years (in seconds).
LEAST_FRACTION, LONGEST_TIME = 1e-3, 315_360_000

_ACTIVATIONS = ("ssp", "silu", "tanh", "sigmoid", "swish", "mish")

# fmt: off
_GROUPS: dict[str, Sequence[Option]] = {
    "Run control and input": (
        Option("load_model", "path", None,
               "Continue from this checkpoint: weights, optimizer, epoch counter and settings. The settings come from "
               "the hparams.yaml beside it, or, where there is none or it is of another run, from the checkpoint "
               "itself; files and flags given with it change them.", read_by="data training"),
        Option("conf", "path", None,
               "YAML file with settings, one 'key: value' a line. May be given more than once; later files win over "
               "earlier ones, flags win over files.", short="-c"),
        Option("num_epochs", "int", 300, "Train for at most this many epochs.", ge=-1, in_card=True),
        Option("max_time", "duration", None,
               "End the training after this time, in seconds or as hours:minutes:seconds, with the validation of what "
               "was trained until then. A planned lr_schedule follows the clock, or num_epochs where these end first. "
               "Reading data and the final test come on top.", ge=1, le=LONGEST_TIME, established=False,
               read_by="training", in_card=True),
        Option("batch_size", "int", 32, "Systems per training batch, per process.", ge=1, le=MOST_SYSTEMS,
               read_by="data", in_card=True),
        Option("inference_batch_size", "int", None,
               "Systems per validation or test batch. None takes batch_size.", ge=1, le=MOST_SYSTEMS, read_by="data"),
        Option("seed", "int", 1, "Seed of the splits, the initial weights and the shuffling.", ge=0, le=2**32 - 1,
               read_by="data", in_card=True),
        Option("num_workers", "int", 4,
               "Processes that prepare batches, for data sets that are not read in place.", ge=0, le=MOST_PROCESSES,
               read_by="data"),
        Option("shuffle_block", "int", None,
               "Shuffle blocks of this many samples in a row, and the samples within 32 of them, so that data larger "
               "than memory are read in few places at a time. None shuffles all samples.", ge=1, established=False,
               read_by="data"),
        Option("ngpus", "int", -1,
               "Devices per node. -1 takes every visible GPU, or one process on a machine without. "
               "CUDA_VISIBLE_DEVICES chooses among them.", ge=-1, le=MOST_PROCESSES),
        Option("num_nodes", "int", 1,
               "Nodes of a distributed run; NODE_RANK, MASTER_ADDR and MASTER_PORT tell each its place.", ge=1,
               le=MOST_NODES),
        Option("precision", "int", 32, "Bits of a floating point number in the model. 16 are too few for forces.",
               choices=(32, 64), read_by="model training", free=True),
        Option("compile", "bool", False,
               "Compile training steps with forces: energy and forces are recorded together and go through "
               "torch.compile. Takes minutes at the start, and on the CPU a C++ compiler.", established=False,
               read_by="training"),
        Option("log_dir", "path", None,
               "Folder for everything the run writes. None (null) makes runs/<dataset>-<model>-<date>-<time>.",
               short="-l", read_by="data"),
        Option("redirect", "bool", False, "Also write what appears on the terminal to log_dir/log."),
        Option("overwrite", "bool", False,
               "Delete what an earlier run left in log_dir. Without it the earlier last.ckpt, best.ckpt, "
               "potential.safetensors, tables, settings, splits.npz, report and plots are renamed, all with the same "
               "time, and the other checkpoints stay.", established=False),
        Option("report", "bool", True,
               "Write report.html and plots when the training has finished.", established=False),
        Option("load_weights", "path", None,
               "Start from the weights in this file, with a fresh optimizer and the settings of this run."),
        Option("reset_trainer", "bool", False,
               "With load_model: take only weights and settings; optimizer and epoch counter start afresh."),
        Option("accept_changed_data", "bool", False,
               "With load_model or splits: continue although the data are no longer those of the run, so that systems "
               "that were trained on may be tested on.", established=False, read_by="data"),
    ),
    "Optimisation": (
        Option("lr", "float", 1e-4, "Learning rate of AdamW; 0 keeps the weights as they are.", ge=0,
               least=1e-12, le=MOST_RATE,
               read_by="training", in_card=True),
        Option("lr_schedule", "text", "plateau",
               "How the learning rate falls: by lr_factor after lr_patience epochs without improvement (plateau), or, "
               "planned over num_epochs or max_time and step by step, to 0: as half a cosine after the warm-up "
               "(cosine), or constant, then linear over the last lr_decay_fraction (warmup-stable-decay).",
               choices=("plateau", "cosine", "warmup-stable-decay"), established=False, read_by="training",
               in_card=True),
        Option("lr_decay_fraction", "float", 0.2,
               "With lr_schedule: warmup-stable-decay, the share of the run over which the learning rate falls to 0.",
               ge=LEAST_FRACTION, le=1, established=False, read_by="training", in_card=True),
        Option("lr_patience", "int", 10, "Epochs without improvement before the learning rate is reduced.", ge=0,
               read_by="training", in_card=True),
        Option("lr_metric", "text", "val", "Which loss the learning rate follows.", choices=("train", "val"),
               read_by="training"),
        Option("lr_min", "float", 1e-6, "The learning rate is not reduced below this. Training goes on there.",
               ge=0, le=MOST_RATE, read_by="training", in_card=True),
        Option("lr_factor", "float", 0.8, "Each reduction multiplies the learning rate by this.", ge=LEAST_FACTOR,
               lt=1, read_by="training", in_card=True),
        Option("lr_warmup_steps", "int", 0, "Steps over which the learning rate grows to lr. 0 for no warm-up.", ge=0,
               le=MOST_WARMUP, read_by="training", in_card=True),
        Option("weight_decay", "float", 0.0, "Weight decay of AdamW.", ge=0, le=MOST_DECAY,
               read_by="training", in_card=True),
        Option("weight_decay_on", "text", "all",
               "Parameters with weight decay: all, or matrices alone, which spares biases, norms, embeddings and what "
               "else has one dimension.", choices=("all", "matrices"), established=False, read_by="training",
               in_card=True),
        Option("model_ema_decay", "float", 0.0,
               "Decay of an exponential moving average of the weights, updated after every step, which is validated, "
               "tested and written to best.ckpt and potential.safetensors; 0.999, for example. 0 for none. Not the "
               "smoothing of losses, which is ema_alpha_y.", ge=0, lt=1, established=False, read_by="training",
               in_card=True),
        Option("gradient_clipping", "float", 0.0, "Largest norm of the gradient; 0 for no limit.", ge=0, le=MOST_WEIGHT,
               least=1e-9, in_card=True),
        Option("early_stopping_patience", "int", 30, "Stop after this many epochs without improvement.", ge=0),
        Option("early_stopping_monitor", "text", "val_total_mse_loss",
               "Metric that early stopping follows, {train,val}_total_<loss>. Left alone it follows train_loss; null "
               "turns early stopping off.", nullable=True),
        Option("checkpoint_monitor", "text", "val_total_mse_loss",
               "Metric that ranks the checkpoints, {train,val}_total_<loss>. Left alone it follows train_loss.",
               nullable=True),
        Option("ema_alpha_y", "float", 1.0,
               "Exponential smoothing of the loss of y: 1 for none. Values below 1 also scale its gradient.",
               ge=LEAST_FACTOR, le=1, read_by="training"),
        Option("ema_alpha_neg_dy", "float", 1.0, "The same for the loss of the forces.", ge=LEAST_FACTOR, le=1,
               read_by="training"),
        Option("y_weight", "float", 1.0, "Weight of y (the energy) in the loss.", ge=0, le=MOST_WEIGHT,
               least=LEAST_WEIGHT, read_by="training", in_card=True),
        Option("y_loss_per_atom", "bool", False,
               "Divide predicted and reference energies by the number of atoms before they enter the loss (training, "
               "validation and test), so that one y_weight suits systems of every size. Recommended.",
               established=False, read_by="training", in_card=True),
        Option("neg_dy_weight", "float", 1.0,
               "Weight of the forces in the loss. Without derivative there are none.", ge=0, le=MOST_WEIGHT,
               least=LEAST_WEIGHT, read_by="training", in_card=True),
        Option("stress_weight", "float", 0.0,
               "Weight of the stress in the loss. Needs derivative and periodic data with stress labels; samples "
               "without one count for the other terms.", ge=0, established=False, le=MOST_WEIGHT,
               least=LEAST_WEIGHT, read_by="data training", in_card=True),
        Option("train_loss", "text", "mse_loss", "Loss to train with.", choices="torchmdnet.losses:LOSSES",
               read_by="training", in_card=True),
        Option("train_loss_arg", "mapping", None, 'Arguments of the loss, e.g. {"delta": 0.5} for huber_loss.',
               read_by="training"),
    ),
    "Splits, evaluation, saving": (
        Option("splits", "path", None,
               "NumPy .npz file with idx_train, idx_val and idx_test, or the word 'dataset' for the split that the "
               "data set publishes; sizes and seed are then not used. Data whose files or frames state their part are "
               "divided so, unless this is 'random'.", read_by="data"),
        Option("train_size", "size", None, "Training set: a count, a fraction, or None for the rest.", ge=0,
               read_by="data", in_card=True),
        Option("val_size", "size", 0.05, "Validation set: the same.", nullable=True, ge=0,
               read_by="data", in_card=True),
        Option("test_size", "size", 0.1, "Test set: the same.", nullable=True, ge=0, read_by="data", in_card=True),
        Option("split_by", "text", None,
               "Keep samples together: those of one file, formula, connectivity (the same molecules by their bonds), "
               "or of one value of a quantity of that name; time cuts each trajectory into blocks.",
               established=False, read_by="data"),
        Option("split_gap", "int", 0,
               "With split_by: time, leave out this many samples before each cut.", ge=0, established=False,
               read_by="data"),
        Option("test_interval", "int", -1, "Epochs between evaluations of the test set; -1 for only at the end.",
               ge=-1, read_by="data"),
        Option("save_interval", "int", 10, "Epochs between ranked checkpoints.", ge=1),
        Option("keep_checkpoints", "int", 10,
               "Number of ranked checkpoints that stay beside best.ckpt and last.ckpt; 0 for none.",
               ge=0, established=False),
    ),
    "Data set": (
        Option("dataset", "text", None, "Where the reference data come from.", choices="torchmdnet.datasets:DATASETS",
               read_by="data", in_card=True),
        Option("dataset_root", "paths", "~/data",
               "Folder the data set keeps its files in; for ASE and HDF5 the file, files or glob to read.",
               read_by="data"),
        Option("dataset_arg", "mapping", None,
               'Further arguments of the data set, e.g. {"label": "energy_U0"} or label=energy_U0.', read_by="data"),
        Option("coord_files", "text", None, "Custom: glob of the .npy files with positions.", read_by="data"),
        Option("embed_files", "text", None, "Custom: glob of the .npy files with atomic numbers.", read_by="data"),
        Option("energy_files", "text", None, "Custom: glob of the .npy files with energies.", read_by="data"),
        Option("force_files", "text", None, "Custom: glob of the .npy files with forces.", read_by="data"),
        Option("dataset_preload_limit", "int", 1024,
               "Custom and HDF5 data below this many MB are held in memory.", ge=0, read_by="data"),
        Option("remove_ref_energy", "bool", False,
               "Delta learning: subtract the elements' reference energies from the labels. The model can add them "
               "back when it is loaded.", read_by="model data training"),
        Option("standardize", "bool", False,
               "Scale the output by the standard deviation of the training labels and add their mean. Deprecated; the "
               "Atomref prior or remove_ref_energy do better.", read_by="data", in_card=True),
    ),
    "Architecture": (
        Option("model", "text", "graph-network", "Architecture.", choices="torchmdnet.models:ARCHITECTURES",
               read_by="model"),
        Option("output_model", "head", "Scalar",
               "Head: what the model predicts, with arguments of its own as a mapping.",
               choices="torchmdnet.heads:HEADS", read_by="model"),
        Option("output_mlp_num_layers", "int", 0, "Hidden layers that the head adds.", ge=0, read_by="model"),
        Option("properties", "properties", None,
               "What the model predicts beside its main output: names (dipole, charges, polarizability), or a mapping "
               "of names to a head, or to head, weight, loss, label and arguments of the head. Each is trained on the "
               "label of that name in the data.", established=False, read_by="model data training"),
        Option("prior_model", "priors", None,
               "Known physics beside the network: one or more names, with arguments as a mapping.",
               choices="torchmdnet.priors:PRIORS", read_by="model data"),
        Option("prior_args", "prior_args", None,
               "Arguments of the priors, one mapping for each, in place of those in prior_model.", established=False,
               read_by="model"),
        Option("charge", "bool", False, "Give the total charge of each system to the model.",
               read_by="model data training"),
        Option("spin", "bool", False, "Give the spin of each system to the model.", read_by="model data training"),
        Option("system_embedding", "text", "auto",
               "What atoms are told of their system beside their element. auto embeds the spin with spin, and the "
               "total charge with charge where the architecture has no other use for it.",
               choices=("auto", "none", "charge", "spin", "charge+spin"), established=False),
        Option("embedding_dimension", "int", 256, "Feature channels per atom.", ge=1),
        Option("num_layers", "int", 6, "Interaction layers.", ge=0),
        Option("num_rbf", "int", 64, "Radial basis functions.", ge=1),
        Option("activation", "text", "silu", "Activation function.", choices=_ACTIVATIONS, read_by="head"),
        Option("rbf_type", "text", "expnorm", "Radial basis.", choices=("gauss", "expnorm")),
        Option("trainable_rbf", "bool", False, "Train the centres and widths of the radial basis."),
        Option("neighbor_embedding", "bool", False,
               "Mix the elements of the neighbours into the first features. graph-network, transformer, "
               "equivariant-transformer."),
        Option("aggr", "text", "add",
               "How messages are gathered. The established mean and max count an extra zero, average and maximum do "
               "not. graph-network.", choices=("add", "mean", "max", "average", "maximum")),
        Option("distance_influence", "text", "both",
               "Where the distance enters the attention. transformer, equivariant-transformer.",
               choices=("keys", "values", "both", "none")),
        Option("attn_activation", "text", "silu",
               "Activation inside the attention. transformer, equivariant-transformer.", choices=_ACTIVATIONS),
        Option("num_heads", "int", 8, "Attention heads. transformer, equivariant-transformer.", ge=1),
        Option("vector_cutoff", "bool", False,
               "Let vector messages vanish at the cutoff, which makes the energy continuous there. "
               "equivariant-transformer."),
        Option("equivariance_invariance_group", "text", "O(3)",
               "Symmetry group. tensornet, tensornet2.", choices=("O(3)", "SO(3)")),
        Option("q_dim", "int", 0, "Charge channels. tensornet2.", ge=0, established=False, read_by="model head"),
        Option("q_weights", "weights", [],
               "Weight of each layer's charges in the Coulomb head: num_layers + 1 entries.", established=False,
               read_by="model head"),
        Option("coulomb_cutoff", "float", None,
               "Cutoff of the Coulomb head in Å, with a reaction field. None takes all pairs and no box.",
               ge=NARROWEST, established=False, read_by="model head"),
        Option("coulomb_epsilon_solvent", "float", 78.3,
               "Relative permittivity beyond coulomb_cutoff.", ge=1, established=False, read_by="model head"),
        Option("coulomb_max_num_neighbors", "int", None,
               "Neighbours to expect within coulomb_cutoff.", ge=1, established=False, read_by="model head"),
        Option("coulomb_neighbor_strategy", "text", "brute",
               "Neighbour search of the Coulomb head.", choices=("brute", "cell", "shared"), established=False,
               read_by="model head"),
        Option("repulsion", "bool", False,
               "Add a screened nuclear repulsion inside the model. tensornet2.", established=False),
        Option("box_vecs", "box", None,
               "Fixed periodic box in Å, one lattice vector a row; a row of zeros is an open direction.",
               fixed=True, free=True),
        Option("static_shapes", "bool", False, "Arrays of fixed shape, for CUDA graphs. tensornet, tensornet2.",
               read_by="head", fixed=True, free=True),
        Option("radial", "text", "auto",
               "How radial filters are evaluated: pair by pair (exact), or on a grid of distances that reproduces them "
               "(grid). auto takes the grid where it is accurate and pays.",
               choices=("auto", "exact", "grid"), established=False, read_by="model", free=True, transient=True),
        Option("derivative", "bool", False, "Predict forces, the negative gradient of y.",
               read_by="model training"),
        Option("cutoff_lower", "float", 0.0, "Neighbours nearer than this are not seen, in Å.", ge=0),
        Option("cutoff_upper", "float", 5.0, "Neighbours farther than this are not seen, in Å.", ge=NARROWEST),
        Option("atom_filter", "int", -1,
               "Only atoms with an atomic number above this count. Not with derivative.", ge=-1, read_by="model"),
        Option("max_z", "int", 100, "Atomic numbers must be smaller than this.", ge=1),
        Option("max_num_neighbors", "int", 32, "Neighbours to expect per atom.", ge=1, free=True),
        Option("reduce_op", "text", "add",
               "How atoms make up the system's value. The established mean divides by one atom more; average does not.",
               choices=("add", "mean", "average"), read_by="model head"),
    ),
    "Experiment trackers": (
        Option("wandb_use", "bool", False, "Log to Weights & Biases."),
        Option("wandb_name", "text", "training", "Name of the run there."),
        Option("wandb_project", "text", "training_", "Project there."),
        Option("wandb_resume_from_id", "text", None, "Continue the run with this id there."),
        Option("tensorboard_use", "bool", False, "Write TensorBoard event files."),
    ),
}
# fmt: on

#: Every option by its key, in the order in which they are shown.
OPTIONS: Mapping[str, Option] = {
    option.key: dataclasses.replace(option, group=group, le=LARGEST.get(option.key, option.le))
    for group, options in _GROUPS.items()
    for option in options
}

#: Keys of earlier releases that are now spelt differently.
RENAMED: dict[str, str] = {
    "energy_weight": "y_weight",
    "force_weight": "neg_dy_weight",
    "ema_alpha_dy": "ema_alpha_neg_dy",
}

#: Keys of earlier releases that no longer do anything, each with the reason.
RETIRED: dict[str, str] = {
    "check_errors": "errors are always checked",
    "accelerator": "the device is found by itself",
    "distributed_backend": "several processes are set up by themselves",
    "num_processes": "use ngpus",
    "progress": "progress is shown when there is a terminal",
    "job_id": "use log_dir",
}

#: Words people try first, and the option that they mean.
SYNONYMS: dict[str, str] = {
    "learning_rate": "lr",
    "epochs": "num_epochs",
    "max_epochs": "num_epochs",
    "cutoff": "cutoff_upper",
    "r_max": "cutoff_upper",
    "hidden_channels": "embedding_dimension",
    "channels": "embedding_dimension",
    "gpus": "ngpus",
    "devices": "ngpus",
    "config": "conf",
    "forces": "derivative",
    "loss": "train_loss",
    "output_dir": "log_dir",
    "optimizer_lr": "lr",
    "scheduler": "lr_schedule",
    "lr_scheduler": "lr_schedule",
    "ema": "model_ema_decay",
    "ema_decay": "model_ema_decay",
    "use_ema": "model_ema_decay",
    "time_limit": "max_time",
    "patience": "early_stopping_patience",
    "prior": "prior_model",
    "root": "dataset_root",
}


def keys_read_by(reader: Reader) -> frozenset[str]:
    """The options that a part of the package reads."""
    return frozenset(key for key, option in OPTIONS.items() if reader in option.read_by.split())


def defaults_of(reader: Reader, *, established: bool = False) -> dict[str, Any]:
    """The defaults of the options that a part of the package reads.

    Args:
        reader: The part.
        established: Leave out the options that release 3 does not have.
    """
    keys = keys_read_by(reader)
    options = [option for key, option in OPTIONS.items() if key in keys and (option.established or not established)]
    return {option.key: copy.copy(option.default) for option in options}


def value_of(options: Mapping[str, Any], key: str) -> Any:
    """An option in a configuration; its default where the configuration lacks it, or None is no value of it."""
    value, option = options.get(key), OPTIONS[key]
    return copy.copy(option.default) if value is None and (key not in options or not option.takes_none) else value


def has_fixed_default(key: str) -> bool:
    """Whether a configuration without the key means the default of the option table.

    Otherwise the constructor of the architecture decides. Files leave out the options that release 3 does not have
    where they are at their default, so for these the table decides, always.
    """
    option = OPTIONS.get(key)
    return option is not None and (option.fixed or not option.established)
