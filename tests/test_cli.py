"""The `kdcode` command as a process: output, exit status, files, and recovery after it was killed."""
import copy
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdcode import cli
from kdcode.config import Config, DecodeSettings, SHORT_PROMPT


def settings(teacher):
    """Return options for a run that takes seconds."""
    return ["--teacher.name", teacher,
            "--data.tokens", 4096, "--data.validation_tokens", 128, "--data.block_size", 64,
            "--student.layers", "[0]", "--student.draft_vocabulary", 1000,
            "--train.batch_size", 4, "--train.eval_steps", 2, "--train.logging_steps", 1,
            "--decode.problems", 2, "--decode.max_new_tokens", 12, "--decode.compile", "off",
            "--decode.adaptive", "false"]  # at an adaptive γ a slow draft may draft nothing, and then has no plot


def test_demo_writes_all_files(kdcode, tiny_teacher, tmp_path):
    token = "hf_a_secret_that_must_not_be_saved"
    done = kdcode("demo", "--name", "trial", *settings(tiny_teacher), fresh=True, HF_TOKEN=token)
    assert done.returncode == 0, done.stderr
    assert [f"[{i}/4]" in done.stderr for i in range(1, 5)] == [True] * 4
    assert "kdcode, student draft" in done.stdout and "Warning" not in done.stderr
    assert done.stderr.startswith(f"kdcode demo: teacher {tiny_teacher}, run folder runs/trial")
    written, following = done.stdout.splitlines()[-1], done.stderr.splitlines()[-1]
    assert written.startswith("run folder: runs/trial") and following.startswith("next: kdcode generate")
    assert f"--draft runs/trial/student --teacher.name {tiny_teacher}" in following
    run = tmp_path/"runs"/"trial"
    for name in ("config.yaml", "run.json", "report.json", "report.md", "loss.png", "acceptance.png", "history.json",
                 "student/model.safetensors", "corpus/corpus.json"):
        assert (run/name).stat().st_size > 0, name
    assert done.stderr.count("the corpus is not checked for problems of MBPP, which could not be loaded") == 1
    assert json.loads((run/"corpus"/"corpus.json").read_text())["statistics"]["unchecked"] == ["MBPP"]
    assert list((run/"tensorboard").glob("events*"))
    report = json.loads((run/"report.json").read_text())
    assert {"command", "date", "commit", "machine", "versions", "config", "figures", "rows"} <= set(report)
    assert {"identical", "acceptance_rate", "tokens_per_call", "speedup", "teacher_tokens_per_second",
            "speculative_tokens_per_second"} <= set(report["figures"])
    assert report["figures"]["identical"] == 1.0
    assert report["command"].startswith("kdcode demo --name trial")
    for path in run.rglob("*"):
        if path.is_file():
            assert b"hf_a_secret" not in path.read_bytes(), path


def test_demo_measures_the_shipped_draft_in_both_forms(monkeypatch):
    monkeypatch.setattr(cli, "shipped_drafts", lambda: {"known": Path("models/known")})
    monkeypatch.setattr("kdcode.decode.load_draft", lambda name, teacher: f"draft of {name}")
    config = Config(decode=DecodeSettings(gamma=2, adaptive=False))
    found = cli.shipped_student(SimpleNamespace(name="known"), config)
    assert [(label, student, settings.drafter) for label, (student, settings) in found.items()] == [
        ("kdcode, shipped draft", "draft of known", "student"),
        ("kdcode, shipped draft, hybrid", "draft of known", "hybrid")]
    assert all(settings.adaptive is None and settings.gamma == 4 for _, settings in found.values())
    assert cli.shipped_student(SimpleNamespace(name="another"), config) == {}


