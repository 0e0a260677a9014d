"""Archived updates and taking a task out again: every bit accounted for, nothing believed unchecked."""

import copy
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
from jumplora.storage.state import load_state
from safetensors.torch import load_file, save_file

from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence, merge_adapter, weights_of
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig, attach_adapter
from jumplora.method.adapter import adapter_layers
from jumplora.storage import rollback as archives
from jumplora.storage import run_folder
from jumplora.storage import updates as sparse_updates
from jumplora.storage.record import Damaged, Run
from jumplora.storage.rollback import (
    add_archives,
    load_archives,
    load_without,
    rollback,
    rollback_folder,
    without_task,
)
from jumplora.storage.updates import (
    ArchiveHeader,
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
    with pytest.raises(Damaged, match=r"bad\.safetensors: .*Nothing was changed"):
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
    with pytest.raises(Damaged, match="odd"):
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
    with pytest.raises(Damaged, match=message):
        read_archive(path)


def test_a_whole_archive_that_is_not_the_recorded_one_is_refused(archive):
    with pytest.raises(Damaged, match="not the file that the record names"):
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


@pytest.mark.parametrize(
    "changes", [dict(after_task="keep"), dict(training="joint")], ids=lambda c: next(iter(c))
)
def test_a_run_without_updates_of_single_tasks_says_so(results, changes):
    run = copy.deepcopy(results["gated"].run)
    run.configuration["method"] |= changes
    with pytest.raises(ValueError, match="JumpLoRA .*no update is one task's own"):
        archives.check_archived(run)


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


def test_a_merged_task_that_is_not_scored_yet_can_be_taken_out(gated):
    run = Run.load(gated.folder)
    run.accuracy[2, 1:], run.extra["state_tasks"] = np.nan, 3  # killed while its scores were taken
    del run.right[run.tasks[2]]
    run.save(gated.folder.parent)
    assert run.finished == 2
    found = rollback(gated.folder, "places", SEQUENCE)
    assert found.bound == 0 and found.tasks == run.tasks and np.isnan(found.scores["places"][0])
    assert "| places | nan | " in archives.rollback_report(found)


def test_a_deleted_archive_ends_the_counting_and_not_the_run(gated):
    support = gated.run.extra["support"]
    assert sparse_updates.support_so_far(gated.folder, gated.run.tasks, support) == support
    older = {key: value for key, value in support.items() if key != "counts"}
    assert sparse_updates.support_so_far(gated.folder, gated.run.tasks, older) is None
    archive_path(gated.folder, 0, "topics").unlink()
    with pytest.warns(UserWarning, match="no longer counted.*01-topics"):
        assert sparse_updates.support_so_far(gated.folder, gated.run.tasks, support) is None
    assert sparse_updates.support_so_far(gated.folder, gated.run.tasks, None) is None


# ---- taking a task out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, k", PLACES)
def test_a_task_is_taken_out_bit_for_bit(results, kind, k, tmp_path):
    result = results[kind]
    folder = Path(shutil.copytree(result.folder, tmp_path / result.folder.name))
    before, task = files(folder), result.run.tasks[k]
    found = rollback(folder, task)
    assert found.bound == 0 and found.task == task and found.last == (k == len(result.run.tasks) - 1)
    place = rollback_folder(folder, task)
    weights = {n.removesuffix(".weight"): w for n, w in load_file(place / "weights.safetensors").items()}
    archived = load_archives(folder, result.run)
    assert same_bits(weights, add_archives(result.weights[0], archived[:k] + archived[k + 1 :]))
    if found.last:
        assert same_bits(weights, result.weights[k])  # the weights that the last task began with
    changed = sum((archived[k].update(n).dense() != 0).sum().item() for n in weights)
    assert (found.changed, found.entries) == (changed, sum(w.numel() for w in weights.values()))
    after = files(folder)
    assert before.items() <= after.items()
    assert {str(p) for p in after.keys() - before.keys()} == {
        f"rollback-{task}/{name}" for name in ("weights.safetensors", "rollback.json", "report.md")
    }
    model, _, _ = load_without(folder, task, device="cpu")
    for name, weight in weights.items():
        own = model.get_submodule(name).weight
        assert own.dtype == result.model.dtype and torch.equal(own, weight.to(own.dtype))


def test_without_overwritten_values_the_base_gives_the_same_bits(gated):
    for i in range(3):
        rewrite(gated, i, lambda layer, old: pack_sparse(layer, old.update(layer)))
    found = load_archives(gated.folder, Run.load(gated.folder))
    for k, task in enumerate(gated.run.tasks):
        assert rollback(gated.folder, task).bound == 0
        weights = load_file(rollback_folder(gated.folder, task) / "weights.safetensors")
        others = add_archives(gated.weights[0], found[:k] + found[k + 1 :])
        assert same_bits({n.removesuffix(".weight"): w for n, w in weights.items()}, others)


@pytest.mark.parametrize("kept", [True, False], ids=["overwritten kept", "from the base"])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_rounded_values_stay_within_the_stated_bound(gated, k, kept):
    exact = load_archives(gated.folder, gated.run)
    for i in range(3):
        rewrite(
            gated, i, values="bfloat16",
            make=lambda layer, old: pack_sparse(
                layer, old.update(layer), old.overwritten(layer) if kept else None, "bfloat16"
            ),
        )  # fmt: skip
    found = rollback(gated.folder, gated.run.tasks[k])
    weights = load_file(rollback_folder(gated.folder, found.task) / "weights.safetensors")
    wanted = add_archives(gated.weights[0], exact[:k] + exact[k + 1 :])
    error = max((weights[f"{name}.weight"] - w).abs().max().item() for name, w in wanted.items())
    assert (error == 0) == (found.bound == 0) == (kept and k == 2)
    assert error <= found.bound < 0.1 * max(w.abs().max().item() for w in wanted.values())


@pytest.mark.parametrize("k", [0, 1])
def test_factors_on_another_processor_stay_within_the_stated_bound(results, k, tmp_path, monkeypatch):
    result, real = results["no gate"], sparse_updates.UpdateArchive.update
    folder = Path(shutil.copytree(result.folder, tmp_path / result.folder.name))
    exact = load_archives(folder, result.run)
    wanted = add_archives(result.weights[0], exact[:k] + exact[k + 1 :])

    def in_float64(archive, layer):  # another order of rounding
        A, B, s = (archive.tensors[f"{layer}.{part}"].double() for part in ("A", "B", "scaling"))
        return sparse_update((s * (B @ A)).float())

    monkeypatch.setattr(sparse_updates.UpdateArchive, "update", in_float64)
    assert not exact[0].exact
    found = rollback(folder, result.run.tasks[k])
    weights = load_file(rollback_folder(folder, found.task) / "weights.safetensors")
    error = max((weights[f"{name}.weight"] - w).abs().max().item() for name, w in wanted.items())
    assert 0 < found.bound < 1e-3 and error <= found.bound
    monkeypatch.setattr(sparse_updates.UpdateArchive, "update", real)


# ---- scores -----------------------------------------------------------------------------------------------


def test_scores_without_the_last_task_are_those_of_the_row_before(gated):
    found = rollback(gated.folder, "places", SEQUENCE)
    run = gated.run
    for j, task in enumerate(run.tasks):
        match, after, options, options_after = found.scores[task]
        assert (match, options) == (run.accuracy[2, j], run.option_accuracy[2, j])
        if j < 2:
            assert (after, options_after) == (run.accuracy[1, j], run.option_accuracy[1, j])
    report = (rollback_folder(gated.folder, "places") / "report.md").read_text()
    assert "as it was before that task, bit for bit" in report and "| weather |" in report
    facts = json.loads((rollback_folder(gated.folder, "places") / "rollback.json").read_text())
    assert facts["scores"] == found.scores and facts["bound"] == 0


# ---- refusals ---------------------------------------------------------------------------------------------


def flip_last_byte(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def swap_in_another_task(gated):
    shutil.copy(archive_path(gated.folder, 0, "topics"), archive_path(gated.folder, 1, "weather"))


def other_base(gated):
    rewrite(
        gated,
        1,
        lambda layer, old: pack_sparse(layer, old.update(layer), old.overwritten(layer)),
        base="0" * 16,
    )


def other_values(gated):
    def double(layer, old):
        update = old.update(layer)
        return pack_sparse(layer, replace(update, values=2 * update.values), old.overwritten(layer))

    rewrite(gated, 1, double)


def other_overwritten(gated):
    rewrite(gated, 2, lambda layer, old: pack_sparse(layer, old.update(layer), old.overwritten(layer) + 1))


def other_start(gated):
    def same(layer, old):
        return pack_sparse(layer, old.update(layer), old.overwritten(layer))

    rewrite(gated, 2, same, before="0" * 64)


REFUSED = {
    "unknown task": (lambda gated: None, "tpoics", "task='tpoics' is not known.*did you mean 'topics'"),
    "a path as task": (lambda gated: None, "../x", "task='../x' is not known"),
    "twice": (
        lambda gated: rollback(gated.folder, "topics"),
        "topics",
        "taken out before; delete .*rollback-topics",
    ),
    "tampered": (
        lambda gated: flip_last_byte(archive_path(gated.folder, 1, "weather")),
        "places",
        "02-weather.safetensors: the checksum does not match",
    ),
    "missing": (
        lambda gated: archive_path(gated.folder, 1, "weather").unlink(),
        "topics",
        "02-weather.*missing",
    ),
    "another archive": (swap_in_another_task, "topics", "02-weather.*not the file that the record names"),
    "another base": (other_base, "topics", "its base is '0000000000000000', that of the run"),
    "another update": (other_values, "topics", "do not add up to the merged weights"),
    "another past": (other_overwritten, "places", "do not add up to the merged weights"),
    "another start": (other_start, "places", "not those that it began with"),
    "damaged state": (
        lambda gated: flip_last_byte(gated.folder / "state" / "after-3.safetensors"),
        "topics",
        "after-3.safetensors",
    ),
    "damaged record": (lambda gated: flip_last_byte(gated.folder / "record.json"), "topics", "record.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_rightly_is_refused_and_changes_nothing(gated, case):
    prepare, task, message = REFUSED[case]
    prepare(gated)
    before = files(gated.folder.parent)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        rollback(gated.folder, task)
    assert files(gated.folder.parent) == before
    assert not list(gated.folder.glob(".rollback*"))


def test_a_backbone_with_other_weights_is_refused(results, tmp_path, monkeypatch):
    result, real = results["no gate"], run_folder.load_backbone
    folder = Path(shutil.copytree(result.folder, tmp_path / result.folder.name))

    def changed(name, **options):
        model, tokenizer = real(name, **options)
        model.get_submodule("model.norm").weight.data[0] += 1e-6
        return model, tokenizer

    monkeypatch.setattr(run_folder, "load_backbone", changed)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="tiny-llama has other weights than the backbone"):
        rollback(folder, "topics")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "sequence, message",
    [
        (SEQUENCE.limit(4), "the rows of 'topics' are not those of .*'train': 8"),
        (TaskSequence("short", TASKS[:2]), "the rows of 'places' are not those"),
    ],
    ids=["fewer rows", "a task less"],
)
def test_rows_of_another_run_are_refused(gated, sequence, message):
    before = files(gated.folder)
    with pytest.raises(ValueError, match=message):
        rollback(gated.folder, "topics", sequence)
    assert files(gated.folder) == before


def test_a_crash_while_writing_leaves_no_folder(gated, monkeypatch):
    def crash(found):
        raise Stopped

    monkeypatch.setattr(archives, "rollback_report", crash)
    before = files(gated.folder)
    with pytest.raises(Stopped):
        rollback(gated.folder, "topics")
    assert files(gated.folder) == before and not list(gated.folder.glob(".rollback*"))


def test_a_damaged_result_is_not_loaded(gated):
    with pytest.raises(ValueError, match="was not taken out of .*call rollback first"):
        load_without(gated.folder, "topics")
    rollback(gated.folder, "topics")
    place = rollback_folder(gated.folder, "topics")
    flip_last_byte(place / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged; delete .*rollback-topics"):
        load_without(gated.folder, "topics")
    (place / "rollback.json").write_text((place / "rollback.json").read_text().replace("topics", "tropics"))
    with pytest.raises(Damaged):
        load_without(gated.folder, "topics")


def test_tables_do_not_count_a_rollback_as_a_run(gated):
    from jumplora.results.run_tables import load_runs

    rollback(gated.folder, "topics")
    assert len(load_runs(gated.folder.parent)) == 1


def test_the_checksum_of_an_update_sees_every_entry():
    one, other = random_update(seed=1), random_update(seed=1)
    other.values[3] = np.nextafter(other.values[3].item(), np.float32(9), dtype=np.float32).item()
    assert update_checksum([("layer", one)]) == update_checksum([("layer", random_update(seed=1))])
    assert update_checksum([("layer", one)]) != update_checksum([("layer", other)])
    assert set("model base before task method sparsity position format".split()) <= set(asdict(header({})))


def test_a_task_taken_out_of_a_run_that_has_learned_on_is_refused(tmp_path, monkeypatch):
    train = continual.Learner.train

    def interrupted(learner, i):
        if i == 2:
            raise KeyboardInterrupt
        return train(learner, i)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(continual.Learner, "train", interrupted)
        learn(tmp_path)
    (folder,) = tmp_path.iterdir()
    task = rollback(folder, SEQUENCE.names[0]).task
    load_without(folder, task, device="cpu")
    learn(tmp_path)
    with pytest.raises(ValueError, match="the run has learned .* since; delete .* and call rollback again"):
        load_without(folder, task, device="cpu")
