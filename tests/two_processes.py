"""Groups of two processes, for tests/running/test_processes.py: `python tests/two_processes.py FOLDER`.

Everything is imported once, and every group is forked from here.
What a process of a group finds is in FOLDER/NAME-PROCESS.json.
"""

import copy
import gc
import io
import json
import math
import os
import signal
import socket
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch.utils.data import BatchSampler

from jumplora.command_line import main
from jumplora.data.backbones import load_backbone
from jumplora.learning import continual, evaluation, training
from jumplora.learning.continual import learn_sequence
from jumplora.learning.evaluation import evaluate
from jumplora.learning.methods import METHODS, with_settings
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import Progress, TrainConfig
from jumplora.running import answers
from jumplora.running.processes import fill_batches, gathered, is_main, join_processes, on_main, process_index
from jumplora.storage.state import Stopped, StopRequest, weights_fingerprint

BALL = [("a ball" + " and a bat" * n, "sport") for n in range(8)]
BALL += [("an atom" + " of words" * n, "physics") for n in range(8)] * 2
RAIN = [(f"rain on day {n}", "yes") for n in range(6)] + [(f"sun, {n}", "no") for n in range(7)]
# 24 rows, of many lengths; and 13, which leave an uneven last step
TASKS = (
    Task("topics", "Topic?\n", ("sport", "physics"), BALL, BALL[:2], BALL[:6]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, RAIN[:2], RAIN[:5]),
)
SEQUENCE = TaskSequence("short", TASKS)
QUICK = TrainConfig(batch_size=4, learning_rate=5e-4, max_length=120, threshold_scope="block")
SHORT = replace(QUICK, batch_size=2)
ELLA = with_settings(METHODS["ELLA + JumpLoRA"], strength=1e7)
CASES = {  # name -> backbone, method, settings
    "llama": ("tiny-llama", ELLA, QUICK),
    "llama, accumulation 2": ("tiny-llama", ELLA, replace(SHORT, gradient_accumulation=2)),
    "llama, accumulation 3": ("tiny-llama", ELLA, replace(SHORT, gradient_accumulation=3)),
    "t5": ("tiny-t5", ELLA, QUICK),
    "t5, accumulation 2": ("tiny-t5", ELLA, replace(SHORT, gradient_accumulation=2)),
    "replay by length": ("tiny-llama", METHODS["Replay"], replace(QUICK, group_by_length=True)),
    "EWC": ("tiny-llama", METHODS["EWC"], QUICK),
    "dropout": ("tiny-llama", ELLA, replace(QUICK, lora_dropout=0.2)),
}
EQUAL = [name for name in CASES if name != "dropout"]


fresh = cache(partial(load_backbone, device="cpu", dtype="float32"))


def learn(case, out=None, **options):
    "One run on a fresh backbone; returns its record and the model."
    name, method, config = CASES[case] if isinstance(case, str) else case
    model, tokenizer = copy.deepcopy(fresh(name)[0]), fresh(name)[1]
    for module in model.modules():  # T5 has dropout of its own
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    options = dict(seed=1, out=out, backbone=name, progress=False) | options
    return learn_sequence(model, tokenizer, SEQUENCE, method, config, **options), model, tokenizer


def all_answers(model, tokenizer, **options):
    "What a model says about the test rows of both tasks."
    options |= dict(max_length=120, batch_size=2)
    return [evaluate(model, tokenizer, task, **options).answers for task in TASKS]


def count_files():
    "A list that grows with every file that is put in place."
    written, replace = [], os.replace
    patch.object(os, "replace", lambda *names: written.append(names) or replace(*names)).start()
    return written


def at_step(number, call):
    "`train_task` that calls something after so many steps of the second task."
    real = continual.train_task

    def train(*args, callbacks, **options):
        def advanced(steps):
            done.append(steps)
            if sum(done) == number and args[2].name == "weather":
                call()

        done = []
        return real(*args, callbacks=[Progress(advanced), *callbacks], **options)

    return patch.object(continual, "train_task", train)


