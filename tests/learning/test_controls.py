"Controls of the gate, the held density, and scores by labels, each against a slow computation."

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from running.test_trunk import CONFIG, SEQUENCE, task, whole_words

from jumplora.command_line import main
from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence, weights_of
from jumplora.learning.evaluation import evaluate, text_loss
from jumplora.learning.methods import METHODS, DisjointMasks, Prune, RandomMask, Scale, with_settings
from jumplora.learning.tasks import Question, TaskSequence, encode_answer, encode_prompt
from jumplora.learning.training import TrainConfig, attach_adapter
from jumplora.running.grid import Job, job_method
from jumplora.storage.rollback import load_without, rollback
from jumplora.storage.state import new_run
from jumplora.storage.updates import archive_path, read_archive

LABELS = ["red", "blue", "green", "yellow"]


def learn(method, out=None, **changes):
    model = load_backbone("tiny-llama", dtype="float32")[0]
    before = {
        name: weight.clone() for name, weight in weights_of(attach_adapter(model, CONFIG, False)).items()
    }
    model = load_backbone("tiny-llama", dtype="float32")[0]
    run = learn_sequence(
        model, whole_words(), SEQUENCE, method, replace(CONFIG, **changes), scoring="labels", out=out,
        progress=False, zero_shot=False, neutral=["a b c some longer text", "x y them"],
    )  # fmt: skip
    after = {name: model.get_submodule(name).weight for name in before}
    return run, {name: (after[name] - before[name]).detach() for name in before}


def updates_of(run, out):
    archives = [read_archive(archive_path(out / run.name, i, name)) for i, name in enumerate(run.tasks)]
    return [{layer: a.update(layer).dense() for layer in a.header.layers} for a in archives]


@pytest.mark.parametrize(("name", "kept"), [("IncLoRA + late gate", 0.1), ("IncLoRA pruned", 0.1)])
def test_exactly_the_share_that_was_asked_for_is_merged_after_every_task(name, kept, tmp_path):
    run, moved = learn(METHODS[name], tmp_path)
    entries = sum(change.numel() for change in moved.values())
    for update, noted in zip(updates_of(run, tmp_path), run.extra["updates"].values(), strict=True):
        flat = torch.cat([part.flatten() for part in update.values()])
        assert flat.count_nonzero().item() == round(kept * entries)
        assert noted["kept"] == pytest.approx(flat.count_nonzero().item() / entries)
        assert noted["norm"] == pytest.approx(flat.double().norm().item(), rel=1e-5)


def test_the_loss_of_neutral_texts_is_measured_before_and_after_every_task():
    model = load_backbone("tiny-llama", dtype="float32")[0]
    texts, found = ["a b c some longer text", "x y them"], {"": None}
    found[""] = text_loss(model, whole_words(), texts)
    run, _ = learn(METHODS["IncLoRA"])
    alone = TaskSequence("one", SEQUENCE[:1])
    options = dict(scoring="labels", progress=False, zero_shot=False)
    learn_sequence(model, whole_words(), alone, METHODS["IncLoRA"], CONFIG, **options)
    found["first"] = text_loss(model, whole_words(), texts)
    noted = run.extra["neutral_loss"]
    assert set(noted) == {"", "first", "second"} and noted["second"] != noted["first"] != noted[""]
    assert {after: noted[after] for after in found} == pytest.approx(found)
    assert run.base_loss == noted["second"] - noted[""]


def test_a_run_scores_among_the_labels_seen_so_far(monkeypatch):
    asked, real = [], continual.evaluate

    def watched(model, tokenizer, one, split, labels, **options):
        asked.append((one.name, labels))
        return real(model, tokenizer, one, split, labels, **options)

    monkeypatch.setattr(continual, "evaluate", watched)
    learn(METHODS["IncLoRA"])
    assert asked == [("first", LABELS[:2]), ("first", LABELS), ("second", LABELS)]


