"""Fake vLLM and llama.cpp: programs of a few lines that speak the protocols of both servers."""
import json
import stat
import sys

from kdcode.files import PROGRAMS

# Each answers after 50 ms: one token, and then steps of one token, or of two with a draft. vLLM sends an event for each
# step, llama.cpp one for each token, with the number after the step. Both count only if the request asks for it.
# A file beside the program, PROGRAM.FAULT, is a fault of the servers that have its text in an argument.
FAKE_ENGINE = """#!PYTHON
import http.server, itertools, json, os, sys, time
name, words = sys.argv[0], sys.argv[1:]
is_vllm = os.path.basename(name) == "vllm"
drafting = ("--speculative-config" if is_vllm else "--model-draft") in words
log = os.open(name + ".log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
def record(entry): os.write(log, (json.dumps(entry) + chr(10)).encode())
def has(fault):
    path = f"{name}.{fault}"
    return os.path.exists(path) and any(open(path).read() in word for word in words)
record({"arguments": words})
if has("does-not-start"): sys.exit("no such model")
posts = itertools.count(1)

def count(done, body):
    if is_vllm: return {"usage": {"completion_tokens": done}} if body.get("stream_options") == {
        "include_usage": True, "continuous_usage_stats": True} else {}
    return {"timings": {"predicted_n": done}} if body.get("timings_per_token") is True else {}

def events(body):
    if "messages" in body: yield {"choices": [{"delta": {"role": "assistant", "content": "" if is_vllm else None}}]}
    done = 0
    while done < body["max_tokens"]:
        step = min(2 if drafting and done else 1, body["max_tokens"] - done)
        done += step
        for text in ["ab"[:step]] if is_vllm else "ab"[:step]:
            choice = {"text": text, "token_ids": [7] * len(text)}
            if "messages" in body: choice = {"delta": {"content": text}}
            yield {"choices": [choice]} | count(done, body)
            if body.get("prompt") == [13]: yield {"error": {"message": "out of memory"}}
    if is_vllm and "stream_options" in body: yield {"choices": []} | count(done, body)

def whole(body):
    drafts = {"draft_n": 2, "draft_n_accepted": 1} if drafting else {}
    return {"tokens": [7] * body["n_predict"], "timings": {"prompt_ms": 50} | drafts}

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words): pass
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        record({"path": self.path, "body": body})
        if has("does-not-answer") or has("fails-later") and next(posts) > 2: return self.send_error(500)
        time.sleep(.05)
        self.send_response(200)
        self.end_headers()
        if not body.get("stream"): return self.wfile.write(json.dumps(whole(body)).encode())
        for event in [*map(json.dumps, events(body)), "[DONE]"]: self.wfile.write(f"data: {event}\\n\\n".encode())

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # more than the clients; a full queue loses connections
Server(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


def install(folder, engine, fault="", word=""):
    """Write a fake engine where `make engines` installs the real one, and return its path.

    Its servers have a fault if their command contains a word.
    """
    program = folder/".engines"/"bin"/PROGRAMS[engine]
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(FAKE_ENGINE.replace("PYTHON", sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    if fault: program.with_name(f"{program.name}.{fault}").write_text(word)
    return program


def entries(program):
    """What a fake engine has recorded, in one list for each of its starts.

    If two of its servers run at the same time, the requests to both are in the list of the second one.
    """
    starts = []
    for line in program.with_name(program.name + ".log").read_text().splitlines():
        entry = json.loads(line)
        if "arguments" in entry: starts.append([])
        starts[-1].append(entry)
    return starts


def option(start, name):
    """The value of an option in the command that started a fake engine."""
    words = start[0]["arguments"]
    return words[words.index(name) + 1]
