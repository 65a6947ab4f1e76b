"""The vLLM server whose options are those that a run needs.

`papo-fast serve PRESET ...` becomes the server (`papo_fast.launch`); a run without
`rollout.server_urls` starts one for itself, on a socket in a folder that only its user can enter,
and ends it. Whoever the server obeys can change its weights and more (vLLM calls this development
mode), so it obeys those who know its token (`vllm_guard`). Nothing is encrypted: one with a port
belongs on loopback or in a network of one's own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import torch

from papo_fast.child_process import end_with_parent
from papo_fast.config import Config
from papo_fast.data.encoder import PromptEncoder
from papo_fast.errors import InputError
from papo_fast.parallel import pick_device
from papo_fast.rollout import vllm_guard
from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_requests import cpu_options, engine_options, require_vllm
from papo_fast.rollout.vllm_setup import set_environment
from papo_fast.setting_bounds import check_urls

_log = logging.getLogger(__name__)


def server_command(
    config: Config, encoder: PromptEncoder, url: str, token: str
) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of vLLM's OpenAI-compatible server at `url`.

    `encoder` is that of `config.model.path`. `url` is of the form http://HOST:PORT, or unix:PATH
    for a socket in a folder that is there.
    """
    address = urlsplit(url)
    if address.scheme == vllm_guard.SOCKET:
        host, place = "localhost", {"uds": address.path}
    else:
        check_urls((url,))
        host, place = address.hostname or "", {"host": address.hostname, "port": address.port}
    on_cpu = pick_device(config.device).type == "cpu"
    options = engine_options(config, encoder) | {
        "model": config.model.path,
        **place,
        "middleware": vllm_guard.MIDDLEWARE,
        "tensor_parallel_size": config.rollout.tensor_parallel,
        "seed": 0,
        "enable_scale_out": True,  # token ids in, token ids out
        "disable_uvicorn_access_log": True,
    }
    transfer = config.rollout.server_transfer
    if transfer != "disk":
        options["weight_transfer_config"] = {"backend": transfer}
    if on_cpu:
        options |= cpu_options(config, encoder)
    one_process = on_cpu and config.rollout.tensor_parallel == 1
    if one_process:
        options["distributed_executor_backend"] = "uni"
    command, switches = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"], []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            switches.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    command += switches
    environment = dict(os.environ)
    set_environment(environment, on_cpu=on_cpu)
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # loading weights, resetting caches
    if transfer == "ipc":  # where in the GPU's memory, which vLLM tells over HTTP as a pickle
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    environment[vllm_guard.TOKEN], environment[vllm_guard.HOST] = token, host
    root = str(Path(__file__).parents[2])  # from where the server imports the guard
    if "site-packages" not in root and root not in environment.get("PYTHONPATH", ""):
        paths = (environment.get("PYTHONPATH"), root)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if one_process:
        # Else vLLM runs the model in a process of its own, to pin threads, and waits for each step
        # in a loop that never sleeps: half a core, which the trainer could use.
        environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if on_cpu and config.threads:
        environment.setdefault("OMP_NUM_THREADS", str(config.threads))
    return command, environment


def warn_of_open_address(url: str) -> None:
    """Say it where tokens, questions and responses travel through a network as they are."""
    if not vllm_guard.is_loopback(url):
        _log.warning(
            "%s is not on loopback and nothing is encrypted: whoever can listen in on that network "
            "learns the token and can then change the server's weights",
            url,
        )


def gpus_of_own_server(config: Config, device: torch.device) -> str | None:
    """CUDA_VISIBLE_DEVICES of a server that a run on `device` starts: GPUs that the run leaves.

    With `rollout.server_transfer` ipc it is the run's own GPU. None: where too few are left, it
    sees all that the run sees.

    Raises `InputError` where too few are left for `rollout.server_transfer` nccl.
    """
    if device.type == "cpu":
        return None
    rollout, visible = config.rollout, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if visible == [""]:
        visible = [str(i) for i in range(torch.cuda.device_count())]
    taken = [device.index or 0]
    if "LOCAL_RANK" in os.environ:  # as `papo_fast.parallel` gives them to processes
        taken = list(range(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if rollout.server_transfer == "ipc":
        return visible[taken[0]]
    left = [gpu for i, gpu in enumerate(visible) if i not in taken]
    if len(left) >= rollout.tensor_parallel:
        return ",".join(left[: rollout.tensor_parallel])
    if rollout.server_transfer == "nccl":
        raise InputError(
            f"rollout.server_transfer is nccl, for which the run's own server needs "
            f"{rollout.tensor_parallel} GPU(s) (rollout.tensor_parallel) besides those of the run, "
            f"but {len(left)} of {len(visible)} are left: start fewer processes, or take ipc or "
            "disk"
        )
    return None


class OwnServer:
    """A server of this run alone, on a socket; ends with it, however it ends.

    A port of loopback would be open to every user of the machine, and another program could take
    it between being found free and being used.

    Attributes:
        url: unix:PATH of the socket, whose folder has mode 700.
        token: what every request has to carry; random.

    Raises:
        RolloutError: it does not start within `rollout.server_timeout`; names its log.
    """

    def __init__(
        self, config: Config, encoder: PromptEncoder, log: Path, answers: Callable[[str], bool]
    ):
        require_vllm()
        self.folder = _folder_for_a_socket()
        self.url = f"{vllm_guard.SOCKET}:{self.folder / 'vllm'}"
        self.token = vllm_guard.new_token()
        command, environment = server_command(config, encoder, self.url, self.token)
        # torchrun's variables are of the run's processes
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        if (gpus := gpus_of_own_server(config, pick_device(config.device))) is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # interrupts are for the run, which then ends it
                preexec_fn=end_with_parent,
            )
        deadline = time.monotonic() + config.rollout.server_timeout
        while not answers(self.url):
            status = self.process.poll()
            if status is not None or time.monotonic() > deadline:
                self.close()
                why = "is not ready in time" if status is None else f"ended with status {status}"
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                last = " | ".join(lines[-3:])
                raise RolloutError(
                    f"the vLLM server of this run {why} (rollout.server_timeout = "
                    f"{config.rollout.server_timeout}): see {log}, which ends: {last}"
                )
            time.sleep(0.2)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with suppress(ProcessLookupError):  # what it started, where it could not end that itself
            os.killpg(self.process.pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def _folder_for_a_socket() -> Path:
    """A new folder of mode 700, whose path is short: a socket's may have 107 bytes."""
    short = len(os.fsencode(tempfile.gettempdir())) <= 80
    return Path(tempfile.mkdtemp(prefix="papo-fast-", dir=None if short else "/tmp"))
