"""A few hundred wild inputs: each is taken and right, or refused by a message that names it."""

import json
from dataclasses import asdict

import fuzz_models
import pytest
import torch
from fuzz import (
    CHECKS,
    HEADER,
    ON_DISK,
    OWNER,
    UPDATE,
    archive_bytes,
    attack,
    signed,
    state_bytes,
    whole_run,
)
from peft import get_peft_model

from jumplora.command_line import main, parse_settings
from jumplora.conventions import set_seed
from jumplora.data.backbones import load_backbone
from jumplora.data.benchmark import read_folder
from jumplora.learning.evaluation import average_accuracy
from jumplora.learning.tasks import Question
from jumplora.learning.training import TrainConfig
from jumplora.method.adapter import JumpLoraConfig
from jumplora.running.grid import plan, run_grid
from jumplora.storage.record import Damaged, Run, read_tensors
from jumplora.storage.state import Checkpoint, load_state
from jumplora.storage.updates import read_archive


@pytest.mark.parametrize("test", CHECKS, ids=lambda test: test.__name__)
def test_wild_input_is_taken_rightly_or_refused_clearly(test):
    assert attack(test, 25) > 20


@pytest.mark.parametrize("test", fuzz_models.CHECKS, ids=lambda test: test.__name__)
def test_wild_models_and_tables_are_taken_rightly_or_refused_clearly(test):
    slow = test in (fuzz_models.answers_in_batches, fuzz_models.files_of_flags)
    assert attack(test, 2 if slow else 6) > 0


# ---- what it has found, one plain test each ---------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        *((lambda t=t: TrainConfig(target_modules=t), "target_modules=.* is no regular exp") for t in "(*["),
        *((lambda v=v: JumpLoraConfig(init_lora_weights=v), f"init_lora_weights={v}") for v in (0, 1, 1.0)),
        *(
            (lambda d=d: load_backbone("tiny-llama", device=d), "device=.* is not usable")
            for d in (None, 1.5)
        ),
        *((lambda s=s: set_seed(s), f"seed={s!r} is outside") for s in (0.0, None, "3")),
        *(
            (lambda a=a: average_accuracy(a), "accuracy=.*no matrix of numbers")
            for a in ([[], [0]], [[10**400]])
        ),
        *(
            (
                lambda s=s: run_grid(plan(["ELLA"], ["order1"], [s], backbone="tiny-llama"), "nowhere"),
                "seed=.* is not a whole number",
            )
            for s in ([], {}, 1.5)
        ),
        (lambda: run_grid([], "nowhere", device=0), "device='0' is not usable here"),
    ],
)
def test_what_is_refused_is_named_by_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_gate_on_a_layer_that_computes_its_weight_is_refused():
    model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 5)))
    with pytest.raises(ValueError, match="type ParametrizedLinear; a gate needs nn.Linear"):
        get_peft_model(model, JumpLoraConfig(target_modules=["0"]))


def test_a_file_of_flags_with_an_odd_value_for_a_file_of_flags_is_refused(tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text('{"config": {}}')
    assert main(["compare", "--sequence", "nowhere", "--config", str(tmp_path / "flags.yaml")]) == 2
    assert f"--config {tmp_path / 'flags.yaml'}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gate_start", "gate_stop", "lora_dropout"])
@pytest.mark.parametrize("value", ["", None, True])
def test_a_share_that_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} is not a share"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", ["rank", "max_length", "learning_rate", "epochs"])
def test_a_number_too_large_for_the_machine_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}=10+ is not"):
        TrainConfig(**{name: 10**400})


@pytest.mark.parametrize("value", [None, "wide", float("inf"), True])
def test_a_bandwidth_that_is_no_number_is_refused_by_name(value):
    with pytest.raises(ValueError, match="bandwidth=.* is not positive"):
        JumpLoraConfig(bandwidth=value)


@pytest.mark.parametrize("asked", [("a \ud800", ["a"]), ("", ["a\udfff"])], ids=ascii)
def test_half_a_character_in_question_or_option_is_refused(asked):
    with pytest.raises(ValueError, match="task 'topics': .* holds half a character; remove it"):
        Question("topics", *asked)


