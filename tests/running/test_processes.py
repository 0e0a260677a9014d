"""One run on two processes: the numbers of one, one writer, stopped and killed together; what is refused."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import cache, partial
from itertools import product
from unittest.mock import Mock, patch

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from two_processes import EQUAL, QUICK, SEQUENCE, TASKS, all_answers, compare_words, learn, refused

from jumplora.command_line import main
from jumplora.data.backbones import load_backbone, pick_device
from jumplora.learning.continual import learn_sequence
from jumplora.learning.methods import METHODS
from jumplora.learning.training import attach_adapter, train_task
from jumplora.method.regularizers import IncLoRA
from jumplora.running import processes
from jumplora.running.processes import (
    check_processes,
    fill_batches,
    fill_rows,
    join_processes,
    own_device,
    split_batch,
)
from jumplora.storage.record import Run, read_tensors
from jumplora.storage.rollback import load_without, rollback


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    "What groups of two processes have left, and found."
    folder = tmp_path_factory.mktemp("groups")
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, root / "tests" / "two_processes.py", folder]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def of(folder, name):
    "What both processes of a group have found; both must have ended well."
    assert json.loads((folder / f"{name}.json").read_text()) == [0, 0], name
    return [json.loads((folder / f"{name}-{n}.json").read_text()) for n in (0, 1)]


@cache
def alone(case):
    "One of the cases, learned by this process."
    return learn(case, zero_shot=case == "llama")


def numbers(value) -> list:
    "All numbers of nested lists and dicts, in order."
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [x for item in value for x in numbers(item)] if isinstance(value, list) else [value]


def plain(value):
    "A record, or any value, as JSON gives it back."
    return json.loads(json.dumps(value.to_dict() if isinstance(value, Run) else value))


def gap(one, other) -> float:
    "The largest difference of two states."
    return max((one[name] - other[name]).abs().max().item() for name in one)


# ---- the same numbers ----------------------------------------


@pytest.mark.parametrize("case", EQUAL)
def test_two_processes_end_with_the_numbers_of_one(folder, case):
    first, second = (found[case] for found in of(folder, "cases"))
    run, model, tokenizer = alone(case)
    one, two = plain(run), first["run"]
    for key in ("accuracy", "option_accuracy", "zero_shot", "zero_shot_options"):
        assert one[key] == two[key] == second["run"][key], key
    for key in ("loss", "penalty"):
        expected = pytest.approx(numbers(one["extra"][key]), rel=1e-5, abs=1e-5)
        assert numbers(two["extra"][key]) == expected, key
    assert numbers(two["thresholds"]) == pytest.approx(numbers(one["thresholds"]), rel=1e-5, abs=1e-6)
    assert first["weights"] == second["weights"]
    assert gap(model.state_dict(), load_file(folder / f"{case}.safetensors")) < 1e-5
    if "answers" in first:
        assert first["answers"] == second["answers"]
        assert first["answers"] == plain(all_answers(model, tokenizer))
        assert len(set(numbers(first["answers"]))) > 1


def test_the_cases_move_the_weights_and_pay_a_penalty(folder):
    before = load_backbone("tiny-llama", device="cpu", dtype="float32")[0].state_dict()
    assert gap(before, load_file(folder / "llama.safetensors")) > 1e-3
    found = of(folder, "cases")[0]
    for case in ("llama", "t5", "EWC"):
        assert max(found[case]["run"]["extra"]["penalty"]["weather"]) > 1e-3, case


def test_the_record_says_how_many_learned_and_the_configuration_does_not(folder):
    shares = {"llama": (2, 1), "t5, accumulation 2": (2, 1), "llama, accumulation 3": (1, 3)}
    for case, (rows, accumulation) in shares.items():
        two = of(folder, "cases")[0][case]["run"]
        share = dict(processes=2, rows=rows, accumulation=accumulation)
        assert two["extra"]["processes"] == {task.name: share for task in TASKS}
        (path,) = (folder / case).glob("*/record.json")
        assert plain(Run.load(path))["extra"]["processes"] == two["extra"]["processes"]
        one = alone(case)[0]
        assert "processes" not in one.extra and one.name == path.parent.name


def test_scoring_is_shared_by_batches(folder):
    for case in ("llama", "t5"):  # 6 and 5 rows, two in a batch: the main process has two batches of each
        main_one, other = (found[case]["steps"] for found in of(folder, "cases"))
        assert (main_one, other) == ([2, 2, 2, 2, 1, 2], [2, 4, 2, 3])  # the last of each: what others did
    mine, others = (found["batches"] for found in of(folder, "cases"))
    assert all(a + b == total == same for (a, total), (b, same) in zip(mine, others, strict=True))


def test_only_the_main_process_writes(folder):
    main_one, other = of(folder, "cases")
    assert main_one["written"] > 50 and other["written"] == 0
    main_one, other = of(folder, "whole")  # with checkpoints
    assert main_one["written"] > 10 and other["written"] == 0
    run = learn("llama", folder / "alone")[0]
    places = [folder / "alone" / run.name, folder / "llama" / run.name]
    one, two = (sorted(str(p.relative_to(place)) for p in place.rglob("*")) for place in places)
    assert one == two and "record.json" in one and "02-weather.safetensors" in " ".join(one)


def test_a_task_is_taken_out_of_what_two_processes_have_learned(folder, tmp_path):
    learn("llama", tmp_path / "one")
    shutil.copytree(folder / "llama", tmp_path / "two")
    left, first = [], TASKS[0].name
    for count in ("one", "two"):
        place = next((tmp_path / count).glob("*/record.json")).parent
        assert rollback(place, first).tasks[-1] != first
        left.append(load_without(place, first, device="cpu")[0].state_dict())
    assert gap(*left) < 1e-5 and gap(left[1], load_file(folder / "llama.safetensors")) > 1e-3


# ---- together to the end ----------------------------------------


def test_a_group_that_was_killed_goes_on_and_ends_with_the_same_bits(folder):
    assert json.loads((folder / "killed.json").read_text()) == [-9, -9]
    whole, resumed = of(folder, "whole"), of(folder, "resumed")
    assert len({found["weights"] for found in whole + resumed}) == 1
    keys = ("accuracy", "option_accuracy", "thresholds", "sparsity")
    for one, two in zip(whole, resumed, strict=True):
        assert {key: one["run"][key] for key in keys} == {key: two["run"][key] for key in keys}
        assert one["run"]["extra"]["loss"] == two["run"]["extra"]["loss"]


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_process_goes_on(folder):
    assert [found["status"] for found in of(folder, "stopped")] == [143, 143]
    (path,) = (folder / "stopped").glob("*/state/step.safetensors")
    assert read_tensors(path)[1]["trainer"]["global_step"] == 2
    run, model, _ = learn("llama", folder / "stopped")
    assert list(run.extra["processes"]) == ["topics"]  # the second task was ended by one
    two = of(folder, "cases")[0]["llama"]["run"]
    assert plain(run)["option_accuracy"] == two["option_accuracy"]
    assert run.extra["loss"]["weather"] == pytest.approx(two["extra"]["loss"]["weather"], rel=1e-5)
    assert gap(model.state_dict(), load_file(folder / "llama.safetensors")) < 1e-5


def test_what_goes_wrong_in_one_process_is_known_to_both(folder):
    main_one, other = of(folder, "refusals")
    for found in (main_one, other):
        assert "2 processes cannot share 1 x 3 rows" in found["uneven"]
        assert "the processes have different runs" in found["different"]
        assert found["diverged"].startswith("Diverged: task 'topics': the loss became nan at step 1")
        assert found["request"] == 2 and len(set(found["drawn"])) == 2
        assert found["batches"] == [[0, 1], [2, 3], [4, None], [None, None]]
    assert main_one["failed"].startswith("ValueError: invalid literal")
    assert other["failed"].startswith("MainFailed: the main process stopped: ValueError: invalid literal")


def test_the_command_is_done_together_and_one_process_speaks(folder, capsys):
    main_one, other = of(folder, "command")
    assert (main_one["code"], other["code"]) == (0, 0) and other["output"] == ""
    assert main_one["output"].count("accuracy.png") == 1 and (folder / "command" / "tables").is_dir()
    two = Run.load(next((folder / "command").glob("*/record.json")))
    assert two.complete and all(two.extra["processes"][task]["rows"] == 2 for task in two.tasks)
    assert main(compare_words(folder / "data", folder / "one")) == 0
    one = Run.load(next((folder / "one").glob("*/record.json")))
    assert one.name == two.name and plain(one)["option_accuracy"] == plain(two)["option_accuracy"]
    assert main_one["output"].splitlines()[-1].replace("command", "one") in capsys.readouterr().out


# ---- one process alone ----------------------------------------


def test_one_process_is_not_touched():
    rows, collate, loader = [([1], [2])], object(), object()
    before = torch.get_rng_state()
    assert fill_rows(rows, collate) == (rows, collate) and fill_batches(loader) is loader
    assert join_processes("cpu") == 1
    assert torch.equal(before, torch.get_rng_state()) and not torch.distributed.is_initialized()


def test_a_split_is_the_same_rows_or_refused():
    for count, accumulation, batch_size in product((1, 2, 3, 4, 6), (1, 2, 3), range(1, 13)):
        try:
            split = split_batch(batch_size, accumulation, count)
        except ValueError:
            assert batch_size * accumulation % count or batch_size % count
            continue
        assert math.prod(split.values()) == batch_size * accumulation
        assert split["rows"] <= batch_size and split["accumulation"] <= accumulation


# ---- what is refused ----------------------------------------


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed", "Megatron_LM", "Parallelism_Config"])
def test_other_kinds_of_parallelism_are_refused_by_name(name, monkeypatch):
    for state in (processes.AcceleratorState, processes.PartialState):  # set by a program
        with patch.dict(state._shared_state, distributed_type=DistributedType.FSDP):
            assert "FSDP is not supported" in refused(join_processes)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")  # by a launcher
    message = refused(learn, "llama")
    assert message.startswith(f"ValueError: {name.upper()} is not supported") and "DDP" in message


def test_each_process_has_the_gpu_of_its_number_and_must_meet_the_others(monkeypatch):
    assert own_device("cuda:5") == torch.device("cuda:5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda") == torch.device("cuda:1") and own_device("cpu") == torch.device("cpu")
    with patch("torch.cuda.is_available", lambda: True):
        assert pick_device("auto") == torch.device("cuda:1")
    assert own_device(torch.device("cuda:1")) == torch.device("cuda:1")
    for other in (
        torch.device("cuda:0"),
        "cuda:0",
        "cuda:1",
    ):  # the text in every process, or one fails alone
        message = f"device='{other}', but each process has its own GPU; use 'cuda' or 'auto'"
        assert message in refused(own_device, other)
    with patch.object(processes, "PartialState", Mock(_shared_state={})):
        assert "2 processes were started, but 1 have joined" in refused(join_processes, "cpu")


def test_other_commands_are_refused_under_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["table", "nowhere"]) == 2
    assert "only `jumplora compare` runs under a launcher" in capsys.readouterr().err


class Int8Linear(nn.Linear):
    "A stand-in for a quantised layer: whole numbers, a scale per output, read as floats in the forward pass."

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


def quantised_backbone():
    "tiny-llama with its query and value projections in eight bits."
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    for name, layer in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj")):
            layer.__class__ = Int8Linear
            layer.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            whole = (layer.weight / layer.scale).round().to(torch.int8)
            layer.weight = nn.Parameter(whole, requires_grad=False)
    return model, tokenizer


def test_a_run_on_quantised_weights_is_refused_with_what_to_do_instead(tmp_path):
    model, tokenizer = quantised_backbone()
    for method in ("ELLA + JumpLoRA", "SeqLoRA"):
        message = refused(learn_sequence, model, tokenizer, SEQUENCE, METHODS[method], QUICK, out=tmp_path)
        for part in ("int8", "are quantised", "full-precision checkpoint", "save_pretrained"):
            assert part in message
    assert not list(tmp_path.iterdir())


def learn_one_task(model, tokenizer, folder):
    "What the refusal advises: train one task beside the quantised weights, and save its adapter."
    adapted = attach_adapter(model, QUICK, gated=True)
    log = train_task(adapted, tokenizer, TASKS[0], QUICK, IncLoRA())
    assert log.loss[-1] < log.loss[0]
    assert "are quantised; merge into the full-precision checkpoint" in refused(adapted.merge_and_unload)
    adapted.save_pretrained(folder)
    return adapted


def test_what_the_refusal_advises_works(tmp_path):
    model, tokenizer = quantised_backbone()
    layers = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    weights = [layer.weight.clone() for layer in layers]
    learn_one_task(model, tokenizer, tmp_path)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))
    exact = load_backbone("tiny-llama", device="cpu", dtype="float32")[0]
    before = exact.model.layers[0].self_attn.q_proj.weight.clone()
    merged = PeftModel.from_pretrained(exact, tmp_path).merge_and_unload()
    assert not torch.equal(merged.model.layers[0].self_attn.q_proj.weight, before)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_task_is_learned_beside_a_base_of_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    exact, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    exact.save_pretrained(tmp_path / "exact")
    asked = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    load = partial(AutoModelForCausalLM.from_pretrained, tmp_path / "exact", quantization_config=asked)
    model = load(device_map={"": "cpu"})
    assert "are quantised" in refused(learn_sequence, model, tokenizer, SEQUENCE, METHODS["ELLA"], QUICK)
    adapted = learn_one_task(model, tokenizer, tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(device_map={"": "cpu"}), tmp_path / "adapter")
    row = tokenizer("a ball", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again.eval()(**row).logits, adapted.eval()(**row).logits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_every_sign_of_quantised_weights_is_seen(dtype):
    model = nn.Sequential(nn.Linear(2, 2))
    for ordinary in (torch.float32, torch.bfloat16, torch.float16):
        check_processes(model.to(ordinary), 1, 1)
    model.is_quantized = True
    assert "is_quantized" in refused(check_processes, model, 1, 1)
    model.is_quantized = False
    model[0].weight.quant_state = object()  # four bits may be stored in bfloat16
    assert "0 holds float16" in refused(check_processes, model, 1, 1)
    model[0].weight = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
    assert str(dtype).removeprefix("torch.") in refused(check_processes, model, 1, 1)
