"""Options of the benchmarks, their results as JSON, and the tables at the end."""

import pytest
from plan import MINUTES, RESULTS, Book, make_plan
from report import tables


def pytest_addoption(parser):
    group = parser.getgroup("papo_kernels")
    group.addoption("--size", choices=list(MINUTES), default="quick", help="which cases")
    group.addoption("--minutes", type=float, help="start nothing new after these many minutes")
    group.addoption("--out", help="JSON to write; default bench/results/cpu/SIZE.json")


def pytest_generate_tests(metafunc):
    if {"spec", "name"} <= set(metafunc.fixturenames):
        plan = make_plan(metafunc.config.getoption("size"))
        metafunc.parametrize("spec, name", plan, ids=[f"{s}-{n}" for s, n in plan])


_book = pytest.StashKey()


@pytest.fixture(scope="session")
def book(pytestconfig):
    size = pytestconfig.getoption("size")
    path = pytestconfig.getoption("out") or RESULTS / f"{size}.json"
    minutes = pytestconfig.getoption("minutes") or MINUTES[size]
    found = pytestconfig.stash[_book] = Book(size, path, minutes)
    return found


def pytest_terminal_summary(terminalreporter, config):
    book = config.stash.get(_book, None)
    if book is not None and book.content["records"]:
        terminalreporter.write_line("")
        terminalreporter.write_line(tables(book.content))
        terminalreporter.write_line(f"Written to {book.path.name} in {book.path.parent.name}/")
