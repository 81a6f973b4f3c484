"""CodeLlama's path on a stand-in: a random Llama with a SentencePiece tokenizer, infilling, no pad token, and NF4."""
import json
import re
import sysconfig
from pathlib import Path

import pytest

CONFIG = Path(__file__).parent.parent/"configs"/"codellama.yaml"
INFILLING = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
KINDS = {  # tokenizer class, infilling tokens in the vocabulary, options
    "CodeLlama": ("CodeLlamaTokenizer", INFILLING, {}),
    "CodeLlama-Python": ("CodeLlamaTokenizer", [], {}),  # transformers adds all infilling tokens behind the vocabulary
    "Llama": ("LlamaTokenizer", [], {"add_bos_token": True})}
PROMPTS = ["def f(x):\n", "x = [1, 2]\n    ", "class A:\n    # 中文"]


def words(text):
    """Return words with `▁` for a space, and runs of spaces; a line feed is in none, so it becomes a byte token."""
    return [word.replace(" ", "▁") for word in re.findall(r" ?[^\s]+| +(?= )", text)]


@pytest.fixture(scope="session")
def bpe():
    """Vocabulary and merges of a BPE with byte tokens, trained on part of Python's standard library."""
    from tokenizers import Tokenizer, models, trainers
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, limit_alphabet=90, show_progress=False)
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))[:12]
    tokenizer.train_from_iterator((words(file.read_text(errors="ignore")) for file in files), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="session")
def tokenizer_of(bpe):
    """A function that makes a tokenizer of one of the kinds."""
    import transformers
    vocabulary, merges = bpe

    def make(kind, **options):
        name, infilling, defaults = KINDS[kind]
        known = vocabulary | {token: len(vocabulary) + i for i, token in enumerate(infilling)}
        return getattr(transformers, name)(vocab=known, merges=list(merges), **defaults | options)
    return make


