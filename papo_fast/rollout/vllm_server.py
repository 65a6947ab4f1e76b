"""Rollout by vLLM servers over HTTP: processes or machines of their own, of several GPUs each.

A request is one prompt, as token ids and PNG pictures, and asks for all its responses; the answer
holds their token ids and log-probs (vLLM's `/inference/v1/generate`, since a chat request would
have the server tokenize again). New weights are written to a folder that run and servers share and
loaded from there. Whatever a server does wrong is a `RolloutError` on every rank, so that all of
them can write a checkpoint together.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import io
import json
import math
import shutil
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from papo_fast.config import Config
from papo_fast.data.encoded import EncodedPrompt
from papo_fast.data.encoder import PromptEncoder
from papo_fast.errors import InputError
from papo_fast.model.policy import Policy
from papo_fast.parallel import gather, is_main, rank
from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_guard import SOCKET, read_token
from papo_fast.rollout.vllm_requests import RequestFormat, prompt_passes, prompt_seeds
from papo_fast.rollout.vllm_serve import OwnServer, warn_of_open_address
from papo_fast.run.private import private_folder
from papo_fast.samples import Completion

START = "start it with `papo-fast serve` and the options of this run"
AGAIN = "the same command with --resume goes on"


class Server:
    """One vLLM server; every failure is a `RolloutError` that names it and what to do."""

    def __init__(self, url: str, timeout: float, token: str = ""):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.headers = {"Content-Type": "application/json"}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"

    def __str__(self) -> str:
        return f"the vLLM server at {self.url} (rollout.server_urls)"

    def call(self, method: str, path: str, body: dict | None = None) -> Any:
        """The JSON answer, or None where the server answers nothing."""
        connection = _connection(self.url, self.timeout)
        try:
            connection.connect()
        except OSError as error:
            raise RolloutError(f"{self} cannot be reached: {error}. {START}; {AGAIN}") from error
        try:
            text = None if body is None else json.dumps(body)
            with suppress(BrokenPipeError):  # refused before all was read: the answer says why
                connection.request(method, path, text, self.headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
        except TimeoutError as error:
            raise RolloutError(
                f"{self} has not answered {path} within rollout.server_timeout = {self.timeout} "
                f"seconds: raise it, or start the server again; {AGAIN}"
            ) from error
        except (OSError, HTTPException) as error:
            raise RolloutError(
                f"{self} broke off while it answered {path} ({error!r}): its log says why. "
                f"{START}; {AGAIN}"
            ) from error
        finally:
            connection.close()
        if status == 401:
            raise RolloutError(
                f"{self} refused {path}: it asks for a token other than this run's. Give both the "
                f"same --rollout.server-token-file; {AGAIN}"
            )
        if status >= 400:
            detail = content[:500].decode(errors="replace")
            raise RolloutError(
                f"{self} refused {path} with status {status}: {detail}. If it was started "
                f"otherwise, {START}"
            )
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise self.nonsense(path, f"no JSON but {content[:80]!r}") from error

    def nonsense(self, path: str, what: str) -> RolloutError:
        return RolloutError(
            f"{self} answered {path} with {what}: is it vLLM, of a version that pyproject.toml "
            f"allows? {START}; {AGAIN}"
        )

    def is_ready(self) -> bool:
        try:
            self.call("GET", "/health")
        except RolloutError:
            return False
        return True

    def check(self, length: int) -> None:
        """Raise where the server was started with options under which a run would be wrong."""
        path = "/server_info?config_format=json"
        info = self.call("GET", path)
        try:
            model = info["vllm_config"]["model_config"]
            mode, longest = model["logprobs_mode"], int(model["max_model_len"])
        except (KeyError, TypeError, ValueError) as error:
            raise self.nonsense(path, "no description of its model") from error
        if mode != "processed_logprobs" or longest < length:
            raise RolloutError(
                f"{self} runs with --logprobs-mode {mode} --max-model-len {longest}, but this run "
                f"needs processed_logprobs and {length}: {START}"
            )

    def load_weights(self, folder: Path) -> None:
        self.call(
            "POST",
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
        )
        path = "/reset_prefix_cache"
        done = self.call("POST", path)
        if not isinstance(done, dict) or done.get("success") is not True:
            raise self.nonsense(path, f"{done}, so it kept keys and values of the old weights")
        self.call("POST", "/reset_mm_cache")
        self.call("POST", "/reset_encoder_cache")


class _SocketConnection(HTTPConnection):
    """HTTP over a socket that a path names."""

    def __init__(self, path: str, timeout: float):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def _connection(url: str, timeout: float) -> HTTPConnection:
    address = urlsplit(url)
    if address.scheme == SOCKET:
        return _SocketConnection(address.path, timeout)
    return HTTPConnection(address.hostname or "", address.port, timeout=timeout)


class VLLMServerRollout:
    """`RolloutEngine` over servers; processes of the run take the servers in turn.

    Args:
        config: `rollout.server_urls` names the servers; without one, this run's own is started.
        encoder: of the checkpoint that they serve.
        run_dir: for the log of an own server, and for weights without `rollout.server_weights`.

    Raises:
        RolloutError: a server cannot be reached, does not start, or runs with other options.
    """

    def __init__(self, config: Config, encoder: PromptEncoder, run_dir: Path):
        rollout = config.rollout
        self.format = RequestFormat(encoder)
        self.batch_size = rollout.batch_size
        # one and the same for a run and its continuation, which deletes what the run has left
        key = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
        place = Path(rollout.server_weights or run_dir / "server_weights").absolute()
        self.weights = place / f"papo-fast-{key}"
        self.loaded = 0
        self.own: OwnServer | None = None
        urls, token, error = rollout.server_urls, "", None
        try:
            if not urls and is_main():
                log = run_dir / "vllm_server.log"
                self.own = OwnServer(config, encoder, log, lambda url: Server(url, 5.0).is_ready())
                atexit.register(self.close)
                urls, token = (self.own.url,), self.own.token
            elif is_main() and rollout.server_token_file:
                token = read_token(rollout.server_token_file)
            if is_main():
                for url in urls:
                    warn_of_open_address(url)
                    length = config.data.max_prompt_length + rollout.max_new_tokens
                    Server(url, rollout.server_timeout, token).check(length)
        except InputError as problem:
            error = problem
        _fail_together(error)
        urls, token = gather((urls, token))[0]
        self.servers = [Server(url, rollout.server_timeout, token) for url in urls]

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        n: int,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        advance: Callable[[int], None],
    ) -> list[list[Completion]]:
        """Sample `n` responses per prompt at `temperature` (see `RolloutEngine`)."""
        server, path = self.servers[rank() % len(self.servers)], "/inference/v1/generate"

        def answer(prompt: EncodedPrompt, its_seed: int) -> list[Completion]:
            ids, pictures = self.format.prompt(prompt)
            request = {
                "token_ids": ids,
                "sampling_params": self.format.sampling(n, temperature, max_new_tokens, its_seed),
                "return_token_ids": True,
            }
            if pictures:
                request["content_parts"] = [
                    {"type": "image_url", "url": data_url(picture)} for picture in pictures
                ]
            found = self._completions(server, path, prompt, n, server.call("POST", path, request))
            advance(1)
            return found

        groups: list[list[Completion]] = []
        error = None
        pool = ThreadPoolExecutor(max(1, self.batch_size // n))
        try:
            groups = list(pool.map(answer, prompts, prompt_seeds(seed, len(prompts), n)))
        except RolloutError as problem:
            error = problem
        finally:
            pool.shutdown(cancel_futures=True)
        _fail_together(error)
        return groups

    def _completions(
        self, server: Server, path: str, prompt: EncodedPrompt, n: int, answer: Any
    ) -> list[Completion]:
        try:
            self.format.check_prompt(prompt, answer["prompt_token_ids"], str(server))
            found = []
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
                tokens, reason = choice["token_ids"], choice["finish_reason"]
                content = choice["logprobs"]["content"]
                logprobs = [float(entry["logprob"]) for entry in content]
                if [entry["token_id"] for entry in content] != tokens or not tokens:
                    raise ValueError("log-probs of other tokens than it drew")
                if not all(math.isfinite(x) and x < 1e-3 for x in logprobs):
                    raise ValueError("numbers that are no log-probs")
                if reason not in ("stop", "length"):
                    raise ValueError(f"a response that ended for the reason {reason!r}")
                found.append(self.format.completion(tokens, logprobs, reason))
            if len(found) != n:
                raise ValueError(f"{len(found)} responses instead of {n}")
        except InputError as error:
            raise RolloutError(str(error)) from error
        except (KeyError, TypeError) as error:
            raise server.nonsense(path, f"no responses ({error!r})") from error
        except ValueError as error:
            raise server.nonsense(path, str(error)) from error
        return found

    def load_weights(self, policy: Policy) -> None:
        """Hand the policy's weights to all servers, which forget what the old ones computed."""
        self.loaded += 1
        folder, error = self.weights / f"update-{self.loaded}", None
        try:
            write_weights(policy, folder, first=self.loaded == 1)
            if is_main():
                with ThreadPoolExecutor(len(self.servers)) as pool:
                    list(pool.map(lambda server: server.load_weights(folder), self.servers))
        except RolloutError as problem:
            error = problem
        finally:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)
        _fail_together(error)

    @staticmethod
    def prompt_passes(n: int) -> int:
        """See `vllm_requests.prompt_passes`."""
        return prompt_passes(n)

    def sleep(self) -> None:
        """Servers have GPUs of their own."""

    def close(self) -> None:
        if self.own is not None:
            self.own.close()
            self.own = None
        if self.loaded and is_main():
            with suppress(OSError):  # empty, unless weights are still being written
                self.weights.rmdir()


