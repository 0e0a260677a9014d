"""EWC, replay, Muon and the two bounds: each against its definition, in real training; strengths as words."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jumplora.command_line import parse_strengths
from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence
from jumplora.learning.methods import EWC, METHODS, with_settings
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import (
    Collator,
    TrainConfig,
    attach_adapter,
    encode_rows,
    label_loss,
    row_gradients,
    task_steps,
    train_task,
)
from jumplora.method.adapter import adapter_layers
from jumplora.method.regularizers import ELLA, IncLoRA, Update
from jumplora.storage.record import Run

ROOT = Path(__file__).resolve().parent.parent
BALL = [("a ball", "sport"), ("an atom", "physics")] * 8
RAIN = [("rain", "yes"), ("sun", "no")] * 8
TASKS = (
    Task("topics", "Topic?\n", ("sport", "physics"), BALL, (), BALL[:4]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, (), RAIN[:4]),
)
SEQUENCE = TaskSequence("short", TASKS)
QUICK = TrainConfig(batch_size=4, learning_rate=1e-2, max_length=120)


def learn(method, sequence=SEQUENCE, config=QUICK, **options):
    model, tokenizer = load_backbone("tiny-llama")
    options = dict(seed=1, zero_shot=False, progress=False) | options
    return learn_sequence(model, tokenizer, sequence, method, config, **options), model


def adapted_model(backbone="tiny-llama"):
    "A backbone with an adapter whose B is not zero, so that both factors have gradients."
    torch.manual_seed(0)
    model, tokenizer = load_backbone(backbone)
    model = attach_adapter(model, QUICK, gated=False)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    return model, tokenizer


def updates(seed, shapes=(("a", (3, 2)), ("b", (2, 4))), grad=False):
    generator = torch.Generator().manual_seed(seed)
    factors = {n: (torch.randn(2, size, generator=generator), torch.randn(out, 2, generator=generator))
               for n, (out, size) in shapes}  # fmt: skip
    return {n: Update(B @ A, A.requires_grad_(grad), B.requires_grad_(grad)) for n, (A, B) in factors.items()}


def gradients(seed, count):
    "Made-up gradients of some rows."
    generator, like = torch.Generator().manual_seed(seed), updates(0)
    named = {f"{n}.{part}": getattr(u, part) for n, u in like.items() for part in "AB"}
    return [{k: torch.randn(w.shape, generator=generator) for k, w in named.items()} for _ in range(count)]


# ---- EWC --------------------------------------------------------------------------------------------------


def test_ewc_equals_its_formula_and_gradient_in_float64_after_two_tasks():
    ewc, importance = EWC(strength=3.0), {}
    for seed in (1, 2):
        rows = gradients(seed, 5)
        ewc.after_rows(iter(rows))
        ewc.after_task(updates(seed))
        for key in rows[0]:
            squares = np.mean([row[key].double().numpy() ** 2 for row in rows], axis=0)
            importance[key] = importance.get(key, 0) + squares
    current, last = updates(9, grad=True), updates(2)
    penalty = ewc.penalty(current)
    moved = {f"{n}.{p}": (getattr(u, p) - getattr(last[n], p)).detach().double().numpy()
             for n, u in current.items() for p in "AB"}  # fmt: skip
    expected = 3.0 / 2 * sum((importance[k] * moved[k] ** 2).sum() for k in moved)
    np.testing.assert_allclose(penalty.item(), expected, rtol=1e-5)
    penalty.backward()
    for name, update in current.items():
        for part in "AB":
            key = f"{name}.{part}"
            np.testing.assert_allclose(
                getattr(update, part).grad.numpy(), 3.0 * importance[key] * moved[key], rtol=1e-4, atol=1e-6
            )


def test_ewc_remembers_through_a_state_and_refuses_others():
    ewc = EWC(strength=2.0)
    ewc.after_rows(gradients(1, 3))
    ewc.after_task(updates(1))
    other = EWC(strength=2.0)
    other.load_state_dict(ewc.state_dict())
    assert torch.equal(other.penalty(updates(5)), ewc.penalty(updates(5)))
    with pytest.raises(ValueError, match="not the memory of EWC"):
        other.load_state_dict({"past.a": torch.zeros(1)})
    with pytest.raises(ValueError, match="not the memory of EWC"):
        other.load_state_dict({"anchor.a.A": torch.zeros(1)})
    with pytest.raises(ValueError, match="different layers"):
        ewc.penalty(updates(5, (("c", (3, 2)),)))
    with pytest.raises(ValueError, match="at least one training row"):
        EWC().after_rows([])


@pytest.mark.parametrize("backbone", ["tiny-llama", "tiny-t5"])
def test_the_gradients_of_rows_are_those_of_each_row_alone(backbone):
    model, tokenizer = adapted_model(backbone)
    found = list(row_gradients(model, tokenizer, TASKS[0], QUICK))
    assert len(found) == 16
    collator = Collator.for_model(model, tokenizer)
    weights = {f"{n}.{p}": getattr(layer, f"lora_{p}")["default"].weight
               for n, layer in adapter_layers(model).items() for p in "AB"}  # fmt: skip
    assert found[0].keys() == weights.keys()
    for i, row in enumerate(encode_rows(tokenizer, [TASKS[0]], QUICK, collator.encoder_decoder)[:3]):
        batch = collator([row])
        labels = batch.pop("labels")
        model.zero_grad()
        label_loss(model(**batch), labels, shift=not collator.encoder_decoder).backward()
        assert all(torch.equal(found[i][key], weight.grad) for key, weight in weights.items())


def test_a_strong_ewc_keeps_important_factors_where_they_were():
    ways = {}
    for strength in (0.0, 1e9):
        method = Method("EWC", regularizer=EWC(strength), after_task="keep")
        seen = {}
        real = continual.Learner.finish

        def watched(learner, i, log, real=real, seen=seen):
            real(learner, i, log)
            memory = learner.regularizer
            seen[i] = ({k: w.clone() for k, w in memory.importance.items()}, dict(memory.anchor))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(continual.Learner, "finish", watched)
            learn(method)
        (importance, before), (_, after) = seen[0], seen[1]
        ways[strength] = sum((importance[k] * (after[k] - before[k]).square()).sum().item() for k in before)
    assert ways[1e9] < 0.1 * ways[0.0]


def test_ewc_needs_one_adapter_and_asks_nothing_during_the_first_task():
    with pytest.raises(ValueError, match="EWC remembers one adapter; use after_task='keep'"):
        Method("EWC", regularizer=EWC())
    run, _ = learn(replace(METHODS["EWC"], regularizer=EWC(1e4)))
    penalty = run.extra["penalty"]
    assert max(penalty["topics"]) == 0 and max(penalty["weather"]) > 0
    assert penalty["weather"][0] == 0  # the second task begins at the anchor


def test_ewc_measures_the_importance_of_each_task_on_its_own_rows(monkeypatch):
    asked, real = [], continual.row_gradients
    monkeypatch.setattr(continual, "row_gradients", lambda *given: asked.append(given) or real(*given))
    learn(METHODS["EWC"])
    assert [next(part for part in given if isinstance(part, Task)) for given in asked] == list(TASKS)


@pytest.mark.parametrize("name", ["ELLA", "ELLA + JumpLoRA", "O-LoRA"])
def test_a_penalty_on_finished_updates_needs_fresh_adapters(name):
    with pytest.raises(ValueError, match="remembers finished updates; use after_task='merge'"):
        replace(METHODS[name], after_task="keep")


# ---- replay and bounds ------------------------------------------------------------------------------------


def rows_learned(method, sequence=SEQUENCE):
    "The (prompt, answer) rows that each task's training saw."
    seen, real = [], continual.train_task

    def watched(model, tokenizer, task, *args, also=(), **options):
        seen.append([task.train, *[other.train for other in also]])
        return real(model, tokenizer, task, *args, also=also, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "train_task", watched)
        run, model = learn(method, sequence)
    return seen, run, model


def test_replay_learns_a_few_rows_of_every_older_task_again():
    seen, run, _ = rows_learned(METHODS["Replay"])
    assert [len(groups) for groups in seen] == [1, 2]
    again = seen[1][1]
    assert len(again) == 1 and again[0] in TASKS[0].train  # two percent of sixteen rows, rounded up
    half, run, _ = rows_learned(replace(METHODS["Replay"], rehearsal=0.5))
    assert sorted(row.label for row in half[1][1]) == ["physics"] * 4 + ["sport"] * 4
    assert len(run.extra["loss"]["weather"]) == task_steps(TASKS[1], QUICK, [TASKS[0].limit(train=8)]) == 6
    assert rows_learned(METHODS["SeqLoRA"])[0] == [[TASKS[0].train], [TASKS[1].train]]
    third = TaskSequence("three", [*TASKS, replace(TASKS[1], name="again")])
    three, _, _ = rows_learned(replace(METHODS["Replay"], rehearsal=0.5), third)
    assert [row.text for row in three[2][1]] == [row.text for row in half[1][1]]  # of the first task still
    assert [len(rows) for rows in three[2]] == [16, 8, 8]


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "2 %", float("nan")])
def test_a_share_outside_zero_to_one_is_refused(share):
    with pytest.raises(ValueError, match="rehearsal="):
        Method("mine", rehearsal=share)


def test_multi_task_learning_sees_all_rows_once_and_scores_at_the_end(tmp_path):
    seen, run, model = rows_learned(METHODS["multi-task"])
    assert [[len(rows) for rows in groups] for groups in seen] == [[16, 16]]
    assert run.complete and np.isnan(run.accuracy[0]).all() and not np.isnan(run.accuracy[1]).any()
    assert np.isnan(run.backward_transfer) and not np.isnan(run.average_accuracy)
    alone, tokenizer = load_backbone("tiny-llama")
    torch.manual_seed(0)
    seed = 1000 * 1 + 1
    continual.set_seed(seed)
    adapted = attach_adapter(alone, QUICK, gated=False)
    log = train_task(adapted, tokenizer, TASKS[1], QUICK, IncLoRA(), also=[TASKS[0]], seed=seed)
    assert log.loss == run.extra["loss"]["weather"]
    first, _ = learn(METHODS["multi-task"], out=tmp_path)
    again, _ = learn(METHODS["multi-task"], out=tmp_path)
    assert np.array_equal(first.accuracy, again.accuracy, equal_nan=True)
    assert again.seconds == first.seconds  # nothing was done twice


def test_a_single_task_is_the_first_task_of_inclora_bit_for_bit():
    alone, model = learn(METHODS["single task"], TaskSequence("topics", TASKS[:1]))
    other, inc = learn(METHODS["IncLoRA"], TaskSequence("topics", TASKS[:1]))
    assert alone.extra["loss"] == other.extra["loss"] and np.array_equal(alone.accuracy, other.accuracy)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), inc.parameters(), strict=True))
    with pytest.raises(ValueError, match="learns one task; 'short' has 2"):
        learn(METHODS["single task"])


# ---- Muon -------------------------------------------------------------------------------------------------


def test_muon_steps_are_those_of_torch_on_every_factor():
    model, tokenizer = adapted_model()
    other, _ = adapted_model()
    config = replace(QUICK, batch_size=16, max_grad_norm=1e9)
    train_task(model, tokenizer, TASKS[0], config, IncLoRA(), optimizer="muon", seed=3)
    collator = Collator.for_model(other, tokenizer)
    batch = collator(encode_rows(tokenizer, [TASKS[0]], config, False))
    labels = batch.pop("labels")
    label_loss(other(**batch), labels).backward()
    factors = [p for p in other.parameters() if p.requires_grad]
    torch.optim.Muon(factors, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    for mine, theirs in zip((p for p in model.parameters() if p.requires_grad), factors, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_the_loop_takes_the_optimizer_of_the_method(monkeypatch):
    taken, real = [], continual.train_task

    def watched(*given, **options):
        taken.append(options["optimizer"])
        return real(*given, **options)

    monkeypatch.setattr(continual, "train_task", watched)
    learn(METHODS["IncLoRA (Muon)"])
    assert taken == ["muon", "muon"]


def test_muon_is_refused_where_there_is_a_gate_and_unknown_optimizers_everywhere():
    with pytest.raises(ValueError, match="a gate has a threshold; use adamw"):
        Method("mine", gated=True, optimizer="muon")
    with pytest.raises(ValueError, match="optimizer='adam'"):
        Method("mine", optimizer="adam")
    with pytest.raises(ValueError, match="training='all'"):
        Method("mine", training="all")


# ---- what a record says -----------------------------------------------------------------------------------


def test_records_from_before_a_choice_existed_keep_their_names():
    records = sorted((ROOT / "results/laptop").glob("*/record.json"))
    assert len(records) == 5
    for path in records:
        run = Run.load(path)
        method = with_settings(METHODS[run.method], strength=3e5)
        described = json.loads(json.dumps(method.describe()))
        assert described == run.configuration["method"]
    assert METHODS["Replay"].describe()["rehearsal"] == 0.02


def test_a_method_with_a_penalty_of_its_own_runs_and_is_recorded():
    class Halves(ELLA):
        def layer_penalty(self, name, update):
            return super().layer_penalty(name, update) / 2

    run, _ = learn(Method("halves", regularizer=Halves(1e6)))
    whole, _ = learn(Method("wholes", regularizer=ELLA(1e6)))
    ratio = run.extra["penalty"]["weather"][1] / whole.extra["penalty"]["weather"][1]  # B is 0 at step 0
    assert ratio == pytest.approx(0.5, rel=1e-2)
    assert run.configuration["method"]["regularizer"]["name"] == "Halves"


# ---- strengths --------------------------------------------------------------------------------------------


def test_strengths_are_numbers_or_lists_for_methods_that_have_one():
    assert parse_strengths(["EWC=3e5", "ELLA=0,1,2"]) == {"EWC": 3e5, "ELLA": [0.0, 1.0, 2.0]}
    assert with_settings(METHODS["IncLoRA"], strength=1.0) == METHODS["IncLoRA"]
    assert with_settings(METHODS["EWC"], strength=5.0, past_dtype="bfloat16").regularizer.strength == 5.0
    assert METHODS["ELLA"].regularizer.strength == 3e4  # the list itself does not change


def test_one_strength_per_task_is_for_ella_alone():
    with pytest.raises(ValueError, match="only ELLA takes one per task"):
        parse_strengths(["O-LoRA=0,1,1,1"])


@pytest.mark.parametrize("pair", ["3e5", "ELLA", "ELLA=", "ELLA=a", "ELLA=1;2", "=3"])
def test_what_is_no_strength_is_refused(pair):
    with pytest.raises(ValueError, match="NAME=NUMBER|method with a strength"):
        parse_strengths([pair])


@pytest.mark.parametrize("name", ["IncLoRA", "Ella", "ELLA + JumpLoRA"])
def test_a_strength_for_a_method_without_one_is_refused(name):
    with pytest.raises(ValueError, match="method with a strength"):
        parse_strengths([f"{name}=1"])


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_strengths_of_the_wrong_length_is_found_before_anything_is_learned(count, monkeypatch):
    monkeypatch.setattr(continual, "train_task", None)
    method = with_settings(METHODS["ELLA"], strength=[1.0] * count)
    with pytest.raises(ValueError, match=f"strength has {count} values for 2 tasks; give one per task"):
        learn(method)
