"""The sandbox: what a hostile program can't do, by language and by kind of isolation; Top-k and pass@k."""

import itertools
import os
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput, Unsupported
from pegbox.parts import languages
from pegbox.parts.languages import Job, available, check, check_all, fenced, language_named
from pegbox.parts.passes import pass_at_k, top_k
from pegbox.parts.sandbox import Limits, box, isolation, run

QUICK = Limits(seconds=3)
TESTS = "assert add(2, 3) == 5"
KERNEL = isolation() == {"files": True, "calls": True}


@pytest.fixture(params=[True, False], ids=["kernel", "audit"])
def limits(request):
    if request.param and not KERNEL:
        pytest.skip("this kernel has no Landlock or no known seccomp table")
    return Limits(seconds=3, kernel=request.param)


def python(code, limits=QUICK, tests=TESTS):
    return check(Job("python", code, tests), limits)


def test_a_right_candidate_passes_and_a_wrong_one_fails(limits):
    assert python("def add(a, b):\n    return a + b", limits).passed
    wrong = python("def add(a, b):\n    return a - b", limits)
    assert wrong.status == "failed"
    assert "AssertionError" in wrong.output
    assert python("def add(a, b)\n    return a + b", limits).status == "failed"


def test_an_infinite_loop_is_stopped():
    """An endless candidate ends with its time."""
    began = time.perf_counter()
    assert python("while True: pass", Limits(seconds=0.5)).status == "timeout"
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("code", ["import os\nos.fork()", "import subprocess\nsubprocess.run(['/bin/true'])"])
def test_no_process_can_be_started(limits, code):
    """A candidate that forks fails, and nothing of it is left."""
    assert python(f"{code}\ndef add(a, b): return a + b", limits).status == "failed"


def test_a_huge_allocation_fails():
    """10 GB are refused."""
    assert python("x = bytearray(10 * 1024**3)\ndef add(a, b): return a + b").status == "memory"


@pytest.mark.parametrize(
    "leave",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "quit = exit = None\nraise SystemExit(0)",
    ],
)
def test_leaving_before_the_tests_is_no_success(limits, leave):
    """exit(0) in the candidate counts as a failure: the sentinel behind the tests is missing."""
    found = python(leave, limits)
    assert found.status == "left_early"
    assert not found.passed


def test_a_printed_word_is_no_sentinel():
    """Printing anything before leaving does not pass for the end of the tests."""
    assert python("print('passed', flush=True)\nimport os\nos._exit(0)").status == "left_early"


def test_files_outside_the_box_can_not_be_written(limits, tmp_path):
    """Writing, removing and making folders outside fails; inside it works."""
    victim = tmp_path / "victim.txt"
    victim.write_text("kept")
    tests = "assert True"
    for attempt in (
        f"open({str(victim)!r}, 'w').write('lost')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.chmod({str(victim)!r}, 0)",
    ):
        assert python(attempt, limits, tests).status == "failed", attempt
    assert victim.read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["victim.txt"]
    assert python("open('own.txt', 'w').write('x')\nassert open('own.txt').read() == 'x'", limits, tests).passed