@pytest.fixture(scope="session", params=KINDS)
def folder(request, tokenizer_of, tmp_path_factory):
    """A random Llama in safetensors with a tokenizer of each kind."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    folder, tokenizer = tmp_path_factory.mktemp(request.param), tokenizer_of(request.param)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, rope_theta=1e6,
        initializer_range=.2, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(folder):
    from kdcode.config import TeacherSettings
    from kdcode.teacher import load_teacher
    return load_teacher(TeacherSettings(name=str(folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def student(teacher):
    from kdcode.student import Student
    return Student.from_teacher(teacher.model, layers=[0]).eval()


def whole_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def expected_text(tokenizer, prompt, ids):
    """Return the text of new ids: prompt and answer decoded together, and cut."""
    return whole_text(tokenizer, prompt + ids)[len(whole_text(tokenizer, prompt)):]


def test_the_stand_in_is_like_codellama(teacher):
    tokenizer = teacher.tokenizer
    assert tokenizer.pad_token_id is None and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer("def =\n中").tokens() == ["<s>", "▁def", "▁=", "<0x0A>", "<0xE4>", "<0xB8>", "<0xAD>"]
    rows = teacher.model.config.vocab_size
    assert teacher.vocabulary_size == rows <= len(tokenizer)
    beyond = tokenizer.convert_ids_to_tokens(range(rows, len(tokenizer)))
    assert beyond == [token for token in getattr(tokenizer, "extra_special_tokens", []) if token in beyond]


def test_generated_text_keeps_its_first_space(teacher, student, tmp_path):
    from kdcode.config import DecodeSettings
    from kdcode.decode import complete, prompt_ids, stream
    from kdcode.eval import generate_texts
    from kdcode.teacher import generate, generate_ids
    tokenizer, prompts = teacher.tokenizer, PROMPTS * 8
    ids = [prompt_ids(teacher, prompt) for prompt in prompts]
    rows = generate_ids(teacher, prompts, 6, temperature=1., batch_size=24)
    expected = [expected_text(tokenizer, *pair) for pair in zip(ids, rows)]
    assert sum(text.startswith(" ") for text in expected) > 4
    assert generate(teacher, prompts, 6, temperature=1., batch_size=24) == expected

    settings = DecodeSettings(max_new_tokens=6, temperature=1.)
    texts = generate_texts(teacher, student, ids, settings, 0, 24, tmp_path/"texts.jsonl")
    results = complete(teacher, student, prompts, settings)
    expected = [expected_text(tokenizer, result.prompt, result.tokens) for result in results]
    valid = [i for i, text in enumerate(expected) if "\ufffd" not in text]  # others depend on how bytes are grouped
    assert sum(expected[i].startswith(" ") for i in valid) > 2
    assert [texts[i] for i in valid] == [expected[i] for i in valid]
    assert [results[i].text for i in valid] == [expected[i] for i in valid]
    assert "".join(stream(teacher, student, prompts[0], settings)) == results[0].text


def test_infilling_prompt(tokenizer_of):
    from kdcode.data import text_ids
    from kdcode.infill import (
        beginning_ids, fim_marks, fim_text, find_fim_format, infill_prompt, middle_end_id, order_parts, part_encoding)
    tokenizer, rows = tokenizer_of("CodeLlama"), tokenizer_of("CodeLlama").vocab_size
    fim, prefix, suffix = find_fim_format(tokenizer, rows), "x = ", " + 1\n"
    parts = part_encoding(tokenizer, prefix, True)[0], part_encoding(tokenizer, suffix, False)[0]
    for suffix_first in (False, True):
        of_transformers = tokenizer_of("CodeLlama")(prefix, suffix=suffix, suffix_first=suffix_first).input_ids
        ordered = order_parts(fim, fim_marks(fim, tokenizer), *parts, suffix_first)
        assert beginning_ids(tokenizer) + ordered == of_transformers
    psm = infill_prompt(fim, tokenizer, rows, prefix, suffix)
    assert psm == tokenizer_of("CodeLlama")(prefix, suffix=suffix).input_ids
    assert psm == text_ids(tokenizer, fim_text(tokenizer, prefix, suffix))
    # transformers would put a space before this suffix, which Meta's own code does not
    assert tokenizer.convert_ids_to_tokens(infill_prompt(fim, tokenizer, rows, "x", "x\n")) == [
        "<s>", "▁<PRE>", "▁x", "▁<SUF>", "x", "<0x0A>", "▁<MID>"]
    assert middle_end_id(fim, tokenizer) == tokenizer.convert_tokens_to_ids("▁<EOT>")
    for kind in ("CodeLlama-Python", "Llama"):
        other = tokenizer_of(kind)
        assert find_fim_format(other, other.vocab_size) is None  # no rows for tokens behind the vocabulary


def test_only_the_prefix_starts_a_document(tokenizer_of):
    """The tokenizer puts a space before the prefix; before another part, even the first, it would be new text."""
    import random
    from kdcode.data import Document, encode_infilling
    tokenizer = tokenizer_of("CodeLlama")
    found = {" ".join(tokenizer.convert_ids_to_tokens(encode_infilling(Document("x"), tokenizer, random.Random(i))[0]))
             for i in range(60)}
    assert found == {f"<s> ▁<PRE> {middle} ▁<EOT>" for middle in (
        "▁x ▁<SUF> ▁<MID>", "▁<SUF> ▁<MID> ▁x", "▁<SUF> x ▁<MID>", "▁<SUF> ▁<MID> x")}


def test_text_in_the_middle_of_bytes_and_after_special_tokens(teacher):
    from kdcode.data import text_after
    from kdcode.result import incremental_text
    tokenizer = teacher.tokenizer
    for before, after in (("def f():  # 中文中文中文", "字\n    def"), ("def", " def\n  # 中"), ("\n\n\n\n中", "\n")):
        ids, start = tokenizer(before + after).input_ids, len(tokenizer(before).input_ids)
        assert ids[:start] == tokenizer(before).input_ids
        assert text_after(tokenizer, ids[:start], ids[start:]) == after
        assert "".join(incremental_text(tokenizer, ids[start:], ids[:start])) == after
    ids = tokenizer.convert_tokens_to_ids(["<s>", "▁def", "</s>", "▁def", "<s>", "▁def"])
    assert "".join(incremental_text(tokenizer, ids)) == whole_text(tokenizer, ids) == "def def def"


def test_sample_of_a_validation_keeps_its_first_space(teacher):
    from types import SimpleNamespace
    from unittest import mock
    import torch
    from kdcode.callbacks import SampleText
    ids = torch.tensor([teacher.tokenizer("x =").input_ids])
    new = torch.tensor([teacher.tokenizer.convert_tokens_to_ids(["▁def", "</s>"])])
    model, writer = mock.Mock(device="cpu"), mock.Mock()
    model.config.max_position_embeddings = 256
    model.generate.return_value = torch.cat([ids, new], 1)
    sample = SampleText(writer, teacher, SimpleNamespace(input_ids=ids))
    sample.on_evaluate(None, SimpleNamespace(global_step=1), None, model)
    assert "**output**\n```\n def</s>\n```" in writer.add_text.call_args.args[1]


def scored(tokenizer, tokens):
    """Return a delta of these tokens, each with the log-probabilities -1, -2, ... of all of them."""
    from kdcode.api import TextDelta
    from kdcode.decode import TokenLogprobs
    ids = tokenizer.convert_tokens_to_ids(tokens)
    scores = {id: -1. - i for i, id in enumerate(ids)}
    return TextDelta(logprobs=[("", id, TokenLogprobs(scores[id], scores)) for id in ids])


def test_log_probabilities_by_token(teacher, bpe):
    from kdcode.api import ChatCompletionFormat, ChatCompletionRequest, CompletionFormat, CompletionRequest
    word = next(token for token in bpe[0] if len(token) > 2 and token.isalpha() and "▁" + token in bpe[0])
    delta = scored(teacher.tokenizer, ["▁" + word, word, "<0xE4>", "<0x0A>", "▁", "</s>"])
    chat = ChatCompletionRequest(model="", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=6)
    content = ChatCompletionFormat(teacher, chat).logprobs(delta)["content"]
    expected = [f" {word}".encode(), word.encode(), b"\xe4", b"\n", b" ", b"</s>"]
    assert [bytes(entry["bytes"]) for entry in content] == expected
    assert [bytes(entry["bytes"]) for entry in content[0]["top_logprobs"]] == expected
    plain = CompletionFormat(teacher, CompletionRequest(model="", prompt="x", logprobs=5)).logprobs(delta, 0)
    texts = [f" {word}", word, "bytes:\\xe4", "\n", " ", "</s>"]
    assert plain["tokens"] == texts
    assert plain["top_logprobs"][0] == {text: -1. - i for i, text in enumerate(texts)}

    same = scored(teacher.tokenizer, ["x", "<0x78>"])  # two tokens with one text: the most probable one counts
    assert CompletionFormat(teacher, CompletionRequest(model="", prompt="x", logprobs=5)).logprobs(
        same, 0)["top_logprobs"][0] == {"x": -1.}


def test_rejected_tokens_keep_their_space(teacher):
    from kdcode.decode import StepOutput
    from kdcode.drafters import Sequence
    from kdcode.serve import ResponseSequence
    response = ResponseSequence(Sequence([1], 16), teacher, [])
    accepted, *rejected = teacher.tokenizer.convert_tokens_to_ids(["▁def", "▁def", "=", "▁"])
    assert response.add_step(StepOutput([accepted], 0, rejected=rejected)).rejected == [" def", "=", " "]


def test_bad_words_with_and_without_a_space(tokenizer_of, bpe):
    from kdcode.decode import bad_word_ids
    tokenizer = tokenizer_of("CodeLlama")
    word = next(token for token in bpe[0] if len(token) > 2 and token.isalpha() and "▁" + token in bpe[0])
    assert sorted(bad_word_ids([word], tokenizer)) == sorted([[bpe[0][word]], [bpe[0]["▁" + word]]])
    assert [bpe[0]["<0x0A>"]] in bad_word_ids(["\n"], tokenizer)


def test_text_with_the_infilling_token(teacher):
    from kdcode.code_eval import text_metrics
    from kdcode.data import Document, encode
    from kdcode.decode import prompt_ids
    from kdcode.teacher import function_prompt, generate_ids, line_prompt, PromptInput
    import random
    tokenizer, rng = teacher.tokenizer, random.Random(0)
    spaced = tokenizer(" x = 1").input_ids
    for text in ("def f(<FILL_ME>):\n", "<FILL_ME> and <FILL_ME>\n"):
        ids = encode(Document(text, prompt=text), tokenizer)[0]
        assert whole_text(tokenizer, ids) == text * 2
        assert whole_text(tokenizer, prompt_ids(teacher, text)) == text
        assert len(generate_ids(teacher, [text], 2)[0]) <= 2
        assert line_prompt(PromptInput(Document(text), tokenizer, 99, rng)) == text
        assert text_metrics(teacher, [text])["bits_per_byte"] > 0
    documented = 'def f(x):\n    """<FILL_ME>"""\n'
    given = PromptInput(Document(documented + "    return x\n"), tokenizer, 99, rng)
    assert function_prompt(given) == documented
    assert tokenizer(" x = 1").input_ids == spaced  # an infilling prompt would change how later texts are tokenized


def test_line_prompt_keeps_its_indentation(teacher):
    import random
    from kdcode.data import Document
    from kdcode.decode import prompt_ids
    from kdcode.teacher import line_prompt, PromptInput
    line = "    return x + 1\n"
    for tokens in range(2, 12):
        prompt = line_prompt(PromptInput(Document(line), teacher.tokenizer, tokens, random.Random(0)))
        assert line.startswith(prompt) and prompt and len(prompt_ids(teacher, prompt)) <= tokens
    assert prompt.startswith("    return")


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_has_no_end_of_text(kind, tokenizer_of, teacher):
    from dataclasses import replace
    from kdcode.data import Document, encode
    from kdcode.decode import prompt_ids
    from kdcode.teacher import left_pad
    options = {"add_eos_token": True, "add_bos_token": True}
    ending, plain = tokenizer_of(kind, **options), tokenizer_of(kind)
    assert ending("x").input_ids[-1] == 2
    both = [replace(teacher, tokenizer=tokenizer) for tokenizer in (ending, plain)]
    for prompt in ("x = 1\n", "", "    x"):
        ids, expected = (prompt_ids(each, prompt) for each in both)
        assert ids == expected and 2 not in ids
    assert left_pad(both[0], ["x"], 2)["input_ids"].tolist() == [prompt_ids(both[1], "x")]
    assert encode(Document("x = 1\n", "y"), ending) == encode(Document("x = 1\n", "y"), plain)


def test_server_takes_the_infilling_token_as_text(teacher, student):
    from fastapi.testclient import TestClient
    from kdcode.config import Config, DecodeSettings
    from kdcode.serve import Service, create_app
    service = Service(teacher, student, Config(decode=DecodeSettings(gamma=2, adaptive=False)))
    with TestClient(create_app(service), base_url="http://localhost") as client:
        for prompt in ("a<FILL_ME>b", "<FILL_ME><FILL_ME>"):
            answer = client.post("/v1/completions", json={"model": service.name, "prompt": prompt, "max_tokens": 3})
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["prompt_tokens"] > 6


def generated(teacher, folder, n, **options):
    """Return n teacher-generated documents."""
    import itertools
    from kdcode.config import DataSettings
    from kdcode.teacher import teacher_documents
    settings = DataSettings(source="teacher", prompt_tokens=12, max_new_tokens=8, generation_batch_size=16, **options)
    return list(itertools.islice(teacher_documents(teacher, settings, 0, folder), n))


@pytest.fixture
def ending_teacher(teacher):
    """The teacher, with a fifth of the tokens as end-of-text tokens, so that it ends most texts."""
    from unittest import mock
    with mock.patch.object(teacher.model.generation_config, "eos_token_id", list(range(2, 1500, 5))):
        yield teacher


def test_cut_text_has_no_end(ending_teacher, tmp_path):
    from kdcode.data import encode
    tokenizer, documents = ending_teacher.tokenizer, generated(ending_teacher, tmp_path, 32)
    assert {document.finished for document in documents} == {True, False}
    for document in documents:
        ids, labels = encode(document, tokenizer)
        assert ids[-1] == 2 and labels[-1] == (2 if document.finished else -100)
    again = generated(ending_teacher, tmp_path, 32)
    assert again == documents  # read from the file


def test_generated_text_of_an_earlier_version_is_made_anew(teacher, tmp_path, capsys):
    from kdcode.config import DataSettings
    from kdcode.provenance import short_hash
    from kdcode.teacher import GENERATION_FIELDS, teacher_identity
    settings = DataSettings(source="teacher", prompt_tokens=12, max_new_tokens=8, generation_batch_size=16)
    header = teacher_identity(teacher) | {"seed": 0, "batch_size": 16} | {
        name: getattr(settings, name) for name in GENERATION_FIELDS}
    old = tmp_path/f"{short_hash(header)}.jsonl"
    old.write_text(json.dumps(header) + "\n")
    before = old.read_bytes()
    first = generated(teacher, tmp_path, 16)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(old) in lines[0] and "generates them again" in lines[0]
    assert generated(teacher, tmp_path, 16) == first
    assert capsys.readouterr().err == ""  # told once
    assert old.read_bytes() == before


@pytest.fixture
def code(tmp_path):
    """A folder with some files of the standard library, one of which mentions the infilling token."""
    folder = tmp_path/"code"
    folder.mkdir()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))[:12]:
        (folder/file.name).write_text(file.read_text()[:3000])
    (folder/"infilling.py").write_text("prompt = '<FILL_ME> and <FILL_ME>'  # 中文\n" * 10)
    return folder


@pytest.mark.parametrize("folder", ["CodeLlama-Python"], indirect=True)
def test_whole_configuration(folder, code, tmp_path, monkeypatch, capsys):
    """Corpus, labels, training, decoding, evaluation, export and server with the settings of configs/codellama.yaml."""
    from fastapi.testclient import TestClient
    from kdcode.cli import load_pair, main, parse
    from kdcode.serve import Service, create_app
    from transformers import AutoTokenizer, LlamaForCausalLM
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCODE_HOME", str(tmp_path))
    sources = [{"source": "folder", "path": str(code)}, {"source": "teacher"}]
    settings = [
        "--config", CONFIG, "--teacher.name", folder, "--teacher.device", "cpu", "--data.source", json.dumps(sources),
        "--data.prompt_source", "stdlib", "--data.prompt_tokens", 12, "--data.max_new_tokens", 24,
        "--data.min_characters", 1, "--data.tokens", 2048, "--data.validation_tokens", 512,
        "--data.validation_share", .3, "--data.block_size", 128, "--data.generation_batch_size", 16,
        "--student.layers", "[0]", "--student.draft_vocabulary", 700, "--targets.kind", "top_k", "--targets.k", 8,
        "--train.batch_size", 2, "--train.gradient_accumulation", 1, "--train.eval_steps", 4,
        "--decode.max_new_tokens", 8, "--decode.problems", 1, "--decode.adaptive", "false", "--decode.compile", "off",
        "--eval.limit", 1, "--eval.lines", 1, "--eval.documents", 2, "--eval.max_new_tokens", 8]

    def run(*words, more=()):
        status = main([str(word) for word in (*words, *settings, *more)])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    run("targets")
    run("distill")
    out, student = tmp_path/"runs"/"codellama", tmp_path/"runs"/"codellama"/"student"
    corpus = json.loads((out/"corpus"/"corpus.json").read_text())
    assert corpus["recipe"]["author"].startswith(f"{folder} ")  # and the hash of its weights
    assert corpus["statistics"]["train"]["tokens"] == 2048
    prompt = "prompt = '<FILL_ME>'\n    "
    assert run("generate", prompt).startswith(prompt)
    run("eval", "--models", student, "--draft", student, "--unsafe")
    run("bench", "decode", "--compare", "baseline")
    run("export", student, "--grow-vocabulary", more=("--name", "grown"))  # an exported Llama predicts all ids
    exported = tmp_path/"runs"/"grown"/"llama"
    assert LlamaForCausalLM.from_pretrained(exported).config.vocab_size == 1500
    assert AutoTokenizer.from_pretrained(exported)("x = 1").input_ids[0] == 1

    _, config, _ = parse([str(word) for word in ("serve", *settings)])
    service = Service(*load_pair(config, None), config)
    assert service.teacher.model.hf_quantizer is not None
    with TestClient(create_app(service), base_url="http://localhost") as client:
        request = {"model": service.name, "prompt": "x = '<FILL_ME>'", "max_tokens": 4, "logprobs": 2}
        assert client.post("/v1/completions", json=request).status_code == 200


def test_infilling_prompt_is_that_of_the_tokenizer(folder, teacher):
    """CodeLlama's own tokenizer makes the same prompt of a text with `<FILL_ME>`, if the model has the tokens."""
    from kdcode.infill import find_fim_format, infill_prompt
    size, prefix, suffix = teacher.model.config.vocab_size, "def f(x):\n    return ", " + 1\n\nf(3)"
    fim = find_fim_format(teacher.tokenizer, size)
    if not folder.name.startswith("CodeLlama0"):  # CodeLlama-Python's model has no rows for them
        assert fim is None
        return
    expected = teacher.tokenizer(f"{prefix}<FILL_ME>{suffix}").input_ids
    assert infill_prompt(fim, teacher.tokenizer, size, prefix, suffix) == expected


