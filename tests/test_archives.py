"""Archived updates and taking a task out again: every bit accounted for, nothing believed unchecked."""

import json
import shutil
import struct
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from equal_runs import files
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence, merge_adapter, weights_of
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig, attach_adapter
from jumplora.method.adapter import adapter_layers
from jumplora.storage import updates as sparse_updates
from jumplora.storage.record import Run
from jumplora.storage.rollback import (
    add_archives,
    load_archives,
    rollback,
    without_task,
)
from jumplora.storage.run_folder import load_state
from jumplora.storage.updates import (
    ArchiveHeader,
    DamagedArchive,
    SparseUpdate,
    archive_adapter,
    archive_path,
    neutral_zeros,
    pack_sparse,
    read_archive,
    sparse_update,
    update_checksum,
    write_archive,
)

BALL = [("a ball", "sport"), ("an atom", "physics")] * 4
RAIN = [("rain", "yes"), ("sun", "no")] * 4
FORK = [("a fork", "table"), ("a tree", "forest")] * 4
TASKS = (
    Task("topics", "Topic?\n", ("sport", "physics"), BALL, BALL[:2], BALL[:4]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, RAIN[:2], RAIN[:4]),
    Task("places", "Where?\n", ("table", "forest"), FORK, FORK[:2], FORK[:4]),
)
SEQUENCE, PAIR = TaskSequence("short", TASKS), TaskSequence("pair", TASKS[:2])
QUICK = TrainConfig(batch_size=8, epochs=5, learning_rate=1e-2, max_length=120, kept=0.05)
GATED = Method("IncLoRA + JumpLoRA", gated=True)


@dataclass
class Result:
    "A run, its folder, the model it ended with, and its float32 weights: at first, and after each task."

    run: Run
    folder: Path
    model: torch.nn.Module
    weights: list[dict] = field(default_factory=list)


def learn(out, method=GATED, backbone="tiny-llama", dtype="float32", **options):
    "One run on a fresh backbone, its weights copied at the end of every task."
    weights, real = [], continual.Learner.finish

    def watched(learner, i, log):
        if not weights:
            weights.append({name: weight.clone() for name, weight in learner.weights.items()})
        real(learner, i, log)
        weights.append({name: weight.clone() for name, weight in learner.weights.items()})

    model, tokenizer = load_backbone(backbone, device="cpu", dtype=dtype)
    sequence = options.pop("sequence", SEQUENCE)
    options = dict(seed=1, out=out, backbone=backbone, progress=False, zero_shot=False) | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual.Learner, "finish", watched)
        run = learn_sequence(model, tokenizer, sequence, method, QUICK, **options)
    return Result(run, Path(out) / run.name, model, weights)


KINDS = {
    "gated": dict(),
    "gated, bfloat16": dict(dtype="bfloat16", sequence=PAIR),
    "gated, encoder-decoder": dict(backbone="tiny-t5", sequence=PAIR),
    "no gate": dict(method=Method("IncLoRA"), sequence=PAIR),
}
PLACES = [(kind, k) for kind in KINDS for k in range(2 if "sequence" in KINDS[kind] else 3)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "One run of every kind."
    return {kind: learn(tmp_path_factory.mktemp("runs"), **given) for kind, given in KINDS.items()}


@pytest.fixture
def gated(results, tmp_path):
    "A copy of the gated run, to be changed or damaged."
    result = results["gated"]
    return replace(result, folder=Path(shutil.copytree(result.folder, tmp_path / result.folder.name)))


def same_bits(one, other):
    "Whether named float32 tensors agree in every bit, the sign of zero included."
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def rewrite(result, i, make, **about):
    "Write archive i again, from what `make` gives for each layer, and put its checksum into the record."
    path = archive_path(result.folder, i, result.run.tasks[i])
    old, tensors = read_archive(path), {}
    for layer in old.header.layers:
        tensors |= make(layer, old)
    written = write_archive(path, replace(old.header, **about), tensors)
    run = Run.load(result.folder)
    run.extra["archives"][run.tasks[i]] = written
    run.save(result.folder.parent)


# ---- one layer --------------------------------------------------------------------------------------------

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = st.integers(1, 5).flatmap(
    lambda columns: st.lists(
        st.lists(st.one_of(st.just(0.0), st.just(-0.0), FLOATS), min_size=columns, max_size=columns),
        min_size=1,
    )
)


@settings(max_examples=40, deadline=None)
@given(MATRICES)
def test_a_sparse_update_is_the_matrix_again(rows):
    matrix = torch.tensor(rows, dtype=torch.float32)
    update = sparse_update(matrix)
    assert torch.equal(update.dense(), matrix) and update.shape == tuple(matrix.shape)
    assert update.indices.dtype == torch.int32 and update.values.dtype == torch.float32
    assert np.array_equal(update.indices.numpy(), np.flatnonzero(matrix.numpy()))
    assert (update.values != 0).all() and update.density == np.count_nonzero(matrix) / matrix.numel()


@settings(max_examples=40, deadline=None)
@given(MATRICES, st.sampled_from([0.0, -0.0, 1.5, -1e-40]))
def test_adding_neutral_zeros_keeps_every_bit_outside_the_support(rows, weight):
    delta = torch.tensor(rows, dtype=torch.float32)
    weights = torch.full_like(delta, weight)
    after = weights + neutral_zeros(delta)
    outside = delta == 0
    assert torch.equal(after[outside].view(torch.int32), weights[outside].view(torch.int32))
    assert torch.equal(after[~outside], (weights + delta)[~outside])


def test_what_is_no_matrix_or_too_large_is_refused():
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(1, 1).expand(2**16, 2**15)):
        with pytest.raises(ValueError, match=r"no matrix of 1 to 2\*\*31 - 1 entries"):
            sparse_update(bad)


