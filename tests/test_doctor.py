"""`kdcode doctor` names each planted fault first, and finds none in a healthy pair.

The shipped drafts and the embedded teacher on few tokens; small random models where these cannot show a fault.
"""
import copy
import json

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from conftest import ROOT
from kdcode.config import DecodeSettings
from kdcode.data import humaneval_problems, text_ids
from kdcode.decode import load_draft, prompt_ids
from kdcode.doctor import (
    check_context, check_draft_vocabulary, check_numerics, check_sampling, check_training, diagnose, doctor_note,
    MARGIN, Pair, RecordedTeacher, TrainingRecord, with_rows)
from kdcode.drafters import TOKENIZERS
from kdcode.eagle import EagleStudent
from kdcode.result import Statistics
from kdcode.student import Student
from kdcode.teacher import checkpoint_fingerprint, generate_ids, load_teacher, Teacher

HEAD, INDEPENDENT = "smollm2-135m-draft", "smollm2-135m-draft-independent"
PROMPTS = [problem["prompt"] for problem in humaneval_problems(2)]
PROSE = ["The history of the Roman Empire begins", "The old man walked along the river and thought about"]


def continued(teacher, prompts, new=24):
    return list(zip([prompt_ids(teacher, prompt) for prompt in prompts], generate_ids(teacher, prompts, new)))


@pytest.fixture(scope="module")
def teacher(): return RecordedTeacher(load_teacher("smollm2"))


@pytest.fixture(scope="module")
def texts(teacher): return continued(teacher, PROMPTS)


@pytest.fixture
def load(teacher):
    def loading(name): return load_draft(f"{ROOT}/models/{name}", teacher)
    return loading


def random_llama(vocabulary=49152, **sizes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, eos_token_id=None, initializer_range=.2, **sizes)).eval()


# Each function plants one fault in a healthy pair, and returns the pair.

def other_tokenizer(teacher, texts, load):
    """The ids of the draft are moved by 1,000, and its tokenizer says so."""
    draft = with_rows(load(INDEPENDENT), torch.arange(49152).roll(1000))
    moved = copy.deepcopy(teacher.tokenizer)
    vocabulary = {token: (index + 1000) % 49152 for token, index in teacher.tokenizer.get_vocab().items()}
    moved.get_vocab = lambda: vocabulary
    TOKENIZERS[draft] = moved
    return Pair(teacher, draft, texts)


def fingerprint_of_other_tokenizer(teacher, texts, load):
    """A student of a teacher with another tokenizer, without any knowledge of the ids."""
    draft = with_rows(load(INDEPENDENT), torch.arange(49152).roll(1000))
    draft.config.tokenizer_fingerprint = "0" * 16
    return Pair(teacher, draft, texts)


def missing_beginning(teacher, texts, load):
    """A draft that works only after the beginning-of-text token, which the prompts lack."""
    draft = load(INDEPENDENT)

    class NeedsBeginning(Student):
        def hidden_states(self, input_ids, *args, **options):
            return super().hidden_states(input_ids, *args, **options) * (1 if input_ids[0, 0] == 1 else 0)

    draft.__class__ = NeedsBeginning
    return Pair(teacher, draft, texts)


class NeedsToken(Student):
    """A student that drafts badly without a certain token in its text."""
    needed = 0

    def hidden_states(self, input_ids, *args, **options):
        return super().hidden_states(input_ids, *args, **options) * int((input_ids == self.needed).any())


def missing_template(teacher, texts, load):
    """A draft that works only in the teacher's chat template, and prompts without it."""
    draft = load(INDEPENDENT)
    draft.__class__, draft.needed = NeedsToken, teacher.tokenizer.convert_tokens_to_ids("<|im_end|>")
    return Pair(teacher, draft, texts)


def template_of_another_model(teacher, texts, load):
    """A draft with a chat template of its own, and prompts in the teacher's."""
    draft, tokenizer = load(INDEPENDENT), copy.deepcopy(teacher.tokenizer)
    draft.__class__, draft.needed = NeedsToken, tokenizer.convert_tokens_to_ids("<repo_name>")
    tokenizer.chat_template = "<repo_name>{{ messages[0].content }}\n"
    TOKENIZERS[draft] = tokenizer
    chats = [tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], chat_template=teacher.tokenizer.chat_template, tokenize=False,
        add_generation_prompt=True) for prompt in PROMPTS]
    return Pair(teacher, draft, [(text_ids(tokenizer, chat, add_special_tokens=False), text)
                                 for chat, (_, text) in zip(chats, texts)])


