"""The same training in TRL and in kdcode. These tests need TRL's environment (make test-trainers)."""
import json
from dataclasses import replace

import pytest

from conftest import ROOT
from kdcode.config import Config, DataSettings, StudentSettings, TrainSettings
from kdcode.data import build_corpus
from kdcode.teacher import load_teacher
from kdcode.trainers import bench_trainers, read_records, Training, TRAINERS

pytestmark = pytest.mark.engines
CONFIG = Config(
    name="tiny", threads=1, data=DataSettings(tokens=1024, validation_tokens=256, block_size=64),
    student=StudentSettings(layers=[0]), train=TrainSettings(batch_size=2, learning_rate=1e-2, precision="float32"))


@pytest.fixture
def measured(tiny_teacher, tmp_path, monkeypatch):
    """A function from settings of the training to the report and the trainings."""
    if not (ROOT/".engines"/"trl"/"complete").exists(): pytest.skip("TRL is not installed; make trainers")
    monkeypatch.setenv("KDCODE_HOME", str(ROOT))
    teacher = load_teacher(replace(CONFIG.teacher, name=str(tiny_teacher), device="cpu"))
    corpus = build_corpus(CONFIG.data, teacher.tokenizer, tmp_path/"corpus", CONFIG.seed)

    def measure(**train):
        config = replace(CONFIG, train=replace(CONFIG.train, **train))
        report = bench_trainers(config, teacher, corpus, tmp_path, "test")
        files = {kind: tmp_path/"trainings"/kind/"steps.jsonl" for kind in TRAINERS}
        return report, {kind: Training.read(read_records(file)) for kind, file in files.items()}
    return measure


@pytest.mark.parametrize("train", [{}, {"gradient_accumulation": 2, "epochs": 2.}, {"precision": "bfloat16"}], ids=str)
def test_both_trainers_compute_the_same(measured, train, tmp_path):
    report, trainings = measured(**train)
    tolerance = 2e-2 if "precision" in train else 1e-4
    assert trainings["trl"].losses == pytest.approx(trainings["online"].losses, rel=tolerance)
    assert trainings["trl"].losses[-1] < trainings["trl"].losses[0]
    rates = {kind: report.figures[f"{kind}_acceptance_rate"] for kind in TRAINERS}
    assert rates["trl"] == pytest.approx(rates["online"], abs=1e-3 if train else 1e-4)
    assert rates["trl"] > report.figures["untrained_acceptance_rate"]
    versions = json.loads((tmp_path/"trainings"/"trl"/"versions.json").read_text())
    assert versions["trl"] == "1.16.0"
