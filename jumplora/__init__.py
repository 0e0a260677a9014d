"""Sparse low-rank adapters (JumpReLU-gated LoRA) and continual learning of language models with them.

Names are loaded when they are first used: `import jumplora` itself imports neither torch nor transformers.
A function whose module has the same name is imported from its module:
`from jumplora.jumprelu import jumprelu` and `from jumplora.gated_linear import gated_linear`.
"""

__version__ = "0.1.0"

_MODULES = {
    "conventions": "METHOD_COLORS figure_style set_seed",
    "jumprelu": "Threshold threshold_gradient two_sided_jumprelu",
    "gated_linear": "gated_update naive_gated_linear",
    "adapter": "JumpLoraConfig JumpLoraLinear JumpLoraModel adapter_layers delta_weights gate_groups",
    "schedule": "SparsityCallback SparsitySchedule initial_threshold interpolation_factor",
    "regularizers": "ELLA IncLoRA Regularizer Update",
    "penalties": "EWC NLoRA OLoRA",
    "processes": "join_processes on_main split_batch",
    "prompts": "Example Task TaskSequence prompt",
    "tasks": "ORDERS",
    "hub_rows": "hub_table hub_task",
    "paper_rows": "check_folder load_sequence paper_split",
    "backbones": "load_backbone",
    "metrics": "average_accuracy backward_transfer forgetting forward_transfer just_learned",
    "run_record": "DamagedRecord Run",
    "training": "TrainConfig train_task",
    "evaluation": "evaluate",
    "sparse_updates": "SparseUpdate sparse_update",
    "tracking": "Tracking find_trackers",
    "continual": "Method learn_sequence load_learned",
    "methods": "METHODS",
    "sparsity": "overlap_report support_overlap",
    "archives": "load_without rollback",
    "formats": "save_sparse_adapter",
    "export": "export_run push_to_hub",
    "grid": "plan run_grid status",
    "records": "accuracy_figure comparison_table first_task_figure load_runs reported_results",
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str):
    "Import the module that defines `name`, and keep the value for the next time."
    if name not in _NAMES:
        from difflib import get_close_matches

        near = "".join(f"; did you mean {n!r}?" for n in get_close_matches(name, _NAMES, 1))
        raise AttributeError(f"module 'jumplora' has no attribute {name!r}{near}")
    from importlib import import_module

    value = getattr(import_module(f"jumplora.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_NAMES})
