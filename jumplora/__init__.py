"""Sparse low-rank adapters (JumpReLU-gated LoRA) and continual learning of language models with them.

Names are loaded when they are first used: `import jumplora` itself imports neither torch nor transformers.
"""

__version__ = "0.2.0"

_MODULES = {
    "conventions": "set_seed",
    "method.adapter": "JumpLoraConfig delta_weights",
    "method.schedule": "SparsityCallback SparsitySchedule",
    "method.regularizers": "ELLA IncLoRA NLoRA OLoRA Regularizer Update",
    "learning.tasks": "Task TaskSequence",
    "data.sequences": "load_sequence",
    "data.backbones": "load_backbone",
    "storage.record": "Run",
    "learning.training": "TrainConfig train_task",
    "learning.evaluation": "evaluate",
    "storage.state": "load_learned",
    "learning.continual": "Method learn_sequence",
    "learning.methods": "EWC METHODS",
    "storage.rollback": "rollback",
    "storage.export": "export_run",
    "running.grid": "run_grid",
    "results.run_tables": "load_runs paired_table summary_table",
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
