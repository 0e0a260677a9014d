"""The list: EWC, replay, Muon and the references against their definitions; own methods resumed."""

import os
import signal
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from equal_runs import content, same_weights

from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence
from jumplora.learning.methods import EWC, METHODS, base_of, with_settings
from jumplora.learning.tasks import Task, TaskSequence, encode_answer, encode_prompt
from jumplora.learning.training import (
    Collator,
    Progress,
    TrainConfig,
    attach_adapter,
    label_loss,
    row_gradients,
    task_steps,
    train_task,
)
from jumplora.method.adapter import adapter_layers
from jumplora.method.regularizers import ELLA, IncLoRA, Update
from jumplora.storage.state import Stopped

BALL = [("a ball", "sport"), ("an atom", "physics")] * 8
RAIN = [("rain", "yes"), ("sun", "no")] * 8
TASKS = (
    Task("topics", "Topic?\n", ("sport", "physics"), BALL, (), BALL[:4]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, (), RAIN[:4]),
)
SEQUENCE = TaskSequence("short", TASKS)
QUICK = TrainConfig(batch_size=4, learning_rate=1e-2, max_length=120)  # four steps


def learn(method, sequence=SEQUENCE, out=None):
    "A run on a fresh backbone, and the model it ends with."
    model, tokenizer = load_backbone("tiny-llama")
    options = dict(seed=1, zero_shot=False, progress=False, out=out)
    return learn_sequence(model, tokenizer, sequence, method, QUICK, **options), model


@pytest.fixture
def watched(monkeypatch):
    "For every call of `train_task`: the training rows of its task and of those that join, and the optimizer."
    calls, real = [], continual.train_task

    def train(model, tokenizer, task, *rest, also, optimizer, **options):
        calls.append(([list(one.train) for one in (task, *also)], optimizer))
        return real(model, tokenizer, task, *rest, also=also, optimizer=optimizer, **options)

    monkeypatch.setattr(continual, "train_task", train)
    return calls


def adapted_model(backbone="tiny-llama", config=QUICK):
    "A backbone with an adapter whose B is not zero, so that both factors have gradients."
    torch.manual_seed(0)
    model, tokenizer = load_backbone(backbone)
    model = attach_adapter(model, config, gated=False)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    return model, tokenizer


def updates(seed, shapes=(("a", (3, 2)), ("b", (2, 4))), grad=False):
    generator = torch.Generator().manual_seed(seed)
    factors = {n: (torch.randn(2, size, generator=generator), torch.randn(out, 2, generator=generator))
               for n, (out, size) in shapes}  # fmt: skip
    return {n: Update(B @ A, A.requires_grad_(grad), B.requires_grad_(grad)) for n, (A, B) in factors.items()}


def factors_of(named):
    return {f"{n}.{part}": getattr(update, part) for n, update in named.items() for part in "AB"}


def gradients(seed, count):
    "Made-up gradients of some rows."
    generator = torch.Generator().manual_seed(seed)
    like = factors_of(updates(0)).items()
    return [{key: torch.randn(w.shape, generator=generator) for key, w in like} for _ in range(count)]


# ---- EWC --------------------------------------------------------------------------------------------------


def test_ewc_equals_its_formula_and_gradient_in_float64_after_two_tasks():
    ewc, importance = EWC(strength=3.0), {}
    for seed in (1, 2):
        rows, live = gradients(seed, 5), updates(seed)
        ewc.after_rows(iter(rows))
        ewc.after_task(live)
        for factor in factors_of(live).values():  # the adapter is kept, and its factors change in place
            factor.add_(1.0)
        for key in rows[0]:
            squares = np.mean([row[key].double().numpy() ** 2 for row in rows], axis=0)
            importance[key] = importance.get(key, 0) + squares
    current, last = updates(9, grad=True), factors_of(updates(2))
    moved = {k: (w - last[k]).detach().double().numpy() for k, w in factors_of(current).items()}
    penalty = ewc.penalty(current)
    expected = 3.0 / 2 * sum((importance[k] * moved[k] ** 2).sum() for k in moved)
    np.testing.assert_allclose(penalty.item(), expected, rtol=1e-5)
    penalty.backward()
    for key, factor in factors_of(current).items():
        np.testing.assert_allclose(factor.grad, 3.0 * importance[key] * moved[key], rtol=1e-4, atol=1e-6)