def test_pruning_keeps_the_largest_entries_and_scaling_the_direction():
    torch.manual_seed(0)
    model = attach_adapter(load_backbone("tiny-llama", dtype="float32")[0], CONFIG, gated=False)
    from jumplora.learning.training import named_updates

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    updates = named_updates(model)
    flat = torch.cat([update.delta.flatten() for update in updates.values()]).detach().numpy()
    pruned = Prune(0.05).finish(updates)
    found = torch.cat([update.delta.flatten() for update in pruned.values()]).detach().numpy()
    largest = np.sort(np.abs(flat))[-round(0.05 * flat.size)]
    np.testing.assert_array_equal(found, np.where(np.abs(flat) >= largest, flat, 0))
    scaled = Scale(2.5).finish(updates)
    found = torch.cat([update.delta.flatten() for update in scaled.values()]).detach().numpy()
    np.testing.assert_allclose(found, flat * 2.5 / np.linalg.norm(flat.astype(np.float64)), rtol=1e-5)
    zero = {name: replace(update, delta=torch.zeros_like(update.delta)) for name, update in updates.items()}
    assert not any(update.delta.any() for update in Scale(2.5).finish(zero).values())


def test_a_random_mask_bars_the_same_entries_in_every_task(tmp_path):
    run, moved = learn(METHODS["IncLoRA + random mask"], tmp_path)
    assert RandomMask(kept=0.01).masks({"small": (2, 20)})["small"].sum() == 1
    masks = RandomMask().masks({name: tuple(change.shape) for name, change in moved.items()})
    other = RandomMask(seed=1).masks({name: tuple(change.shape) for name, change in moved.items()})
    for name, change in moved.items():
        assert masks[name].sum() == round(0.1 * change.numel()) and not masks[name].equal(other[name])
        assert change[masks[name]].any() and not change[~masks[name]].any()
    first, second = updates_of(run, tmp_path)
    assert all((first[name] != 0).equal(second[name] != 0) for name in masks)


def test_disjoint_masks_leave_no_entry_to_two_tasks_and_resume_with_their_memory(tmp_path):
    run, _ = learn(METHODS["IncLoRA + disjoint masks"], tmp_path)
    first, second = updates_of(run, tmp_path)
    for name in first:
        assert (
            first[name].any() and second[name].any() and not ((first[name] != 0) & (second[name] != 0)).any()
        )
    plain, _ = learn(METHODS["IncLoRA + late gate"])
    assert plain.extra["loss"]["second"] != run.extra["loss"]["second"]  # the bar counts while it learns
    memory = DisjointMasks()
    memory.used = {name: part != 0 for name, part in first.items()}
    copy = DisjointMasks()
    copy.load_state_dict(memory.state_dict())
    assert all(copy.used[name].equal(memory.used[name]) for name in first)


def test_a_pruned_task_can_be_taken_out_again(tmp_path):
    run, moved = learn(METHODS["IncLoRA pruned"], tmp_path)
    model = load_backbone("tiny-llama", dtype="float32")[0]
    base = {name: model.get_submodule(name).weight.clone() for name in moved}
    given = (model, whole_words())
    rollback(tmp_path / run.name, "second", backbone=given)
    rolled, _, _ = load_without(tmp_path / run.name, "second", backbone=given)
    first = updates_of(run, tmp_path)[0]
    for name in moved:
        torch.testing.assert_close(
            rolled.get_submodule(name).weight, base[name] + first[name], rtol=0, atol=1e-7
        )


def test_settings_of_a_method_are_those_of_training():
    with pytest.raises(ValueError, match="setting='kep' is not known"):
        Method("mine", settings=dict(kep=0.1))
    with pytest.raises(ValueError, match="kept=2.0"):
        Method("mine", settings=dict(kept=2.0))
    assert with_settings(METHODS["IncLoRA scaled"], norm=3.0).regularizer.norm == 3.0


def test_a_setting_that_was_changed_wins_over_that_of_the_method():
    late = METHODS["IncLoRA + late gate"]
    assert late.configure(TrainConfig()) == TrainConfig(**late.settings)
    changed = late.configure(TrainConfig(kept=0.01, learning_rate=1.0))
    assert changed == TrainConfig(**late.settings | dict(kept=0.01), learning_rate=1.0)
    assert late.configure(changed) == changed
    job = Job("IncLoRA + late gate", "newsroom", 1, "tiny-llama", train=dict(kept=0.01))
    assert job_method(job)[1].kept == 0.01 and job_method(job)[1].hold_kept
    method, config = job_method(replace(job, train=dict(hold_kept=False, gate_start=0.2)))
    assert method.configure(config) == config == replace(config, hold_kept=False, gate_start=0.2, kept=0.1)
    run, _ = learn(METHODS["IncLoRA + late gate"], kept=0.5)
    assert run.configuration["train"]["kept"] == 0.5 and run.configuration["train"]["hold_kept"]
    run, _ = learn(METHODS["IncLoRA + late gate"])
    assert run.configuration["train"]["kept"] == 0.1 and run.configuration["scoring"] == "labels"


