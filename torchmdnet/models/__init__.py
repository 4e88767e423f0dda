"""Architectures: networks that turn a graph of atoms into features of atoms."""

from torchmdnet.catalogue import Catalogue

ARCHITECTURES = Catalogue(
    "model",
    {
        "graph-network": "torchmdnet.models.torchmd_gn:TorchMD_GN",
        "transformer": "torchmdnet.models.torchmd_t:TorchMD_T",
        "equivariant-transformer": "torchmdnet.models.torchmd_et:TorchMD_ET",
        "tensornet": "torchmdnet.models.tensornet:TensorNet",
        "tensornet2": "torchmdnet.models.tensornet2:TensorNet2",
    },
    base="torch.nn:Module",
    needs=("forward", "reset_parameters"),
)

__all_models__ = list(ARCHITECTURES)

__all__ = ["ARCHITECTURES", "__all_models__"]
