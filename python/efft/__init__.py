"""Adapt a frozen model, such as a vision transformer, by training a tensor train that its layers share.

The method EFFT is described in arXiv 2311.06749. Using it takes two calls::

    efft.apply(model, efft.EfftConfig(rank=32))  # changes the model in place; then train it as usual
    efft.save_adapter(model, "out/")

The configurations in :mod:`efft.methods` select other methods, such as LoRA.
"""

from efft.adapting.inject import (
    adapted_layers,
    apply,
    disabled,
    freeze_backbone,
    named_factors,
    remove,
)
from efft.adapting.optimizing import parameter_groups
from efft.fusion import fuse, unfuse
from efft.graphs.serve import GraphServer, graph_serve
from efft.graphs.step import GraphStep, graph_step
from efft.integrations.fact_import import import_fact
from efft.integrations.lora_export import export_lora
from efft.integrations.lora_import import import_lora
from efft.merge import MergeReport, merge, merged_state_dict, unmerge
from efft.methods.efft import EfftConfig
from efft.params import ParameterCount, count_parameters, print_trainable_parameters
from efft.planning.plan import Plan, inspect
from efft.pool import AdapterPool, SharedBackbone
from efft.presets import paper_config
from efft.prune import PruneReport, prune
from efft.saving.hub import from_pretrained, push_to_hub
from efft.saving.io import load_adapter, save_adapter
from efft_kernels import __version__

__all__ = [
    "AdapterPool",
    "EfftConfig",
    "GraphServer",
    "GraphStep",
    "MergeReport",
    "ParameterCount",
    "Plan",
    "PruneReport",
    "SharedBackbone",
    "__version__",
    "adapted_layers",
    "apply",
    "count_parameters",
    "disabled",
    "export_lora",
    "freeze_backbone",
    "from_pretrained",
    "fuse",
    "graph_serve",
    "graph_step",
    "import_fact",
    "import_lora",
    "inspect",
    "load_adapter",
    "merge",
    "merged_state_dict",
    "named_factors",
    "paper_config",
    "parameter_groups",
    "print_trainable_parameters",
    "prune",
    "push_to_hub",
    "remove",
    "save_adapter",
    "unfuse",
    "unmerge",
]