def test_tensorboard_has_curves_and_text(kdcode, tiny_teacher, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert kdcode("distill", "--name", "curves", *settings(tiny_teacher)).returncode == 0
    events = EventAccumulator(str(tmp_path/"runs"/"curves"/"tensorboard"))
    events.Reload()
    assert {"train/loss", "train/ce", "train/kl", "train/perplexity", "train/learning_rate",
            "eval/ce", "eval/kl", "eval/acceptance_rate"} <= set(events.Tags()["scalars"])
    assert "sample/text_summary" in events.Tags()["tensors"]


def test_generate_streams_the_output_of_the_teacher(kdcode, tiny_teacher, tmp_path):
    assert kdcode("distill", "--name", "pair", *settings(tiny_teacher)).returncode == 0
    words = ("generate", "def is_palindrome(s):", "--name", "pair", "--teacher.name", tiny_teacher,
             "--decode.max_new_tokens", 16, "--decode.adaptive", "false")
    drafted, without_draft = kdcode(*words), kdcode(*words, "--decode.gamma", 0)
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout.startswith("def is_palindrome(s):") and "\x1b" not in drafted.stdout + drafted.stderr
    assert drafted.stdout == without_draft.stdout
    first, *_, summary = drafted.stderr.splitlines()
    assert first == f"kdcode generate: teacher {tiny_teacher}, draft runs/pair/student"
    assert "16 tokens in" in summary and "acceptance rate" in summary and "tokens/s" in summary
    piped = kdcode(*words, "--plain")
    assert (piped.stdout, piped.stderr) == (drafted.stdout, "")
    measured = kdcode("bench", "decode", "--name", "pair", "--teacher.name", tiny_teacher,
                      "--decode.problems", 2, "--decode.max_new_tokens", 12, "--decode.compile", "off")
    assert measured.returncode == 0, measured.stderr
    report = json.loads((tmp_path/"runs"/"pair"/"bench-decode"/"report.json").read_text())
    assert report["figures"]["identical"] == 1.0 and report["figures"]["ratio_to_assisted"] > 0
    assert [row["identical outputs"] for row in report["rows"]] == [None] + ["100%"] * 15
    figures = report["figures"]
    assert figures["speedup_low"] <= figures["speedup"] <= figures["speedup_high"] and figures["hybrid_speedup_low"] > 0
    assert all(figures[name] > 0 for name in ("ttft_p50", "tpot_p50", "teacher_ttft_p50", "teacher_tpot_p50"))
    assert all(row["TTFT p50, ms"] > 0 and row["TPOT p50, ms"] > 0 for row in report["rows"])
    assert "A headline needs at least 40 prompts." in (tmp_path/"runs"/"pair"/"bench-decode"/"report.md").read_text()

    lengths = kdcode("bench", "lengths", "--name", "pair", "--teacher.name", tiny_teacher, "--decode.problems", 1,
                     "--decode.compile", "off")
    assert lengths.returncode == 0, lengths.stderr
    rows = json.loads((tmp_path/"runs"/"pair"/"bench-lengths"/"report.json").read_text())["rows"]
    assert [row["prompt tokens"] for row in rows] == [100, 100] and {row["95% interval"] for row in rows} == {None}

    steps = kdcode("bench", "steps", "--name", "pair", "--teacher.name", tiny_teacher, "--decode.compile", "off")
    assert steps.returncode == 0, steps.stderr
    rows = json.loads((tmp_path/"runs"/"pair"/"bench-steps"/"report.json").read_text())["rows"]
    variants = {row["variant of the teacher"] for row in rows}
    assert {"float32, tuned kernels (kdcode)", "bfloat16"} <= variants
    assert any(variant.endswith("PyTorch kernels") for variant in variants)


@pytest.mark.slow
def test_a_draft_vocabulary_is_grown_for_export(kdcode, tiny_teacher, tmp_path):
    from transformers import AutoModelForCausalLM
    assert kdcode("distill", "--name", "trimmed", *settings(tiny_teacher)).returncode == 0
    student = tmp_path/"runs"/"trimmed"/"student"
    rejected = kdcode("export", student, "--name", "llama", "--teacher.name", tiny_teacher)
    assert (rejected.returncode, "--grow-vocabulary" in rejected.stderr) == (2, True)
    done = kdcode("export", student, "--grow-vocabulary", "--name", "grown", *settings(tiny_teacher))
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path/"runs"/"grown"/"llama").config.vocab_size == 49152
    export = ("export", tmp_path/"runs"/"grown"/"student", "--name", "others", "--teacher.name", tiny_teacher, "--to")
    for words in (("int8",), ("gguf",), ("hub", "--repo", "me/draft", "--dry-run", "--license", "mit")):
        done = kdcode(*export, *words)
        assert done.returncode == 0, done.stderr
    assert "license: mit" in (tmp_path/"runs"/"others"/"hub"/"README.md").read_text()


