"""`pip install ./kernels`: what it brings, and that it runs where nothing else is installed."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]
# what a training step of two streams needs, and a look at what came along with it
PROGRAM = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "papo_fast", "datasets", "trl", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from papo_kernels import token_stats
from papo_kernels.cpu import library
library.LEAST_LOGITS = 0  # its C++ must have come along
torch.manual_seed(0)
hidden, aug_hidden = torch.randn(2, 6, 8, requires_grad=True)
weight = torch.randn(40, 8, requires_grad=True)
targets = torch.randint(0, 40, (6,))
stats = token_stats(hidden, weight, targets, aug_hidden=aug_hidden, grad_budget=0.0)
p, q = (hidden @ weight.T).log_softmax(-1), (aug_hidden @ weight.T).log_softmax(-1)
truth = (p.exp() * (p - q)).sum(-1)
ours, theirs = (torch.autograd.grad(x.sum(), weight, retain_graph=True)[0]
                for x in (stats.kl_prcp, truth))
print(json.dumps({
    "where": sys.modules["papo_kernels"].__file__,
    "sources": sorted(p.name for p in library.SOURCES.iterdir()),
    "value": (stats.kl_prcp - truth).abs().max().item(),
    "gradient": (ours - theirs).norm().item() / theirs.norm().item(),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if Version(importlib.metadata.version("setuptools")) < Version("77"):
        pytest.skip("setuptools 77 or later is needed to build a wheel: pip install -U setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    # a copy, so that the build leaves nothing in the repository
    source = shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=_built)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, source], check=True)
    (made,) = folder.glob("*.whl")
    return made


def _built(folder, names):
    return [n for n in names if n in ("build", "__pycache__") or n.endswith(".egg-info")]


def test_it_brings_torch_and_triton_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (n for n in names if n.endswith("METADATA"))
        text = archive.read(metadata).decode()
    asked = [line.split(": ", 1)[1] for line in text.splitlines() if line.startswith("Requires-D")]
    assert {Requirement(line).name for line in asked} == {"torch", "triton"}
    modules = {n for n in names if n.endswith(".py")}
    assert modules == {
        str(p.relative_to(ROOT / "kernels"))
        for p in (ROOT / "kernels" / "papo_kernels").rglob("*.py")
    }


def test_it_runs_where_transformers_is_not(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # -P: not the folder of the program; PYTHONPATH: what was just unpacked comes first
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert Path(result["where"]).is_relative_to(tmp_path)
    cpp = ROOT / "kernels" / "papo_kernels" / "cpu" / "cpp"
    assert result["sources"] == sorted(p.name for p in cpp.iterdir())
    assert result["value"] < 1e-5 and result["gradient"] < 1e-5


def test_it_asks_for_what_papo_fast_asks_for():
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(PROJECT["dependencies"]) <= set(whole["dependencies"])
    for key in ("version", "requires-python", "license", "authors"):
        assert PROJECT[key] == whole[key]
