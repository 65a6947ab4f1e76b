"""Rollout by vLLM servers over HTTP: processes or machines of their own, of several GPUs each.

A request is one prompt, as token ids and PNG pictures, and asks for all its responses; the answer
holds their token ids and log-probs (vLLM's `/inference/v1/generate`, since a chat request would
have the server tokenize again). New weights are written to a folder that run and servers share and
loaded from there, or go from GPU to GPU (`vllm_transfer`). Whatever a server does wrong is a
`RolloutError` on every rank, so that all of them can write a checkpoint together.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import io
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

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
from papo_fast.rollout.vllm_client import AGAIN, Server
from papo_fast.rollout.vllm_guard import is_loopback, read_token
from papo_fast.rollout.vllm_requests import (
    RequestFormat,
    prompt_passes,
    prompt_seeds,
    require_vllm,
)
from papo_fast.rollout.vllm_serve import OwnServer, warn_of_open_address
from papo_fast.rollout.vllm_transfer import WeightTransfer
from papo_fast.run.private import private_folder
from papo_fast.samples import Completion


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
            if rollout.server_transfer != "disk":
                require_vllm()  # here too, and not in the servers alone
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
                    if rollout.server_transfer == "ipc" and not is_loopback(url):
                        raise InputError(
                            f"rollout.server_transfer is ipc, by which a server reads the memory "
                            f"of this machine's GPU, but {url} is not on loopback: take nccl"
                        )
                    length = config.data.max_prompt_length + rollout.max_new_tokens
                    server = Server(url, rollout.server_timeout, token)
                    server.check(length, rollout.server_transfer)
        except InputError as problem:
            error = problem
        fail_together(error)
        urls, token = gather((urls, token))[0]
        self.servers = [Server(url, rollout.server_timeout, token) for url in urls]
        self.transfer: WeightTransfer | None = None
        if rollout.server_transfer != "disk":
            kind, timeout = rollout.server_transfer, rollout.server_timeout
            self.transfer = WeightTransfer(kind, self.servers, timeout)

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
        fail_together(error)
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
        error = None
        try:
            if self.transfer is None:
                self._load_from_disk(policy)
            else:
                self.transfer.send(policy)
            if is_main():
                self._of_all(Server.forget)
        except RolloutError as problem:
            error = problem
        fail_together(error)

    def _load_from_disk(self, policy: Policy) -> None:
        self.loaded += 1
        folder = self.weights / f"update-{self.loaded}"
        try:
            write_weights(policy, folder, first=self.loaded == 1)
            if is_main():
                self._of_all(lambda server: server.load_weights(folder))
        finally:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)

    def _of_all(self, ask: Callable[[Server], None]) -> None:
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(ask, self.servers))

    @staticmethod
    def prompt_passes(n: int) -> int:
        """See `vllm_requests.prompt_passes`."""
        return prompt_passes(n)

    def sleep(self) -> None:
        """Servers have GPUs of their own."""

    def close(self) -> None:
        if self.transfer is not None:
            self.transfer.close()
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


def fail_together(error: InputError | None) -> None:
    """Raise the first rank's error on every rank."""
    messages = [m for m in gather(None if error is None else str(error)) if m is not None]
    if messages:
        raise RolloutError(messages[0]) from error