@pytest.mark.parametrize("form", ["llama", "gguf", "eagle3", "speculators", "int8"])
def test_an_export_says_in_one_line_that_its_window_is_lost(kdcode, pair, tmp_path, form):
    """Not `int8`, which stays a student."""
    from kdcode.eagle import EagleStudent
    teacher, student = pair
    if form in ("eagle3", "speculators"): student = EagleStudent.from_teacher(teacher.model)
    for window in (None, 16):
        student = copy.deepcopy(student)
        student.config.attention_window = window
        student.save_pretrained(tmp_path/"student")
        done = kdcode("export", tmp_path/"student", "--to", form, "--teacher.name", "smollm2")
        assert done.returncode == 0, done.stderr
        notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
        assert len(notes) == (window is not None and form != "int8")
        assert all("the student to its last 16" in note for note in notes)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_to_the_same_weights(kdcode, start, tiny_teacher, tmp_path, optimizer):
    from safetensors.torch import load_file
    common = [*settings(tiny_teacher), "--train.epochs", 2, "--train.optimizer", optimizer]
    assert kdcode("distill", "--name", "whole", *common).returncode == 0
    process = start("distill", "--name", "killed", *common)
    checkpoint = tmp_path/"runs"/"killed"/"checkpoints"/"checkpoint-2"/"trainer_state.json"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (tmp_path/"runs"/"killed"/"student").exists()  # killed during training
    again = kdcode("distill", "--name", "killed", *common)
    assert (again.returncode, "--resume" in again.stderr) == (2, True)  # an earlier run is never overwritten
    assert kdcode("distill", "--name", "killed", "--resume", *common).returncode == 0
    whole, resumed = (load_file(tmp_path/"runs"/name/"student"/"model.safetensors") for name in ("whole", "killed"))
    assert all((whole[key] == resumed[key]).all() for key in whole)


def test_a_student_with_another_tokenizer_is_rejected(kdcode, tiny_teacher, tmp_path):
    from kdcode.student import Student, StudentConfig
    other = StudentConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, teacher="codellama/CodeLlama-7b-Python-hf",
        tokenizer_fingerprint="0123456789abcdef")
    Student(other).save_pretrained(tmp_path/"other")
    done = kdcode("generate", "x", "--draft", tmp_path/"other", "--teacher.name", tiny_teacher)
    assert done.returncode == 2
    assert "codellama/CodeLlama-7b-Python-hf" in done.stderr and str(tiny_teacher) in done.stderr


