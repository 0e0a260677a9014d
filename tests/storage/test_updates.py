"""Archived updates: every bit accounted for, and nothing believed unchecked."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from equal_runs import entries, files
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import learn_sequence, merge_adapter, weights_of
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig, attach_adapter
from jumplora.method.adapter import adapter_layers
from jumplora.storage.record import Damaged, Run, tensors_checksum, write_tensors
from jumplora.storage.updates import (
    ArchiveHeader,
    SparseUpdate,
    archive_path,
    archive_task,
    neutral_zeros,
    read_archive,
    sparse_update,
)

BALL = [("a ball", "sport"), ("an atom", "physics")] * 4
RAIN = [("rain", "yes"), ("sun", "no")] * 4
TASKS = [
    Task("topics", "Topic?\n", ("sport", "physics"), BALL, [], BALL[:2]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, [], RAIN[:2]),
]
QUICK = TrainConfig(batch_size=8, epochs=5, learning_rate=1e-2, max_length=120, kept=0.05)
INT = torch.int32


def same_bits(one, other):
    "Whether float32 tensors agree in every bit, the sign of zero included."
    return torch.equal(one.view(INT), other.view(INT))


# ---- one layer --------------------------------------------------------------------------------------------

ENTRIES = st.sampled_from([0.0, -0.0]) | st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.integers(1, 5).map(lambda columns: st.lists(ENTRIES, min_size=columns, max_size=columns))


@settings(max_examples=40, deadline=None)
@given(ROWS.flatmap(lambda row: st.lists(row, min_size=1)), st.sampled_from([0.0, -0.0, 1.5, -1e-40]))
def test_a_sparse_update_is_the_matrix_again_and_leaves_other_entries_bit_for_bit(rows, weight):
    matrix = torch.tensor(rows, dtype=torch.float32)
    update = sparse_update(matrix)
    assert torch.equal(update.dense(), matrix) and update.shape == tuple(matrix.shape)
    assert update.indices.dtype == INT and update.values.dtype == torch.float32
    assert np.array_equal(update.indices.numpy(), np.flatnonzero(matrix.numpy()))
    weights, outside = torch.full_like(matrix, weight), matrix == 0
    after = weights + neutral_zeros(matrix)
    assert same_bits(after[outside], weights[outside])
    assert torch.equal(after[~outside], (weights + matrix)[~outside])


def test_what_is_no_matrix_or_too_large_is_refused_and_gradients_stay_out():
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(1, 1).expand(2**16, 2**15)):
        with pytest.raises(ValueError, match=r"no matrix of 1 to 2\*\*31 - 1 entries"):
            sparse_update(bad)
    assert not sparse_update(torch.ones(2, 2, requires_grad=True)).values.requires_grad


# ---- the file ---------------------------------------------------------------------------------------------


def write(path, tensors, layers, values="float32"):
    "An archive by hand; its header and its checksum."
    about = dict(task="topics", position=0, method="by hand", model="none", base="b", before="w", update="u")
    header = ArchiveHeader(**about, layers=layers, sparsity=0.5, values=values)
    return header, write_tensors(path, tensors, asdict(header))


def random_update(rows=16, columns=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < 0.3
    return sparse_update(torch.randn(rows, columns, generator=generator) * kept)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path, update = tmp_path_factory.mktemp("archive") / "good.safetensors", random_update()
    write(path, entries("layer", update), {"layer": [16, 12]})
    return path


def test_an_archive_keeps_its_header_and_its_tensors(archive, tmp_path):
    update = random_update()
    tensors = dict(reversed(entries("layer", update).items()))
    header, checksum = write(tmp_path / "same", tensors, {"layer": [16, 12]})
    found = read_archive(archive, checksum)
    assert found.header == header and torch.equal(found.update("layer").dense(), update.dense())
    assert (tmp_path / "same").read_bytes() == archive.read_bytes()
    write(tmp_path / "empty", entries("layer", sparse_update(torch.zeros(2, 3))), {"layer": [2, 3]})
    empty = read_archive(tmp_path / "empty")
    assert not empty.update("layer").dense().any()


def flipped(place):
    return lambda good: good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: good[:-9],
        lambda good: b"",
        lambda good: b"no safetensors at all",
        lambda good: save({"layer.indices": torch.zeros(1)}, {"format": "pt"}),  # of another program
        *map(flipped, [0, 9, 20, 60, 200, 400, -1, -9, -200]),
    ],
)
def test_a_file_that_is_no_whole_archive_is_refused(archive, damage, tmp_path):
    path = tmp_path / "bad.safetensors"
    for place in (path, tmp_path):  # one that is not there, and a folder
        with pytest.raises(Damaged, match="It is not used"):
            read_archive(place)
    path.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(Damaged, match=r"bad\.safetensors .*It is not used"):
        read_archive(path)


def test_a_whole_archive_that_is_not_the_recorded_one_is_refused(archive):
    with pytest.raises(Damaged, match="not the file that the record names"):
        read_archive(archive, "0" * 64)


ONES, NANS, INFINITE = torch.ones(2), torch.full((2,), torch.nan), torch.ones(2) / 0
LAYER, SCALE = {"layer": [2, 3]}, torch.tensor(1.0)
UNLIKE, ODD = "header does not describe its tensors", "positions or values that no update has"


def sparse(indices=(1, 3), values=ONES, dtype=INT):
    return entries("layer", SparseUpdate(torch.tensor(indices, dtype=dtype), values, (2, 3)))


def factors(A, B):
    return {"layer.A": A, "layer.B": B, "layer.scaling": SCALE}


@pytest.mark.parametrize(
    "tensors, layers, values, message",
    [
        (sparse((-1, 3)), LAYER, "float32", ODD),
        (sparse((3, 1)), LAYER, "float32", ODD),
        (sparse((1, 1)), LAYER, "float32", ODD),
        (sparse((1, 6)), LAYER, "float32", ODD),
        (sparse(dtype=torch.int64), LAYER, "float32", ODD),
        (sparse(values=torch.ones(3)), LAYER, "float32", ODD),
        (sparse(values=INFINITE), LAYER, "float32", ODD),
        (sparse(values=NANS), LAYER, "float32", ODD),
        (sparse([[1, 3]], torch.ones(1, 2)), LAYER, "float32", ODD),
        (sparse((1, 4)), {"layer": [2, 2]}, "float32", ODD),
        (sparse(), {"other": [2, 3]}, "float32", UNLIKE),
        (sparse(), {"layer": [2]}, "float32", UNLIKE),
        (sparse(), LAYER, "factors", UNLIKE),
        (factors(torch.ones(1, 3), torch.ones(3, 1)), LAYER, "factors", ODD),
        (factors(torch.ones(1, 3) / 0, torch.ones(2, 1)), LAYER, "factors", ODD),
    ],
)
def test_an_archive_with_impossible_entries_or_another_header_is_refused(
    tensors, layers, values, message, tmp_path
):
    write(tmp_path / "odd", tensors, layers, values)
    with pytest.raises(Damaged, match=f"odd .*{message}"):
        read_archive(tmp_path / "odd")


def test_a_task_whose_name_leaves_the_folder_is_refused():
    with pytest.raises(ValueError, match="cannot be part of a file name"):
        archive_path(Path("runs"), 0, "../other")


# ---- the update of a task ---------------------------------------------------------------------------------


def test_an_archive_gives_the_merged_weights_and_those_before_in_every_bit(tmp_path):
    model, _ = load_backbone("tiny-llama", device="cpu", dtype="float32")
    for name in ("q_proj", "v_proj"):
        model.get_submodule(f"model.layers.0.self_attn.{name}").weight.data[:, ::2] = -0.0
    model = attach_adapter(model, QUICK, gated=True)
    torch.manual_seed(0)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
        layer.lora_gate["default"].set_threshold(0.006)
        layer.lora_gate["default"].interpolation.fill_(1.0)
    place = tmp_path / "secret" / "my-model"
    place.mkdir(parents=True)
    run = Run("by hand", str(place), "short", 1, ["topics"], [2], {"weights": "b"})
    weights = weights_of(model)
    before = {name: weight.clone() for name, weight in weights.items()}
    archive_task(tmp_path, run, 0, model, weights)
    merge_adapter(model, weights)
    path, written = archive_path(tmp_path, 0, "topics"), run.extra["archives"]["topics"]
    archive = read_archive(path, written["checksum"])
    about = archive.header
    assert 0.5 < about.sparsity < 1 and archive.exact and about.before == tensors_checksum(before)
    assert (about.task, about.position, about.method, about.base) == ("topics", 0, "by hand", "b")
    assert about.model == "my-model" and b"secret" not in path.read_bytes()  # no path of this machine
    count = sum(len(archive.update(name).indices) for name in weights)
    assert written["bytes"] == path.stat().st_size and 0 < written["bytes"] - 8 * count < 4000
    for name, weight in weights.items():
        assert same_bits(before[name] + neutral_zeros(archive.update(name).dense()), weight)
        assert (weight == 0).sum() > 100 or "layers.1" in name  # untouched zeros
    values = archive.tensors[f"{next(iter(about.layers))}.values"]
    values[3] = torch.nextafter(values[3], torch.tensor(9.0))
    assert not archive.exact


def learn(out, method="IncLoRA + JumpLoRA", backbone="tiny-llama", **options):
    model, tokenizer = load_backbone(backbone, device="cpu", dtype="float32")
    options = dict(seed=1, out=out, backbone=backbone, progress=False, zero_shot=False) | options
    run = learn_sequence(model, tokenizer, TaskSequence("short", TASKS), METHODS[method], QUICK, **options)
    return run, Path(out) / run.name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("backbone", ["tiny-llama", "tiny-t5"])
def test_the_record_counts_the_entries_that_tasks_touch_and_share(backbone, whole, tmp_path):
    run, folder = whole if backbone == "tiny-llama" else learn(tmp_path, backbone=backbone)
    found = [read_archive(archive_path(folder, i, task)) for i, task in enumerate(run.tasks)]
    support = run.extra["support"]
    masks = [{layer: a.update(layer).dense() != 0 for layer in a.header.layers} for a in found]
    touched = [np.concatenate([part.flatten().numpy() for part in mask.values()]) for mask in masks]
    assert sum(support["entries"].values()) == touched[0].size
    for i in range(len(found)):
        assert support["shared"][i] == [int((touched[i] & touched[j]).sum()) for j in range(i + 1)]
        assert support["touched"][i] == np.any(touched[: i + 1], axis=0).sum()
        assert found[i].header.sparsity == pytest.approx(1 - touched[i].mean())
    for layer, counts in support["counts"].items():
        assert counts == [int(mask[layer].sum()) for mask in masks]
    json.dumps(support)


def test_an_update_without_a_gate_is_kept_as_factors(tmp_path, whole):
    run, folder = learn(tmp_path, "IncLoRA")
    found = read_archive(archive_path(folder, 0, "topics"))
    assert found.header.values == "factors" and found.exact and "support" not in run.extra
    size = sum(written["bytes"] for written in run.extra["archives"].values())
    assert size < 2 * 4 * sum(rows * columns for rows, columns in found.header.layers.values()) / 2


def test_archives_can_be_left_out(tmp_path):
    run, folder = learn(tmp_path, archive=False)
    assert not (folder / "updates").exists() and not {"archives", "support"} & run.extra.keys()


class Crash(Exception):
    "Stands for a lost machine."


@pytest.mark.parametrize("lost", ["nothing", "archive", "counts"])
def test_a_resumed_run_has_the_same_archives_and_counts(lost, whole, tmp_path, monkeypatch):
    def crash(run, folder, tasks, parts, real=continual.state.write_finished):
        if tasks == 2:  # the archive of the second task is written, its record is not
            raise Crash
        return real(run, folder, tasks, parts)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(continual.state, "write_finished", crash)
        learn(tmp_path)
    (folder,) = tmp_path.iterdir()
    if lost == "archive":
        archive_path(folder, 0, "topics").unlink()
        with pytest.warns(UserWarning, match="no longer counted.*01-topics"):
            run, _ = learn(tmp_path)
    else:
        if lost == "counts":  # an old record
            run = Run.load(folder)
            del run.extra["support"]["counts"]
            run.save(tmp_path)
        run, _ = learn(tmp_path)
    if lost == "nothing":
        assert run.extra == whole[0].extra and files(folder / "updates") == files(whole[1] / "updates")
    else:
        assert run.extra["support"] is None and run.extra["archives"] == whole[0].extra["archives"]
