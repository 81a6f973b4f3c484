"""`kdcode plan`: as a process, its mistakes, and its arithmetic against real decoding and committed reports."""
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import save_random_llama
from kdcode import cli, plan
from kdcode.bench import Decoded, decode_interleaved, fixed_gamma_name, kdcode_method, StepCosts
from kdcode.config import Config, DecodeSettings, load_config
from kdcode.data import humaneval_problems
from kdcode.draft_eval import draft_logits
from kdcode.eagle import EagleStudent
from kdcode.history import read_report
from kdcode.plan import (
    matches_and_confidences, model_size, NGRAM, plan_for_card, predicted_seconds, replay_methods, replay_text,
    ReplayedDrafter, shape_of, Simulation, teacher_texts)
from kdcode.result import Statistics
from kdcode.student import Student

RESULTS = Path(__file__).parent.parent/"results"
SHORT = ("--decode.problems", 2, "--decode.max_new_tokens", 12, "--decode.compile", "off")
CARD = ("--bandwidth", 4800, "--flops", 990)


def config_only(folder, **sizes):
    """Write the config.json of a Llama without weights."""
    LlamaConfig(**{"vocab_size": 49_152, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
                   "num_hidden_layers": 3} | sizes).save_pretrained(folder)
    return folder


def test_a_plan_can_be_trained(kdcode, tiny_teacher, tmp_path):
    done = kdcode("plan", "--teacher.name", tiny_teacher, *SHORT)
    assert done.returncode == 0, done.stderr
    folder = tmp_path/"runs"/"quickstart"/"plan"
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "speedup.png", "distill.yaml"}
    report = json.loads((folder/"report.json").read_text())
    assert report["rows"][-1]["draft"] == NGRAM and len(report["rows"]) == 5  # the teacher has 2 layers
    assert {"expected_speedup", "break_even", "training_hours", "gamma"} <= set(report["figures"])
    assert "configuration of the training: runs/quickstart/plan/distill.yaml" in done.stdout
    pays = report["figures"]["expected_speedup"] >= 1  # as measured here and now
    others = f"bench steps --teacher.name {tiny_teacher}"
    following = "distill --config runs/quickstart/plan/distill.yaml" if pays else others
    assert done.stderr.splitlines()[-1] == f"next: kdcode {following}"
    assert load_config(folder/"distill.yaml").teacher.name == str(tiny_teacher)
    small = ("--data.tokens", 2048, "--data.validation_tokens", 128, "--data.block_size", 64,
             "--data.max_new_tokens", 16, "--student.draft_vocabulary", 1000, "--train.max_steps", 2,
             "--train.eval_steps", 2, "--data.prompt_source", "stdlib", "--data.source", "teacher")
    trained = kdcode("distill", "--config", folder/"distill.yaml", *small)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path/"runs"/"quickstart-draft"/"student"/"model.safetensors").is_file()


def test_a_draft_is_predicted_with_the_labels_of_the_benchmark(kdcode, tiny_teacher, pair, tmp_path):
    pair[1].save_pretrained(tmp_path/"draft")
    words = ("--teacher.name", tiny_teacher, "--draft", tmp_path/"draft", *SHORT, "--decode.gamma", 3)
    planned, measured = kdcode("plan", *words), kdcode("bench", "decode", *words)
    assert (planned.returncode, measured.returncode) == (0, 0), planned.stderr + measured.stderr
    assert planned.stderr.splitlines()[-1].startswith("next: kdcode bench decode --teacher.name")
    rows = [json.loads((tmp_path/"runs"/"quickstart"/name/"report.json").read_text())["rows"]
            for name in ("plan", "bench-decode")]
    assert {row["method"] for row in rows[0]} <= {row["method"] for row in rows[1]}
    by_method = [{row["method"]: row["tokens per target call"] for row in table} for table in rows]
    for gamma in (1, 2, 4, 8):
        assert by_method[0][fixed_gamma_name(gamma)] == by_method[1][fixed_gamma_name(gamma)]