@pytest.mark.parametrize("words, message", [
    (["distill", "--data.source", "folder"], "data.path is None"),
    (["distill", "--data.source", "folder", "--data.path", "nowhere"], "not a folder"),
    (["distill", "--teacher.name", "nowhere/model.gguf"], "no such file"),
    (["distill", "--teacher.name", "nobody/nothing"], "model hub"),
    (["distill", "--teacher.device", "cuda:9"], "teacher.device"),
    (["generate", "x", "--draft", "nowhere"], "no student"),
    (["distill", "--out", "/dev/null/run"], "cannot create run folder"),
    (["distill", "--data.block_size", "1"], "data.block_size"),
    (["distill", "--data.block_sizes", "[256,256]"], "data.block_sizes is [256, 256]"),
    (["distill", "--teacher.name", "http://localhost/v1"], "teacher.tokenizer is needed"),
    (["distill", "--student.architecture", "classic"], "classic"),
    (["distill", "--name", "../up"], "name is"),
    (["distill", "--name", ".."], "name is"),
    (["targets"], "targets.kind is online"),
    (["distill", "--targets.kind", "sampled", "--loss.divergence", "jsd"], "supports only forward_kl"),
    (["distill", "--loss.divergence", "kl"], "loss.divergence"),
])
def test_an_error_is_one_line(kdcode, words, message):
    done = kdcode(*words)
    assert done.returncode == 2, done.stderr
    *before, last = done.stderr.rstrip().splitlines()
    assert last.startswith("kdcode: ") and message in last, done.stderr
    assert not [line for line in before if line.startswith("kdcode:") or "Traceback" in line], done.stderr