def layers_counted_from_one(teacher, texts, load):
    draft = load(HEAD)
    draft.config.feature_layers = [2, 15, 29]
    return Pair(teacher, draft, texts)


def layers_in_another_order(teacher, texts, load):
    draft = load(HEAD)
    draft.config.feature_layers = [30, 16, 3]
    return Pair(teacher, draft, texts)


def shifted_states(teacher, texts, load):
    draft = load(HEAD)
    kind = type(draft)
    draft.__class__ = type("Shifted", (kind,), {
        "fuse_features": lambda self, features: kind.fuse_features(self, features.roll(1, 1))})
    return Pair(teacher, draft, texts)


def greedy_text(teacher, draft, prompt, new):
    """Return the text that a draft itself would write, so that all its drafts of one token match."""
    ids = list(prompt)
    for _ in range(new):
        features = teacher.hidden_states(torch.tensor([ids]), tuple(draft.config.feature_layers))
        state = draft.training_time_test(torch.tensor([ids]), features, 1)[0][0, -1]
        ids.append(draft.draft_logits(state).argmax().item())
    return ids[len(prompt):]


@torch.no_grad()
def norm_at_the_wrong_place(teacher, texts, load):
    """A head for which its texts were made, with the other value of `norm_before_residual`."""
    made = RecordedTeacher(Teacher(random_llama(), teacher.tokenizer, "random"))
    draft = EagleStudent.from_teacher(made.model, feature_layers=[1, 2, 3], layers=1).eval()
    torch.nn.init.normal_(draft.layers[0].self_attn.o_proj.weight, std=.5)
    draft.layers[0].hidden_norm.weight.normal_(1, 1)
    prompt = [5, 6, 7, 8]
    pair = Pair(made, draft, [(prompt, greedy_text(made, draft, prompt, 60))], settings=DecodeSettings(gamma=1))
    assert pair.acceptance() == 1
    draft.layers[0].norm_before_residual = True
    return pair


def keep_ids(draft, kept):
    """Take ids out of a draft vocabulary; `kept` is a mask."""
    draft.draft_ids, draft.lm_head.weight.data = draft.draft_ids[kept], draft.lm_head.weight.data[kept]
    return draft


def by_frequency(texts):
    """The ids of the texts, the most frequent first, and how often they occur."""
    tokens, counts = torch.tensor([token for _, text in texts for token in text]).unique(return_counts=True)
    order = counts.argsort(descending=True)
    return tokens[order], counts[order]


