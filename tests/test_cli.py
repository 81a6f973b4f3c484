"""The `kdcode` command as a process: output, exit status, files, and recovery after it was killed."""
import json
import signal
import time

import pytest


def settings(teacher):
    """Return options for a run that takes seconds."""
    return ["--teacher.name", teacher,
            "--data.tokens", 4096, "--data.validation_tokens", 128, "--data.block_size", 64,
            "--student.layers", "[0]", "--student.draft_vocabulary", 1000,
            "--train.batch_size", 4, "--train.eval_steps", 2, "--train.logging_steps", 1,
            "--decode.problems", 2, "--decode.max_new_tokens", 12]


def test_demo_writes_all_files(kdcode, tiny_teacher, tmp_path):
    token = "hf_a_secret_that_must_not_be_saved"
    done = kdcode("demo", "--name", "trial", *settings(tiny_teacher), fresh=True, HF_TOKEN=token)
    assert done.returncode == 0, done.stderr
    assert [f"[{i}/4]" in done.stderr for i in range(1, 5)] == [True] * 4
    assert "kdcode, student draft" in done.stdout and "Warning" not in done.stderr
    run = tmp_path/"runs"/"trial"
    for name in ("config.yaml", "run.json", "report.json", "report.md", "loss.png", "acceptance.png", "history.json",
                 "student/model.safetensors", "corpus/corpus.json"):
        assert (run/name).stat().st_size > 0, name
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
    words = ("generate", "def quicksort(arr):", "--name", "pair", "--teacher.name", tiny_teacher,
             "--decode.max_new_tokens", 16)
    drafted, without_draft = kdcode(*words), kdcode(*words, "--decode.gamma", 0)
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout.startswith("def quicksort(arr):")
    assert drafted.stdout == without_draft.stdout
    measured = kdcode("bench", "decode", "--name", "pair", "--teacher.name", tiny_teacher,
                      "--decode.problems", 2, "--decode.max_new_tokens", 12)
    assert measured.returncode == 0, measured.stderr
    report = json.loads((tmp_path/"runs"/"pair"/"bench-decode"/"report.json").read_text())
    assert report["figures"]["identical"] == 1.0 and report["figures"]["ratio_to_assisted"] > 0
    assert [row["identical outputs"] for row in report["rows"]] == [None] + ["100%"] * 14

    steps = kdcode("bench", "steps", "--name", "pair", "--teacher.name", tiny_teacher, "--decode.compile", "off")
    assert steps.returncode == 0, steps.stderr
    rows = json.loads((tmp_path/"runs"/"pair"/"bench-steps"/"report.json").read_text())["rows"]
    variants = {row["variant of the teacher"] for row in rows}
    assert {"float32, tuned kernels (kdcode)", "bfloat16"} <= variants
    assert any(variant.endswith("PyTorch kernels") for variant in variants)


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


def test_a_killed_run_resumes_to_the_same_weights(kdcode, start, tiny_teacher, tmp_path):
    from safetensors.torch import load_file
    common = [*settings(tiny_teacher), "--train.epochs", 2]
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
    (["distill", "--data.fim_share", ".5"], "no tokens for filling in the middle"),
    (["distill", "--teacher.name", "http://localhost/v1"], "teacher.tokenizer is needed"),
    (["distill", "--student.architecture", "classic"], "classic"),
    (["distill", "--name", "../up"], "name is"),
    (["distill", "--name", ".."], "name is"),
    (["targets"], "targets.kind is online"),
    (["distill", "--targets.kind", "sampled", "--loss.divergence", "jsd"], "supports only forward_kl"),
    (["distill", "--loss.divergence", "kl"], "loss.divergence"),
    (["distill", "--train.upload", "nosuch://bucket"], "train.upload"),
])
def test_an_error_is_one_line(kdcode, words, message):
    done = kdcode(*words)
    assert done.returncode == 2, done.stderr
    *before, last = done.stderr.rstrip().splitlines()
    assert last.startswith("kdcode: ") and message in last, done.stderr
    assert not [line for line in before if line.startswith("kdcode:") or "Traceback" in line], done.stderr
