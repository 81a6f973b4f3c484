"""Trainings that are stopped, spread over processes, or copied elsewhere: as processes, against a real S3 server."""
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

import pytest
from safetensors.torch import load_file

from conftest import ROOT

SETTINGS = ["--data.tokens", 4096, "--data.validation_tokens", 128, "--data.block_size", 64, "--student.layers", "[0]", "--student.draft_vocabulary", 1000,
            "--train.batch_size", 4, "--train.eval_steps", 4, "--train.logging_steps", 1]


def wait_for(there, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not there() and process.poll() is None and time.monotonic() < deadline: time.sleep(.005)
    assert there(), process.communicate()[1] if process.poll() is not None else "it took too long"


def same_weights(a, b):
    one, other = (load_file(folder/"student"/"model.safetensors") for folder in (a, b))
    return all((one[key] == other[key]).all() for key in one)


def files(folder): return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".unfinished"}


def test_targets_killed_and_continued_are_the_same_bytes(kdcode, start, tiny_teacher, tmp_path):
    words = ["targets", "--teacher.name", tiny_teacher, *SETTINGS, "--targets.kind", "sampled", "--targets.shard_blocks", 4]
    done = kdcode(*words, "--name", "whole")
    assert done.returncode == 0, done.stderr
    assert re.search(r"targets of 4,096 tokens .*: [\d.]+ bytes for each", done.stdout)
    process, cache = start(*words, "--name", "killed"), tmp_path/"runs"/"killed"/"targets"
    wait_for((cache/"shard-00002.sha256").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cache/"shard-00015.sha256").exists()  # it was really in the middle
    assert kdcode(*words, "--name", "killed").returncode == 0
    assert files(cache) == files(tmp_path/"runs"/"whole"/"targets")
    # one cache for several trainings, and an error that names what differs
    trained = ["distill", "--teacher.name", tiny_teacher, *SETTINGS, "--targets.kind", "sampled", "--targets.shard_blocks", 4, "--targets.folder", cache]
    assert kdcode(*trained, "--name", "user").returncode == 0
    refused = kdcode(*trained, "--name", "other", "--loss.temperature", 2)
    assert refused.returncode == 2 and "another temperature 1.0 (now 2.0)" in refused.stderr