def frequent_ids_missing(teacher, texts, load):
    """A head without the most frequent ids."""
    draft, (tokens, _) = load(HEAD), by_frequency(texts)
    return Pair(teacher, keep_ids(draft, ~torch.isin(draft.draft_ids, tokens[:len(tokens) // 8])), texts)


def small_draft_vocabulary(teacher, texts, load):
    """A head with few ids, though they are the most frequent ones."""
    draft, (tokens, _) = load(HEAD), by_frequency(texts)
    return Pair(teacher, keep_ids(draft, torch.isin(draft.draft_ids, tokens[:8])), texts)


def long_pair(teacher, texts, draft):
    """A draft with a prompt of 500 tokens, solved problems of HumanEval one after the other.

    With 64 new tokens, the loss of acceptance is more than chance.
    """
    solved = (problem["prompt"] + problem["canonical_solution"] for problem in humaneval_problems()[20:])
    prompt = teacher.tokenizer.decode(text_ids(teacher.tokenizer, "\n\n".join(solved))[:500])
    return Pair(teacher, draft, texts, contexts={500: continued(teacher, [prompt], 64)})


def short_context(teacher, texts, load):
    """A draft whose context ends at 256 tokens."""
    draft = load(INDEPENDENT)
    draft.config.max_position_embeddings = 256
    return long_pair(teacher, texts, draft)


def no_window(teacher, texts, load):
    """A draft that looks farther back than it was trained."""
    draft = load(INDEPENDENT)
    draft.config.attention_window = None
    return long_pair(teacher, texts, draft)


def draft_samples(teacher, texts, load):
    draft = load(INDEPENDENT)
    draft.generation_config = GenerationConfig(do_sample=True, temperature=1.)
    return Pair(teacher, draft, texts)


def repetition_penalty(teacher, texts, load):
    draft = load(INDEPENDENT)
    draft.generation_config = GenerationConfig(repetition_penalty=1.5)
    return Pair(teacher, draft, texts)


def noise_of_bfloat16(teacher, texts, load):
    """Logits that differ less from each other than bfloat16 can tell, and an exact copy as the draft."""
    model = random_llama()
    model.lm_head.weight.data = .02 * model.lm_head.weight.data + 2 * torch.randn(32)
    model.to(torch.bfloat16)
    draft = Student.from_teacher(copy.deepcopy(model).float(), layers=[0, 1, 2, 3]).eval()
    made = RecordedTeacher(Teacher(model, teacher.tokenizer, "random"))
    return Pair(made, draft, continued(made, ["def f(x):"], 100))


def other_checkpoint(teacher, texts, load):
    """The teacher was trained further, here with noise in its matrices; the draft has the old fingerprint."""
    model, generator = copy.deepcopy(teacher.model), torch.Generator().manual_seed(0)
    for weight in model.model.layers.parameters():
        if weight.dim() == 2: weight.add_(.3 * weight.std() * torch.randn(weight.shape, generator=generator))
    changed = RecordedTeacher(Teacher(model, teacher.tokenizer, "smollm2"))
    return Pair(changed, load(INDEPENDENT), continued(changed, PROMPTS, 24))


def head_with_other_embedding(teacher, texts, load):
    """A head of another project has a copy of its teacher's embedding, which was trained further here."""
    made = RecordedTeacher(Teacher(random_llama(), teacher.tokenizer, "random"))
    draft = EagleStudent.from_teacher(made.model, feature_layers=[1, 2, 3]).eval()
    draft.embed_tokens = torch.nn.Embedding.from_pretrained(made.model.model.embed_tokens.weight * 1.1)
    return Pair(made, draft, continued(made, ["def f(x):"], 40))


def other_text(teacher, texts, load):
    return Pair(teacher, load(INDEPENDENT), continued(teacher, PROSE), reference=texts)


def no_training(teacher, texts, load):
    return Pair(teacher, Student.from_teacher(teacher.model, layers=[0, 1, -1]).eval(), texts,
                training=TrainingRecord(20_000, 256))


PLANTED = {
    other_tokenizer: "tokenizer", fingerprint_of_other_tokenizer: "tokenizer",
    missing_beginning: "beginning of the prompt", missing_template: "beginning of the prompt",
    template_of_another_model: "beginning of the prompt", layers_counted_from_one: "feature layers",
    layers_in_another_order: "feature layers", shifted_states: "state and position",
    norm_at_the_wrong_place: "state and position", frequent_ids_missing: "draft vocabulary",
    small_draft_vocabulary: "draft vocabulary",
    short_context: "context length", no_window: "context length", draft_samples: "sampling parameters",
    repetition_penalty: "sampling parameters",
    noise_of_bfloat16: "numerics", other_checkpoint: "teacher's checkpoint",
    head_with_other_embedding: "teacher's checkpoint", other_text: "text", no_training: "training"}


SLOW = (fingerprint_of_other_tokenizer, layers_counted_from_one, repetition_penalty)  # of a kind that others show


@pytest.mark.parametrize("plant", [pytest.param(plant, marks=[pytest.mark.slow] * (plant in SLOW), id=plant.__name__)
                                   for plant in PLANTED])
def test_planted_fault_comes_first(plant, teacher, texts, load):
    first, *others = diagnose(plant(teacher, texts, load))
    assert first.is_fault and first.check == PLANTED[plant], [first, *others]
    assert first.measured and first.expected and first.remedy
    assert all(other.explained <= first.explained for other in others)


@pytest.mark.parametrize("name", [HEAD, INDEPENDENT])
def test_healthy_pair_has_no_fault(name, teacher, texts, load):
    draft = load(name)
    findings = diagnose(Pair(teacher, draft, texts, reference=texts, training=TrainingRecord(9_600_000, 256)))
    assert draft.config.teacher_weights == checkpoint_fingerprint(teacher)
    assert not [finding for finding in findings if finding.is_fault]
    assert {"tokenizer", "training", "text", "sampling parameters"} <= {finding.check for finding in findings}


@pytest.mark.parametrize("covered, is_fault", [(93, False), (60, True)])
def test_ids_that_would_cost_more_than_they_save_are_no_fault(covered, is_fault, teacher, load):
    """The draft vocabulary of the shipped head for Qwen has 93% of the teacher's tokens."""
    draft = load(HEAD)
    missing = torch.arange(49152)[~torch.isin(torch.arange(49152), draft.draft_ids)]
    found = Pair(teacher, draft, [([1], [*draft.draft_ids[:covered].tolist(), *missing[:100 - covered].tolist()])])
    found.as_is = .754 * covered / 100
    finding = check_draft_vocabulary(found)
    assert finding.measured.startswith(f"{covered}.0% of the teacher's tokens") and finding.is_fault == is_fault
    assert f"all ids would add at most {.754 - found.as_is:.2f}, and 0.25 is lost to other causes" in finding.measured
    assert .754 - found.as_is > MARGIN  # the rule without the costs would call both a fault


def test_nothing_measured_is_no_fault(teacher, texts, load):
    """The teacher ends its text at once, so no draft token is verified. The control is `no_training` above."""
    found = Pair(teacher, load(HEAD), [(texts[0][0], [0])])
    findings = diagnose(found)
    assert not sum(found.counts.verified) and not [finding for finding in findings if finding.is_fault]
    assert doctor_note(found, findings).startswith("No draft token was verified; give longer texts")


def counted(accepted, verified):
    """The statistics of verified draft tokens."""
    return Statistics(accepted=[accepted], verified=[verified], acceptance_sum=accepted)


@pytest.mark.parametrize("accepted, verified, is_fault", [(7, 15, False), (0, 15, True), (70, 150, True)])
def test_few_tokens_do_not_show_missing_training(accepted, verified, is_fault, teacher, texts, load):
    found = Pair(teacher, load(INDEPENDENT), texts)
    found.counts = counted(accepted, verified)
    assert check_training(found, []).is_fault == is_fault


@pytest.mark.parametrize("accepted, is_fault", [(74, False), (20, True)])
def test_long_context_is_a_fault_only_above_chance(accepted, is_fault, teacher, load, monkeypatch):
    """Two texts of 64 tokens: 81 of 115 draft tokens are accepted if the draft sees the last 256 tokens only."""
    found = Pair(teacher, load(INDEPENDENT), [], contexts={1024: [([5] * 1024, [6] * 64)]})
    monkeypatch.setattr(found, "statistics", lambda texts, teacher: counted(81 if teacher.before else accepted, 115))
    finding = check_context(found)
    assert finding.is_fault == is_fault
    assert finding.measured == f"{accepted / 115:.2f} after 1,024 tokens (0.70 with the last 256)"


def test_faults_that_kdcode_ignores_come_last(teacher, texts, load):
    """A draft's generation_config.json counts only in other engines, even if it explains more than other faults."""
    found = no_window(teacher, texts, load)
    found.draft.generation_config = GenerationConfig(do_sample=True, temperature=10.)
    findings = diagnose(found)
    faults = [finding for finding in findings if finding.is_fault]
    assert [finding.check for finding in faults] == ["context length", "sampling parameters"]
    assert faults[1].explained > faults[0].explained and faults[1].remedy.startswith("kdcode ignores")
    assert "Repair first: context length" in doctor_note(found, findings)
    note = doctor_note(found, faults[1:])
    assert "no check found a fault that counts in kdcode" in note and "Repair first" not in note


def test_no_logits_are_kept(teacher, texts, load):
    """Those of all texts can need more memory than the model."""
    found = noise_of_bfloat16(teacher, texts, load)
    found.draft.generation_config = GenerationConfig(do_sample=True, temperature=1.)
    assert check_numerics(found).is_fault and check_sampling(found).explained
    assert not found.teacher.recorded  # this draft needs no hidden states of the teacher either


def test_any_causal_model_is_examined(pair):
    """The teacher's own model as the draft: everything is accepted."""
    made = RecordedTeacher(pair[0])
    found = Pair(made, copy.deepcopy(made.model), continued(made, ["def f(x):"], 30))
    assert found.as_is == 1 and not [finding for finding in diagnose(found) if finding.is_fault]


SMALL = ("--decode.problems", 1, "--decode.max_new_tokens", 12, "--decode.gamma", 2)


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory):
    """A folder with an untrained student of the tiny teacher."""
    from kdcode.data import tokenizer_fingerprint
    made, folder = load_teacher(str(tiny_teacher)), tmp_path_factory.mktemp("student")
    draft = Student.from_teacher(made.model, layers=[0])
    draft.config.update({"teacher": made.name, "tokenizer_fingerprint": tokenizer_fingerprint(made.tokenizer),
                         "teacher_weights": checkpoint_fingerprint(made)})
    draft.save_pretrained(folder)
    return folder


def test_command(kdcode, tiny_teacher, student, tmp_path):
    (tmp_path/"prompts.jsonl").write_text('{"prompt": "x = 1"}\n{"prompt": "y = "}\n')
    done = kdcode("doctor", "--name", "ill", "--teacher.name", tiny_teacher, "--draft", student,
                  "--prompts", tmp_path/"prompts.jsonl", *SMALL)
    assert done.returncode == 0, done.stderr
    folder = tmp_path/"runs"/"ill"/"doctor"
    report = json.loads((folder/"report.json").read_text())
    rows = {row["check"]: row for row in report["rows"]}
    assert rows["tokenizer"]["verdict"] == rows["teacher's checkpoint"]["verdict"] == "healthy"
    assert report["rows"][0]["verdict"] == "FAULT" and report["figures"]["faults"] >= 1
    assert "after 256 tokens" in rows["context length"]["measured"] and "text" in rows
    assert "Repair first" in done.stdout and (folder/"doctor.png").stat().st_size > 0
    assert "next: kdcode bench decode" in done.stderr
    assert "call/s" in done.stderr  # the unit of the progress bar of the texts


def test_command_examines_a_draft_that_others_refuse(kdcode, tiny_teacher, student, tmp_path):
    """A draft with another tokenizer is what the command is for."""
    import shutil
    other = shutil.copytree(student, tmp_path/"other")
    config = json.loads((other/"config.json").read_text()) | {"tokenizer_fingerprint": "0" * 16, "teacher": "other"}
    (other/"config.json").write_text(json.dumps(config))
    refused = kdcode("generate", "x", "--teacher.name", tiny_teacher, "--draft", other, "--decode.compile", "off")
    assert refused.returncode == 2, refused.stderr
    done = kdcode("doctor", "--teacher.name", tiny_teacher, "--draft", other, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "made for other, another tokenizer" in done.stdout


def no_weights(folder):
    (folder/"draft").mkdir()
    (folder/"draft"/"config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize("words, message", [
    (("--draft", "nowhere"), "there is no student in nowhere"),
    (("--draft", "draft"), "draft has a config.json and no weights (model.safetensors); give a complete model"),
    (("--draft", "smollm2", "--teacher.name", "nowhere/model"), "teacher nowhere/model is neither a folder nor"),
    (("--draft", "smollm2", "--prompts", "none.jsonl"), "--prompts is none.jsonl, which is not a file"),
    (("--draft", "smollm2", "--decode.gamma", 0), "decode.gamma is 0, which drafts nothing"),
])
def test_mistakes_are_one_line_before_torch_is_imported(tmp_path, monkeypatch, capsys, words, message):
    import sys
    from kdcode import cli
    no_weights(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCODE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hidden = {name for name in sys.modules if name in ("kdcode.doctor", "kdcode.teacher", "torch")}
    for name in hidden: monkeypatch.setitem(sys.modules, name, None)  # an import of it would raise
    assert cli.main(["doctor", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.shipped
@pytest.mark.parametrize("draft", [HEAD, INDEPENDENT])
def test_shipped_pair_by_the_command(kdcode, draft, tmp_path):
    done = kdcode("doctor", "--draft", ROOT/"models"/draft, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert "no check found a fault" in done.stdout


@pytest.mark.shipped
def test_prose_by_the_command(kdcode, tmp_path):
    (tmp_path/"prose.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROSE))
    done = kdcode("doctor", "--draft", "smollm2", "--prompts", tmp_path/"prose.jsonl", timeout=3000)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path/"runs"/"quickstart"/"doctor"/"report.json").read_text())
    assert report["rows"][0]["check"] == "text"
