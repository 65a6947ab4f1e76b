"""The compiled C++ and its cache folder: it is right, or torch runs and one warning says why."""

import ctypes
import hashlib
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from kernel_oracle import FAST, check, make_case, statistic_errors

from papo_kernels import token_stats
from papo_kernels.cpu import build, library

FLAGS = ["-shared", "-fPIC"]
pytestmark = [
    pytest.mark.skipif(library._library() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(FAST == "triton", reason="about the torch backend"),
]


@pytest.fixture
def sources(tmp_path):
    """A folder of C++ that compiles in no time, and a cache folder of its own."""
    folder = tmp_path / "cpp"
    folder.mkdir()
    (folder / "one.cpp").write_text('extern "C" int answer() { return 42; }')
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "papo_kernels"


def kept(cache):
    """The one file in the cache folder, whose name holds its checksum."""
    (path,) = cache.iterdir()
    assert path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def in_another_process(sources):
    """A process that loads the library and prints what it answers: damage may kill it."""
    code = (
        "import sys; from pathlib import Path; from papo_kernels.cpu import build\n"
        f"print(build.library(Path(sys.argv[1]), {FLAGS}).answer())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(sources)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer_of(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (process.returncode, err)
    return int(out)


# ---- Damage


@pytest.mark.parametrize("damage", ["empty", "cut", "changed"])
def test_a_damaged_file_is_made_anew(damage, sources, cache):
    build.library(sources, FLAGS)
    path = kept(cache)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[: len(whole) // 3],
            "changed": whole.replace(b"answer", b"anwser"),
        }[damage]
    )
    assert answer_of(in_another_process(sources)) == 42
    assert kept(cache).read_bytes() == whole


def test_a_whole_file_that_does_not_load_here_is_made_anew(sources, cache, tmp_path):
    build.library(sources, FLAGS)
    path = kept(cache)
    # as if made where there is a library that this machine does not have
    (tmp_path / "x.cpp").write_text("void missing(); void f() { missing(); }")
    made = tmp_path / "x.so"
    subprocess.run(["g++", *FLAGS, str(tmp_path / "x.cpp"), "-o", str(made)], check=True)
    name, digest = path.stem.rpartition("-")[0], hashlib.sha256(made.read_bytes()).hexdigest()
    stranger = made.rename(path.with_name(f"{name}-{digest}.so"))
    with pytest.raises(OSError, match="undefined symbol"):
        ctypes.CDLL(str(stranger))
    path.unlink()
    assert build.library(sources, FLAGS).answer() == 42
    assert path.exists()


def test_processes_that_build_at_once_all_get_it(sources, cache):
    # forks: three that import torch first build one after the other
    fork = multiprocessing.get_context("fork")
    start, answers = fork.Barrier(3), fork.SimpleQueue()

    def build_it():
        start.wait()
        answers.put(build.library(sources, FLAGS).answer())

    processes = [fork.Process(target=build_it) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0] * 3
    assert [answers.get() for _ in processes] == [42] * 3
    kept(cache)  # one file, and nothing that they left behind


def test_a_file_that_is_kept_needs_no_compiling(sources, cache, monkeypatch):
    build.library(sources, FLAGS)
    monkeypatch.setattr(build, "_make", None)
    assert build.library(sources, FLAGS).answer() == 42


def test_the_name_is_given_to_a_file_that_is_whole_on_the_disk(sources, cache, monkeypatch):
    events = []
    for of, name in ((os, "fsync"), (Path, "replace")):
        original = getattr(of, name)
        monkeypatch.setattr(
            of, name, lambda *a, name=name, do=original: events.append(name) or do(*a)
        )
    build.library(sources, FLAGS)
    assert events == ["fsync", "replace"]
    assert cache.stat().st_mode & 0o777 == 0o700


# ---- What cannot be: torch's operators, and one warning


@pytest.fixture
def refused(monkeypatch, caplog):
    """Asks for the library as a call of token_stats does, and returns the one warning."""

    def ask(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(library, "_library", library._once(library._library.__wrapped__))
        case = make_case(20, 16, 303, bias=True)
        with caplog.at_level(logging.WARNING, logger="papo_kernels"):
            for _ in range(2):
                check(statistic_errors(case, token_stats, backend="torch"), 1e-5)
        assert library._library() is None
        (record,) = caplog.records
        assert "\n" not in record.getMessage()
        assert "torch's operators run instead" in record.getMessage()
        return record.getMessage()

    return ask


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("place", ["/proc", "a file"])
def test_a_cache_folder_that_cannot_be_made(place, refused, tmp_path):
    (tmp_path / "a file").write_text("")
    assert "no file can be made in" in refused(XDG_CACHE_HOME=tmp_path / place)


def test_a_cache_folder_of_somebody_else(refused, cache, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert f"{cache} belongs to user {owner}" in refused()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_folder_in_which_others_can_write(mode, refused, cache):
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert f"chmod go-w {cache}" in refused()


def test_a_full_disk(refused, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_compile", full)
    assert "No space left" in refused()


@pytest.mark.parametrize(
    ("cxx", "why"),
    [
        ("no-such-compiler -pipe", "no C++ compiler found: 'no-such-compiler -pipe' is none"),
        ("g++ '-pipe", "which is no command: No closing quotation"),
        ("g++ --no-such-option", "error"),
        ("true", "ended well and wrote nothing"),
        ("false", "failed with status 1: it said nothing"),
        ("{folder}/no-program", "Exec format error"),
        ("{folder}/empties", "file too short"),
        ("{folder}/links-nothing", "undefined symbol"),
    ],
    ids=lambda x: x.split("/")[-1].split(" ")[0] if "'" not in x else None,
)
def test_a_compiler_that_is_none(cxx, why, refused, cache, tmp_path):
    script(tmp_path / "no-program", "").write_bytes(b"\0\1\2")
    script(tmp_path / "empties", 'for last; do :; done; : > "$last"')
    (tmp_path / "x.cpp").write_text("void missing(); void f() { missing(); }")
    script(
        tmp_path / "links-nothing",
        f'for last; do :; done; g++ -shared -fPIC {tmp_path}/x.cpp -o "$last"',
    )
    assert why in refused(CXX=cxx.format(folder=tmp_path))
    assert not cache.exists() or not list(cache.iterdir())


def test_a_compiler_that_makes_something_else(refused, tmp_path):
    (tmp_path / "x.cpp").write_text("void f() {}")
    script(
        tmp_path / "other", f'for last; do :; done; g++ -shared -fPIC {tmp_path}/x.cpp -o "$last"'
    )
    assert "undefined symbol: statistics" in refused(CXX=tmp_path / "other")


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(
    refused, cache, tmp_path, monkeypatch
):
    script(tmp_path / "hangs", f"sleep 300 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(build, "COMPILE_SECONDS", 1)
    start = time.monotonic()
    assert "did not end within 1 s" in refused(CXX=tmp_path / "hangs")
    assert time.monotonic() - start < 60
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    assert not child.exists() or child.read_text().split()[2] in "ZX"
    assert not list(cache.iterdir())


def test_a_user_without_a_home(refused, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where it knows none
    assert "no home folder" in refused()


def test_threads_that_ask_at_once_get_one_answer_and_one_warning():
    asked = []

    def slow():
        asked.append(1)
        time.sleep(0.2)

    ask = library._once(slow)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [1]


# ---- What can be


@pytest.mark.parametrize("cxx", ["g++ -pipe", "env g++", "  ", 'g++ -DNAME="a b"'])
def test_cxx_may_hold_arguments(cxx, sources, cache, monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    assert build.library(sources, FLAGS).answer() == 42
    kept(cache)


def test_another_command_makes_another_file(sources, cache, monkeypatch):
    build.library(sources, FLAGS)
    monkeypatch.setenv("CXX", "g++ -pipe")
    build.library(sources, FLAGS)
    assert len(list(cache.iterdir())) == 2


def test_a_relative_cache_home_does_not_count(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert build.library(sources, FLAGS).answer() == 42
    kept(tmp_path / "home" / ".cache" / "papo_kernels")
    assert not (tmp_path / "relative").exists()


def test_the_compiler_keeps_its_own_files_in_the_cache_folder(sources, cache, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/proc")
    assert build.library(sources, FLAGS).answer() == 42