@pytest.mark.parametrize(
    "change",
    [
        dict(sha256=3),
        dict(sha256=None),
        dict(note=[1]),
        dict(use={"train": ["dev"]}),
        dict(files={"train": "a\0b"}),
    ],
    ids=str,
)
def test_an_odd_entry_of_a_list_of_tasks_is_refused(change, tmp_path):
    (tmp_path / "rows.json").write_bytes(ON_DISK)
    entry = dict(name="topics", files=dict.fromkeys(("train", "dev", "test"), "rows.json"))
    (tmp_path / "tasks.json").write_text(json.dumps([entry]))
    assert len(read_folder(tmp_path)) == 1
    (tmp_path / "tasks.json").write_text(json.dumps([entry | change]))
    with pytest.raises(ValueError, match=r"task 'topics': its entry in .*tasks\.json is odd: .*; use texts"):
        read_folder(tmp_path)


@pytest.mark.parametrize("labels", ["[[1], {}]", "[" * 3000 + "]" * 3000], ids=["lists", "deep"])
def test_labels_that_are_no_words_are_refused(labels, tmp_path):
    (tmp_path / "topics").mkdir()
    for name in ("train", "dev", "test"):
        (tmp_path / "topics" / f"{name}.json").write_bytes(ON_DISK)
    (tmp_path / "topics" / "labels.json").write_text(labels)
    with pytest.raises(ValueError, match=r"topics.*(the option is (.1.|\[+); give text|cannot be read)"):
        read_folder(tmp_path)


DEEP = '{"extra": ' + "[" * 400 + "]" * 400 + ', "format": 1, "checksum": "0"}'


@pytest.mark.parametrize(
    "text", ['{"seed": 1e999, "format": 1, "checksum": "0"}', DEEP], ids=["infinite", "deep"]
)
def test_a_record_that_json_takes_and_we_cannot_is_damaged(text, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(Damaged, match=r"record\.json"):
        Run.load(path)


@pytest.mark.parametrize(
    "change",
    [
        dict(extra=[]),
        dict(seconds=[]),
        dict(configuration=[]),
        dict(sparsity={"a": []}),
        dict(seed=[]),
        dict(seconds={"train": ["x"]}),
        dict(extra={"notes": []}),
    ],
    ids=str,
)
def test_a_signed_record_with_other_types_is_damaged(change, tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_bytes(signed(whole_run().to_dict() | change))
    with pytest.raises(Damaged, match="does not describe a run"):
        Run.load(path)
    assert main(["show", str(path)]) == 2 and "does not describe a run" in capsys.readouterr().err


@pytest.mark.parametrize("about", [None, [], float("inf"), "text"], ids=str)
def test_a_state_that_says_nothing_is_damaged(about, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(state_bytes(about=about))
    with pytest.raises(Damaged, match=r"x\.safetensors is damaged"):
        read_tensors(path)


@pytest.mark.parametrize("name", ["q", "new.q", ""])
def test_a_state_with_a_tensor_of_no_group_is_damaged(name, tmp_path):
    path = tmp_path / "state" / "after-1.safetensors"
    path.parent.mkdir()
    path.write_bytes(state_bytes({name: torch.ones(2)}, dict(owner=OWNER)))
    with pytest.raises(Damaged, match=r"after-1\.safetensors is damaged \(its tensor .* belongs to no group"):
        load_state(tmp_path, 1, read_tensors(path)[2])
    with pytest.warns(UserWarning, match="belongs to no group.*the training starts again"):
        assert Checkpoint(path, OWNER).read() is None


def test_a_checkpoint_without_an_owner_is_not_used(tmp_path):
    path = tmp_path / "step.safetensors"
    path.write_bytes(state_bytes({}, {}))
    assert Checkpoint(path, OWNER).read() is None


@pytest.mark.parametrize("scaling", [torch.tensor(float("nan")), torch.ones(2)], ids=["nan", "two"])
def test_an_archive_with_an_odd_scaling_is_damaged(scaling, tmp_path):
    header, path = asdict(HEADER) | dict(values="factors"), tmp_path / "a.safetensors"
    parts = {"q.A": torch.ones(1, 3), "q.B": torch.ones(2, 1), "q.scaling": torch.tensor(1.0)}
    path.write_bytes(archive_bytes(header, parts))
    assert read_archive(path).update("q").dense().sum() == 6
    path.write_bytes(archive_bytes(header, parts | {"q.scaling": scaling}))
    with pytest.raises(Damaged, match="positions or values that no update has"):
        read_archive(path)


def test_an_archive_with_an_infinite_header_is_damaged(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(archive_bytes(asdict(HEADER) | dict(sparsity=float("inf")), UPDATE))
    with pytest.raises(Damaged, match="sparsity is infinite"):
        read_archive(path)


def test_a_setting_of_many_brackets_is_text():
    assert parse_settings(["kept=" + "[" * 5000]) == {"kept": "[" * 5000}