def test_ewc_remembers_through_a_state_and_refuses_others():
    ewc, other = EWC(strength=2.0), EWC(strength=2.0)
    ewc.after_rows(gradients(1, 3))
    ewc.after_task(updates(1))
    other.load_state_dict(ewc.state_dict())
    assert torch.equal(other.penalty(updates(5)), ewc.penalty(updates(5)))
    for message, wrong in (
        ("not the memory of EWC", lambda: other.load_state_dict({"past.a": torch.zeros(1)})),
        ("different layers", lambda: ewc.penalty(updates(5, (("c", (3, 2)),)))),
        ("at least one training row", lambda: EWC().after_rows([])),
        ("strength=-1.0 is not allowed", lambda: EWC(-1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def encoded(tokenizer, encoder_decoder):
    "The training rows of the first task as (prompt ids, answer ids)."
    prompts = [encode_prompt(tokenizer, TASKS[0], row.text, QUICK.max_length) for row in TASKS[0].train]
    answers = [encode_answer(tokenizer, row.label, encoder_decoder) for row in TASKS[0].train]
    return list(zip(prompts, answers, strict=True))


@pytest.mark.parametrize("backbone", ["tiny-llama", "tiny-t5"])
def test_the_gradients_of_rows_are_those_of_each_row_alone_without_dropout(backbone):
    config = replace(QUICK, lora_dropout=0.5)
    model, tokenizer = adapted_model(backbone, config)
    found = list(row_gradients(model.train(), tokenizer, TASKS[0], config))
    assert len(found) == 16
    collator = Collator.for_model(model, tokenizer)
    weights = {f"{n}.{p}": getattr(layer, f"lora_{p}")["default"].weight
               for n, layer in adapter_layers(model).items() for p in "AB"}  # fmt: skip
    assert found[0].keys() == weights.keys()
    model.eval()
    for i, row in enumerate(encoded(tokenizer, collator.encoder_decoder)[:3]):
        batch = collator([row])
        labels = batch.pop("labels")
        model.zero_grad()
        label_loss(model(**batch), labels, shift=not collator.encoder_decoder).backward()
        assert all(torch.equal(found[i][key], w.grad) and w.grad.any() for key, w in weights.items())


def test_a_strong_ewc_keeps_important_factors_where_they_were(monkeypatch):
    real, tasks, moved = continual.training.row_gradients, [], {}
    monkeypatch.setattr(
        continual.training, "row_gradients", lambda *args: tasks.append(args[2]) or real(*args)
    )
    for strength in (1e-6, 1e6):
        penalty = learn(with_settings(METHODS["EWC"], strength=strength))[0].extra["penalty"]
        assert max(penalty["topics"]) == 0 and max(penalty["weather"]) > 0
        assert penalty["weather"][0] == 0  # the second task begins at the anchor
        moved[strength] = penalty["weather"][-1] / strength
    assert moved[1e6] < 0.25 * moved[1e-6]  # Adam's steps are of the size of its rate
    assert tasks == [*TASKS, *TASKS]  # importance comes from the rows of the task that was learned


# ---- replay, references, Muon -----------------------------------------------------------------------------


def test_replay_learns_a_few_rows_of_every_older_task_again(watched):
    assert learn(METHODS["Replay"])[0].configuration["method"]["rehearsal"] == 0.02
    (first, _), (second, _) = watched
    assert first == [BALL]
    assert len(second[1]) == 1 and second[1][0] in BALL  # two percent of sixteen rows, rounded up
    watched.clear()
    half = replace(METHODS["Replay"], rehearsal=0.5)
    three = TaskSequence("three", [*TASKS, replace(TASKS[1], name="again")])
    run, _ = learn(half, three)
    rows = [rows for rows, _ in watched]
    assert [[len(part) for part in call] for call in rows] == [[16], [16, 8], [16, 8, 8]]
    assert sorted(label for _, label in rows[1][1]) == ["physics"] * 4 + ["sport"] * 4
    assert rows[2][1] == rows[1][1]  # the same rows in every later task
    steps = [task_steps(task, QUICK, half.tasks_beside(three, i)) for i, task in enumerate(three)]
    assert [len(loss) for loss in run.extra["loss"].values()] == steps == [4, 6, 8]


def test_multi_task_learning_sees_all_rows_once_and_scores_at_the_end(watched):
    run, _ = learn(METHODS["multi-task"])
    assert watched == [([RAIN, BALL], "adamw")]
    assert run.complete and np.isnan(run.accuracy[0]).all() and not np.isnan(run.accuracy[1]).any()
    assert np.isnan(run.backward_transfer) and not np.isnan(run.average_accuracy)
    model, tokenizer = load_backbone("tiny-llama")
    continual.set_seed(1001)  # 1000 · seed + position of the task
    adapted = attach_adapter(model, QUICK, gated=False)
    log = train_task(adapted, tokenizer, TASKS[1], QUICK, IncLoRA(), also=[TASKS[0]], seed=1001)
    assert log.loss == run.extra["loss"]["weather"]


def test_a_single_task_is_the_first_task_of_inclora_bit_for_bit():
    one = TaskSequence("topics", TASKS[:1])
    (alone, model), (first, inc) = learn(METHODS["single task"], one), learn(METHODS["IncLoRA"], one)
    assert alone.extra["loss"] == first.extra["loss"] and np.array_equal(alone.accuracy, first.accuracy)
    assert same_weights(model, inc)


def test_muon_steps_are_those_of_torch_on_every_factor(watched):
    model, tokenizer = adapted_model()
    other, _ = adapted_model()
    config = replace(QUICK, batch_size=16, max_grad_norm=1e9)
    train_task(model, tokenizer, TASKS[0], config, IncLoRA(), optimizer="muon", seed=3)
    batch = Collator.for_model(other, tokenizer)(encoded(tokenizer, False))
    labels = batch.pop("labels")
    label_loss(other(**batch), labels).backward()
    factors = [p for p in other.parameters() if p.requires_grad]
    torch.optim.Muon(factors, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    for mine, theirs in zip((p for p in model.parameters() if p.requires_grad), factors, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    learn(METHODS["IncLoRA (Muon)"])
    assert watched == [([BALL], "muon"), ([RAIN], "muon")]


# ---- settings ---------------------------------------------------------------------------------------------


def given_strengths(count):
    return lambda: learn(with_settings(METHODS["ELLA"], strength=[1.0] * count))


@pytest.mark.parametrize(
    "change, message",
    [
        (("EWC", dict(after_task="merge")), "EWC remembers one adapter; use after_task='keep'"),
        (("ELLA", dict(after_task="keep")), "ELLA uses finished updates; use after_task='merge'"),
        (("IncLoRA + random mask", dict(gated=False)), "bars entries of a gated update; use gated=True"),
        (("IncLoRA + random mask", dict(after_task="keep")), "RandomMask bars entries, which no kept"),
        (("O-LoRA", dict(after_task="keep")), "OLoRA uses finished updates"),
        (("IncLoRA pruned", dict(after_task="keep")), "Prune uses finished updates"),
        (("IncLoRA (Muon)", dict(gated=True)), "a gate has a threshold; use adamw"),
        (("IncLoRA", dict(optimizer="adam")), "optimizer='adam'"),
        (("IncLoRA", dict(training="all")), "training='all'"),
        *[(("Replay", dict(rehearsal=share)), "rehearsal=") for share in (-0.1, 1.5, True, "2 %", np.nan)],
        (given_strengths(1), "strength has 1 values for 2 tasks; give one per task"),
        (given_strengths(3), "strength has 3 values for 2 tasks; give one per task"),
        (lambda: learn(METHODS["single task"]), "learns one task; 'short' has 2"),
        (lambda: learn(Method("kept", gated=True, after_task="keep")), "again .*use after_task='merge'"),
        (lambda: with_settings(METHODS["ELLA"], name="mine"), "setting='name' is not known"),
        *[(lambda method=method: with_settings(method, strenght=1.0), "'strenght'.*did you mean 'strength'")
          for method in METHODS.values()],
    ],
)  # fmt: skip
def test_choices_that_clash_or_do_not_exist_are_refused_before_anything_is_learned(change, message, watched):
    with pytest.raises(ValueError, match=message):
        change() if callable(change) else replace(METHODS[change[0]], **change[1])
    assert watched == []


def test_another_strength_changes_nothing_else():
    method = METHODS["ELLA + JumpLoRA"]
    changed = with_settings(method, strength=[0.0, 5.0], past_dtype="bfloat16")
    assert changed.regularizer.strength == (0.0, 5.0) and changed.regularizer.past_dtype == "bfloat16"
    assert replace(changed, regularizer=method.regularizer) == method and changed.gated
    assert METHODS["ELLA"].regularizer.strength == method.regularizer.strength == 3e4  # the list stays
    assert with_settings(method, strength=None) == method
    assert with_settings(METHODS["EWC"], strength=5.0, past_dtype="bfloat16").regularizer.strength == 5.0
    assert with_settings(METHODS["IncLoRA"], strength=5.0) == METHODS["IncLoRA"]
    assert [base_of(name) for name in ("ELLA + JumpLoRA", "ELLA")] == ["ELLA", "ELLA"]


# ---- a method of one's own --------------------------------------------------------------------------------


@dataclass(eq=False)
class Touched(IncLoRA):
    "A penalty on entries that older updates have changed, with a memory of two kinds."

    memory = ("touched", "tasks")
    power: float = 2.0
    touched: dict = field(default_factory=dict, init=False)
    tasks: int = field(default=0, init=False)

    def layer_penalty(self, name, update):
        return 10 * self.tasks * (update.delta.abs() ** self.power * self.touched.get(name, False)).sum()

    def after_task(self, updates):
        self.touched = {n: (u.delta != 0) | self.touched.get(n, False) for n, u in updates.items()}
        self.tasks += 1


class WorstLayer(ELLA):
    "ELLA with a penalty of all layers at once."

    def penalty(self, updates):
        return max(self.layer_penalty(name, update) for name, update in updates.items())


OWN = [
    Method("Touched", gated=True, regularizer=Touched()),
    Method("WorstLayer", regularizer=WorstLayer(1e6)),
    Method("kept", after_task="keep", regularizer=Touched()),
]


@pytest.mark.parametrize("method", OWN, ids=lambda method: method.name)
def test_a_method_of_ones_own_is_penalised_and_resumes_with_the_same_bits(method, tmp_path, monkeypatch):
    whole, model = learn(method, out=tmp_path / "whole")
    penalty = whole.extra["penalty"]
    assert penalty["topics"] == [0.0] * 4 and max(penalty["weather"]) > 0
    real, steps = continual.train_task, []

    def advance(count):
        steps.append(count)
        if len(steps) == 8:  # the beginning of two tasks, four steps of the first, two of the second
            os.kill(os.getpid(), signal.SIGTERM)

    def train(*args, callbacks, **options):
        return real(*args, callbacks=[Progress(advance), *callbacks], **options)

    monkeypatch.setattr(continual, "train_task", train)
    with pytest.raises(Stopped):
        learn(method, out=tmp_path / "out")
    resumed, same = learn(method, out=tmp_path / "out")
    assert steps == [0, 1, 1, 1, 1, 0, 1, 1, 2, 1, 1]  # then from the second step of the second task
    assert content(resumed) == content(whole) and same_weights(model, same)


def test_settings_of_ones_own_are_fields_of_a_dataclass_and_enter_the_record():
    method = with_settings(OWN[0], power=3.0)
    assert method.regularizer.power == 3.0 and OWN[0].regularizer.power == 2.0
    assert method.describe()["regularizer"] == {"name": "Touched", "power": 3.0}
    undecorated = Method("mine", regularizer=type("Mine", (IncLoRA,), {"strength": 1.0})())
    assert with_settings(undecorated, strength=2.0) == undecorated
    assert undecorated.describe()["regularizer"] == {"name": "Mine"}
