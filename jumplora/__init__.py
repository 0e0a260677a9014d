"""Sparse low-rank adapters (JumpReLU-gated LoRA) and continual learning of language models with them.

Names are loaded when they are first used: `import jumplora` itself imports neither torch nor transformers.
"""

__version__ = "0.1.0"

_MODULES = {
    "conventions": "METHOD_COLORS figure_style set_seed",
    "method.jumprelu": "Gate threshold_gradient two_sided_jumprelu",
    "method.gated_linear": "gated_update naive_gated_linear",
    "method.adapter": "JumpLoraConfig JumpLoraLinear JumpLoraModel adapter_layers delta_weights gate_groups",
    "method.schedule": "SparsityCallback SparsitySchedule initial_threshold interpolation_factor",
    "method.regularizers": "ELLA IncLoRA NLoRA OLoRA Regularizer Update",
    "running.processes": "join_processes on_main split_batch",
    "learning.tasks": "Example Task TaskSequence prompt",
    "data.benchmark": "ORDERS check_folder hub_table hub_task paper_split",
    "data.sequences": "load_sequence",
    "data.backbones": "load_backbone",
    "storage.record": "Damaged Run",
    "learning.training": "TrainConfig train_task",
    "learning.evaluation": "evaluate average_accuracy backward_transfer forgetting forward_transfer "
    "just_learned",
    "storage.state": "load_learned",
    "storage.updates": "SparseUpdate sparse_update",
    "running.tracking": "Tracking find_trackers",
    "learning.continual": "Method learn_sequence",
    "learning.methods": "EWC METHODS",
    "results.sparsity": "overlap_report support_overlap",
    "storage.rollback": "load_without rollback",
    "storage.export": "export_run push_to_hub save_sparse_adapter",
    "running.grid": "plan run_grid status",
    "results.run_tables": "accuracy_figure comparison_table first_task_figure load_runs reported_results",
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