def write_weights(
    policy: Policy, folder: Path, shard_bytes: int = 4 << 30, *, first: bool = True
) -> None:
    """Whole weights in the policy's dtype as safetensors; the main rank writes, all take part.

    The `first` time, the folder around `folder` is made, for this user alone.
    """
    shard: dict[str, Tensor] = {}
    size, written = 0, 0
    error: OSError | None = None
    if is_main() and first:
        try:
            private_folder(folder.parent)
        except OSError as problem:
            error = problem

    def write() -> None:
        nonlocal size, written
        folder.mkdir(exist_ok=True)
        written += 1
        save_file(shard, folder / f"model-{written:05}.safetensors")
        shard.clear()
        size = 0

    for name, weight in policy.whole_weights():
        if not is_main() or error is not None:
            continue  # the other ranks gather what is left with us
        try:
            shard[name] = weight.cpu().contiguous()
            size += weight.nbytes
            if size >= shard_bytes:
                write()
        except OSError as problem:
            error = problem
    if is_main() and error is None:
        try:
            write()
        except OSError as problem:
            error = problem
    if error is not None:
        raise RolloutError(
            f"new weights for the vLLM servers cannot be written to {folder}: {error}; set "
            f"rollout.server_weights to a folder that run and servers share; {AGAIN}"
        ) from error


def data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _fail_together(error: InputError | None) -> None:
    """Raise the first rank's error on every rank."""
    messages = [m for m in gather(None if error is None else str(error)) if m is not None]
    if messages:
        raise RolloutError(messages[0]) from error