def output(capsys, *words):
    """Run a command line in this process; return its exit status, standard output and last line of standard error."""
    status = cli.main([*words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.rstrip()


@pytest.mark.parametrize("words, message", [
    (["distill", "--train.epoch", "2"], "did you mean --train.epochs?"),
    (["distill", "--epochs", "2"], "did you mean --train.epochs?"),
    (["distill", "--re"], "did you mean --resume?"),
    (["generate", "x", "--gama=3"], "did you mean --decode.gamma?"),
    (["generate", "x", "decode.gamma=3"], "did you mean --decode.gamma?"),
    (["serve", "--port", "80"], "did you mean --serve.port?"),
    (["distil"], "did you mean distill?"),
    (["--versio"], "did you mean --version?"),
    (["distill", "--train.lr", "1"], "did you mean --train.learning_rate?"),
    (["distill", "--train.steps", "9"], "did you mean --train.max_steps?"),
    (["generate", "x", "--max-tokens", "9"], "did you mean --decode.max_new_tokens?"),
    (["generate", "x", "--temp", "1"], "did you mean --decode.temperature?"),
    (["generate", "x", "--decode.temp", "1"], "did you mean --decode.temperature?"),
    (["generate", "--prompt", "x"], "has no option --prompt; write it in quotes"),
    (["generate", "x\udcff"], "the prompt has bytes that are not UTF-8 text (at character 1)"),
    (["generate", "x", "--threads", "99999"], "threads is 99999, but this machine has"),
    (["generate", "x", "--decode.stop", "5"], "decode.stop is 5; expected a list, such as '[a, b]'"),
    (["distill", "--data.source", "my/code"], "'teacher', a list of sources"),
    (["distill", "--loss.divergence", "kl"], "'lk_hybrid', a mapping"),
    (["distill", "--config", "/"], "give a YAML file"),
    (["export", "smollm2", "--to", "gguf"], "a head of an earlier version"),
    (["--name", "x", "distill"], "options follow the command"),
    (["bench", "decod"], "did you mean decode?"),
    (["bench"], "needs a benchmark; choose one of decode, lengths"),
    (["generate"], "needs a prompt; write it in quotes"),
    (["generate", "def", "f(x):"], "put the whole prompt in quotes"),
    (["record", "runs/x"], "kdcode record FOLDER NAME"),
    (["distill", "--name"], "--name is the last word"),
    (["distill", "--config", "no/such.yaml"], "there is no such file"),
    (["distill", "--config=no/such.yaml"], "there is no such file"),
    (["generate", ""], "has no text"),
    (["generate", " \n"], "has no text"),
    (["generate", "x", "--draft", "smolm2"], "did you mean smollm2?"),
    (["generate", "x", "--draft", "qwen2.5-coder-1.5b"], "whose tokenizer differs from that of smollm2"),
    (["bench", "decode", "--draft", "qwen2.5-coder-1.5b"], "whose tokenizer differs from that of smollm2"),
    (["eval", "--draft", "nowhere"], "no student in nowhere"),
    (["eval", "--eval.problems", "nowhere.jsonl"], "eval.problems is nowhere.jsonl"),
    (["eval", "--models", "nowhere.gguf"], "--models has nowhere.gguf"),
    (["eval", "--models", "runs/mine/student"], "--models has runs/mine/student"),
    (["distill", "--student.start", "nowhere"], "no student in nowhere"),
    (["generate", "x", "--teacher.name", "smolm2"], "did you mean smollm2?"),
    (["distill", "--teacher.name", "/nowhere/at/all"], "no such file or folder"),
    (["distill", "--out", "/dev/null/run"], "cannot create run folder"),
    (["bench", "steps", "--out", "/dev/null/run"], "cannot create run folder"),
    (["distill", "--data.source", "folder", "--data.path", "nowhere"], "not a folder"),
    (["bench", "trainers"], "TRL is not installed; run make trainers"),
    (["targets"], "targets.kind is online"),
    (["tune", "--trials", "0"], "--trials is 0"),
    (["export", "smollm2", "--repo", "me/x"], "require --to hub"),
    (["export", "smollm2", "--to", "hub"], "give --repo USER/NAME"),
    (["serve", "--serve.host", "0.0.0.0"], "KDCODE_API_KEY is not set"),
    (["serve", "--engine", "vllm"], "vLLM is not installed; run make engines"),
    (["serve", "--engine-options", "--seed '1"], "close its quotes"),
    (["record", "nowhere", "mine"], "nowhere has no report.json"),
    (["record", ".", "../mine"], "it should be a folder name under results/"),
    (["distill", "--student.layers", "[0,30]"], "student.layers has 30, but teacher smollm2 has 30 layers"),
    (["distill", "--student.feature_layers", "[99]"], "student.feature_layers has 99"),
    (["distill", "--data.source", "the-stack"], "HF_TOKEN is not set"),
    (["distill", "--data.path", "src"], "data.path is src, but no source reads it"),
    (["distill", "--data.fim_share", ".5"], "the tokenizer of smollm2 has no tokens for filling in the middle"),
    (["distill", "--data.validation_tokens", "100"], "less than one block of 256 tokens"),
    (["distill", "--train.upload", "nosuch://bucket"], "train.upload is 'nosuch://bucket'"),
    (["bench", "targets", "--targets.kind", "top_k", "--data.block_sizes", "[64,128]"], "use data.block_size"),
    (["export", "smollm2"], "models/smollm2-135m-draft-independent, or train one with student.feature_layers []"),
    (["export", "smollm2", "--to", "eagle3"], "models/smollm2-135m-draft-eagle3, or train one as configs"),
])
def test_a_mistake_is_explained(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCODE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")  # without other engines
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.delenv("KDCODE_API_KEY", raising=False)
    status, out, error = output(capsys, *words)
    assert (status, out, error.count("\n")) == (2, "", 0) and error.startswith("kdcode: ") and message in error, error
    assert not list(tmp_path.iterdir())


def test_a_run_that_exists_is_found_at_once(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KDCODE_HOME", str(tmp_path))
    run = tmp_path/"runs"/"old"
    run.mkdir(parents=True)
    _, config, _ = cli.parse(["distill", "--name", "old"])
    from kdcode.config import save_config
    save_config(config, run/"config.yaml")
    for words, message in ((["distill", "--name", "old"], "--resume"), (["tune", "--name", "old"], "no search"),
                           (["demo", "--name", "old", "--loss.alpha", "0.3"], "different loss.alpha")):
        status, _, error = output(capsys, *words)
        assert (status, message in error, error.count("\n")) == (2, True, 0), error


def test_a_folder_that_is_no_model_is_found_at_once(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KDCODE_HOME", str(tmp_path))
    (tmp_path/"config.json").write_text("{}")
    status, _, error = output(capsys, "generate", "x", "--draft", str(tmp_path))
    assert (status, "no model_type" in error, error.count("\n")) == (2, True, 0), error


@pytest.mark.parametrize("words", [["--version"], ["distill", "--help-all"]])
def test_the_reader_of_a_pipe_may_stop(words, tmp_path):
    """As `kdcode ... 2>&1 | head -1` does: no traceback."""
    read, write = os.pipe()
    os.close(read)
    log = tmp_path/"python.log"
    program = f"from kdcode.cli import main\nstatus = main({words})\nopen({str(log)!r}, 'w').write(str(status))"
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=write, timeout=300)
    os.close(write)
    assert (done.returncode, log.read_text()) == (0, "1")  # also at Python's exit, where it flushes both


@pytest.mark.parametrize("command, kept", [
    ("generate", False), ("serve", False), ("bench decode", False), ("plan", False), ("doctor", False),
    ("export x --to int8", False), ("distill", True), ("eval", True), ("export x --to llama --grow-vocabulary", True)])
def test_an_interrupted_command_says_what_is_kept(capsys, monkeypatch, command, kept):
    def interrupt(arguments): raise KeyboardInterrupt
    monkeypatch.setattr(cli, "run_command", interrupt)
    status, _, error = output(capsys, *command.split())
    assert (status, error.startswith("kdcode: interrupted"), "work is saved" in error) == (130, True, kept), error


def test_examples_of_the_help_pass_every_check(monkeypatch, tmp_path):
    """As in a checkout after `make demo`, whose student has a draft vocabulary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCODE_HOME", str(tmp_path))
    monkeypatch.setattr(cli, "bind_socket", lambda settings: None)
    for folder in ("configs", "models"): (tmp_path/folder).symlink_to(Path(__file__).parent.parent/folder)
    run = tmp_path/"runs"/"quickstart"
    for folder in (run/"student", run/"bench-decode", tmp_path/"my"/"code"): folder.mkdir(parents=True)
    config = {"model_type": "kdcode-student", "architectures": ["Student"], "draft_vocab_size": 16_384}
    (run/"student"/"config.json").write_text(json.dumps(config))
    for file in ("student/model.safetensors", "bench-decode/report.json", "bench-decode/report.md"): (run/file).touch()
    lines = [line for examples in cli.EXAMPLES.values() for line in examples if "USER/TEACHER" not in line]
    assert len(lines) > 15
    for line in lines:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(SHORT_PROMPT.encode())))
        _, config, options = cli.parse(shlex.split(line.partition(" <")[0])[1:])
        cli.check_files(config, options)


@pytest.mark.parametrize("words", [["generate", "x", "--draft"], ["doctor", "--draft"], ["eval", "--draft"],
                                   ["export", "--to", "int8"], ["distill", "--student.start"]])
def test_a_student_without_weights_is_found_at_once(capsys, monkeypatch, tmp_path, words):
    monkeypatch.setenv("KDCODE_HOME", str(tmp_path))
    (tmp_path/"config.json").write_text('{"model_type": "llama"}')
    status, _, error = output(capsys, *words, str(tmp_path))
    assert (status, "no weights" in error, error.count("\n")) == (2, True, 0), error


def test_help_keeps_the_case_of_names(capsys):
    assert cli.main(["serve", "--help"]) == 0
    assert "Start an OpenAI-compatible server" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_a_download_shows_its_progress_in_a_terminal(monkeypatch, terminal):
    from huggingface_hub.utils import are_progress_bars_disabled
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    cli.silence_libraries()
    assert are_progress_bars_disabled() is not terminal


def test_the_home_folder_of_configurations_is_searched(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert "did you mean configs/quickstart.yaml?" in output(capsys, "distill", "--config", "quickstart")[2]


LATE = ("torch", "transformers", "pandas", "matplotlib", "scipy")  # large libraries


def test_help_and_mistakes_load_no_large_library(tmp_path):
    lines = [["--version"], ["--help"], ["generate", "--help"], ["distill", "--help-all"], ["distill", "--epochs", "2"],
             ["generate", "x", "--draft", "nowhere"], ["generate", "x", "--draft", "qwen2.5-coder-1.5b"],
             ["distill", "--teacher.name", "/nowhere"], ["distill", "--out", "/dev/null/run"], ["record", "x", "y"],
             ["record", ".", "../y"], ["serve", "--engine", "vllm"], ["distill", "--student.layers", "[99]"],
             ["distill", "--data.source", "the-stack"], ["export", "smollm2"], ["distill", "--data.path", "src"],
             ["distill", "--data.validation_tokens", "1"], ["distill", "--train.upload", "nosuch://bucket"],
             ["distill", "--data.fim_share", ".5"]]
    program = (f"import sys\nfrom kdcode.cli import main\nfor words in {lines}:\n    main(words)\n"
               f"    print([name for name in {LATE} if name in sys.modules], file=sys.stderr)")
    environment = os.environ | {"KDCODE_HOME": str(tmp_path), "PATH": "", "HF_TOKEN_PATH": os.devnull}
    environment.pop("HF_TOKEN", None)
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", program], **options)
    loaded = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert loaded == ["[]"] * len(lines), done.stderr


def test_the_first_line_comes_before_large_libraries(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KDCODE_HOME", str(tmp_path))
    monkeypatch.setattr(cli, "silence_libraries", lambda: 1 / 0)  # the first import of a large library
    for words in (["generate", "x"], ["demo"], ["distill"], ["bench", "decode"], ["eval"],
                  ["export", "smollm2", "--to", "int8"]):
        status, out, error = output(capsys, *words)
        first, failure = error.splitlines()
        assert (status, failure) == (1, "kdcode: division by zero")
        assert first.startswith(f"kdcode {words[0]}: teacher smollm2"), first
        if words[0] in ("generate", "bench"):
            assert "smollm2-135m-draft (shipped for smollm2; choose another with --draft)" in first


@pytest.mark.parametrize("estimate, verified, shown", [(1.2, [9], True), (2.5, [9], False), (1.2, [], False)])
def test_the_summary_has_no_impossible_speedup(monkeypatch, estimate, verified, shown):
    from kdcode import decode
    from kdcode.result import Statistics
    statistics = Statistics(tokens=30, calls=20, verified=verified, seconds=3.)
    monkeypatch.setattr(decode, "estimate_speedup", lambda streamed: (estimate, 2))
    summary = cli.decoding_summary(SimpleNamespace(sequence=SimpleNamespace(statistics=statistics)))
    assert "10.0 tokens/s" in summary and ("speedup" in summary) is shown, summary


@pytest.mark.parametrize("new_tokens, full", [(64, True), (2, False)])
def test_a_full_context_is_told(capsys, monkeypatch, pair, new_tokens, full):
    monkeypatch.setattr(cli, "load_pair", lambda *arguments: pair)
    monkeypatch.setattr(pair[0].model.config, "max_position_embeddings", 20)
    _, config, parsed = cli.parse(["generate", "def f(x):", "--decode.max_new_tokens", str(new_tokens),
                                   "--decode.adaptive", "false", "--decode.compile", "off"])
    cli.run_generate(config, parsed)
    assert capsys.readouterr().err.endswith("; the target's context of 20 tokens is full\n") is full


def test_blocks_beyond_the_context_are_refused_before_text_is_generated(kdcode, tiny_teacher, tmp_path):
    done = kdcode("distill", "--teacher.name", tiny_teacher, "--data.source", "teacher", "--data.prompt_source",
                  "stdlib", "--data.tokens", 100_000, "--data.validation_tokens", 100_000, "--data.block_size", 50_000)
    assert done.returncode == 2 and "data has blocks of 50000 tokens" in done.stderr.splitlines()[-1]
    assert not [*tmp_path.rglob("*.jsonl")]


@pytest.mark.parametrize("speedup, following", [(.8, "kdcode doctor --draft mine"), (1.2, "kdcode record")])
def test_a_draft_that_does_not_pay_goes_to_the_doctor(capsys, monkeypatch, tmp_path, speedup, following):
    report = SimpleNamespace(figures={"speedup": speedup}, rows=[{"method": "generate"}], notes=[])
    monkeypatch.setitem(cli.BENCHMARKS, "decode", (lambda *arguments: report, ""))
    _, config, options = cli.parse(["bench", "decode", "--draft", "mine", "--out", str(tmp_path)])
    cli.run_bench(config, options)
    assert capsys.readouterr().err.startswith(f"next: {following}")


class Terminal(io.StringIO):
    def isatty(self): return True


@pytest.mark.parametrize("options, coloured", [([], True), (["--plain"], False)])
def test_a_terminal_shows_who_wrote_each_token(capsys, monkeypatch, pair, options, coloured):
    from kdcode.decode import complete
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(cli, "load_pair", lambda *arguments: pair)
    monkeypatch.setattr(sys, "stdout", Terminal())
    words = ["generate", SHORT_PROMPT, "--decode.max_new_tokens", "24", "--decode.adaptive", "false", *options]
    _, config, parsed = cli.parse(words)
    cli.run_generate(config, parsed)
    shown, errors = sys.stdout.getvalue(), capsys.readouterr().err
    result = complete(*pair, SHORT_PROMPT, config.decode)
    plain = re.sub(r"\x1b\[(?:0|2|32|1;33)m", "", shown)
    assert plain == f"{SHORT_PROMPT}{result.text}\n"
    assert ("\x1b[1;33m" in shown, bool(errors)) == (coloured, coloured)
    if coloured:
        drafted = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", shown, re.S))
        assert drafted == "".join(piece for piece, draft in result.pieces() if draft)
        assert f"{result.statistics.tokens} tokens in {result.statistics.calls} target calls" in errors


FAKE_VLLM = """#!/bin/sh
echo "$VLLM_CPU_KVCACHE_SPACE $VLLM_NO_USAGE_STATS $VLLM_API_KEY"
printf '%s\\n' "$@"
"""


@pytest.fixture
def vllm(tmp_path):
    """A program in place of vLLM that prints its environment and arguments; returns the PATH with it."""
    (program := tmp_path/"bin"/"vllm").parent.mkdir()
    program.write_text(FAKE_VLLM)
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_serve_passes_everything_on_to_vllm(kdcode, pair, tiny_teacher, tmp_path, vllm, method):
    """Independent student and EAGLE-3 head, address, key, and options and environment for several GPUs and replicas."""
    from kdcode.eagle import EagleStudent
    teacher, student = pair
    if method == "eagle3": student = EagleStudent.from_teacher(teacher.model).eval()
    student.save_pretrained(tmp_path/"student")
    done = kdcode("serve", "--engine", "vllm", "--teacher.name", tiny_teacher, "--teacher.device", "cpu",
                  "--draft", tmp_path/"student", "--serve.host", "0.0.0.0", "--serve.port", 8123, "--decode.gamma", 3,
                  "--engine-options", "--tensor-parallel-size 2 --data-parallel-size 4 --max-model-len 8192",
                  PATH=vllm, KDCODE_API_KEY="a key", VLLM_CPU_KVCACHE_SPACE="40")
    assert done.returncode == 0, done.stderr
    environment, command, folder, *arguments = done.stdout.splitlines()
    assert (environment, command) == ("40 1 a key", "serve") and (Path(folder)/"model.safetensors").exists()
    options = dict(zip(arguments, arguments[1:]))  # of a repeated one, vLLM takes the last, too
    drafting = json.loads(options["--speculative-config"])
    draft = Path(drafting.pop("model"))
    assert drafting == {"method": method, "num_speculative_tokens": 3}
    assert ("Eagle3" in (draft/"config.json").read_text()) == (method == "eagle3")
    assert (options["--host"], options["--port"]) == ("0.0.0.0", "8123")
    assert options["--served-model-name"] == str(tiny_teacher)
    assert arguments[-6:] == ["--tensor-parallel-size", "2", "--data-parallel-size", "4", "--max-model-len", "8192"]
