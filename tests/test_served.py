"""A teacher on a server: its targets are those of the local model; retries, resuming, cut texts, and refusals."""
import itertools
import json
import threading
import time
from contextlib import contextmanager

import pytest

from conftest import save_random_llama

K = 32
SHORT = ["--data.tokens", 1024, "--data.validation_tokens", 256, "--data.block_size", 64, "--train.batch_size", 4,
         "--train.eval_steps", 2, "--targets.kind", "top_k", "--targets.k", K, "--targets.shard_blocks", 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama whose distributions have a few probable tokens."""
    return save_random_llama(
        tmp_path_factory.mktemp("large"), head_scale=80, num_hidden_layers=1, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def local(folder):
    from kdcode.config import TeacherSettings
    from kdcode.teacher import load_teacher
    return load_teacher(TeacherSettings(name=str(folder), device="cpu"))


class Fake:
    """A server with part of vLLM's API, and a real model behind it."""

    def __init__(self, local):
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse
        self.local, self.app, self.lock = local, FastAPI(), threading.Lock()
        self.reset()

        @self.app.post("/tokenize")
        @self.app.get("/v1/models")
        @self.app.post("/v1/completions")
        def respond(request: Request, body: dict | None = None):
            with self.lock:
                self.count += 1
                if self.statuses: return JSONResponse({"error": {"message": "busy"}}, self.statuses.pop())
                if self.count > self.stops_after: return JSONResponse({"error": {"message": "down"}}, 503)
                found = self.answer(request.url.path, body)
                return JSONResponse(found or {}, 200 if found else 404)

    def reset(self):
        self.count, self.statuses, self.stops_after = 0, [], 10**9
        self.logprobs, self.tokenize, self.shift, self.key = "prompt_logprobs", True, 0, None

    def answer(self, path, body):
        if path == "/v1/models": return {"data": [{"id": "large", "max_model_len": 512}]}
        if path == "/tokenize":
            ids = self.local.tokenizer(body["prompt"], add_special_tokens=False).input_ids
            return {"tokens": [id + self.shift for id in ids]} if self.tokenize else None
        if "prompt_logprobs" in body or "echo" in body: return {"choices": [self.scores(body)]}
        return {"choices": [self.text(body)]}

    def scores(self, body):
        """Score a prompt as vLLM does, by id; only in the form that the server knows."""
        import torch
        k = body.get("prompt_logprobs") or body["logprobs"]
        log_p = self.local.logits(torch.tensor([body["prompt"]]))[0].float().log_softmax(-1)
        rows = [dict(zip(map(int, top.indices), map(float, top.values))) for top in (row.topk(k) for row in log_p[:-1])]
        if self.logprobs == "prompt_logprobs" in body:
            return {"prompt_logprobs": [None, *({str(id): {"logprob": x} for id, x in row.items()} for row in rows)]}
        if self.logprobs == "echo" in body:
            top = [None, *({f"token_id:{id}": x for id, x in row.items()} for row in rows), {"token_id:1": 0.}]
            return {"text": "", "logprobs": {"top_logprobs": top}}
        return {"text": ""}

    def text(self, body):
        """Continue a prompt; prompts of an even length end, others are cut."""
        from kdcode.teacher import generate
        prompt = self.local.tokenizer.decode(body["prompt"])
        text = generate(self.local, [prompt], body["max_tokens"], body["temperature"], seed=body["seed"])[0]
        return {"text": text, "finish_reason": "length" if len(body["prompt"]) % 2 else "stop"}

    @contextmanager
    def running(self):
        import uvicorn
        server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started: time.sleep(.01)
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        yield self
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def running(local):
    with Fake(local).running() as fake: yield fake


@pytest.fixture
def fake(running, monkeypatch):
    monkeypatch.setattr("kdcode.served.RETRY_DELAYS", (.01, .01, .01))
    running.reset()
    return running


def configuration(fake, folder, **student):
    from kdcode.config import Config, DataSettings, StudentSettings, TargetsSettings, TeacherSettings, TrainSettings
    return Config(teacher=TeacherSettings(fake.url, tokenizer=str(folder), device="cpu"),
                  data=DataSettings(tokens=1024, validation_tokens=256, block_size=64),
                  student=StudentSettings(**({"draft_vocabulary": 0} | student)), train=TrainSettings(batch_size=4),
                  targets=TargetsSettings(kind="top_k", k=K, shard_blocks=4))


@pytest.fixture(scope="module")
def corpus(local, tmp_path_factory):
    from kdcode.config import DataSettings
    from kdcode.data import build_corpus
    settings = DataSettings(tokens=1024, validation_tokens=256, block_size=64)
    return build_corpus(settings, local.tokenizer, tmp_path_factory.mktemp("corpus"), 0)


def opened(config):
    from kdcode.served import open_served
    return open_served(config.teacher, config.targets.k)


def all_targets(config, teacher, corpus, run):
    """Return the targets of all blocks, without the last position of each, which has no label."""
    from kdcode.targets import make_targets
    cache = make_targets(config, teacher, corpus, run, progress=False)
    ids, probs = zip(*((targets.ids[:-1], targets.log_probs[:-1].exp()) for targets, _ in map(cache.block, range(16))))
    return ids, probs


@pytest.mark.parametrize("logprobs", ["prompt_logprobs", "echo"])
def test_targets_are_those_of_the_local_model(fake, local, folder, corpus, tmp_path, logprobs):
    import torch
    fake.logprobs = logprobs
    config = configuration(fake, folder)
    here, there = (all_targets(config, teacher, corpus, tmp_path/name)
                   for name, teacher in (("here", local), ("there", opened(config))))
    for (ids, probs), (served_ids, served_probs) in zip(zip(*here), zip(*there), strict=True):
        assert probs.sum(-1).mean() > .3  # the top k are worth something
        torch.testing.assert_close(served_probs, probs, atol=2e-3, rtol=0)
        assert (ids == served_ids).float().mean() > .99  # the order of equal probabilities is free


def test_targets_and_validation_on_a_draft_vocabulary(fake, local, folder, corpus, tmp_path):
    import torch
    from kdcode.student import Student
    from kdcode.targets import draft_vocabulary
    from kdcode.validate import validate, ValidationSet
    config = configuration(fake, folder, draft_vocabulary=20_000)
    config.targets.k = 400
    teacher = opened(config)
    pairs = [all_targets(config, one, corpus, tmp_path/one.name.replace("/", "-")) for one in (local, teacher)]
    for probs, served_probs in zip(*(probs for _, probs in pairs), strict=True):
        assert (served_probs.sum(-1) - probs.sum(-1)).abs().mean() < .1
    student = Student.from_teacher(local.model, [0], draft_ids=draft_vocabulary(config, local, corpus))
    torch.manual_seed(0)
    for weight in student.parameters(): weight.data += .02 * torch.randn_like(weight)
    rates = [validate(student, one, ValidationSet.of(corpus.validation, one))["acceptance_rate"]
             for one in (local, teacher)]
    assert abs(rates[0] - rates[1]) < .05 and .02 < rates[0] < .98


def test_retries_and_resuming(fake, folder, corpus, tmp_path):
    config = configuration(fake, folder)
    fake.statuses = [503, 429, 500]
    teacher = opened(config)
    whole = all_targets(config, teacher, corpus, tmp_path/"whole")
    fake.count, fake.stops_after = 0, 10
    with pytest.raises(ConnectionError, match="doesn't answer .status 503: down."):
        all_targets(config, teacher, corpus, tmp_path/"cut")
    finished = {path: path.read_bytes() for path in (tmp_path/"cut").glob("targets/*.parquet")}
    assert 0 < len(finished) < 4
    fake.stops_after, fake.count = 10**9, 0
    resumed = all_targets(config, teacher, corpus, tmp_path/"cut")
    assert fake.count < 16 and all(path.read_bytes() == content for path, content in finished.items())
    assert all((a == b).all() for a, b in zip(whole[1], resumed[1], strict=True))


def test_texts_are_cut_resumed_and_greedy_ones_those_of_the_local_model(fake, local, folder, tmp_path):
    from kdcode.config import DataSettings
    from kdcode.teacher import teacher_documents
    settings = DataSettings(
        source="teacher", prompt_tokens=8, max_new_tokens=6, generation_batch_size=4, temperature=0.)
    teacher = opened(configuration(fake, folder))

    def first(teacher, n, name):
        return list(itertools.islice(teacher_documents(teacher, settings, 0, tmp_path/name), n))

    documents = first(teacher, 8, "served")
    assert [d.text for d in documents] == [d.text for d in first(local, 8, "local")]
    lengths = [len(local.tokenizer(d.prompt).input_ids) for d in documents]
    assert [d.finished for d in documents] == [length % 2 == 0 for length in lengths] and len(set(lengths)) > 1
    fake.count = 0
    assert first(teacher, 8, "served") == documents and fake.count == 0  # read from the file
    file, = (tmp_path/"served").glob("*.jsonl")
    file.write_text(file.read_text()[:-10])
    assert first(teacher, 8, "served") == documents and fake.count == 4  # the batch that was not complete


def test_no_answer_in_the_network(fake, folder):
    config = configuration(fake, folder)
    config.teacher.name = "http://127.0.0.1:9/v1"  # nobody listens there
    with pytest.raises(ConnectionError, match="doesn't answer .ConnectError"): opened(config)


def test_refusals(fake, folder):
    import torch
    from kdcode.config import ConfigError
    config, ids = configuration(fake, folder), torch.tensor([[5, 6, 7]])
    fake.logprobs = "none"
    with pytest.raises(ConfigError, match="answers without log-probabilities .* vLLM"): opened(config).logits(ids)
    fake.shift = 1
    with pytest.raises(ConfigError, match="another tokenizer"): opened(config)
    fake.tokenize = False
    with pytest.raises(ConfigError, match="can't be checked"): opened(config)
    config.teacher.tokenizer = "/no/such/folder"
    with pytest.raises(ConfigError, match="/no/such/folder"): opened(config)


@pytest.mark.parametrize("content", ["<p>Sign in</p>", '{"error": {"message": "no model"}}', '{"data": []}', "[]"])
def test_an_answer_without_results(content):
    import httpx
    from kdcode.config import ConfigError
    from kdcode.served import Server
    server = Server("http://teacher/v1", httpx.MockTransport(lambda request: httpx.Response(200, text=content)))
    with pytest.raises(ConfigError, match="/v1/models answers without results .* OpenAI-compatible server"):
        server.call("/models")


def test_distillation_on_the_command_line(fake, local, folder, kdcode, tmp_path):
    from kdcode.data import tokenizer_fingerprint
    from kdcode.student import Student
    student = Student.from_teacher(local.model, [0], seed=1)
    student.config.update({"teacher": "small", "tokenizer_fingerprint": tokenizer_fingerprint(local.tokenizer)})
    student.save_pretrained(tmp_path/"start")
    common = ["--teacher.name", fake.url, "--teacher.tokenizer", folder, "--teacher.device", "cpu", "--name", "served"]
    start = ["--student.start", tmp_path/"start"]

    refused = kdcode("distill", *common, *SHORT)
    assert refused.returncode == 2 and "can't start from its weights; give student.start" in refused.stderr
    refused = kdcode("distill", *common, *SHORT, "--student.feature_layers", "[1]")
    assert refused.returncode == 2 and "an independent student works" in refused.stderr
    refused = kdcode("generate", "x = ", *common, "--draft", tmp_path/"start")
    assert refused.returncode == 2 and "this command needs a teacher on this machine" in refused.stderr
    for run in (refused,): assert len(run.stderr.strip().splitlines()) == 1

    done = kdcode("targets", *common, *SHORT, *start)
    assert done.returncode == 0, done.stderr
    assert "1,024 tokens" in done.stdout
    done = kdcode("distill", *common, *SHORT, *start)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path/"runs"/"served"/"report.json").read_text())
    assert 0 < report["figures"]["acceptance_rate"] <= 1
    assert (tmp_path/"runs"/"served"/"student"/"model.safetensors").exists()
