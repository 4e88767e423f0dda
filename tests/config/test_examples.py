"""The configurations in ``examples/``, against the tables of the configurations they stand for."""

from __future__ import annotations

import pytest
from conftest import REPOSITORY

from torchmdnet.config import OPTIONS, resolve

EXAMPLES = REPOSITORY / "examples"

ET = """
dataset               | ANI1      | MD17      | QM9       | SPICE
dataset_root          | ~/data    | ~/data    | ~/data    | data
embedding_dimension   | 128       | 128       | 256       | 128
num_layers            | 6         | 6         | 8         | 5
num_rbf               | 32        | 32        | 64        | 64
cutoff_upper          | 5.0       | 5.0       | 5.0       | 10.0
max_num_neighbors     | 64        | 32        | 64        | 128
max_z                 | 100       | 100       | 100       | 100
derivative            | False     | True      | False     | True
prior_model           | Atomref   | None      | Atomref   | None
standardize           | False     | True      | False     | False
y_weight              | 1.0       | 0.2       | 1.0       | 0.5
neg_dy_weight         | 1.0       | 0.8       | 1.0       | 0.5
ema_alpha_y           | 1.0       | 0.05      | 1.0       | 1.0
batch_size            | 2048      | 8         | 128       | 16
inference_batch_size  | 2048      | 64        | 128       | 16
lr                    | 0.0007    | 0.001     | 0.0004    | 0.0001
lr_factor             | 0.5       | 0.8       | 0.8       | 0.5
lr_min                | 1e-07     | 1e-07     | 1e-07     | 1e-07
lr_patience           | 5         | 30        | 15        | 5
lr_warmup_steps       | 10000     | 1000      | 10000     | 1000
early_stopping_patience | 500     | 300       | 150       | 50
num_epochs            | 3000      | 3000      | 3000      | 500
train_size            | 0.8       | 950       | 110000    | 0.8
val_size              | 0.05      | 50        | 10000     | 0.1
test_size             | None      | None      | None      | None
test_interval         | 10        | 10        | 10        | 10
num_workers           | 6         | 6         | 6         | 4
ngpus                 | -1        | -1        | -1        | -1
dataset_arg           | None      | {'molecules': 'aspirin'} | {'label': 'energy_U0'} | {'version': '1.1.4'}
"""

TENSORNET = """
dataset               | ANI1X  | ANI2X  | MACEOFF | QM9     | SPICE  | MD17
embedding_dimension   | 128    | 128    | 128     | 256     | 128    | 128
num_layers            | 2      | 2      | 2       | 3       | 2      | 2
num_rbf               | 32     | 32     | 64      | 32      | 64     | 32
cutoff_upper          | 4.5    | 5.0    | 10.0    | 5.0     | 10.0   | 4.5
max_num_neighbors     | 128    | 128    | 128     | 64      | 128    | 32
max_z                 | 128    | 128    | 128     | 128     | 128    | 100
derivative            | True   | True   | True    | False   | True   | True
prior_model           | None   | None   | None    | Atomref | None   | None
standardize           | False  | False  | False   | False   | False  | True
remove_ref_energy     | False  | True   | False   | False   | False  | False
y_weight              | 1.0    | 1.0    | 1.0     | 1.0     | 1.0    | 0.5
neg_dy_weight         | 100.0  | 100.0  | 10.0    | 0.0     | 10.0   | 0.5
ema_alpha_y           | 1.0    | 1.0    | 1.0     | 1.0     | 1.0    | 0.01
gradient_clipping     | 100.0  | 100.0  | 100.0   | 40.0    | 100.0  | 40.0
batch_size            | 64     | 64     | 16      | 16      | 16     | 8
inference_batch_size  | 64     | 64     | 16      | 128     | 16     | 64
lr                    | 0.0001 | 0.001  | 0.0001  | 0.0001  | 0.0001 | 0.001
lr_factor             | 0.5    | 0.5    | 0.5     | 0.8     | 0.5    | 0.8
lr_min                | 1e-07  | 1e-07  | 1e-08   | 1e-07   | 1e-08  | 1e-08
lr_patience           | 4      | 4      | 5       | 15      | 5      | 25
lr_warmup_steps       | 1000   | 1000   | 500     | 1000    | 500    | 500
early_stopping_patience | 30   | 50     | 50      | 150     | 50     | 300
num_epochs            | 500    | 500    | 500     | 3000    | 500    | 10000
train_size            | 0.8    | 0.9    | 0.8     | 110000  | 0.8    | 950
val_size              | 0.1    | 0.1    | 0.1     | 10000   | 0.1    | 50
test_size             | None   | 0      | None    | None    | None   | None
test_interval         | 10     | -1     | 10      | 20      | 10     | 30
num_workers           | 4      | 4      | 4       | 6       | 4      | 6
ngpus                 | -1     | -1     | -1      | -1      | -1     | 1
seed                  | 1      | 1      | 1       | 1       | 1      | 12345
"""

COMMON = {
    "activation": "silu", "aggr": "add", "atom_filter": -1, "charge": False, "spin": False, "cutoff_lower": 0.0,
    "ema_alpha_neg_dy": 1.0, "output_model": "Scalar", "precision": 32, "rbf_type": "expnorm", "trainable_rbf": False,
    "reduce_op": "add", "weight_decay": 0.0, "save_interval": 10, "num_nodes": 1, "redirect": False, "log_dir": "logs",
    "coord_files": None, "embed_files": None, "energy_files": None, "force_files": None, "load_model": None,
    "splits": None, "box_vecs": None, "static_shapes": False,
}  # fmt: skip
OF_ET = {"model": "equivariant-transformer", "neighbor_embedding": True, "distance_influence": "both",
         "attn_activation": "silu", "vector_cutoff": True, "num_heads": 8}  # fmt: skip
OF_TENSORNET = {"model": "tensornet", "equivariance_invariance_group": "O(3)", "distance_influence": "both",
                "dataset_root": "~/data"}  # fmt: skip


def columns(table, names, shared):
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return {name: {row[0]: row[i + 1] for row in rows} | {k: str(v) for k, v in (COMMON | shared).items()}
            for i, name in enumerate(names)}  # fmt: skip


EXPECTED = columns(ET, ["ET-ANI1", "ET-MD17", "ET-QM9", "ET-SPICE"], OF_ET) | columns(
    TENSORNET,
    ["TensorNet-ANI1X", "TensorNet-ANI2X", "TensorNet-MACEOFF", "TensorNet-QM9", "TensorNet-SPICE", "TensorNet-rMD17"],
    OF_TENSORNET,
)
EXPECTED["TensorNet-MACEOFF"]["dataset_arg"] = "{'max_gradient': 50.94}"
EXPECTED["TensorNet-SPICE"]["dataset_arg"] = "{'version': '1.1.4', 'max_gradient': 50.94}"
EXPECTED["TensorNet-rMD17"]["dataset_arg"] = "{'molecules': 'revised_aspirin'}"


@pytest.mark.parametrize("name", EXPECTED)
def test_examples_say_what_their_tables_say(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = vars(resolve(["--conf", str(EXAMPLES / f"{name}.yaml")]))
    assert {key: str(args[key]) for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_resolves_without_a_warning(path, caplog, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = resolve(["--conf", str(path)])
    assert vars(args).keys() == OPTIONS.keys()
    assert [record for record in caplog.records if record.levelname != "INFO"] == []
