"""Archived updates: every bit accounted for, and nothing believed unchecked."""

import json
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from equal_runs import entries, files
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import learn_sequence, merge_adapter, weights_of
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig, attach_adapter
from jumplora.method.adapter import adapter_layers
from jumplora.storage.record import Damaged, Run, tensors_checksum
from jumplora.storage.updates import (
    ArchiveHeader,
    SparseUpdate,
    archive_path,
    archive_task,
    neutral_zeros,
    read_archive,
    sparse_update,
    write_archive,
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

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = st.integers(1, 5).flatmap(
    lambda columns: st.lists(
        st.lists(st.one_of(st.just(0.0), st.just(-0.0), FLOATS), min_size=columns, max_size=columns),
        min_size=1,
    )
)


@settings(max_examples=40, deadline=None)
@given(MATRICES, st.sampled_from([0.0, -0.0, 1.5, -1e-40]))
def test_a_sparse_update_is_the_matrix_again_and_leaves_other_entries_bit_for_bit(rows, weight):
    matrix = torch.tensor(rows, dtype=torch.float32)
    update = sparse_update(matrix)
    assert torch.equal(update.dense(), matrix) and update.shape == tuple(matrix.shape)
    assert update.indices.dtype == INT and update.values.dtype == torch.float32
    assert np.array_equal(update.indices.numpy(), np.flatnonzero(matrix.numpy()))
    assert update.density == np.count_nonzero(matrix) / matrix.numel()
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


def header(layers, **changes):
    about = dict(task="topics", position=0, method="by hand", model="none", base="b", before="w", update="u")
    return ArchiveHeader(**about | dict(layers=layers, sparsity=0.5, values="float32") | changes)


def random_update(rows=64, columns=48, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    return sparse_update(torch.randn(rows, columns, generator=generator) * kept)


@pytest.mark.parametrize("density", [0.0, 0.3])
@pytest.mark.parametrize("overwritten", [False, True])
def test_an_archive_takes_8_or_12_bytes_per_entry_and_the_same_update_the_same_bytes(
    tmp_path, overwritten, density
):
    updates = {f"layer {i}": random_update(density=density, seed=i) for i in range(3)}
    tensors = {}
    for name, update in updates.items():
        tensors |= entries(name, update, update.values + 1 if overwritten else None)
    about = header({name: [64, 48] for name in updates})
    path = tmp_path / "one.safetensors"
    written = write_archive(path, about, tensors)
    count = sum(len(update.indices) for update in updates.values())
    assert written["bytes"] == path.stat().st_size
    assert 0 < written["bytes"] - (12 if overwritten else 8) * count < 2000
    found = read_archive(path, written["checksum"])
    assert found.header == about
    for name, update in updates.items():
        assert torch.equal(found.update(name).dense(), update.dense())
        assert (found.overwritten(name) is not None) == overwritten
    write_archive(tmp_path / "two", about, dict(reversed(tensors.items())))
    assert (tmp_path / "two").read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "good.safetensors"
    update = random_update(16, 12)
    write_archive(path, header({"layer": [16, 12]}), entries("layer", update, update.values + 1))
    return path


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_changed_bit_anywhere_is_found(archive, data, tmp_path_factory):
    good = archive.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    bad = tmp_path_factory.getbasetemp() / "bad.safetensors"
    bad.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
    try:
        read_archive(bad)
    except Damaged:
        return
    size = struct.unpack("<Q", good[:8])[0]  # spaces that fill up the header are no content
    assert good[8 : 8 + size].rstrip() != good[8 : 8 + size] and good[place] == ord(" ")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "missing", "folder"])
def test_a_file_that_is_no_whole_archive_is_refused(archive, damage, tmp_path):
    path, good = tmp_path / "bad.safetensors", archive.read_bytes()
    if damage == "foreign":
        save_file({"layer.indices": torch.zeros(1)}, path, metadata={"format": "pt"})
    elif damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(dict(truncated=good[:-9], empty=b"", text=b"no safetensors at all")[damage])
    with pytest.raises(Damaged, match=r"bad\.safetensors .*It is not used"):
        read_archive(path)


