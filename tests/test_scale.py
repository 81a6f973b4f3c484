"""Training runs that are interrupted, spread over processes, or uploaded: as processes, against a real S3 server."""
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file

from conftest import ROOT

SETTINGS = ["--data.tokens", 4096, "--data.validation_tokens", 128, "--data.block_size", 64, "--student.layers", "[0]",
            "--student.draft_vocabulary", 1000, "--train.batch_size", 4, "--train.eval_steps", 4,
            "--train.logging_steps", 1]
SAMPLED = ["--targets.kind", "sampled", "--targets.shard_blocks", 4]


def wait_for(condition, process, seconds=300):
    """Wait until a condition holds while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline: time.sleep(.005)
    assert condition(), process.communicate()[1] if process.poll() is not None else "it took too long"


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def weights(run): return load_file(run/"student"/"model.safetensors")


def same_weights(run, other):
    one, two = weights(run), weights(other)
    return all((one[key] == two[key]).all() for key in one)


def files(folder): return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".unfinished"}


def read_json(path): return json.loads(path.read_text())


def losses(run): return [entry["loss"] for entry in read_json(run/"history.json") if "loss" in entry]


def test_killed_targets_resume_to_the_same_bytes(kdcode, start, tiny_teacher, tmp_path):
    words = ["targets", "--teacher.name", tiny_teacher, *SETTINGS, *SAMPLED]
    done = kdcode(*words, "--name", "whole")
    assert done.returncode == 0, done.stderr
    assert re.search(r"targets \(4,096 tokens, [\d.]+ bytes per token\)", done.stdout)
    process, cache = start(*words, "--name", "killed"), tmp_path/"runs"/"killed"/"targets"
    wait_for((cache/"shard-00002.sha256").exists, process)
    kill(process)
    assert not (cache/"shard-00015.sha256").exists()  # it was killed before the end
    assert kdcode(*words, "--name", "killed").returncode == 0
    assert files(cache) == files(tmp_path/"runs"/"whole"/"targets")


def test_one_cache_of_targets_for_several_runs(kdcode, tiny_teacher, tmp_path):
    options = ["--teacher.name", tiny_teacher, *SETTINGS, *SAMPLED, "--targets.folder", tmp_path/"targets"]
    assert kdcode("targets", *options, "--name", "cache").returncode == 0
    assert kdcode("distill", *options, "--name", "user").returncode == 0
    different = kdcode("distill", *options, "--name", "other", "--loss.temperature", 2)
    assert different.returncode == 2 and "temperature 1.0 (now 2.0)" in different.stderr


def test_full_disk_is_one_line_and_loses_nothing(kdcode, tiny_teacher, tmp_path):
    words = ["targets", "--teacher.name", tiny_teacher, *SETTINGS, "--targets.kind", "top_k", "--targets.k", 900,
             "--targets.shard_blocks", 16]
    assert kdcode(*words, "--name", "whole").returncode == 0
    whole = tmp_path/"runs"/"whole"/"targets"
    size = min(path.stat().st_size for path in whole.glob("*.parquet")) // 2
    environment = os.environ | {"KDCODE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kdcode.cli", *map(str, words), "--name", "full"]
    full = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert full.returncode == 1, full.stderr
    assert full.stderr.rstrip().splitlines()[-1].startswith("kdcode: ")
    assert "File too large" in full.stderr and "Traceback" not in full.stderr
    assert kdcode(*words, "--name", "full").returncode == 0
    assert files(tmp_path/"runs"/"full"/"targets") == files(whole)


def test_preempted_run_saves_a_checkpoint_and_resumes(kdcode, start, tiny_teacher, tmp_path):
    words = ["distill", "--teacher.name", tiny_teacher, *SETTINGS, "--train.epochs", 2]
    assert kdcode(*words, "--name", "whole", OMP_NUM_THREADS="1").returncode == 0
    process, run = start(*words, "--name", "preempted"), tmp_path/"runs"/"preempted"
    wait_for((run/"checkpoints"/"checkpoint-4"/"trainer_state.json").exists, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopped after step" in err, err
    step = int(re.search(r"stopped after step (\d+)", err)[1])
    assert (run/"checkpoints"/f"checkpoint-{step}"/"trainer_state.json").exists() and not (run/"student").exists()
    assert kdcode(*words, "--name", "preempted", "--resume", OMP_NUM_THREADS="1").returncode == 0
    assert same_weights(run, tmp_path/"runs"/"whole")


CPU_PROCESSES = {"ACCELERATE_USE_CPU": "true"}  # they communicate by gloo on a machine without a GPU


def launch(folder, *words):
    """Run the command in two processes by `accelerate launch`."""
    environment = os.environ | {"KDCODE_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # --multi_gpu is the launcher's option for several processes
    command = [Path(sys.executable).parent/"accelerate", "launch", "--multi_gpu", "--num_processes", 2,
               "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "kdcode.cli", *words]
    return subprocess.run(list(map(str, command)), cwd=folder, env=environment | CPU_PROCESSES, capture_output=True,
                          text=True, timeout=300)


def run_sharded(start, *words):
    """Run the command in two forked processes with the environment of `accelerate launch`; return what they print."""
    parser, file = launch_command_parser(), ROOT/"configs"/"accelerate"/"fsdp.yaml"
    arguments, *_ = _validate_launch_command(parser.parse_args(
        ["--config_file", str(file), "--num_processes", "2", "--main_process_port", "0", "fsdp_on_cpu.py"]))
    environment = prepare_multi_gpu_env(arguments) | CPU_PROCESSES | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.main_process_port)}
    for name in ("KDCODE_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"): environment.pop(name, None)
    processes = [start(*words, program="fsdp_on_cpu:main", **environment, RANK=rank, LOCAL_RANK=rank)
                 for rank in ("0", "1")]
    errs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errs
    return errs[0]


def close(a, b): return len(a) == len(b) == 16 and max(abs(x - y) for x, y in zip(a, b)) < 1e-4


@pytest.mark.slow
def test_two_processes_train_like_one(kdcode, start, tiny_teacher, tmp_path):
    words = ["distill", "--teacher.name", tiny_teacher, *SETTINGS, "--targets.kind", "top_k",
             "--train.precision", "float32"]
    assert kdcode(*words, "--name", "one").returncode == 0
    one, half = losses(tmp_path/"runs"/"one"), ["--train.batch_size", 2]
    assert max(abs(a - b) for a, b in zip(one, one[1:])) > 1e-3  # negative control: the losses of two steps differ
    # DDP: each process has the whole student
    ddp = launch(tmp_path, *words, *half, "--name", "ddp")
    assert ddp.returncode == 0, ddp.stderr
    assert close(one, losses(tmp_path/"runs"/"ddp"))
    # FSDP: each process has a shard of the student
    sharded, run = [*words, *half, "--name", "fsdp"], tmp_path/"runs"/"fsdp"
    run_sharded(start, *sharded)
    assert close(one, losses(run)) and (run/"checkpoints"/"checkpoint-16"/"pytorch_model_fsdp_0").is_dir()
    trained, expected = weights(run), weights(tmp_path/"runs"/"one")
    assert all((trained[key] - expected[key]).abs().max() < 1e-4 for key in expected)
    # resume from sharded checkpoints
    shutil.rmtree(run/"student")
    shutil.rmtree(run/"checkpoints"/"checkpoint-16")
    (run/"history.json").unlink()
    assert "[3/3]" in run_sharded(start, *sharded, "--resume")
    assert close(one, losses(run))


@pytest.fixture
def s3(tmp_path):
    """Run a real S3 server (rclone) that can be stopped and started again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (bucket := tmp_path/"s3"/"bucket").mkdir(parents=True)
    keys = {"AWS_ACCESS_KEY_ID": "ACCESSKEY0123456789", "AWS_SECRET_ACCESS_KEY": "SECRETKEY0123456789",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_S3_ENDPOINT": f"http://127.0.0.1:{port}"}
    command = [Path(sys.executable).parent/"rclone", "serve", "s3", "--addr", f"127.0.0.1:{port}",
               "--auth-key", f"{keys['AWS_ACCESS_KEY_ID']},{keys['AWS_SECRET_ACCESS_KEY']}", tmp_path/"s3"]
    running = []

    def up():
        running.append(subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0: return
            time.sleep(.05)

    def down():
        running[-1].kill()
        running[-1].wait()

    up()
    yield bucket, keys, up, down
    down()


def test_checkpoints_are_uploaded_to_s3(kdcode, tiny_teacher, tmp_path, s3):
    bucket, keys, _, _ = s3
    words = ["distill", "--teacher.name", tiny_teacher, *SETTINGS, "--train.upload", "s3://bucket/run"]
    done = kdcode(*words, "--name", "uploaded", **keys)
    assert done.returncode == 0 and "upload of" not in done.stderr, done.stderr
    run = tmp_path/"runs"/"uploaded"
    for name, local in (("student/model.safetensors", run), ("checkpoint-16/trainer_state.json", run/"checkpoints")):
        assert (bucket/"run"/name).read_bytes() == (local/name).read_bytes()


@pytest.mark.slow
def test_wrong_key_or_dead_server_does_not_end_a_training(kdcode, start, tiny_teacher, tmp_path, s3):
    bucket, keys, up, down = s3
    words = ["distill", "--teacher.name", tiny_teacher, *SETTINGS, "--train.upload"]
    wrong = keys | {"AWS_SECRET_ACCESS_KEY": "another-secret-0123456789"}
    denied = kdcode(*words, "s3://bucket/denied", "--name", "denied", **wrong)
    assert denied.returncode == 0 and "upload of checkpoint-4 failed" in denied.stderr
    assert "another-secret" not in denied.stderr and "Traceback" not in denied.stderr
    down()
    process = start(*words, "s3://bucket/back", "--name", "back", "--train.epochs", 6, **keys)
    wait_for((tmp_path/"runs"/"back"/"checkpoints"/"checkpoint-4"/"trainer_state.json").exists, process)
    up()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for name in ("student/model.safetensors", "checkpoint-96/trainer_state.json"):
        assert (bucket/"back"/name).exists()


def test_several_sources_with_teacher_generated_text(kdcode, tiny_teacher, tmp_path):
    tiny_teacher = shutil.copytree(tiny_teacher, tmp_path/"teacher")  # a copy, to be changed below
    (web := tmp_path/"web").mkdir()
    for i in range(120): (web/f"{i}.js").write_text(f"export const n{i} = {i};\n" * 30)
    folder = {"source": "folder", "path": str(web), "suffixes": [".js"], "weight": 3}
    data = {"source": [{"source": "teacher"}, folder], "max_new_tokens": 12, "min_characters": 1}
    (tmp_path/"mix.yaml").write_text(json.dumps({"data": data}))
    words = ["distill", "--config", tmp_path/"mix.yaml", "--teacher.name", tiny_teacher, *SETTINGS,
             "--data.tokens", 1024, "--data.validation_tokens", 256]
    done = kdcode(*words, "--name", "mixed")
    assert done.returncode == 0, done.stderr
    run = tmp_path/"runs"/"mixed"
    file, = (tmp_path/"runs"/"generated-text").glob("*.jsonl")
    header, *generated = map(json.loads, file.read_text().splitlines())
    assert header["teacher"] == str(tiny_teacher) and all(len(line[1]) == 64 for line in generated)
    corpus = read_json(run/"corpus"/"corpus.json")
    assert corpus["statistics"]["train"]["languages"] == {"python by teacher": 4, "javascript": 12}
    assert corpus["recipe"]["author"] == f"{tiny_teacher} {header['weights']}"
    report = read_json(run/"report.json")
    assert [row["held-out text"] for row in report["rows"]] == ["all", "python by teacher", "javascript"]
    rates = [report["figures"][f"acceptance_rate_{language}"] for language in ("python by teacher", "javascript")]
    assert min(rates) < report["figures"]["acceptance_rate"] < max(rates)
    # a fine-tuned teacher of the same name: neither its text nor its corpus is that of the first one
    tensors = load_file(tiny_teacher/"model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(tensors, tiny_teacher/"model.safetensors", metadata={"format": "pt"})
    shutil.copytree(run/"corpus", tmp_path/"runs"/"fine-tuned"/"corpus")
    assert kdcode(*words, "--name", "fine-tuned").returncode == 0
    assert len(list((tmp_path/"runs"/"generated-text").glob("*.jsonl"))) == 2
    other = read_json(tmp_path/"runs"/"fine-tuned"/"corpus"/"corpus.json")
    assert other["recipe"]["author"].startswith(f"{tiny_teacher} ") and other["recipe"] != corpus["recipe"]


@pytest.mark.slow
def test_killed_search_resumes_with_two_workers(kdcode, start, tiny_teacher, tmp_path):
    space = {"train.learning_rate": {"low": 3e-4, "high": .03, "log": True}, "train.batch_size": [2, 4],
             "loss.divergence": ["forward_kl", "jsd"]}
    (tmp_path/"space.yaml").write_text(json.dumps(space))
    words = ["tune", "--teacher.name", tiny_teacher, *SETTINGS, "--data.tokens", 1024, "--targets.kind", "top_k",
             "--space", tmp_path/"space.yaml", "--trials", 5, "--name", "search"]
    process, run = start(*words), tmp_path/"runs"/"search"
    wait_for((run/"trial-0001").exists, process)
    kill(process)
    assert not (run/"best.yaml").exists()  # it was killed before the end
    workers = [start(*words) for _ in range(2)]
    errs = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errs
    trials = optuna.load_study(study_name="kdcode", storage=f"sqlite:///{run/'study.db'}").trials
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert 5 <= len(ended) <= 6 and f"trial {ended[-1].number}:" in "".join(errs)
    assert all("trial " in err for err in errs)  # both workers took part
    best = read_json(run/"report.json")["figures"]["objective"]
    assert best == max(trial.value for trial in ended if trial.state == TrialState.COMPLETE)
    assert (run/"tuning.png").stat().st_size > 0
    again = kdcode("distill", "--config", run/"best.yaml", "--out", tmp_path/"again", OMP_NUM_THREADS="1")
    assert again.returncode == 0, again.stderr
    assert abs(read_json(tmp_path/"again"/"report.json")["figures"]["acceptance_rate"] - best) < 1e-6


@pytest.mark.slow
def test_killed_experiment_resumes_and_compares(kdcode, start, tiny_teacher, tmp_path):
    base = {"name": "guide", "teacher": {"name": str(tiny_teacher)}, "targets": {"kind": "top_k"},
            "data": {"tokens": 1024, "validation_tokens": 512, "block_size": 64},
            "student": {"layers": [0], "draft_vocabulary": 1000}, "train": {"batch_size": 4, "eval_steps": 4},
            "decode": {"problems": 2, "max_new_tokens": 12, "compile": False}}
    experiment = {"question": "Text or teacher?", "config": base, "seeds": [0, 1],
                  "variants": {"text": {"loss.alpha": 1}, "teacher": {"loss.alpha": 0}}}
    (tmp_path/"guide.yaml").write_text(json.dumps(experiment))
    process, run = start("experiment", "guide.yaml"), tmp_path/"runs"/"guide"
    text = run/"text"
    wait_for((run/"teacher"/"seed-0"/"config.yaml").exists, process)
    kill(process)
    finished = (text/"seed-0"/"history.json").stat().st_mtime_ns
    done = kdcode("experiment", "guide.yaml")
    assert done.returncode == 0, done.stderr
    assert finished == (text/"seed-0"/"history.json").stat().st_mtime_ns  # a finished run is not repeated
    assert len((run/"runs.csv").read_text().splitlines()) == 5 and (run/"runs.png").stat().st_size > 0
    figures = read_json(run/"report.json")["figures"]
    assert figures["perplexity, text"] != figures["perplexity, teacher"]
    assert "| text |" in done.stdout and "±" in done.stdout and len(list(run.glob("targets-*"))) == 1
    # the speed is measured for the first seed only: it does not depend on the weights
    assert [(text/f"seed-{seed}"/"speed.json").exists() for seed in (0, 1)] == [True, False]
    # on another machine that got one student only, the speed is measured again, and nothing else
    (text/"seed-0"/"speed.json").unlink()
    shutil.rmtree(text/"seed-1"/"student")
    again = kdcode("experiment", "guide.yaml")
    assert again.returncode == 0, again.stderr
    assert (text/"seed-0"/"speed.json").exists() and not (text/"seed-1"/"student").exists()
    assert finished == (text/"seed-0"/"history.json").stat().st_mtime_ns
    assert read_json(run/"report.json")["figures"]["perplexity, text"] == figures["perplexity, text"]
