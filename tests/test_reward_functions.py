"""Reward functions of the user's: what they get, what they give, how they fail."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from papo_fast.errors import InputError
from papo_fast.reward_settings import RewardConfig, check_rewards, rewarded
from papo_fast.rewards.functions import GIVE_UP, FunctionWorker
from papo_fast.rewards.scorer import Scorer
from papo_fast.rewards.workers import PATIENCE
from papo_fast.user_function import forget_files, name_given
from support.asked import RIGHT, WRONG, Asked, scores_of


@pytest.fixture
def file_of(tmp_path, monkeypatch):
    """Writes a file of functions in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return name

    return write


def test_the_default_reward_is_accuracy_and_format():
    (right, wrong), _, alarms = scores_of(RewardConfig().functions, [RIGHT, WRONG])
    assert right.reward == 0.9 + 0.1 and wrong.reward == 0 and right.values == {} and not alarms
    (right, _), _, _ = scores_of(["format=0.25", "accuracy=2"], [RIGHT, WRONG])
    assert right.reward == 2.25 and (right.accuracy, right.format) == (1, 1)
    with pytest.raises(InputError, match=r"reward\.functions is empty"):
        check_rewards(RewardConfig(functions=()))


def test_a_function_gets_everything_by_name_and_is_weighted(file_of):
    file_of(
        "def all_of(response, answer, reference, prompt, images, level, **others):\n"
        "    assert answer == '2' and reference == 'the 2', (answer, reference)\n"
        "    assert prompt == 'How many?' and others == {'source': 'atlas'}, others\n"
        "    return len(response) + images[0].size[0] + level\n"
        "def short(response, longest=10):\n"
        "    return len(response) <= longest\n"
    )
    picture = Image.new("RGB", (100, 50))
    asked = Asked(images=[picture], columns={"level": 1000, "source": "atlas"})
    functions = ["accuracy=1", "mine.py:all_of=0.5", "mine.py:short=-1"]
    (score,), scorer, alarms = scores_of(functions, ["it is \\boxed{2}"], [asked], ["the 2"])
    assert not alarms and scorer.failures == 0
    assert score.values == {"all_of": 15 + 100 + 1000, "short": 0}
    assert score.reward == score.accuracy + 0.5 * 1115


def test_a_function_may_draw_on_the_pictures_of_one_call_only(file_of):
    file_of(
        "def dark(images):\n"
        "    value = images[0].getpixel((0, 0))[0]\n"
        "    images[0].putpixel((0, 0), (0, 0, 0))\n"
        "    return value\n"
    )
    pictures = [[Image.new("RGB", (4, 4), (n, n, n))] for n in (7, 9)]
    asked = [Asked(images=pictures[n]) for n in (0, 0, 1, 1, 0)]
    scores, _, _ = scores_of(["mine.py:dark"], [RIGHT] * 5, asked)
    assert [s.values["dark"] for s in scores] == [7, 7, 9, 9, 7]


BAD = """
import os, time

class Mute(Exception):
    def __str__(self): raise RuntimeError("no words")

def bad(response):
    if response == "raise": raise KeyError("nothing here")
    if response == "nan": return float("nan")
    if response == "huge": return 1e300
    if response == "none": return None
    if response == "text": return "1"
    if response == "exit": raise SystemExit(0)
    if response == "crash": os._exit(3)
    if response == "segfault": os.kill(os.getpid(), 11)
    if response == "spin":
        while True: pass
    if response == "sleep": time.sleep(1000)
    if response == "print": print('{"value": 5}', flush=True)
    if response == "memory": return len(bytearray(1 << 40))
    if response == "mute": raise Mute()
    if response == "replies":  # into the pipe that the replies go through, or any other
        for fd in range(3, 20):
            try: os.write(fd, b'{"value": 7, "seconds": 0}\\n')
            except OSError: pass
    if response == "noise":
        for fd in range(3, 20):
            try: os.write(fd, b'no json\\n')
            except OSError: pass
    return 1
"""
FAILURES = "raise nan huge none text exit crash segfault memory mute replies noise".split()


def test_a_function_that_fails_gives_nothing_and_is_counted_and_the_next_call_is_right(
    file_of, monkeypatch
):
    file_of(BAD)
    monkeypatch.setattr("papo_fast.rewards.functions.WALL_FACTOR", 2.0)
    responses = [r for bad in (*FAILURES, "spin", "sleep", "print") for r in (bad, "fine")]
    started = time.monotonic()
    scores, scorer, alarms = scores_of(["mine.py:bad"], responses, timeout=0.5)
    assert time.monotonic() - started < 120
    got = dict(zip(responses, [s.values["bad"] for s in scores], strict=True))
    assert got == {**dict.fromkeys((*FAILURES, "spin", "sleep"), 0), "fine": 1, "print": 1}
    assert (scorer.failures, scorer.timeouts) == (len(FAILURES), 2)
    assert all(s.reward == s.values["bad"] for s in scores)
    (alarm,) = alarms
    assert "mine.py:bad gave no reward for 14 of 30 responses" in alarm
    assert "nothing here" in alarm and scorer.alarms() == []


def test_a_process_that_a_function_forks_does_not_answer_in_its_place(file_of):
    file_of("import os\ndef forks(response):\n    return float(response) if os.fork() else 100\n")
    scores, _, alarms = scores_of(["mine.py:forks"], [str(n) for n in range(12)])
    assert [s.values["forks"] for s in scores] == list(range(12)) and not alarms