def test_a_whole_archive_that_is_not_the_recorded_one_is_refused(archive):
    with pytest.raises(Damaged, match="not the file that the record names"):
        read_archive(archive, "0" * 64)


ONE = torch.tensor([1, 3], dtype=INT)
ONES = torch.ones(1, 3)
SCALE = {"layer.scaling": torch.tensor(1.0)}


@pytest.mark.parametrize(
    "indices, values, old",
    [
        (torch.tensor([-1, 3], dtype=INT), torch.ones(2), None),
        (torch.tensor([3, 1], dtype=INT), torch.ones(2), None),
        (torch.tensor([1, 1], dtype=INT), torch.ones(2), None),
        (torch.tensor([1, 6], dtype=INT), torch.ones(2), None),
        (torch.tensor([1, 3], dtype=torch.int64), torch.ones(2), None),
        (ONE, torch.ones(3), None),
        (ONE, torch.ones(2) / 0, None),
        (ONE, torch.full((2,), torch.nan), None),
        (torch.tensor([[1, 3]], dtype=INT), torch.ones(1, 2), None),
        (ONE, torch.ones(2), torch.ones(3)),
        (ONE, torch.ones(2), torch.full((2,), torch.nan)),
    ],
)
def test_an_archive_with_impossible_entries_is_refused(indices, values, old, tmp_path):
    path = tmp_path / "odd.safetensors"
    update = SparseUpdate(indices, values, (2, 3))
    write_archive(path, header({"layer": [2, 3]}), entries("layer", update, old))
    with pytest.raises(Damaged, match="odd"):
        read_archive(path)