def test_infilling_in_the_server(folder, teacher, student, served):
    """With a suffix in a completion and in the form of llama.cpp: equal texts, which stop at the family's own end."""
    texts = {"input_prefix": "x = 1\n", "prompt": "def f(x):\n    return ", "input_suffix": " + 1\n\nf(3)"}
    body = {"model": folder.name, "prompt": texts["input_prefix"] + texts["prompt"], "suffix": texts["input_suffix"],
            "max_tokens": 8, "temperature": 0}
    extra = {"input_extra": [{"text": f"y = {i}\n" * 5} for i in range(60)], "cache_prompt": True, "id_slot": 0}
    with served(models=(teacher, student)) as (client, _):
        completion = client.post("/v1/completions", json=body)
        if not folder.name.startswith("CodeLlama0"):
            assert completion.status_code == 400 and "no fill-in-the-middle" in completion.json()["error"]["message"]
            return
        found = client.post("/infill", json=texts | {"n_predict": 8}).json()
        lines = client.post("/infill", json=texts | {"n_predict": 8, "stream": True}).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        end = {"logit_bias": {str(teacher.tokenizer.convert_tokens_to_ids("▁<EOT>")): 100}}
        ended = client.post("/v1/completions", json=body | end).json()["choices"][0]
        warm = client.post("/infill", json=texts | extra | {"n_predict": 0}).json()
        again = client.post("/infill", json=texts | extra | {"n_predict": 8}).json()
        long = client.post("/v1/completions", json=body | {"suffix": "x = 1\n" * 1000})
        broken = client.post("/infill", json={"input_prefix": "x"})
    assert found["content"] == completion.json()["choices"][0]["text"] and found["stop_type"] == "limit"
    assert "".join(event["content"] for event in events) == found["content"]
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    assert warm["content"] == "" and again["tokens_cached"] >= warm["tokens_evaluated"] - 2 > 300
    assert long.status_code == 400 and "context" in long.json()["error"]["message"]
    assert broken.status_code == 400 and "input_suffix" in broken.json()["error"]["message"]
