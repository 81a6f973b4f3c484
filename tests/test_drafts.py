"""The students that the project ships: whole, small enough, fit for their teacher and no other, and trained on no evaluation text."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdcode import load_draft
from kdcode.bench import generate_assisted, generate_baseline
from kdcode.config import ConfigError, DecodeSettings, load_config
from kdcode.data import Document, evaluation_lines, humaneval_problems, read_source, usable_documents
from kdcode.eagle import EagleStudent
from kdcode.decode import complete, shipped_drafts
from kdcode.result import Statistics
from kdcode.teacher import load_teacher

ROOT = Path(__file__).parent.parent
DRAFTS = {"smollm2-135m-draft": (25e6, "smollm2-draft.yaml"), "qwen2.5-coder-1.5b-draft": (40e6, "qwen-draft.yaml")}  # folder: its largest size, and the configuration that makes it again
INDEPENDENT = {"smollm2-135m-draft-independent": (25e6, "smollm2-independent.yaml")}  # that reads nothing of its teacher
CONFIGS = [load_config(ROOT/"configs"/config) for _, config in (DRAFTS | INDEPENDENT).values()]


@pytest.mark.parametrize("name", DRAFTS | INDEPENDENT)
def test_a_draft_is_whole_and_small(name):
    folder, (largest, config) = ROOT/"models"/name, (DRAFTS | INDEPENDENT)[name]
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= files
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl"))]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= largest
    settings, shape = load_config(ROOT/"configs"/config), json.loads((folder/"config.json").read_text())
    made_for = Path(settings.teacher.name).stem if settings.teacher.name.endswith(".gguf") else settings.teacher.name
    assert (settings.student.feature_layers, settings.student.draft_vocabulary, made_for) == (shape.get("feature_layers", []), shape["draft_vocab_size"], shape["teacher"])
    card = (folder/"README.md").read_text()
    for word in ("license: apache-2.0", config, "tokens", "HumanEval", "kdcode bench decode"): assert word in card, word


def test_the_draft_of_smollm2_pays():
    teacher = load_teacher("smollm2")
    student, statistics = load_draft("smollm2", teacher), Statistics()
    for problem in humaneval_problems(4):
        settings = DecodeSettings(max_new_tokens=48, gamma=3, adaptive=False, student_weights="int8")
        result = complete(teacher, student, problem["prompt"], settings)
        assert result.tokens == generate_baseline(teacher, problem["prompt"], settings, 0)
        statistics += result.statistics
    assert statistics.acceptance_rate > .5 and statistics.tokens_per_call > 1.8, statistics


def test_the_independent_draft_works_in_other_engines():
    teacher, (name,) = load_teacher("smollm2"), INDEPENDENT
    student = load_draft(str(ROOT/"models"/name), teacher)
    llama, settings, statistics = student.to_llama(), DecodeSettings(max_new_tokens=48, gamma=3, adaptive=False), Statistics()
    ids = torch.tensor([teacher.tokenizer("def fibonacci(n):").input_ids])
    torch.testing.assert_close(llama(ids).logits, student(ids).logits)
    for problem in humaneval_problems(4):
        alone = generate_baseline(teacher, problem["prompt"], settings, 0)
        result = complete(teacher, student, problem["prompt"], settings)
        assert result.tokens == alone == generate_assisted(teacher, llama, problem["prompt"], settings, 0)
        statistics += result.statistics
    assert statistics.acceptance_rate > .5 and statistics.tokens_per_call > 1.8, statistics


def test_a_draft_is_refused_by_another_teacher():
    teacher = load_teacher("smollm2")
    other = EagleStudent.from_teacher(teacher.model, [-1], [0], draft_ids=torch.arange(100), teacher_name="another-teacher", tokenizer_fingerprint="0123456789abcdef")
    with pytest.raises(ConfigError, match="made for teacher another-teacher, whose tokenizer is not that of smollm2"): complete(teacher, other, "x")
    with pytest.raises(ConfigError, match="made for teacher qwen2.5-coder-1.5b-instruct-q4_k_m, whose tokenizer is not that of smollm2"): load_draft("qwen2.5-coder-1.5b", teacher)
    with pytest.raises(ConfigError, match="there is no student in nobody"): load_draft("nobody")
    assert {folder.name for folder in shipped_drafts().values()} == set(DRAFTS) and {"smollm2", "smollm2-135m"} <= set(shipped_drafts())


@pytest.mark.parametrize("prompt_source", sorted({config.data.prompt_source for config in CONFIGS}))
def test_no_evaluation_text_in_what_a_draft_was_trained_on(prompt_source):
    source = replace(CONFIGS[0].data, source=prompt_source)
    spoilt = [Document(f"x = {i}\n" * 50 + problem["prompt"]) for i, problem in enumerate(humaneval_problems())]
    rejected, documents = Counter(), 0
    for document in usable_documents([*spoilt, *read_source(source, 0)], source, rejected):
        documents += 1
        assert evaluation_lines().isdisjoint(line.strip() for line in document.text.splitlines()), document.origin
    assert documents > 5000 and rejected["evaluation"] >= 155, rejected  # the control: the prompts themselves are found