def test_there_is_no_network(limits):
    """A connection to a listening port of this very machine is refused."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert python(code, limits, "assert True").status == "failed"


def test_other_processes_are_out_of_reach(limits):
    assert python(f"import os\nos.kill({os.getpid()}, 0)", limits, "assert True").status == "failed"


def test_nothing_of_the_callers_environment_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    tests = "import os\nassert 'SECRET_TOKEN' not in os.environ"
    assert python("pass", tests=tests).passed


def test_endless_output_is_bounded():
    found = python("while True: print('x' * 1000)", Limits(seconds=5, file_bytes=1 << 20))
    assert not found.passed
    assert len(found.output) < 1 << 17


def test_equal_jobs_run_once_and_answers_keep_their_order(monkeypatch):
    right, wrong = (Job("py", f"def add(a, b): return a {op} b", TESTS) for op in "+-")
    asked = []
    monkeypatch.setattr(languages, "check", lambda job, limits: asked.append(job) or check(job, limits))
    found = check_all([right, wrong, right, right], QUICK)
    assert [o.passed for o in found] == [True, False, True, True]
    assert len(asked) == 2


CPP = "int add(int a, int b) { return a + b; }"
CPP_TESTS = "#include <cassert>\nint main() { assert(add(2, 3) == 5); }"


@pytest.mark.skipif("cpp" not in available(), reason="g++ is not installed")
@pytest.mark.parametrize(
    ("code", "status"),
    [
        (CPP, "passed"),
        (CPP.replace("+", "-"), "failed"),
        (CPP.replace(";", ""), "not_compiled"),
        ("#include <cstdlib>\nint add(int, int) { std::exit(0); }", "left_early"),
        ("#include <cstdlib>\nint x = (std::exit(0), 1);\n" + CPP, "left_early"),
        ("#include <unistd.h>\nint add(int a, int b) { return fork() < 0 ? a - b : a + b; }", "failed"),
        ('#include <fstream>\nint add(int a, int b) { std::ofstream f("/tmp/pegbox-x"); return f ? 5 : 0; }', "failed"),
        ("int add(int, int) { for (volatile int i = 0;; i = 0) {} }", "timeout"),
    ],
)
def test_cpp(code, status):
    """The same in C++: leaving early, forking, writing outside, looping for ever."""
    assert check(Job("c++", code, CPP_TESTS), Limits(seconds=2)).status == status


JAVA = "class Solution { static int add(int a, int b) { return a + b; } }"
JAVA_TESTS = """public class Main { public static void main(String[] args) {
    if (Solution.add(2, 3) != 5) throw new AssertionError("wrong"); } }"""


@pytest.mark.slow
@pytest.mark.skipif("java" not in available(), reason="javac is not installed")
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import java.util.*;\n" + JAVA, "passed"),
        (JAVA.replace("+", "-"), "failed"),
        (JAVA.replace(";", ""), "not_compiled"),
        (JAVA.replace("return a + b;", "System.exit(0); return 5;"), "left_early"),
        (JAVA.replace("return a + b;", "long[] x = new long[1 << 30]; return x.length > 0 ? 5 : 0;"), "memory"),
    ],
)
def test_java(code, status):
    assert check(Job("java", code, JAVA_TESTS), Limits(seconds=10)).status == status


def test_bad_jobs_are_refused(monkeypatch):
    with pytest.raises(BadInput, match="Unknown language 'rustt'"):
        language_named("rustt")
    with pytest.raises(BadInput, match="without tests"):
        check(Job("python", "x = 1", " "))
    monkeypatch.setattr(languages, "missing_tools", lambda language: ["g++"])
    with pytest.raises(Unsupported, match="need g\\+\\+"):
        check(Job("cpp", CPP, CPP_TESTS))
    with box() as folder, pytest.raises(BadInput, match="does not exist"):
        run(["/no/such/program"], folder)


@pytest.mark.skipif("cpp" not in available(), reason="g++ is not installed")
def test_cpp_tests_need_a_main():
    with pytest.raises(BadInput, match="no `int main"):
        check(Job("cpp", CPP, "void t() {}"))


def test_the_first_fenced_block_is_the_candidate():
    text = "Here:\n```c++\nint x;\n```\nand\n```python\ny = 1\n```\n"
    assert fenced(text, "python") == "y = 1"
    assert fenced(text, "cpp") == "int x;"
    assert fenced(text) == "int x;"
    assert fenced("```\nz\n```", "python") == "z"
    assert fenced("x = 1\n", "python") == "x = 1"
    assert fenced("```python\ncut off", "python") == "cut off"


@given(st.lists(st.lists(st.booleans(), min_size=10, max_size=10), min_size=1, max_size=6))
def test_more_samples_never_solve_fewer(passed):
    """Top-1 <= Top-5 <= Top-10, on any matrix of outcomes."""
    assert top_k(passed, 1) <= top_k(passed, 5) <= top_k(passed, 10)


def test_top_k_on_a_handmade_matrix():
    passed = [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert [top_k(passed, k) for k in (1, 2, 3)] == [1 / 3, 1 / 3, 2 / 3]


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_mean_over_all_draws(line, data):
    """The unbiased estimator is the share of k-subsets with a passing sample, by enumeration."""
    k = data.draw(st.integers(1, len(line)))
    draws = list(itertools.combinations(line, k))
    assert pass_at_k([line], k) == pytest.approx(sum(any(d) for d in draws) / len(draws), abs=1e-12)


def test_more_k_than_samples_is_refused():
    """n < k in Top-k."""
    for count in (top_k, pass_at_k):
        with pytest.raises(BadInput, match="one has 2"):
            count([[1, 0, 0], [1, 0]], 3)
        with pytest.raises(BadInput, match="at least 1"):
            count([[1]], 0)
        with pytest.raises(BadInput, match="no problem"):
            count([], 1)