def test_a_slow_minute_in_one_prompt_does_not_count(monkeypatch):
    seconds = {plan.GENERATE: [2., 2., 2.], plan.NO_DRAFT: [1., 9., 1.]}
    decoded = {name: Decoded([[0] * 10] * 3, times) for name, times in seconds.items()}
    monkeypatch.setattr(plan, "decode_methods", lambda *args: decoded)
    monkeypatch.setattr(plan, "decode_interleaved", lambda *args: decoded)
    found = plan.seconds_per_token(SimpleNamespace(device="cpu"), None, Config())
    assert found == {plan.GENERATE: .2, plan.NO_DRAFT: .1}


@pytest.mark.parametrize("drafter", ("student", "ngram", "hybrid"))
@pytest.mark.parametrize("kind", ("independent", "head", "other"))
def test_a_replay_has_the_rounds_of_the_decoder(pair, kind, drafter):
    teacher, independent = pair
    torch.manual_seed(1)
    students = {"independent": independent, "head": EagleStudent.from_teacher(teacher.model).eval(),
                "other": LlamaForCausalLM(teacher.model.config).eval()}
    students["other"].load_state_dict(teacher.model.state_dict())
    students["other"].lm_head.weight.data += .05 * torch.randn_like(teacher.model.lm_head.weight)  # sometimes wrong
    settings = DecodeSettings(gamma=3, adaptive=False, drafter=drafter, problems=3, max_new_tokens=40, compile=False)
    texts = teacher_texts(teacher, settings)
    replayed = list(replay_methods(teacher, students[kind], texts, settings, StepCosts(1., {1: 10.})).values())[0]
    method = kdcode_method(teacher, students[kind], settings, 0)
    real = decode_interleaved({"": method}, humaneval_problems(3), teacher.device)[""].statistics
    assert (replayed.tokens, replayed.calls, replayed.drafted, replayed.accepted) == (
        real.tokens, real.calls, real.drafted, real.accepted)


def test_a_text_may_be_longer_than_the_context_of_the_draft(pair):
    teacher, _ = pair
    settings = DecodeSettings(gamma=3, adaptive=False, problems=1, max_new_tokens=40, compile=False)
    (prompt, text), = texts = teacher_texts(teacher, settings)
    student = Student.from_teacher(teacher.model, layers=[0]).eval()
    student.config.max_position_embeddings = len(prompt) + 10
    replayed = replay_methods(teacher, student, texts, settings, StepCosts(1., {1: 10.}))[fixed_gamma_name(1)]
    assert replayed.drafted[0] <= 11 < replayed.calls and replayed.tokens == len(text)


def embedding_calls(student, function):
    """Return how often a function embeds tokens for a student, which each pass does equally often."""
    calls = []
    hook = student.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    function()
    hook.remove()
    return len(calls)


@pytest.mark.parametrize("kind", ("independent", "head", "other"))
def test_a_replay_runs_the_draft_once_over_each_text(pair, kind):
    teacher, independent = pair
    students = {"independent": independent, "head": EagleStudent.from_teacher(teacher.model).eval(),
                "other": LlamaForCausalLM(teacher.model.config).eval()}
    student, settings = students[kind], DecodeSettings(gamma=8, problems=2, max_new_tokens=20, compile=False)
    texts, costs = teacher_texts(teacher, settings), StepCosts(1., {1: 10.})
    once = embedding_calls(student, lambda: [
        draft_logits(teacher, student, torch.tensor([prompt + text]), 8) for prompt, text in texts])
    assert once >= len(texts)
    assert embedding_calls(student, lambda: replay_methods(teacher, student, texts, settings, costs)) == once


def test_matches_of_another_position_give_other_rounds(pair):
    """The control of the test above."""
    teacher, student = pair[0], LlamaForCausalLM(pair[0].model.config).eval()
    student.load_state_dict(teacher.model.state_dict())
    settings = DecodeSettings(gamma=3, adaptive=False, problems=1, max_new_tokens=40)
    (prompt, text), = teacher_texts(teacher, settings)
    matches, _ = matches_and_confidences(teacher, student, torch.tensor(prompt + text), 3)
    calls = [replay_text(Simulation(settings, StepCosts(1., {1: 10.})), ReplayedDrafter(prompt + text, some), prompt,
                         text).calls for some in (matches, matches[1:] + [0], [0] * len(matches))]
    assert calls[0] < calls[1] or calls[0] < calls[2]
    assert calls[2] == len(text)