def slow_scores(model, tokenizer, one, rows):
    "ln p of each label's first token among all labels; whether every token of the answer is the likeliest."
    first = [encode_answer(tokenizer, label, False)[0] for label in LABELS]
    scores, exact = [], []
    for row in rows:
        prompt, answer = (
            encode_prompt(tokenizer, one, row.text, 40),
            encode_answer(tokenizer, row.label, False),
        )
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
        scores.append(logits[len(prompt) - 1, first].log_softmax(-1).tolist())
        exact.append(logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer)
    return np.array(scores), exact


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_scores_by_labels_are_those_of_one_row_at_a_time(batch):
    model = load_backbone("tiny-llama", dtype="float32")[0]
    learn_sequence(
        model, whole_words(), SEQUENCE, METHODS["SeqLoRA"], CONFIG, scoring="labels", progress=False
    )
    one = SEQUENCE[0]
    with torch.no_grad():
        scores, exact = slow_scores(model, whole_words(), one, one.test)
    right = [LABELS.index(row.label) for row in one.test]
    found = evaluate(model, whole_words(), one, labels=LABELS, max_length=40, batch_size=batch)
    assert found.right == tuple(exact) and found.seen == tuple((scores.argmax(1) == right).tolist())
    assert found.likeliest == tuple((scores[:, :2].argmax(1) == right).tolist())
    assert found.log_loss == pytest.approx(-scores[range(len(right)), right].mean(), abs=1e-6)
    assert found.rows == len(one.test) and found.answers == ()


@torch.no_grad()
def test_a_model_that_reads_padding_as_text_is_scored_one_row_at_a_time(monkeypatch):
    model = load_backbone("tiny-llama", dtype="float32")[0]
    given = dict(labels=LABELS, max_length=40, batch_size=4)
    sizes = []
    monkeypatch.setattr("jumplora.running.answers.reads_together", lambda model, length: False)
    evaluate(model, whole_words(), SEQUENCE[0], advance=sizes.append, **given)
    assert set(sizes) == {1}


@torch.no_grad()
def test_options_of_equal_probability_are_no_choice():
    model = load_backbone("tiny-llama", dtype="float32")[0]
    model.lm_head.weight.zero_()
    found = evaluate(model, whole_words(), SEQUENCE[0], labels=LABELS, max_length=40)
    assert not any(found.seen + found.likeliest) and found.log_loss == pytest.approx(math.log(4))
    assert not any(evaluate(model, whole_words(), SEQUENCE[0], max_length=40).likeliest)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["red", "blue", "red blue"], "'red' and 'red blue' begin with the same token; use other words, or"),
        (["red"], "the label 'blue' is not among"),
        (["red", "blue", "red"], None),
    ],
)
def test_labels_that_cannot_be_distinguished_are_refused(labels, message):
    model = load_backbone("tiny-llama", dtype="float32")[0]
    given = dict(labels=labels, max_length=40)
    if message is None:
        assert evaluate(model, whole_words(), SEQUENCE[0], **given).rows == len(SEQUENCE[0].test)
        return
    with pytest.raises(ValueError, match=message):
        evaluate(model, whole_words(), SEQUENCE[0], **given)


def test_a_row_with_the_label_of_another_task_is_refused_where_labels_are_scored():
    model = load_backbone("tiny-llama", dtype="float32")[0]
    outside = replace(SEQUENCE[0], test=[("a", SEQUENCE[1].options[0])])
    with pytest.raises(ValueError, match=f"the label {SEQUENCE[1].options[0]!r} is not among"):
        evaluate(model, whole_words(), outside, labels=LABELS, max_length=40)


