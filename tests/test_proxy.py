"""Two servers behind the proxies of the page on the server: streams, a server that stops, and metrics."""
import re
import shutil
import socket
import subprocess
from contextlib import ExitStack

import httpx
import pytest

from conftest import ROOT, wait_until

PAGE = (ROOT/"docs"/"server.md").read_text()
KEY = {"Authorization": "Bearer a key"}
NGINX = """
daemon off; master_process off; error_log stderr; pid {folder}/pid;
events {{}}
http {{ access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
{text}
}}
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free: return free.getsockname()[1]


def proxy_command(kind, addresses, port, folder):
    """Write the page's configuration with these servers and this port; return the command."""
    language = {"nginx": "nginx", "caddy": "text"}[kind]
    start = {"nginx": "upstream", "caddy": ":80"}[kind]
    text = re.search(rf"```{language}\n({start}.*?)```", PAGE, re.DOTALL)[1]
    for number, address in enumerate(addresses, 1): text = text.replace(f"10.0.0.{number}:8000", address)
    text = re.sub(r"^:80", f":{port}", text).replace("listen 80", f"listen 127.0.0.1:{port}")
    text = NGINX.format(folder=folder, text=text) if kind == "nginx" else f"{{\nadmin off\n}}\n{text}"
    (file := folder/"configuration").write_text(text)
    if kind == "nginx": return ["nginx", "-c", file]
    return ["caddy", "run", "--adapter", "caddyfile", "--config", file]


@pytest.fixture(params=["nginx", "caddy"])
def proxy(request, served, tmp_path):
    """Start two servers and a proxy; yields a client of the proxy, and the servers' clients with what stops them."""
    if shutil.which(request.param) is None: pytest.skip(f"{request.param} is not installed")
    with ExitStack() as first, ExitStack() as second, ExitStack() as stack:
        servers = {one.enter_context(served(key="a key"))[0]: one for one in (first, second)}
        addresses = [str(client.base_url).removeprefix("http://").rstrip("/") for client in servers]
        url = f"http://127.0.0.1:{(port := free_port())}"
        with (tmp_path/"log").open("w") as log:
            process = subprocess.Popen(proxy_command(request.param, addresses, port, tmp_path), stdout=log, stderr=log,
                                       env={"HOME": str(tmp_path), "PATH": "/usr/sbin:/usr/bin:/bin"})
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60, headers=KEY))
        wait_until(lambda: process.poll() is None and answers(client), 60)
        for server in servers: server.headers.update(KEY)
        yield client, servers


def answers(client):
    try: return client.get("/health").status_code == 200
    except httpx.TransportError: return False


def requests_of(server):
    """Return the number of completions that a server answered."""
    metrics = server.get("/metrics").text
    found = re.search(r'kdcode_requests_total\{path="/v1/completions",status="200"\} (\d+)', metrics)
    return int(found[1]) if found else 0


def test_two_servers_behind_a_proxy(proxy):
    client, servers = proxy
    model = client.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "x =", "max_tokens": 400, "temperature": 0}
    assert httpx.get(f"{client.base_url}/v1/models").status_code == 401
    assert client.get("/metrics").status_code == 404
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        running = sum("kdcode_running_requests 1.0" in server.get("/metrics").text for server in servers)
        assert running == 1  # the first token arrives before the last one is computed
        assert [line for line in lines if line][-1] == "data: [DONE]"
    def completes(): return client.post("/v1/completions", json=body | {"max_tokens": 4}).status_code == 200
    for _ in range(3): assert completes()
    counts = sorted(map(requests_of, servers))
    assert counts == [0, 4]  # a client returns to its server
    max(servers.items(), key=lambda server: requests_of(server[0]))[1].close()  # this one stops
    wait_until(completes, 30)  # Caddy may answer 502 until its health check has seen it
    for _ in range(3): assert completes()