def test_a_full_disk_is_one_line_and_loses_nothing(kdcode, tiny_teacher, tmp_path):
    words = ["targets", "--teacher.name", tiny_teacher, *SETTINGS, "--targets.kind", "top_k", "--targets.k", 900, "--targets.shard_blocks", 16]
    assert kdcode(*words, "--name", "whole").returncode == 0
    sizes = sorted(path.stat().st_size for path in (tmp_path/"runs"/"whole"/"targets").glob("*.parquet"))
    environment = os.environ | {"KDCODE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] // 2, sizes[0] // 2))
    full = subprocess.run([sys.executable, "-m", "kdcode.cli", *map(str, words), "--name", "full"], cwd=tmp_path, env=environment, capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 1, full.stderr
    assert full.stderr.rstrip().splitlines()[-1].startswith("kdcode: ") and "File too large" in full.stderr and "Traceback" not in full.stderr
    assert kdcode(*words, "--name", "full").returncode == 0
    assert files(tmp_path/"runs"/"full"/"targets") == files(tmp_path/"runs"/"whole"/"targets")


def test_told_to_stop_it_writes_a_checkpoint_and_goes_on(kdcode, start, tiny_teacher, tmp_path):
    words = ["distill", "--teacher.name", tiny_teacher, *SETTINGS, "--train.epochs", 2]
    assert kdcode(*words, "--name", "whole", OMP_NUM_THREADS="1").returncode == 0
    process, run = start(*words, "--name", "told"), tmp_path/"runs"/"told"
    wait_for((run/"checkpoints"/"checkpoint-4"/"trainer_state.json").exists, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopped after step" in told, told
    step = int(re.search(r"stopped after step (\d+)", told)[1])
    assert (run/"checkpoints"/f"checkpoint-{step}"/"trainer_state.json").exists() and not (run/"student").exists()
    assert kdcode(*words, "--name", "told", "--resume", OMP_NUM_THREADS="1").returncode == 0
    assert same_weights(run, tmp_path/"runs"/"whole")


def losses(run): return [entry["loss"] for entry in json.loads((run/"history.json").read_text()) if "loss" in entry]


def launch(folder, launcher, *words):
    """The command on two processes, which talk by gloo where there is no GPU."""
    environment = os.environ | {"KDCODE_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [Path(sys.executable).parent/"accelerate", "launch", "--num_processes", 2, *launcher, *words]
    return subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_train_as_one(kdcode, tiny_teacher, tmp_path):
    words = ["distill", "--teacher.name", tiny_teacher, *SETTINGS, "--targets.kind", "top_k", "--train.precision", "float32"]
    assert kdcode(*words, "--name", "one").returncode == 0
    one, half = losses(tmp_path/"runs"/"one"), ["--train.batch_size", 2]
    assert max(abs(a - b) for a, b in zip(one, one[1:])) > 1e-3  # the losses do move
    # each with the whole student; --multi_gpu is what starts several processes
    whole = launch(tmp_path, ["--multi_gpu", "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "kdcode.cli"], *words, *half, "--name", "two")
    assert whole.returncode == 0, whole.stderr
    assert close(one, losses(tmp_path/"runs"/"two"))
    # each with a part of it
    shared = ["--config_file", ROOT/"configs"/"accelerate"/"fsdp.yaml", ROOT/"tests"/"fsdp_on_cpu.py", *words, *half, "--name", "shared"]
    parts, run = launch(tmp_path, shared), tmp_path/"runs"/"shared"
    assert parts.returncode == 0, parts.stderr
    assert close(one, losses(run)) and (run/"checkpoints"/"checkpoint-16"/"pytorch_model_fsdp_0").is_dir()
    ends = [load_file(folder/"student"/"model.safetensors") for folder in (run, tmp_path/"runs"/"one")]
    assert all((ends[0][key] - ends[1][key]).abs().max() < 1e-4 for key in ends[1])
    shutil.rmtree(run/"student")
    shutil.rmtree(run/"checkpoints"/"checkpoint-16")
    (run/"history.json").unlink()
    again = launch(tmp_path, [*shared, "--resume"])
    assert again.returncode == 0, again.stderr
    assert close(one, losses(run)) and "[3/3]" in again.stderr


def close(a, b): return len(a) == len(b) == 16 and max(abs(x - y) for x, y in zip(a, b)) < 1e-4


@pytest.fixture
def s3(tmp_path):
    """A real S3 server on this machine, which can be stopped and started again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (bucket := tmp_path/"s3"/"bucket").mkdir(parents=True)
    command = [Path(sys.executable).parent/"rclone", "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "ACCESSKEY0123456789,SECRETKEY0123456789", tmp_path/"s3"]
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
    keys = {"AWS_ACCESS_KEY_ID": "ACCESSKEY0123456789", "AWS_SECRET_ACCESS_KEY": "SECRETKEY0123456789", "AWS_DEFAULT_REGION": "us-east-1", "AWS_S3_ENDPOINT": f"http://127.0.0.1:{port}"}
    yield bucket, keys, up, down
    down()


def test_checkpoints_go_to_s3(kdcode, tiny_teacher, tmp_path, s3):
    bucket, keys, _, _ = s3
    words = ["distill", "--teacher.name", tiny_teacher, *SETTINGS, "--train.upload", "s3://bucket/run"]
    done = kdcode(*words, "--name", "copied", **keys)
    assert done.returncode == 0 and "upload" not in done.stderr, done.stderr
    for name in ("student/model.safetensors", "checkpoint-16/trainer_state.json"):
        local = tmp_path/"runs"/"copied"/("" if name.startswith("student") else "checkpoints")/name
        assert (bucket/"run"/name).read_bytes() == local.read_bytes()


def test_a_refused_key_or_a_dead_server_never_ends_a_training(kdcode, start, tiny_teacher, tmp_path, s3):
    bucket, keys, up, down = s3
    words = ["distill", "--teacher.name", tiny_teacher, *SETTINGS, "--train.upload"]
    refused = kdcode(*words, "s3://bucket/refused", "--name", "refused", **keys | {"AWS_SECRET_ACCESS_KEY": "another-secret-0123456789"})
    assert refused.returncode == 0 and "upload of checkpoint-4 failed" in refused.stderr
    assert "another-secret" not in refused.stderr and "Traceback" not in refused.stderr
    down()
    process, run = start(*words, "s3://bucket/back", "--name", "back", "--train.epochs", 6, **keys), tmp_path/"runs"/"back"
    wait_for((run/"checkpoints"/"checkpoint-4"/"trainer_state.json").exists, process)
    up()
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert (bucket/"back"/"student"/"model.safetensors").exists() and (bucket/"back"/"checkpoint-96"/"trainer_state.json").exists()


def test_several_sources_and_the_teachers_own_text(kdcode, tiny_teacher, tmp_path):
    (web := tmp_path/"web").mkdir()
    for i in range(120): (web/f"{i}.js").write_text(f"export const n{i} = {i};\n" * 30)
    data = {"source": [{"source": "teacher"}, {"source": "folder", "path": str(web), "suffixes": [".js"], "weight": 3}], "max_new_tokens": 12, "min_characters": 1}
    (tmp_path/"mix.yaml").write_text(json.dumps({"data": data}))
    done = kdcode("distill", "--config", tmp_path/"mix.yaml", "--teacher.name", tiny_teacher, *SETTINGS, "--data.tokens", 1024, "--data.validation_tokens", 256, "--name", "mixed")
    assert done.returncode == 0, done.stderr
    run = tmp_path/"runs"/"mixed"
    file, = (tmp_path/"runs"/"teacher-texts").glob("*.jsonl")
    written = file.read_text().splitlines()
    assert json.loads(written[0])["teacher"] == str(tiny_teacher) and all(len(json.loads(line)[1]) == 64 for line in written[1:])
    corpus = json.loads((run/"corpus"/"corpus.json").read_text())
    assert corpus["statistics"]["train"]["languages"] == {"python by teacher": 4, "javascript": 12} and corpus["recipe"]["author"] == str(tiny_teacher)
    report = json.loads((run/"report.json").read_text())
    assert [row["held-out text"] for row in report["rows"]] == ["all", "python by teacher", "javascript"]
    both = [report["figures"][f"acceptance_rate_{language}"] for language in ("python by teacher", "javascript")]
    assert min(both) < report["figures"]["acceptance_rate"] < max(both)


def test_a_search_killed_goes_on_with_two_workers(kdcode, start, tiny_teacher, tmp_path):
    import optuna
    (tmp_path/"space.yaml").write_text("train.learning_rate: {low: 0.0003, high: 0.03, log: true}\ntrain.batch_size: [2, 4]\nloss.divergence: [forward_kl, jsd]\n")
    words = ["tune", "--teacher.name", tiny_teacher, *SETTINGS, "--data.tokens", 1024, "--targets.kind", "top_k", "--space", tmp_path/"space.yaml", "--trials", 5, "--name", "search"]
    process, run = start(*words), tmp_path/"runs"/"search"
    wait_for((run/"trial-0001").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run/"best.yaml").exists()  # it was really in the middle
    workers = [start(*words) for _ in range(2)]
    said = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    trials = optuna.load_study(study_name="kdcode", storage=f"sqlite:///{run/'study.db'}").trials
    ended = [trial for trial in trials if trial.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)]
    assert 5 <= len(ended) <= 6 and all(f"trial {ended[-1].number}:" in "".join(said) for _ in ended)
    assert all("trial " in text for text in said)  # both took part
    report = json.loads((run/"report.json").read_text())
    assert report["figures"]["objective"] == max(trial.value for trial in ended if trial.state == optuna.trial.TrialState.COMPLETE)
    assert (run/"tuning.png").stat().st_size > 0
    again = kdcode("distill", "--config", run/"best.yaml", "--out", tmp_path/"again", OMP_NUM_THREADS="1")
    assert again.returncode == 0, again.stderr
    assert abs(json.loads((tmp_path/"again"/"report.json").read_text())["figures"]["acceptance_rate"] - report["figures"]["objective"]) < 1e-6


def test_an_experiment_goes_on_and_compares(kdcode, start, tiny_teacher, tmp_path):
    base = {"name": "guide", "teacher": {"name": str(tiny_teacher)}, "data": {"tokens": 1024, "validation_tokens": 512, "block_size": 64}, "student": {"layers": [0], "draft_vocabulary": 1000},
            "targets": {"kind": "top_k"}, "train": {"batch_size": 4, "eval_steps": 4}}
    experiment = {"question": "Text or teacher?", "config": base, "seeds": [0, 1], "variants": {"text": {"loss.alpha": 1}, "teacher": {"loss.alpha": 0}}}
    (tmp_path/"guide.yaml").write_text(json.dumps(experiment))
    process, run = start("experiment", "guide.yaml"), tmp_path/"runs"/"guide"
    wait_for((run/"teacher"/"seed-0"/"config.yaml").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (run/"text"/"seed-0"/"history.json").stat().st_mtime_ns
    done = kdcode("experiment", "guide.yaml")
    assert done.returncode == 0, done.stderr
    assert first == (run/"text"/"seed-0"/"history.json").stat().st_mtime_ns  # what was finished was kept
    assert len((run/"runs.csv").read_text().splitlines()) == 5 and (run/"runs.png").stat().st_size > 0
    figures = json.loads((run/"report.json").read_text())["figures"]
    assert figures["perplexity, text"] != figures["perplexity, teacher"]
    assert "| text |" in done.stdout and "±" in done.stdout and len(list(run.glob("targets-*"))) == 1
    for seed in (0, 1): assert (run/"text"/f"seed-{seed}"/"speed.json").exists() == (seed == 0)  # a step costs the same whatever the weights are
    (run/"text"/"seed-0"/"speed.json").unlink()  # as on another machine, to which one student was brought
    shutil.rmtree(run/"text"/"seed-1"/"student")
    again = kdcode("experiment", "guide.yaml")
    assert again.returncode == 0, again.stderr
    assert (run/"text"/"seed-0"/"speed.json").exists() and not (run/"text"/"seed-1"/"student").exists() and first == (run/"text"/"seed-0"/"history.json").stat().st_mtime_ns
    assert json.loads((run/"report.json").read_text())["figures"]["perplexity, text"] == figures["perplexity, text"]