@pytest.mark.parametrize(
    "changes, tensors, message",
    [
        (dict(layers={"other": [2, 3]}), {}, "header does not describe its tensors"),
        (dict(layers={"layer": [2]}), {}, "header does not describe its tensors"),
        (dict(layers={"layer": [2, 2]}), {}, "positions or values that no update has"),
        (dict(values="factors"), {}, "header does not describe its tensors"),
        (dict(values="factors"), {"layer.A": ONES, "layer.B": torch.ones(3, 1)} | SCALE, "no update has"),
        (dict(values="factors"), {"layer.A": ONES / 0, "layer.B": torch.ones(2, 1)} | SCALE, "no update has"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(changes, tensors, message, tmp_path):
    update = SparseUpdate(torch.tensor([1, 4], dtype=INT), torch.ones(2), (2, 3))
    path = tmp_path / "odd.safetensors"
    about = header(**dict(layers={"layer": [2, 3]}) | changes)
    write_archive(path, about, entries("layer", update) | tensors)
    with pytest.raises(Damaged, match=message):
        read_archive(path)


# ---- the update of a task ---------------------------------------------------------------------------------


def gated_by_hand():
    "A model with a gated adapter whose update is neither empty nor dense."
    model, _ = load_backbone("tiny-llama", device="cpu", dtype="float32")
    for name in ("q_proj", "v_proj"):
        model.get_submodule(f"model.layers.0.self_attn.{name}").weight.data[:, ::2] = -0.0
    model = attach_adapter(model, QUICK, gated=True)
    torch.manual_seed(0)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
        layer.lora_gate["default"].set_threshold(0.006)
        layer.lora_gate["default"].interpolation.fill_(1.0)
    return model


def empty_run(backbone="tiny-llama"):
    return Run("by hand", backbone, "short", 1, ["topics"], [2], {"weights": "b"})


def test_a_folder_as_backbone_leaves_no_path_in_an_archive(tmp_path):
    model = gated_by_hand()
    place = tmp_path / "secret" / "my-model"
    place.mkdir(parents=True)
    archive_task(tmp_path, empty_run(str(place)), 0, model, weights_of(model))
    path = archive_path(tmp_path, 0, "topics")
    assert read_archive(path).header.model == "my-model" and b"secret" not in path.read_bytes()


def test_an_archive_gives_the_merged_weights_and_those_before_in_every_bit(tmp_path):
    model, run = gated_by_hand(), empty_run()
    weights = weights_of(model)
    before = {name: weight.clone() for name, weight in weights.items()}
    archive_task(tmp_path, run, 0, model, weights)
    merge_adapter(model, weights)
    archive = read_archive(archive_path(tmp_path, 0, "topics"), run.extra["archives"]["topics"]["checksum"])
    about = archive.header
    assert 0.5 < about.sparsity < 1 and archive.exact and about.before == tensors_checksum(before)
    assert (about.task, about.position, about.method, about.base) == ("topics", 0, "by hand", "b")
    for name, weight in weights.items():
        update, was = archive.update(name), before[name].clone().flatten()
        assert same_bits(before[name] + neutral_zeros(update.dense()), weight)
        assert same_bits(archive.overwritten(name), was[update.indices.long()])
        assert (weight == 0).sum() > 100 or "layers.1" in name  # untouched zeros
    values = archive.tensors[f"{next(iter(about.layers))}.values"]
    values[3] = torch.nextafter(values[3], torch.tensor(9.0))
    assert not archive.exact


def test_a_task_whose_name_leaves_the_folder_is_refused():
    with pytest.raises(ValueError, match="cannot be part of a file name"):
        archive_path(Path("runs"), 0, "../other")


def learn(out, method="IncLoRA + JumpLoRA", backbone="tiny-llama", **options):
    model, tokenizer = load_backbone(backbone, device="cpu", dtype="float32")
    options = dict(seed=1, out=out, backbone=backbone, progress=False, zero_shot=False) | options
    run = learn_sequence(model, tokenizer, TaskSequence("short", TASKS), METHODS[method], QUICK, **options)
    return run, Path(out) / run.name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kind", [dict(), dict(backbone="tiny-t5")], ids=["decoder", "encoder-decoder"])
def test_the_record_counts_the_entries_that_tasks_touch_and_share(kind, tmp_path):
    run, folder = learn(tmp_path, **kind)
    found = [read_archive(archive_path(folder, i, task)) for i, task in enumerate(run.tasks)]
    support = run.extra["support"]
    touched = [
        np.concatenate([(a.update(layer).dense() != 0).flatten().numpy() for layer in a.header.layers])
        for a in found
    ]
    assert sum(support["entries"].values()) == touched[0].size
    for i in range(len(found)):
        assert support["shared"][i] == [int((touched[i] & touched[j]).sum()) for j in range(i + 1)]
        assert support["touched"][i] == np.any(touched[: i + 1], axis=0).sum()
        share = 1 - touched[i].mean()
        assert found[i].header.sparsity == pytest.approx(share)
    for layer, counts in support["counts"].items():
        assert counts == [int((a.update(layer).dense() != 0).sum()) for a in found]
    json.dumps(support)


def test_an_update_without_a_gate_is_kept_as_factors(tmp_path, whole):
    run, folder = learn(tmp_path, "IncLoRA")
    found = read_archive(archive_path(folder, 0, "topics"))
    assert found.header.values == "factors" and found.exact and "support" not in run.extra
    sizes = [sum(a["bytes"] for a in r.extra["archives"].values()) for r in (run, whole[0])]
    assert sizes[0] < 2 * 4 * sum(rows * columns for rows, columns in found.header.layers.values()) / 2


def test_archives_can_be_left_out(tmp_path):
    run, folder = learn(tmp_path, archive=False)
    assert not (folder / "updates").exists() and not {"archives", "support"} & run.extra.keys()


@pytest.mark.parametrize("lost", ["nothing", "archive", "counts"])
def test_a_resumed_run_has_the_same_archives_and_counts(lost, whole, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def crash(run, folder, tasks, parts, real=continual.write_finished):
        if tasks == 2:  # the archive of the second task is written, its record is not
            raise Crash
        return real(run, folder, tasks, parts)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(continual, "write_finished", crash)
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


def test_the_header_says_what_an_archive_belongs_to():
    wanted = "model base before update task method sparsity position layers values".split()
    assert sorted(asdict(header({}))) == sorted(wanted)
