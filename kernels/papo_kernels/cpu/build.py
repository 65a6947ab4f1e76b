"""The C++ as a file: found in the user's cache folder, or compiled into it.

A file is loaded only if its content is what its name says, and only from a folder in which nobody
else can write. It gets its name when it is whole, so processes may build at the same time.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger("papo_kernels")

# Compiling takes 8 s on an idle core. Many processes may compile on few cores, but no compiler is
# waited for without end.
COMPILE_SECONDS = 180


class Unavailable(Exception):
    """Why the C++ cannot be had, and what to do about it."""


def library(sources, flags):
    """The functions of the *.cpp in the folder `sources`, compiled with `flags`.

    Returns:
        ctypes.CDLL

    Raises:
        Unavailable: no compiler, one that fails or takes too long, no folder of the user's own to
            keep the file in, or a file that does not load here.
    """
    if os.name != "posix":
        raise Unavailable("it is written for Linux")
    command = compiler()
    folder = _cache_folder()
    name = f"cpu_kernels-{_fingerprint(command, sources, flags)}"
    try:
        for path in sorted(folder.glob(f"{name}-*.so")):
            loaded = _load_kept(path)
            if loaded is not None:
                return loaded
        # What a killed compiler leaves behind may keep the folder from being removed.
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as made_in:
            return _make([*command, *flags], sources, Path(made_in), folder / name)
    except OSError as error:
        raise _no_room(folder, error) from error


def compiler():
    """The words of the command that compiles C++: $CXX, which may hold arguments, or g++.

    Raises:
        Unavailable: there is none.
    """
    given = os.environ.get("CXX", "").strip() or "g++"
    try:
        words = shlex.split(given)
    except ValueError as error:  # a quotation that does not end
        raise Unavailable(f"CXX is {given!r}, which is no command: {error}") from error
    found = shutil.which(words[0]) if words else None
    if not found:
        raise Unavailable(f"no C++ compiler found: {given!r} is none; install g++ or set CXX")
    return [found, *words[1:]]


def _cache_folder():
    """The folder in which compiled files are kept: nobody else can write there."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # the standard says so
        root = os.path.expanduser("~/.cache")
    if not os.path.isabs(root):
        raise Unavailable("this user has no home folder; set XDG_CACHE_HOME to a folder of yours")
    folder = Path(root, "papo_kernels")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError as error:
        raise _no_room(folder, error) from error
    # Whoever can write there can run code as this user.
    if about.st_uid != os.geteuid():
        raise Unavailable(
            f"{folder} belongs to user {about.st_uid}, and this process runs as user "
            f"{os.geteuid()}; set XDG_CACHE_HOME to a folder of yours"
        )
    if about.st_mode & 0o022:
        raise Unavailable(f"others can write in {folder}; run chmod go-w {folder}")
    return folder


def _no_room(folder, error):
    return Unavailable(
        f"no file can be made in {folder} ({error}); set XDG_CACHE_HOME to a folder of yours"
    )


def _load_kept(path):
    """The functions of a kept file, or None where it has to be made anew."""
    # To load a file that was cut off kills the process, so its content is compared with its name.
    if path.stem.rpartition("-")[2] != hashlib.sha256(path.read_bytes()).hexdigest():
        log.info("token_stats: %s is damaged and is made anew", path)
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        # For example, a container with a newer libstdc++ made it, in a home that both share.
        log.info("token_stats: %s does not load here and is made anew: %s", path, error)
        return None


def _make(command, sources, made_in, name):
    """Compiles, loads and publishes: as `name`, completed by the content's checksum."""
    made = made_in / "made.so"
    _compile([*command, *map(str, sorted(sources.glob("*.cpp"))), "-o", str(made)], made_in)
    if not made.exists():
        raise Unavailable(f"{shlex.join(command)} ended well and wrote nothing; set CXX to another")
    with made.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())  # else a power cut may leave the name without the content
    try:
        loaded = ctypes.CDLL(str(made))
    except OSError as error:
        raise Unavailable(
            f"what {shlex.join(command)} made does not load: {error}; set CXX to another"
        ) from error
    made.replace(f"{name}-{digest}.so")
    return loaded


def _compile(command, folder):
    """Runs the compiler; `folder` is for what it says and for its own files."""
    said = folder / "said.txt"
    with said.open("wb") as out:  # not a pipe: a process that it leaves behind would hold that open
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder), "LC_ALL": "C"},
            start_new_session=True,
        )
    try:
        code = process.wait(COMPILE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"{shlex.join(command)} did not end within {COMPILE_SECONDS} s; set CXX to another"
        ) from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # g++ is a driver: others do the work
            process.wait()
    if code:
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
        why = next((line for line in lines if "error" in line.lower()), last)
        raise Unavailable(f"{shlex.join(command)} failed with status {code}: {why[:500]}")


def _fingerprint(command, sources, flags):
    """A name for sources, flags, compiler, C library and processor.

    Unlike machines and containers may share a home.
    """
    program = Path(command[0]).resolve()
    about = [*command, *flags, str(program), str(program.stat().st_size)]
    about += [str(program.stat().st_mtime_ns), *platform.libc_ver()]
    about += [platform.machine(), platform.processor()]
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = set(cpu.read_text(encoding="utf-8").splitlines())
        about += sorted(x for x in lines if x.startswith(("flags", "Features", "model")))
    about += [path.read_text(encoding="utf-8") for path in sorted(sources.iterdir())]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
