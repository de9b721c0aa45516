"""Several servers behind Ray Serve. A conversation stays with the server that has its cache.

    pip install 'ray[serve]'
    cd examples
    serve run ray_serve:app model=$PWD/model-qf.gguf replicas=2 options="--max-length 4096"

Each replica starts one `qfllama serve` and passes requests on to it: http://localhost:8000 then has
the API and the page of one server. `gpus=1` gives each replica a GPU of its own.

Clients name the conversation in the header `serve_multiplexed_model_id`. Ray sends requests with
the same name to the same replica, as long as it is there and has room. Without a name, or on
another replica, an answer is as good, but the conversation is read again from its first token.
"""

from __future__ import annotations

import asyncio
import shlex
import shutil
import socket
import subprocess

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse
from yarl import URL

CONVERSATIONS = 64
"""How many conversations Ray remembers for each replica, about as many as its server keeps."""
OF_ONE_CONNECTION = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@serve.deployment(max_ongoing_requests=CONVERSATIONS)
class Server:
    async def __init__(self, model: str, options: str):
        if not shutil.which("qfllama"):
            raise FileNotFoundError("qfllama is not installed here: `pip install qfllama`")
        port = str(free_port())
        command = ["qfllama", "serve", model, "--host", "127.0.0.1", "--port", port]
        self.process = subprocess.Popen([*command, *shlex.split(options)])
        self.address = f"http://127.0.0.1:{port}"
        forever = aiohttp.ClientTimeout(total=None)
        self.http = aiohttp.ClientSession(timeout=forever, auto_decompress=False)
        while not await self.answers():
            self.check_health()
            await asyncio.sleep(0.2)

    async def answers(self) -> bool:
        try:
            async with self.http.get(f"{self.address}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    def check_health(self) -> None:
        """Ray asks this again and again, and starts another replica if it raises."""
        if self.process.poll() is not None:
            raise RuntimeError(f"qfllama serve has ended with code {self.process.returncode}")

    @serve.multiplexed(max_num_models_per_replica=CONVERSATIONS)
    async def conversation(self, name: str) -> str:
        """Nothing to load: Ray only has to learn that this replica has the conversation."""
        return name

    async def __call__(self, request: Request) -> StreamingResponse:
        if name := serve.get_multiplexed_model_id():
            await self.conversation(name)
        response = await self.http.request(
            request.method,
            URL(f"{self.address}{request.url.path}?{request.url.query}", encoded=True),
            data=await request.body(),
            headers=end_to_end(request.headers),
        )
        replica = serve.get_replica_context().replica_id.unique_id
        headers = end_to_end(response.headers) | {"x-replica": replica}
        return StreamingResponse(pieces(response), response.status, headers)

    def __del__(self):
        if hasattr(self, "process"):
            self.process.terminate()


def end_to_end(headers) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in OF_ONE_CONNECTION}


async def pieces(response: aiohttp.ClientResponse):
    """The answer as it comes. A client that goes away closes this, and so stops the answer."""
    try:
        async for piece in response.content.iter_any():
            yield piece
    finally:
        response.close()


def app(args: dict[str, str]) -> serve.Application:
    """What `serve run ray_serve:app model=... replicas=... gpus=... options=...` starts."""
    if "model" not in args:
        raise ValueError("which model? `serve run ray_serve:app model=/path/model-qf.gguf`")
    return Server.options(
        num_replicas=int(args.get("replicas", 1)),
        ray_actor_options={"num_cpus": 1, "num_gpus": float(args.get("gpus", 0))},
    ).bind(args["model"], args.get("options", ""))