def test_a_function_that_sleeps_ends_with_a_run_that_is_killed(tmp_path):
    source = f"import os, time\ndef f():\n open({str(tmp_path / 'on')!r}, 'w')\n time.sleep(1000)\n"
    entries = pickle.dumps([("f.py", "f", source.encode())])
    ours, theirs = os.pipe()
    if (run := os.fork()) == 0:
        worker = FunctionWorker(entries)
        os.write(theirs, b"%d" % worker.start().pid)
        worker.call(0, {}, 1000)
        os._exit(0)
    pid = int(os.read(ours, 20))
    until(lambda: (tmp_path / "on").exists())
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    try:
        until(lambda: not is_alive(pid))
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
        os.close(ours)
        os.close(theirs)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(is_so, seconds=20):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.02)


def test_a_file_may_hold_what_looks_itself_up_by_the_name_of_its_module(file_of):
    file_of(
        "from __future__ import annotations\n"
        "import multiprocessing\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Judged:\n"
        "    value: float\n"
        "def judged(x): return Judged(x + 1)\n"
        "def mine(response):\n"
        "    with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "        return pool.map(judged, [2])[0].value\n"
    )
    (score,), _, alarms = scores_of(["mine.py:mine"], [RIGHT], timeout=60)
    assert not alarms and score.reward == 3


def test_a_function_that_always_hangs_costs_a_bounded_time(file_of):
    file_of("def spin(response):\n    while True: pass\n")
    limit = 0.2
    started = time.monotonic()
    scores, scorer, _ = scores_of(["mine.py:spin"], [RIGHT] * 300, timeout=limit)
    assert scorer.timeouts == 300 and {s.reward for s in scores} == {0.0}
    # GIVE_UP processes were started and ended, and no more
    assert time.monotonic() - started < PATIENCE * limit + GIVE_UP * 5


def test_a_file_is_read_once(file_of, tmp_path):
    file_of("def one(response): return 1\n")
    with Scorer(RewardConfig(functions=("mine.py:one",), workers=1)) as scorer:
        assert scorer.score([RIGHT], ["2"])[0].reward == 1
        file_of("def one(response): return 2\n")
        scorer._functions._workers.all[0].kill()  # and the next call starts another process
        assert scorer.score([RIGHT], ["2"])[0].reward == 1
        (tmp_path / "mine.py").unlink()
        scorer._functions._workers.all[0].kill()
        assert scorer.score([RIGHT], ["2"])[0].reward == 1 and scorer.failures == 0
    file_of("def one(response): return 3\n")
    forget_files()  # as each command does where it starts
    assert scores_of(["mine.py:one"], [RIGHT])[0][0].reward == 3


def test_plain_functions_of_python_run_in_the_workers_too():
    bonus = 3

    def mine(response):
        import os

        return bonus + (os.getpid() == parent)

    import os

    parent = os.getpid()
    (score,), _, alarms = scores_of([name_given(mine)], [RIGHT])
    assert not alarms and score.values == {"mine": 3}


def test_a_function_that_cannot_be_sent_says_what_to_do():
    numbers = (n for n in range(3))

    def mine(response):
        return next(numbers)

    with pytest.raises(InputError, match=r"mine cannot be sent.*FILE.py:name"):
        Scorer(RewardConfig(functions=(name_given(mine),)))


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        (["acuracy"], "neither accuracy, format, nor FILE.py:name"),
        (["mine.py:ok", "other.py:ok"], "would be logged as reward_ok"),
        (["mine.py:ok=nan"], "has the weight nan"),
        (["mine.py:gone"], "has no function gone"),
        (["none.py:ok"], "none.py is not a file"),
        (["mine.py:timeouts"], "reward_timeouts, which is taken"),
        (["mine.py:nameless"], "takes response by its place alone"),
        (["python:unknown"], "handed over by a Python program"),
        (["http:///x"], "not of the form http://HOST:PORT/PATH"),
        (["http://h:port/x"], "not of the form http://HOST:PORT/PATH"),
        (["http://a b/x"], "not of the form http://HOST:PORT/PATH"),
        (["http://me:secret@h/x"], "names and passwords are not sent"),
        (["http://h/ü"], "written as %XX"),
        (["ftp://h/x"], "neither accuracy, format, nor FILE.py:name"),
        (["http://h/x?model=3"], "may be a part of the URL, or a weight"),
        (["mine.py:ok=1e300"], "has the weight 1e300: expected a number within ±1e+06"),
        (["script.py:ok"], "script.py cannot be run (SystemExit: 3)"),
    ],
)
def test_entries_that_cannot_work_are_refused(functions, said, file_of):
    file_of("def ok(response): return 1\ndef nameless(response, /): return 1\n")
    file_of("def ok(response): return 1\n", "other.py")
    file_of("def ok(response): return 1\nraise SystemExit(3)\n", "script.py")
    with pytest.raises(InputError, match=re.escape(said)):
        check_rewards(RewardConfig(functions=tuple(functions)))


def test_an_argument_that_is_no_column_is_named(file_of):
    file_of("def ok(response, levle): return 1\n")
    asked = Asked(columns={"level": 1, "source": 2})
    with pytest.raises(InputError, match=r"asks for levle.* which has level, source"):
        scores_of(["mine.py:ok"], [RIGHT], [asked])


def test_weights_behind_urls():
    urls = ("http://h:1/judge?k=v=0.5", "http://h:1/other?x=y", "http://h:1/third?x=1&y==2")
    config = RewardConfig(functions=urls)
    assert [(x.name, x.label, x.weight) for x in rewarded(config)] == [
        ("http://h:1/judge?k=v", "judge", 0.5),
        ("http://h:1/other?x=y", "other", 1.0),
        ("http://h:1/third?x=1&y=", "third", 2.0),
    ]