def test_labels_that_cannot_be_scored_are_found_before_anything_is_learned(monkeypatch):
    monkeypatch.setattr("jumplora.learning.continual.train_task", None)
    model = load_backbone("tiny-llama", dtype="float32")[0]
    same = TaskSequence("two", [SEQUENCE[0], task("second", "red x", "green")])
    given = dict(config=CONFIG, scoring="labels", progress=False)
    with pytest.raises(ValueError, match="'red' and 'red x' begin with the same token"):
        learn_sequence(model, whole_words(), same, METHODS["IncLoRA"], **given)
    for test in ([("a", "purple")], [("a", SEQUENCE[0].options[0])]):  # also an option of another task
        odd = TaskSequence("two", [SEQUENCE[0], replace(SEQUENCE[1], test=test)])
        with pytest.raises(ValueError, match="'second' has test rows whose label is no option"):
            learn_sequence(model, whole_words(), odd, METHODS["IncLoRA"], **given)


@torch.no_grad()
def test_texts_without_a_token_to_predict_have_no_loss():
    with pytest.raises(ValueError, match="neutral='a text' is one text; give a list"):
        text_loss(load_backbone("tiny-llama", dtype="float32")[0], whole_words(), "a text")
    with pytest.raises(ValueError, match="no text has two tokens"):
        text_loss(load_backbone("tiny-llama", dtype="float32")[0], whole_words(), ["a"])


def test_other_neutral_texts_make_another_run():
    model = load_backbone("tiny-llama", dtype="float32")[0]
    given = (model, SEQUENCE, METHODS["IncLoRA"], CONFIG)
    names = {new_run(*given, seed=1, neutral=texts).name for texts in ((), ["a b"], ["a b c"])}
    assert len(names) == 3


@torch.no_grad()
def test_the_loss_of_neutral_texts_is_that_of_their_tokens():
    model = load_backbone("tiny-llama", dtype="float32")[0]
    texts = ["a b c some longer text", "x y them"]
    total, count = 0.0, 0
    for text in texts:
        ids = whole_words()(text).input_ids[:5]
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(logs[i, token].item() for i, token in enumerate(ids[1:]))
        count += len(ids) - 1
    assert text_loss(model, whole_words(), texts, max_length=5) == pytest.approx(total / count, abs=1e-6)
    with pytest.raises(ValueError, match="of a decoder"):
        text_loss(load_backbone("tiny-t5")[0], whole_words(), texts)


def test_a_run_whose_prompts_list_no_options_is_asked_the_same_way(tmp_path, capsys, monkeypatch):
    run, _ = learn(METHODS["IncLoRA"], tmp_path)
    assert run.extra["prompts"]["first"] == ["What?", ["red", "blue"], False]
    model = load_backbone("tiny-llama", dtype="float32")[0]
    asked = []
    given = lambda *_, **__: (model, whole_words(), run)  # noqa: E731
    monkeypatch.setattr("jumplora.storage.state.load_learned", given)
    real = Question.prompt
    monkeypatch.setattr(Question, "prompt", lambda self, text: (asked.append(real(self, text)), asked[-1])[1])
    assert main(["predict", str(tmp_path / run.name), "--task", "first", "--text", "a b"]) in (0, None)
    assert asked and not any("Options" in prompt for prompt in asked)


def test_a_prompt_without_the_list_of_options_shows_none_and_is_another_task():
    listed = replace(task("first", "red", "blue"), list_options=True)
    hidden = replace(listed, list_options=False)
    assert hidden.prompt("x") == "Task Instruction: What?\nText: x\nAnswer:"
    assert "Options: red | blue\n" in listed.prompt("x") and listed.fingerprint() != hidden.fingerprint()


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda kind=kind, bad=bad: kind(kept=bad), "is not a share; use a number above 0, at most 1")
     for kind in (Prune, RandomMask) for bad in (0, 1.5, 5000, math.nan, True, "10 %")]
    + [(lambda bad=bad: Scale(norm=bad), "use a finite number above 0") for bad in (0, -1.0, math.inf)],
)  # fmt: skip
def test_shares_and_norms_out_of_range_are_refused_when_a_control_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("labels", [None, LABELS])
def test_outputs_that_are_not_numbers_are_an_error_and_no_accuracy(labels):
    model = load_backbone("tiny-llama", dtype="float32")[0]
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="task 'first': the model's outputs are not numbers; load it in"):
        evaluate(model, whole_words(), SEQUENCE[0], labels=labels, max_length=40)