def test_a_sparse_update_keeps_the_gradient_out():
    assert not sparse_update(torch.ones(2, 2, requires_grad=True)).values.requires_grad


# ---- the file ---------------------------------------------------------------------------------------------


def header(layers, **changes):
    about = dict(task="topics", position=0, method="by hand", model="none", base="b", before="w", update="u")
    return ArchiveHeader(**about | dict(layers=layers, sparsity=0.5, values="float32") | changes)


def random_update(rows=64, columns=48, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    return sparse_update(torch.randn(rows, columns, generator=generator) * kept)


@pytest.mark.parametrize(
    "values, overwritten, bytes_per_entry",
    [("float32", False, 8), ("float32", True, 12), ("bfloat16", False, 6), ("bfloat16", True, 10)],
)
def test_an_archive_takes_so_many_bytes_per_entry_and_a_header(
    tmp_path, values, overwritten, bytes_per_entry
):
    updates = {f"layer {i}": random_update(seed=i) for i in range(3)}
    tensors = {}
    for name, update in updates.items():
        tensors |= pack_sparse(name, update, torch.randn_like(update.values) if overwritten else None, values)
    about = header({name: [64, 48] for name in updates}, values=values)
    path = tmp_path / "one.safetensors"
    written = write_archive(path, about, tensors)
    entries = sum(len(update.indices) for update in updates.values())
    assert written["bytes"] == path.stat().st_size
    assert 0 < written["bytes"] - bytes_per_entry * entries < 2000
    found = read_archive(path, written["checksum"])
    assert found.header == about
    for name, update in updates.items():
        again, step = found.update(name), 0 if values == "float32" else 2**-8
        assert torch.equal(again.indices, update.indices)
        assert ((again.values - update.values).abs() <= step * update.values.abs()).all()
        assert (found.overwritten(name) is not None) == overwritten


def test_an_update_without_entries_is_archived_too(tmp_path):
    empty = sparse_update(torch.zeros(4, 3))
    path = tmp_path / "none.safetensors"
    write_archive(path, header({"layer": [4, 3]}), pack_sparse("layer", empty, torch.zeros(0)))
    assert torch.equal(read_archive(path).update("layer").dense(), torch.zeros(4, 3))


def test_the_same_update_gives_the_same_bytes(tmp_path):
    tensors = pack_sparse("layer", random_update())
    for name in ("one", "two"):
        write_archive(tmp_path / name, header({"layer": [64, 48]}), dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_unknown_kind_of_values_is_refused():
    with pytest.raises(ValueError, match="values='float16' is not known.*did you mean 'bfloat16'"):
        pack_sparse("layer", random_update(), values="float16")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "good.safetensors"
    update = random_update(16, 12)
    write_archive(path, header({"layer": [16, 12]}), pack_sparse("layer", update, update.values + 1))
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
    except DamagedArchive:
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
    with pytest.raises(DamagedArchive, match=r"bad\.safetensors: .*Nothing was changed"):
        read_archive(path)


INT = torch.int32


@pytest.mark.parametrize(
    "indices, values, old",
    [
        (torch.tensor([-1, 3], dtype=INT), torch.ones(2), None),
        (torch.tensor([3, 1], dtype=INT), torch.ones(2), None),
        (torch.tensor([1, 1], dtype=INT), torch.ones(2), None),
        (torch.tensor([1, 6], dtype=INT), torch.ones(2), None),
        (torch.tensor([1, 3], dtype=torch.int64), torch.ones(2), None),
        (torch.tensor([1, 3], dtype=INT), torch.ones(3), None),
        (torch.tensor([1, 3], dtype=INT), torch.ones(2) / 0, None),
        (torch.tensor([1, 3], dtype=INT), torch.full((2,), torch.nan), None),
        (torch.tensor([[1, 3]], dtype=INT), torch.ones(1, 2), None),
        (torch.tensor([1, 3], dtype=INT), torch.ones(2), torch.ones(3)),
        (torch.tensor([1, 3], dtype=INT), torch.ones(2), torch.full((2,), torch.nan)),
    ],
)
def test_a_well_signed_archive_of_nonsense_is_refused(indices, values, old, tmp_path):
    tensors = {"layer.indices": indices, "layer.values": values}
    path = tmp_path / "odd.safetensors"
    write_archive(
        path, header({"layer": [2, 3]}), tensors if old is None else tensors | {"layer.overwritten": old}
    )
    with pytest.raises(DamagedArchive, match="odd"):
        read_archive(path)


ONES = torch.ones(1, 3)
SCALE = {"layer.scaling": torch.tensor(1.0)}


@pytest.mark.parametrize(
    "changes, tensors, message",
    [
        (dict(format=2), {}, "format 2, and this version reads format 1"),
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
    write_archive(
        path, header(**dict(layers={"layer": [2, 3]}) | changes), pack_sparse("layer", update) | tensors
    )
    with pytest.raises(DamagedArchive, match=message):
        read_archive(path)


def test_a_whole_archive_that_is_not_the_recorded_one_is_refused(archive):
    with pytest.raises(DamagedArchive, match="not the file that the record names"):
        read_archive(archive, "0" * 64)


# ---- what a run leaves behind -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_has_an_archive_that_says_what_it_belongs_to(results, kind):
    run, folder, weights = results[kind].run, results[kind].folder, results[kind].weights
    names = [f"0{i + 1}-{task}.safetensors" for i, task in enumerate(run.tasks)]
    assert sorted(path.name for path in (folder / "updates").iterdir()) == names
    for i, task in enumerate(run.tasks):
        path = archive_path(folder, i, task)
        about = read_archive(path, run.extra["archives"][task]["checksum"]).header
        assert run.extra["archives"][task]["bytes"] == path.stat().st_size
        assert (about.task, about.position, about.method, about.model) == (task, i, run.method, run.backbone)
        assert about.base == run.configuration["weights"]
        assert about.before == sparse_updates.checksum_of(weights[i])
        sizes = {name: rows * columns for name, (rows, columns) in about.layers.items()}
        zeros = sum(run.sparsity[task][name] * size for name, size in sizes.items())
        assert about.sparsity == pytest.approx(zeros / sum(sizes.values()))
        assert about.values == ("factors" if kind == "no gate" else "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_base_plus_archives_in_order_is_the_merged_model_bit_for_bit(results, kind):
    result = results[kind]
    found = load_archives(result.folder, result.run)
    assert all(archive.exact for archive in found)
    for i in range(len(found) + 1):
        assert same_bits(add_archives(result.weights[0], found[:i]), result.weights[i])
    state = load_state(result.folder, len(found), result.run.extra["state_sha256"])["weight"]
    assert same_bits(add_archives(result.weights[0], found), state)
    for name, weight in state.items():
        kept = result.model.get_submodule(name).weight
        assert torch.equal(kept, weight.to(kept.dtype))


def test_archives_of_updates_without_a_gate_stay_small(results):
    sizes = [
        sum(a["bytes"] for a in results[kind].run.extra["archives"].values()) for kind in ("no gate", "gated")
    ]
    dense = 2 * 4 * sum(weight.numel() for weight in results["no gate"].weights[0].values())
    assert sizes[0] < dense / 2


def test_the_record_counts_the_entries_that_tasks_share(results):
    for kind in ("gated", "gated, bfloat16", "gated, encoder-decoder"):
        result = results[kind]
        found, support = load_archives(result.folder, result.run), result.run.extra["support"]
        touched = [
            np.concatenate([(a.update(layer).dense() != 0).flatten().numpy() for layer in a.header.layers])
            for a in found
        ]
        assert sum(support["entries"].values()) == touched[0].size
        for i in range(len(found)):
            assert support["shared"][i] == [int((touched[i] & touched[j]).sum()) for j in range(i + 1)]
            assert support["touched"][i] == np.any(touched[: i + 1], axis=0).sum()
        for layer, counts in support["counts"].items():
            assert counts == [int((a.update(layer).dense() != 0).sum()) for a in found]
            assert support["entries"][layer] == found[0].update(layer).dense().numel()
        json.dumps(support)
    assert "support" not in results["no gate"].run.extra


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


ABOUT = dict(task="topics", position=0, method="by hand", base="b")


def test_a_folder_as_backbone_leaves_no_path_in_an_archive(tmp_path):
    model, path = gated_by_hand(), tmp_path / "one.safetensors"
    (tmp_path / "secret" / "my-model").mkdir(parents=True)
    archive_adapter(path, model, weights_of(model), model=str(tmp_path / "secret" / "my-model"), **ABOUT)
    assert read_archive(path).header.model == "my-model" and b"secret" not in path.read_bytes()


def test_a_negative_zero_comes_back_with_its_sign(tmp_path):
    model, path = gated_by_hand(), tmp_path / "one.safetensors"
    weights = weights_of(model)
    before = {name: weight.clone() for name, weight in weights.items()}
    archive_adapter(path, model, weights, model="tiny-llama", **ABOUT)
    merge_adapter(model, weights)
    archive = read_archive(path)
    assert 0.5 < archive.header.sparsity < 1
    assert same_bits(add_archives(before, [archive]), weights) and not same_bits(before, weights)
    assert any((weight == 0).sum() > 100 for weight in weights.values())  # untouched zeros
    again, bound = without_task(weights, [archive], 0)
    assert bound == 0 and same_bits(again, before)


def test_archives_can_be_left_out(tmp_path):
    result = learn(tmp_path, archive=False, sequence=TaskSequence("one", TASKS[:1]))
    assert not (result.folder / "updates").exists()
    assert not {"archives", "support"} & result.run.extra.keys()
    before = files(tmp_path)
    with pytest.raises(ValueError, match="no archive of 'topics'; learn it again, with archive=True"):
        rollback(result.folder, "topics")
    assert files(tmp_path) == before


class Stopped(Exception):
    "Stands for a lost machine."


def test_a_resumed_run_ends_with_the_same_archives_and_counts(results, tmp_path):
    real = continual.write_finished

    def crash(run, folder, tasks, parts):  # after the archive of the second task, before its record
        if tasks == 2:
            raise Stopped
        return real(run, folder, tasks, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "write_finished", crash)
        with pytest.raises(Stopped):
            learn(tmp_path)
    unfinished = next(tmp_path.iterdir())
    with pytest.raises(ValueError, match="task='weather' is not known; use 'topics'"):
        rollback(unfinished, "weather")  # its archive is there, its record not yet
    assert rollback(unfinished, "topics").tasks == ["topics"]
    resumed, whole = learn(tmp_path), results["gated"]
    assert resumed.run.extra == whole.run.extra
    assert files(resumed.folder / "updates") == files(whole.folder / "updates")


def test_a_deleted_archive_ends_the_counting_and_not_the_run(gated):
    support = gated.run.extra["support"]
    assert sparse_updates.support_so_far(gated.folder, gated.run.tasks, support) == support
    older = {key: value for key, value in support.items() if key != "counts"}
    assert sparse_updates.support_so_far(gated.folder, gated.run.tasks, older) is None
    archive_path(gated.folder, 0, "topics").unlink()
    with pytest.warns(UserWarning, match="no longer counted.*01-topics"):
        assert sparse_updates.support_so_far(gated.folder, gated.run.tasks, support) is None
    assert sparse_updates.support_so_far(gated.folder, gated.run.tasks, None) is None


def test_the_checksum_of_an_update_sees_every_entry():
    one, other = random_update(seed=1), random_update(seed=1)
    other.values[3] = np.nextafter(other.values[3].item(), np.float32(9), dtype=np.float32).item()
    assert update_checksum([("layer", one)]) == update_checksum([("layer", random_update(seed=1))])
    assert update_checksum([("layer", one)]) != update_checksum([("layer", other)])
    assert set("model base before task method sparsity position format".split()) <= set(asdict(header({})))
