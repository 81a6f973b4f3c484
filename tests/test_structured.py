"""Structured output and tool calls of the server: valid, exact, and refused in words where they are impossible."""
import asyncio
import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai.types.chat as chat_types
import pytest
from conftest import step_forms, wait_until
from jsonschema import validate
from test_serve import PATH, request_body, streamed_text
from test_serve_load import eagle_pair, growing_prompts, idle  # noqa: F401

from kdcode.config import DecodeSettings
from kdcode.decode import complete
from kdcode.grammar import GrammarState, json_grammar, MAX_GRAMMAR_BYTES
from kdcode.serve import RequestGrammars
from kdcode.teacher import Teacher

CHAT = "/v1/chat/completions"
SHORT = {"type": "string", "maxLength": 6}
SCHEMAS = [
    {"type": "object", "properties": {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
     "required": ["name", "age"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["red", "green", None, 2.5]}, "minItems": 1, "maxItems": 4},
    {"$defs": {"tree": {"type": "object", "properties": {  # contains itself, with an end
        "value": {"type": "boolean"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
        "required": ["value", "next"], "additionalProperties": False}}, "$ref": "#/$defs/tree"},
    {"type": "object", "properties": {"when": {"type": "string", "format": "date"}, "point": {
        "type": "array", "prefixItems": [{"type": "integer", "minimum": -9, "maximum": 9}] * 2, "minItems": 2,
        "items": False}}, "required": ["when", "point"], "additionalProperties": False},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,3}$"},
    {"anyOf": [{"const": {"ok": True}}, {"type": "object", "properties": {"error": SHORT}, "required": ["error"],
                                         "additionalProperties": False}]},
]
TEMPLATE = r"""
{%- if tools %}{{ '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content %}{{ '\n' + message.content }}{% endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson + '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"city": {"enum": ["Oslo", "Rome"]}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "the weather", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}


def structured(schema, **changes):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return request_body(max_tokens=100, response_format=form) | changes


def solo_answer(models, request):
    """The text of a constrained request without a server."""
    teacher, student = models
    settings = DecodeSettings(gamma=3, max_new_tokens=request["max_tokens"], temperature=float(request["temperature"]))
    grammar = json_grammar(teacher, request["response_format"]["json_schema"]["schema"])
    return complete(teacher, student, request["prompt"], settings, request.get("seed", 0), grammar).text


@step_forms("ordinary", "static")
@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_every_answer_follows_its_schema(step, pair, served, count):
    """A random model, which without the grammar writes no JSON; eight clients, greedy and sampled, with streams."""
    requests = [structured(SCHEMAS[i % len(SCHEMAS)], prompt=growing_prompts()[i % 16], seed=i, stream=i % 3 == 0,
                           temperature=i % 5 / 4) for i in range(count)]

    def send(client, request):
        response = client.post(PATH, json=request)
        assert response.status_code == 200, response.text
        return streamed_text(response) if request["stream"] else response.json()["choices"][0]["text"]

    with served() as (client, service), ThreadPoolExecutor(8) as clients:
        texts = list(clients.map(lambda request: send(client, request), requests))
        wait_until(lambda: idle(service))
        free = request_body(prompt=requests[0]["prompt"], max_tokens=100)
        with pytest.raises(ValueError): json.loads(send(client, free | {"stream": False}))  # control
    for text, request in zip(texts, requests):
        validate(json.loads(text), request["response_format"]["json_schema"]["schema"])
    assert len(set(texts)) > count / 4


@step_forms("ordinary", "static", "replayed")
@pytest.mark.parametrize("kind", ["student", "eagle"])
def test_a_constrained_answer_equals_its_solo_run(step, pair, eagle_pair, served, kind):  # noqa: F811
    """Together with others, in chunks, and from the caches of earlier requests."""
    models = pair if kind == "student" else eagle_pair
    requests = [structured(SCHEMAS[i], prompt=growing_prompts()[i], max_tokens=30, temperature=i % 2, seed=i)
                for i in range(4)]
    expected = [solo_answer(models, request) for request in requests]
    with served(models=models, slots=3, prefill_chunk=7) as (client, _), ThreadPoolExecutor(4) as clients:
        for _ in range(2):
            responses = [each.json() for each in clients.map(lambda one: client.post(PATH, json=one), requests)]
            assert [response["choices"][0]["text"] for response in responses] == expected
    assert all(response["usage"]["prompt_tokens_details"]["cached_tokens"] for response in responses)


def test_a_json_object_without_a_schema(pair, served):
    """Its length is not bounded, so a random model may not complete it; what there is begins an object."""
    request = request_body(max_tokens=30, response_format={"type": "json_object"}, temperature=1, n=4)
    with served() as (client, _):
        choices = client.post(PATH, json=request).json()["choices"]
    for choice in choices:
        if choice["finish_reason"] == "stop": assert isinstance(json.loads(choice["text"]), dict)
        else: assert choice["text"].startswith("{")


def nested(depth):
    """A schema of arrays in arrays."""
    return {"type": "array", "items": nested(depth - 1)} if depth else {}


TOOL_FIELDS = {"type": "function", "function": {"name": "f"}}
MANY = {"type": "object", "properties": {f"property {i}": {"type": "string"} for i in range(5000)}}
INVALID = {  # a request, and a part of the message
    "nothing satisfies it": (structured({"type": "string", "minLength": 5, "maxLength": 2}), "Unsatisfiable schema"),
    "no end": (structured({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}), "no finite text"),
    "invalid": (structured({"type": "text"}), "Invalid type: text"),
    "a keyword of the future": (structured({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
    "large": (structured(MANY), f"at most {MAX_GRAMMAR_BYTES} are allowed"),
    "deep": (structured(nested(400)), "recursion limit exceeded"),
    "no schema": (request_body(response_format={"type": "json_schema"}), "needs json_schema"),
    "unknown format": (request_body(response_format={"type": "yaml"}), "response_format.type is 'yaml'"),
    "format of a wrong type": (request_body(response_format="json"), "response_format"),
    "tools of a completion": (request_body(tools=[TOOL_FIELDS]), "use /v1/chat/completions"),
}
INVALID_TOOLS = {
    "odd name": ({"tools": [{"type": "function", "function": {"name": "get weather!"}}]}, "tools.0.function.name"),
    "empty name": ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
    "twice": ({"tools": [NOW, NOW]}, "two functions with the name 'now'"),
    "unknown choice": ({"tools": [NOW], "tool_choice": "maybe"}, "tool_choice must be none, auto, required"),
    "choice of another tool": ({"tools": [NOW], "tool_choice": TOOL_FIELDS}, "tool_choice names 'f'"),
    "choice without tools": ({"tool_choice": "required"}, "there are no tools"),
    "arguments that nothing satisfies": ({"tools": [{"type": "function", "function": {
        "name": "f", "parameters": {"properties": {"x": False}, "required": ["x"]}}}]}, "Unsatisfiable schema"),
    "arguments of another type": ({"tools": [{"type": "function", "function": {
        "name": "f", "parameters": {"type": "string"}}}]}, "parameters"),
    "another kind of tool": ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0"),
    "with a format": ({"tools": [NOW], "response_format": {"type": "json_object"}}, "exclude each other"),
}


def test_what_is_invalid_gets_one_line(pair, with_tools, served):
    chat = {"model": "tools", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    with served() as (client, _), served(models=with_tools) as (tools_client, _):
        answers = {name: (client.post(PATH, json=request), message) for name, (request, message) in INVALID.items()}
        answers |= {name: (tools_client.post(CHAT, json=chat | fields), message)
                    for name, (fields, message) in INVALID_TOOLS.items()}
        afterwards = client.post(PATH, json=structured(SCHEMAS[0]))
    for name, (response, message) in answers.items():
        assert response.status_code == 400, (name, response.text)
        found = response.json()["error"]["message"]
        assert message in found and "\n" not in found and len(found) <= 300, (name, found)
    assert afterwards.status_code == 200


def test_a_schema_of_1_mb_is_refused_before_it_is_read(pair, served):
    with served() as (client, _):
        response = client.post(PATH, json=structured({"enum": ["x" * 1000 + str(i) for i in range(1100)]}))
    assert response.status_code == 413 and "the limit is" in response.json()["error"]["message"]


def test_compiling_does_not_stop_the_server(pair, served, monkeypatch):
    """While one grammar is compiled, other requests are answered, and its client may leave."""
    entered, may_go, original = threading.Event(), threading.Event(), RequestGrammars.compile

    def slow(grammars, request):
        entered.set()
        assert may_go.wait(300)
        return original(grammars, request)
    monkeypatch.setattr(RequestGrammars, "compile", slow)
    with served() as (client, service), ThreadPoolExecutor(1) as other:
        waiting = other.submit(client.post, PATH, json=structured(SCHEMAS[0]))
        assert entered.wait(300)
        assert client.get("/health").status_code == 200
        assert client.post(PATH, json=request_body()).status_code == 200
        may_go.set()
        assert waiting.result().status_code == 200
        wait_until(lambda: idle(service))


@step_forms("ordinary", "replayed")
def test_cancelled_requests_with_a_grammar_leave_nothing(step, pair, served):
    async def send_all(url):
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            async def send(i):
                try:
                    async with asyncio.timeout(.02 + i % 7 * .05):
                        schema = {"type": "array", "items": SHORT, "minItems": 30 + i}
                        await client.post(PATH, json=structured(schema, stream=bool(i % 2), max_tokens=200))
                except TimeoutError:
                    return True
            return await asyncio.gather(*map(send, range(40)))
    with served(slots=4) as (client, service):
        assert any(asyncio.run(send_all(str(client.base_url))))  # control: some were cancelled
        wait_until(lambda: idle(service))
        text = client.post(PATH, json=structured(SCHEMAS[0])).json()["choices"][0]["text"]
    assert text == solo_answer(pair, structured(SCHEMAS[0], seed=0))


def test_a_parser_that_gives_up_ends_its_own_request_only(pair, served, monkeypatch):
    original, others = GrammarState.mask, structured(SCHEMAS[1], max_tokens=30)

    def mask(state, tokens):
        if len(tokens) >= 3 and state.grammar.matcher is broken.matcher:
            state.error = "too many items"
            return state.grammar.ends()
        return original(state, tokens)
    with served() as (client, service), ThreadPoolExecutor(3) as clients:
        assert client.post(PATH, json=structured(SCHEMAS[0])).status_code == 200
        broken, = service.grammars.compiled.values()
        monkeypatch.setattr(GrammarState, "mask", mask)
        requests = [others, structured(SCHEMAS[0]), others]
        first, failed, last = clients.map(lambda request: client.post(PATH, json=request), requests)
        wait_until(lambda: idle(service))
    assert failed.status_code == 400 and "too complex for its grammar" in failed.json()["error"]["message"]
    assert first.json()["choices"] == last.json()["choices"]
    validate(json.loads(first.json()["choices"][0]["text"]), SCHEMAS[1])


# Tools

@pytest.fixture(scope="module")
def with_tools(pair):
    """The tiny teacher with a chat template that has tools."""
    tokenizer = copy.deepcopy(pair[0].tokenizer)
    tokenizer.chat_template = TEMPLATE
    return Teacher(pair[0].model, tokenizer, "tools"), pair[1]


def ask_with_tools(client, **fields):
    """The choice of a request in one piece, checked against OpenAI's type, and what its stream adds up to."""
    messages = [{"role": "user", "content": "How is the weather in Oslo?"}]
    request = {"model": "tools", "messages": messages, "tools": [WEATHER, NOW], "max_tokens": 60, "seed": 3} | fields
    choice, = client.post(CHAT, json=request).json()["choices"]
    lines = client.post(CHAT, json=request | {"stream": True}).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    for chunk in chunks: chat_types.chat_completion_chunk.Choice.model_validate(chunk, strict=True)
    calls = {}
    for call in (call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])):
        known = calls.setdefault(call["index"], {"name": "", "arguments": ""})
        for name in known: known[name] += call["function"].get(name) or ""
    content = "".join(chunk["delta"]["content"] or "" for chunk in chunks)
    parsed = chat_types.chat_completion.Choice.model_validate(choice, strict=True)
    expected = [call.function.model_dump() for call in parsed.message.tool_calls or []]
    assert (content, list(calls.values())) == (parsed.message.content or "", expected)
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]
    return parsed