def refused(call, *arguments, **options):
    "The kind and the words of an error."
    try:
        call(*arguments, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


# Each of these is done by a group; what it returns is written to a file


def cases(folder):
    "Learn every case; count the files that this process puts in place, and the batches that it answers."
    found, written, real = {}, count_files(), evaluation.answer
    batches, counting = [], []

    def answer(model, tokenizer, task, texts, **settings):
        batches.append([0, math.ceil(len(texts) / settings["batch_size"])])
        counting.append(True)
        found = real(model, tokenizer, task, texts, **settings)
        counting.clear()
        return found

    def counted(read, *args, **settings):
        if counting:  # not the question that comes before anything is learned
            batches[-1][0] += 1
        return read(*args, **settings)

    for name in ("read_decoder", "read_by_option"):
        patch.object(answers, name, partial(counted, getattr(answers, name))).start()
    patch.object(evaluation, "answer", answer).start()
    for case in EQUAL:
        run, model, tokenizer = learn(case, folder / case, zero_shot=case == "llama")
        found[case] = dict(run=run.to_dict(), weights=weights_fingerprint(model))
        if case in ("llama", "t5"):
            steps = found[case]["steps"] = []
            found[case]["answers"] = all_answers(model, tokenizer, share=True, advance=steps.append)
        if is_main():
            state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
            save_file(state, folder / f"{case}.safetensors")
    return found | dict(written=len(written), batches=batches)


def refusals(folder):
    "Fail in the main process alone, ask for different runs, share what cannot be shared, lose one's loss."
    uneven = ("tiny-llama", ELLA, replace(QUICK, batch_size=3))
    found = dict(uneven=refused(learn, uneven), different=refused(learn, "llama", seed=process_index()))
    found["failed"] = refused(on_main, int, "no number")
    factor = float("nan") if process_index() == 1 else 1.0
    real = training.label_loss
    with patch.object(training, "label_loss", lambda *a, **o: factor * real(*a, **o)):
        found["diverged"] = refused(learn, "llama", zero_shot=False)
    request = StopRequest()
    with patch("os.write"):
        request.receive(signal.SIGINT)
        request.receive(signal.SIGINT)  # the launcher passes on what the terminal has sent already
    torch.manual_seed(0)
    loader = SimpleNamespace(batch_sampler=SimpleNamespace(batch_sampler=BatchSampler(range(5), 2, False)))
    batches = list(fill_batches(loader).batch_sampler.batch_sampler)  # draws apart from here on
    return found | dict(request=request.number, drawn=gathered(torch.rand(()).item()), batches=batches)


def whole(folder, place="whole"):
    "A run with dropout that is not disturbed, with a checkpoint after every step."
    written = count_files()
    run, model, _ = learn("dropout", folder / place, zero_shot=False, checkpoint_every=0.0)
    return dict(run=run.to_dict(), weights=weights_fingerprint(model), written=len(written))


def killed(folder):
    "The same, killed in the second task."
    with at_step(3, lambda: os.killpg(0, signal.SIGKILL) if process_index() == 1 else None):
        whole(folder, "killed")


def resumed(folder):
    "The same call once more."
    return whole(folder, "killed")


def stopped(folder):
    "Only the second process gets a signal."
    with at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM) if process_index() == 1 else None):
        try:
            learn("llama", folder / "stopped")
        except Stopped as stop:
            return dict(status=stop.status)


def compare_words(data, out):
    "Words of a command."
    words = "--method IncLoRA --backbone tiny-llama --device cpu --batch-size 4 --max-length 160"
    return ["compare", *words.split(), "--progress", "false", "--sequence", str(data), "--out", str(out)]


def command(folder):
    "What a launcher starts in every process."
    for task in TASKS if is_main() else ():
        (place := folder / "data" / task.name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = [dict(sentence=row.text, label=row.label) for row in getattr(task, split)]
            (place / f"{split}.json").write_text(json.dumps(rows))
        (place / "labels.json").write_text(json.dumps(list(task.options)))
    gathered("written")
    with redirect_stdout(io.StringIO()) as output:
        code = main(compare_words(folder / "data", folder / "command"))
    return dict(code=code, output=output.getvalue())


GROUPS = (cases, refusals, whole, killed, resumed, stopped, command)


def group(work, folder):
    "Fork a group of two and wait for its end; their exit codes."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    pids = []
    for n in range(2):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                os.setpgid(0, pids[0] if pids else 0)
                os.environ.update(RANK=str(n), LOCAL_RANK=str(n))
                assert join_processes("cpu") == 2
                (folder / f"{work.__name__}-{n}.json").write_text(json.dumps(work(folder)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("tiny-llama", "tiny-t5"):
        fresh(name)
    gc.freeze()  # a Trainer collects garbage whenever it starts
    for work in GROUPS:
        codes = group(work, folder := Path(sys.argv[1]))
        (folder / f"{work.__name__}.json").write_text(json.dumps(codes))