@pytest.mark.parametrize("gamma", (1, 2, 4, 8))
def test_speedups_of_the_committed_benchmark(gamma):
    """From the tokens per call of results/decode-shipped and the t(n) of results/steps, of the same machine."""
    benchmark = read_report(RESULTS, "decode-shipped")
    rows = {row["method"]: row for row in benchmark["rows"]}
    row, figures = rows[fixed_gamma_name(gamma)], benchmark["figures"]
    variants = {row["variant of the teacher"]: row for row in read_report(RESULTS, "steps")["rows"]}
    steps = variants["float32, tuned kernels (kdcode)"]
    calls = {n: steps[f"t({n}), ms"] for n in (1, 2, 3, 4, 5, 8, 16)}
    costs = StepCosts(figures["c"] * calls[1], calls)
    seconds = (gamma * costs.draft + calls[1] * costs.v(gamma)) / 1e3
    run = Statistics(tokens=round(1000 * row["tokens per target call"]), calls=1000, seconds=1000 * seconds)
    without = calls[1] / 1e3
    predicted = without / predicted_seconds(run, costs, without)
    assert predicted == pytest.approx(row["speedup"] / figures["without_draft_speedup"], rel=.15)


def test_a_card_needs_only_the_configuration(kdcode, tmp_path):
    folder = config_only(tmp_path/"teacher")
    done = kdcode("plan", "--teacher.name", folder, "--teacher.dtype", "bfloat16", *CARD, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "16 bits:" in done.stdout and "4 bits (NF4):" in done.stdout
    assert "kdcode distill --config" in done.stderr


@pytest.mark.parametrize("model", ("gpt2", "gemma2"))
def test_other_families_get_new_layers(model, tmp_path):
    from transformers import AutoConfig
    sizes = {"vocab_size": 32_000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    AutoConfig.for_model(model, **sizes).save_pretrained(tmp_path/"teacher")
    config = Config(name="x")
    config.teacher = replace(config.teacher, name=str(tmp_path/"teacher"), dtype="bfloat16")
    report = plan_for_card(config, (1e12, 1e14), tmp_path, "test")
    assert len(report.rows) == 7
    assert isinstance(load_config(tmp_path/"distill.yaml").student.layers, int)


def test_a_teacher_in_4_bits_breaks_even_later(tmp_path):
    config, least = Config(), {}
    for quantization in ("none", "nf4"):
        folder = config_only(tmp_path/quantization, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24)
        config.teacher = replace(config.teacher, name=str(folder), dtype="bfloat16", quantization=quantization)
        least[quantization] = plan_for_card(config, (57e9, .2e12), tmp_path, "test").figures["break_even"]
    assert not least["nf4"] <= least["none"]  # two cores are compute-bound in 4 bits; NaN: it never pays there


def test_a_plan_that_does_not_pay_says_so(tmp_path, capsys):
    config = Config()
    folder = config_only(tmp_path/"teacher", num_hidden_layers=2)  # a draft of a layer is half of it
    config.teacher = replace(config.teacher, name=str(folder), dtype="bfloat16", quantization="nf4")
    report = plan_for_card(config, (1e12, 1e11), tmp_path, "test")
    assert report.notes[0].startswith("Don't train a draft")
    assert report.figures["expected_speedup"] < 1
    words = ("--teacher.name", folder, "--teacher.quantization", "nf4", "--bandwidth", 1000, "--flops", .1)
    assert cli.main(["plan", *words, "--teacher.dtype", "bfloat16", "--out", tmp_path/"run"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"next: kdcode bench steps --teacher.name {folder}"


def test_a_teacher_that_is_too_large(capsys, tmp_path):
    folder = config_only(tmp_path/"teacher", hidden_size=16_384, intermediate_size=53_248, num_attention_heads=128,
                         num_hidden_layers=512)
    assert cli.main(["plan", "--teacher.name", folder, "--teacher.device", "cpu", "--out", tmp_path/"run"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    needed = model_size(shape_of(LlamaConfig.from_pretrained(folder))).parameters * 4 / 2**30
    assert f"needs {needed:.1f} GiB, and this machine has" in error and "--bandwidth and --flops" in error


@pytest.mark.parametrize("words, message", (
    (("--bandwidth", 4800), "--bandwidth is given without --flops"),
    (("--flops", 990), "--flops is given without --bandwidth"),
    (("--bandwidth", -1, "--flops", 990), "--bandwidth is -1; give a number above 0"),
    (("--bandwidth", 4800, "--flops", 0), "--flops is 0; give a number above 0"),
    (("--bandwidth", "fast", "--flops", 1), "fast"),
    (("--bandwidth", "nan", "--flops", 1), "bandwidth is nan; expected a number"),
    (("--teacher.name", "somebody/unknown"), "neither a folder nor available from the model hub"),
    (("--draft", "no-such-draft"), "there is no student in no-such-draft"),
    (("--draft", "qwen2.5-coder-1.5b"), "whose tokenizer differs from that of smollm2"),
    (("--decode.temperature", 1), "kdcode plan predicts greedy decoding"),
    (("--decode.gamma", 0), "decode.gamma is 0, which drafts nothing"),
))
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["plan", *words, "--out", tmp_path/"run"]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1 and message in error
    assert not (tmp_path/"run").exists()


def test_a_draft_of_another_teacher_on_a_card(kdcode, pair, tmp_path):
    folder = config_only(tmp_path/"teacher", vocab_size=32_000)
    pair[1].save_pretrained(tmp_path/"draft")
    done = kdcode("plan", "--teacher.name", folder, *CARD, "--draft", tmp_path/"draft")
    assert done.returncode == 2 and "it was made for another teacher" in done.stderr
    same = config_only(tmp_path/"same")
    unknown = kdcode("plan", "--teacher.name", same, *CARD, "--draft", tmp_path/"draft")
    assert unknown.returncode == 2 and "neither a model card nor a report gives the acceptance rate" in unknown.stderr
    (tmp_path/"draft"/"README.md").write_text("| acceptance rate α | 0.5 |\n")
    done = kdcode("plan", "--teacher.name", same, *CARD, "--draft", tmp_path/"draft")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path/"runs"/"quickstart"/"plan"/"report.json").read_text())
    assert report["figures"]["acceptance_rate"] == .5
    assert "next: kdcode plan --draft" in done.stderr


def test_code_of_ones_own_is_trained_on_beside_the_teachers_text(tmp_path, capsys):
    """The acceptance and the hours of a plan are those of a corpus with text of the teacher."""
    folder = config_only(tmp_path/"teacher")
    words = ["plan", "--teacher.name", folder, *CARD, "--out", tmp_path/"run", "--data.source", "folder", "--data.path",
             tmp_path, "--data.tokens", 1000]
    assert cli.main(words) == 0
    data = yaml.safe_load((tmp_path/"run"/"plan"/"distill.yaml").read_text())["data"]
    assert data["source"] == [{"source": "teacher", "weight": 3},
                              {"source": "folder", "weight": 2, "path": str(tmp_path)}]
    assert (data["prompt_source"], data["path"], data["tokens"]) == ("folder", str(tmp_path), 1000)
    shutil.rmtree(tmp_path/"run")


def test_the_plan_of_a_random_teacher_is_not_for_its_weights(tmp_path):
    """A plan for a card reads config.json only: another seed gives the same figures."""
    config, figures = Config(), []
    folder = save_random_llama(tmp_path/"teacher", num_hidden_layers=2)
    for _ in range(2):
        config.teacher = replace(config.teacher, name=str(folder))
        figures.append(plan_for_card(config, (1e12, 1e14), tmp_path, "test").figures)
        (folder/"model.safetensors").unlink(missing_ok=True)
    assert figures[0] == figures[1]