def check_calls(choice, names):
    assert choice.message.tool_calls and choice.finish_reason == "tool_calls"
    for call in choice.message.tool_calls:
        assert call.function.name in names and call.id.startswith("call_")
        schema = CITY if call.function.name == "get_weather" else {"type": "object", "maxProperties": 0}
        validate(json.loads(call.function.arguments), schema)


def in_one_line(teacher):
    """A teacher whose template has no line feeds between the tags and the call."""
    teacher = copy.copy(teacher)
    teacher.tokenizer = copy.deepcopy(teacher.tokenizer)
    teacher.tokenizer.chat_template = TEMPLATE.replace(r"<tool_call>\n{", "<tool_call>{").replace(
        r"}\n</tool_call>", "}</tool_call>")
    return teacher


@pytest.mark.parametrize("form", [lambda teacher: teacher, in_one_line], ids=["lines", "one line"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_tool_calls_are_valid_and_streamed(with_tools, served, temperature, form):
    named = {"type": "function", "function": {"name": "get_weather"}}
    with served(models=(form(with_tools[0]), with_tools[1])) as (client, _):
        options = {"temperature": temperature}
        required = ask_with_tools(client, tool_choice="required", parallel_tool_calls=False, **options)
        check_calls(required, ("get_weather", "now"))
        assert len(required.message.tool_calls) == 1 and required.message.content is None
        chosen = ask_with_tools(client, tool_choice=named, **options)
        check_calls(chosen, ("get_weather",))
        assert len(chosen.message.tool_calls) == 1
        several = ask_with_tools(client, tool_choice="required", max_tokens=300, **options)
        if several.finish_reason != "length": check_calls(several, ("get_weather", "now"))
        for free in (ask_with_tools(client, **options), ask_with_tools(client, tool_choice="none", **options)):
            assert free.message.tool_calls is None and free.message.content  # a random model calls no tool by itself


def test_a_closing_tag_in_a_string_does_not_end_a_call(with_tools, served):
    """Without a line feed before the tag, a string may contain the very end of a call."""
    code = '{"a": {}}</tool_call>'
    schema = {"type": "object", "properties": {"code": {"const": code}}, "required": ["code"],
              "additionalProperties": False}
    run = {"type": "function", "function": {"name": "run", "parameters": schema}}
    with served(models=(in_one_line(with_tools[0]), with_tools[1])) as (client, _):
        choice = ask_with_tools(client, tools=[run], tool_choice="required", parallel_tool_calls=False, max_tokens=100)
    call, = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"code": code} and choice.finish_reason == "tool_calls"


def test_a_model_that_begins_a_call_completes_it(pair, with_tools, served):
    """With `auto`, the text is free until the tag. Here the tag is a word, and a bias makes the model write it."""
    teacher = copy.copy(with_tools[0])
    teacher.tokenizer = copy.deepcopy(pair[0].tokenizer)
    teacher.tokenizer.chat_template = TEMPLATE.replace("<tool_call>\\n{", "import\\n{")
    word, = teacher.tokenizer.encode("import")
    options = {"tool_choice": "auto", "parallel_tool_calls": False, "temperature": 0}
    with served(models=(teacher, pair[1])) as (client, _):
        called = ask_with_tools(client, logit_bias={str(word): 100}, **options)
        free = ask_with_tools(client, logit_bias={str(word): -100}, **options)
    check_calls(called, ("get_weather", "now"))
    assert len(called.message.tool_calls) == 1 and free.message.tool_calls is None


def test_tools_reach_the_template_and_results_come_back(with_tools, served):
    from kdcode.api import ChatCompletionRequest
    from kdcode.serve import request_prompts
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [{"role": "user", "content": "How is it?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]
    request = {"model": "tools", "messages": messages, "tools": [WEATHER], "max_tokens": 5}
    prompt, = request_prompts(with_tools[0], ChatCompletionRequest.model_validate(request))
    text = with_tools[0].tokenizer.decode(prompt)
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>tool\nrain<|im_end|>" in text and '"description": "the weather"' in text
    with served(models=with_tools) as (client, _):
        assert client.post(CHAT, json=request).status_code == 200


def test_a_template_without_tools_says_so(pair, served):
    request = {"model": "teacher0", "messages": [{"role": "user", "content": "Hi"}], "tools": [NOW]}
    with served() as (client, _):
        response = client.post(CHAT, json=request)
        ignored = client.post(CHAT, json=request | {"tool_choice": "none", "max_tokens": 2})
    assert response.status_code == 400 and "the chat template has no tools" in response.json()["error"]["message"]
    assert ignored.status_code == 200
