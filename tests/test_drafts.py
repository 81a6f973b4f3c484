"""The shipped students: complete, small, fit for their teacher only, and trained without evaluation text."""

import functools
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from kdcode import load_draft
from kdcode.bench import generate_assisted, generate_baseline
from kdcode.config import ConfigError, DecodeSettings, load_config
from kdcode.data import Document, evaluation_lines, humaneval_problems, read_source, usable_documents
from kdcode.decode import complete
from kdcode.eagle import EagleStudent, resolve_feature_layers
from kdcode.files import shipped_drafts
from kdcode.result import Statistics
from kdcode.teacher import load_teacher, Teacher, teacher_documents

ROOT = Path(__file__).parent.parent
# Folder: largest size in bytes, and the configuration that trains it.
DRAFTS = {
    "smollm2-135m-draft": (16e6, "smollm2-draft.yaml"),
    "qwen2.5-coder-1.5b-draft": (40e6, "qwen-draft.yaml"),
}
EAGLE3 = {"smollm2-135m-draft-eagle3": (11e6, "smollm2-eagle3.yaml")}  # drafts in vLLM, too
INDEPENDENT = {"smollm2-135m-draft-independent": (25e6, "smollm2-independent.yaml")}  # needs no hidden states
ALL_DRAFTS = DRAFTS | EAGLE3 | INDEPENDENT
CONFIGS = [load_config(ROOT/"configs"/config) for _, config in ALL_DRAFTS.values()]
SETTINGS = DecodeSettings(max_new_tokens=48, gamma=3, adaptive=False)


@pytest.fixture(scope="module")
def teacher(): return load_teacher("smollm2")


@pytest.fixture(scope="module")
def baseline(teacher):
    """The tokens of `generate` for a prompt, computed once for all tests."""
    return functools.cache(lambda prompt: generate_baseline(teacher, prompt, SETTINGS, 0))


@pytest.mark.parametrize("name", ALL_DRAFTS)
def test_a_draft_is_complete_and_small(name):
    folder, (largest, _) = ROOT/"models"/name, ALL_DRAFTS[name]
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= files
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl"))]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= largest


@pytest.mark.parametrize("name", ALL_DRAFTS)
def test_a_draft_matches_its_configuration(name):
    folder, (_, config) = ROOT/"models"/name, ALL_DRAFTS[name]
    settings, shipped = load_config(ROOT/"configs"/config), json.loads((folder/"config.json").read_text())
    teacher = settings.teacher.name
    if teacher.endswith(".gguf"):
        teacher = Path(teacher).stem
    wanted, found = settings.student.feature_layers, shipped.get("feature_layers", [])
    if name in EAGLE3:
        wanted, found = resolve_feature_layers(wanted, 30), shipped["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert wanted == found
    assert settings.student.draft_vocabulary == shipped["draft_vocab_size"]
    assert teacher == shipped["teacher"]
    card = (folder/"README.md").read_text()
    for word in ("license: apache-2.0", config, "tokens", "HumanEval", "kdcode bench decode"):
        assert word in card, word


def assert_useful_draft(teacher, student, settings, *references):
    """Check that greedy outputs equal each reference, and that the student has a useful acceptance rate."""
    statistics = Statistics()
    for problem in humaneval_problems(4):
        result = complete(teacher, student, problem["prompt"], settings)
        for reference in references:
            assert result.tokens == reference(problem["prompt"])
        statistics += result.statistics
    assert statistics.acceptance_rate > .5 and statistics.tokens_per_call > 1.8, statistics


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", *EAGLE3])
def test_the_smollm2_draft_has_a_useful_acceptance_rate(teacher, baseline, name):
    student = load_draft(name if name == "smollm2" else str(ROOT/"models"/name), teacher)
    assert_useful_draft(teacher, student, replace(SETTINGS, student_weights="int8"), baseline)


@pytest.mark.slow
def test_the_independent_draft_works_in_other_engines(teacher, baseline):
    """As a plain Llama it has the same logits, and drafts in the assisted generation of transformers."""
    name, = INDEPENDENT
    student = load_draft(str(ROOT/"models"/name), teacher)
    llama = student.to_llama()
    ids = torch.tensor([teacher.tokenizer("def fibonacci(n):").input_ids])
    torch.testing.assert_close(llama(ids).logits, student(ids).logits)
    def assisted(prompt): return generate_assisted(teacher, llama, prompt, SETTINGS, 0)
    assert_useful_draft(teacher, student, SETTINGS, baseline, assisted)


def test_another_teacher_is_an_error(teacher):
    student = EagleStudent.from_teacher(teacher.model, [-1], [0], draft_ids=torch.arange(100),
                                        teacher_name="another-teacher", tokenizer_fingerprint="0123456789abcdef")
    message = "made for teacher {}, whose tokenizer differs from that of smollm2"
    with pytest.raises(ConfigError, match=message.format("another-teacher")):
        complete(teacher, student, "x")
    with pytest.raises(ConfigError, match=message.format("qwen2.5-coder-1.5b-instruct-q4_k_m")):
        load_draft("qwen2.5-coder-1.5b", teacher)


def test_shipped_drafts_are_found_by_name():
    assert {folder.name for folder in shipped_drafts().values()} == set(DRAFTS)
    assert {"smollm2", "smollm2-135m"} <= set(shipped_drafts())
    with pytest.raises(ConfigError, match="there is no student in nobody"):
        load_draft("nobody")


@pytest.mark.parametrize("prompt_source", sorted({config.data.prompt_source for config in CONFIGS}))
def test_training_text_contains_no_evaluation_text(prompt_source):
    """No training document has a line of an evaluation problem. Control: the filter rejects the problems themselves."""
    source = replace(CONFIGS[0].data, source=prompt_source)
    contaminated = [Document(f"x = {i}\n" * 50 + problem["prompt"]) for i, problem in enumerate(humaneval_problems())]
    rejected, documents = Counter(), 0
    for document in usable_documents([*contaminated, *read_source(source, 0)], source, rejected):
        documents += 1
        lines = {line.strip() for line in document.text.splitlines()}
        assert evaluation_lines().isdisjoint(lines), document.origin
    assert documents > 5000 and rejected["evaluation"] >= 155, rejected


def test_shipped_text_is_what_its_configuration_asks_for(teacher, tmp_path):
    """The first batches come from the file, none from the teacher. Control: prompts of another length are an error."""
    config = load_config(ROOT/"configs"/"smollm2-eagle3.yaml")
    data = replace(config.data, generated_text=str(ROOT/config.data.generated_text))
    with mock.patch.object(Teacher, "continuations", side_effect=AssertionError("the teacher generates")):
        documents = list(itertools.islice(teacher_documents(teacher, data, config.seed, tmp_path), 1000))
    assert len({document.text for document in documents}) > 900
    assert {document.finished for document in documents} == {True, False}
    with pytest.raises(ConfigError, match="has prompt_tokens 160, and this run has 100"):
        next(teacher_documents(teacher, replace(data, prompt_tokens=100), config.seed, tmp_path))
