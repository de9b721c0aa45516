"""examples/ray_serve.py: two replicas, each with a server of its own, behind one address."""

import http.client
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import free_port, need_server

ray = pytest.importorskip("ray", reason="no Ray: pip install 'qfllama[ray]'")
serve = pytest.importorskip("ray.serve", reason="no Ray Serve: pip install 'qfllama[ray]'")

EXAMPLES = str(Path(__file__).parent.parent / "examples")
OPTIONS = "--parallel 4 --n-ctx 2048 --max-length 256 --threads 1 -- --slots --temp 0 --no-warmup"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def port(smollm2_filtered):
    """Of a cluster on this machine that runs the example."""
    need_server()
    path = os.pathsep.join([EXAMPLES, os.environ.get("PYTHONPATH", "")])
    found = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("PATH", found)
        patch.setenv("RAY_worker_niceness", "0")  # 15 by default: too slow beside other programs
        patch.syspath_prepend(EXAMPLES)
        from ray_serve import app

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            listening = free_port()
            serve.start(http_options={"port": listening})
            serve.run(app({"model": str(smollm2_filtered), "replicas": "2", "options": OPTIONS}))
            yield listening
        finally:
            serve.shutdown()
            ray.shutdown()


def request(port: int, path: str, name: str, body: dict | None = None):
    """The response to a request of the conversation `name`; not read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"Content-Type": "application/json", "serve_multiplexed_model_id": name}
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    return response


def chat(port: int, name: str, messages: list[dict], **more):
    body = {"messages": messages, **more}
    return request(port, "/v1/chat/completions", name, body)


def test_a_conversation_stays_with_the_server_that_has_it(port):
    def turns(name: str) -> list[tuple[str, int]]:
        """(replica, tokens that it knew from before) of three turns."""
        messages, found = [{"role": "user", "content": f"I am {name}. Who am I? " * 20}], []
        for _ in range(3):
            response = chat(port, name, messages, max_tokens=8)
            answer = json.loads(response.read())
            found.append((response.headers["x-replica"], answer["timings"]["cache_n"]))
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "And now?"}]
        return found

    with ThreadPoolExecutor(6) as pool:
        conversations = list(pool.map(turns, ["Ada", "Bea", "Cleo", "Dora", "Eva", "Fee"]))
    for found in conversations:
        assert len({replica for replica, _ in found}) == 1
        assert all(n_known > 100 for _, n_known in found[1:]), found
    assert len({found[0][0] for found in conversations}) == 2


def test_an_answer_is_streamed_and_stops_when_the_client_goes_away(port):
    def answering() -> bool:
        return any(
            slot["is_processing"] for slot in json.loads(request(port, "/slots", "Gus").read())
        )

    messages = [{"role": "user", "content": "Write a long story about the sea."}]
    response = chat(port, "Gus", messages, max_tokens=1500, stream=True, ignore_eos=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.readline().startswith(b"data: {")
    assert answering()
    response.close()
    end = time.monotonic() + 60
    while answering():
        assert time.monotonic() < end
        time.sleep(0.2)
