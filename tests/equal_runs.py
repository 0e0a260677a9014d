"What two runs must share to be called equal, for the tests that stop, damage or repeat one."

from pathlib import Path

import torch


def content(run) -> dict:
    "A record without what differs between two equal runs: times, memory, date and commit."
    record = run.to_dict()
    for key in ("date", "commit"):
        record["environment"].pop(key, None)
    for key in ("seconds", "peak_memory"):
        del record[key]
    del record["metrics"]["minutes"]
    return record


def same_weights(one, other) -> bool:
    "Whether two models agree in every number."
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def files(folder) -> dict[Path, bytes]:
    "Every file of a folder, with its content."
    return {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def entries(layer, update) -> dict[str, torch.Tensor]:
    "The tensors of one layer's sparse update, as an archive names them."
    return {f"{layer}.indices": update.indices, f"{layer}.values": update.values}
