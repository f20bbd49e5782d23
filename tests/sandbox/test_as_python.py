"""Programs do in a cell what they do in a Python of their own, which runs each of them beside it."""

import subprocess
import sys

import pytest

from gtpo.sandbox import CellStatus
from tests.sandbox.conftest import Cage

INPUT = "3 4\nfive\n\nlast"
PROGRAMS = {
    "command_line": "import sys\nprint(len(sys.argv) > 1, sys.argv[1:])",
    "argparse": (
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--n', type=int, default=7)\n"
        "parser.add_argument('rest', nargs='*')\nprint(parser.parse_args())"
    ),
    "exit": "print(1)\nexit()\nprint(2)",
    "exit_0": "print(1)\nexit(0)\nprint(2)",
    "exit_3": "print(1)\nexit(3)",
    "quit": "print(1)\nquit()\nprint(2)",
    "sys_exit": "import sys\nprint(1)\nsys.exit()",
    "sys_exit_0": "import sys\nprint(1)\nsys.exit(0)",
    "sys_exit_false": "import sys\nprint(1)\nsys.exit(False)",
    "sys_exit_256": "import sys\nprint(1)\nsys.exit(256)",
    "sys_exit_true": "import sys\nprint(1)\nsys.exit(True)",
    "sys_exit_with_a_message": "import sys\nprint(1)\nsys.exit('no')",
    "sys_exit_with_zero_point_zero": "import sys\nprint(1)\nsys.exit(0.0)",
    "raise_system_exit": "print(1)\nraise SystemExit",
    "exit_in_a_function": "def main():\n    print(1)\n    exit()\nmain()\nprint(2)",
    "os_exit": "import os\nprint(1, flush=True)\nos._exit(0)",
    "os_exit_2": "import os\nprint(1, flush=True)\nos._exit(2)",
    "atexit": "import atexit\natexit.register(print, 'bye')\natexit.register(print, 'good')\nprint('hello')",
    "atexit_after_exit": "import atexit\natexit.register(print, 'bye')\nexit()",
    "atexit_after_an_error": "import atexit\natexit.register(print, 'bye')\n1 / 0",
    "atexit_that_raises": "import atexit\natexit.register(print, 'bye')\natexit.register(int, 'x')\nprint('hello')",
    "finalize": "import weakref\nclass A: pass\na = A()\nweakref.finalize(a, print, 'gone')\nprint('hello')",
    "main": "if __name__ == '__main__':\n    print('main', __name__)",
    "annotations": "print(__annotations__)\nx: int = 3\nprint(__annotations__)",
    "builtins": "import builtins\nprint(__builtins__ is builtins, hasattr(__builtins__, 'print'), callable(help))",
    "doc_and_spec": "print(__doc__, __spec__, __package__)",
    "mode": "import sys\nprint([(s.mode, s.name) for s in (sys.stdin, sys.stdout, sys.stderr)])",
    "streams_of_the_start": (
        "import sys\nprint([getattr(sys, n) is getattr(sys, f'__{n}__') for n in ('stdin', 'stdout', 'stderr')])\n"
        "sys.__stdout__.write('raw')"
    ),
    "isatty": "import sys\nprint(sys.stdin.isatty(), sys.stdin.fileno(), sys.stdin.readable(), sys.stdin.encoding)",
    "buffer": "import sys\nprint(sys.stdin.buffer.readline(), sys.stdin.buffer.read())",
    "buffer_out": "import sys\nsys.stdout.buffer.write(b'a')\nsys.stdout.flush()\nprint('b')",
    "input": "print(input().split(), input('? '), input(), input())",
    "input_at_the_end": "try:\n    while True: print(input())\nexcept EOFError as e: print('end', e)",
    "lines": "import sys\nfor line in sys.stdin: print(repr(line))",
    "open_0": "print(open(0).read())",
    "open_0_binary": "print(open(0, 'rb').read().split())",
    "fdopen_0": "import os\nprint(os.fdopen(0).readlines())",
    "dev_stdin": "print(open('/dev/stdin').read())\nimport sys\nprint(sys.stdin.read()[:0])",
    "dev_stdin_as_sys_stdin": "import sys\nsys.stdin = open('/dev/stdin')\nprint(input())",
    "path_of_dev_stdin": "import pathlib\nprint(pathlib.Path('/dev/stdin').read_text())",
    "fileinput": "import fileinput\nfor line in fileinput.input(): print(fileinput.lineno(), repr(line))",
    "fileinput_names": "import fileinput\nfor line in fileinput.input(): print(fileinput.filename(), line.split())",
    "exec_of_input": "exec('x, y = map(int, input().split())')\nprint(x + y)",
    "module_of_its_own": "open('helper.py', 'w').write('x = 5')\nimport helper\nprint(helper.x)",
    "recursion": "def f(n): return n and 1 + f(n - 1)\nprint(f(990))",
    "first_descriptor": "f = open('file', 'w')\nprint(f.fileno())",
    "pickle": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass A: x: int = 1\nprint(A())",
    "logging": "import logging\nlogging.basicConfig(level='INFO')\nlogging.info('x')\nprint(1)",
}
WITH_PROCESSES = {
    "exit_in_a_thread": "import sys, threading\nt = threading.Thread(target=sys.exit)\nt.start()\nt.join()\nprint(1)",
    "non_daemon_thread": (
        "import threading, time\ndef late():\n    time.sleep(0.05)\n    print('late')\n"
        "threading.Thread(target=late).start()\nprint('main')"
    ),
    "daemon_thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\nprint(1)"
    ),
    "executor": (
        "from concurrent.futures import ThreadPoolExecutor\ne = ThreadPoolExecutor(1)\n"
        "e.submit(lambda: __import__('time').sleep(0.05) or print('late'))\nprint('main')"
    ),
    "child_ends": (
        "import os, sys\nif os.fork() == 0:\n    print('child')\n    sys.exit(3)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))"
    ),
    "child_raises": "import os\nif os.fork() == 0:\n    1 / 0\nprint(os.waitstatus_to_exitcode(os.wait()[1]))",
    "child_has_handlers": (
        "import atexit, os\natexit.register(print, 'bye', flush=True)\n"
        "if os.fork():\n    os.wait()\nprint('end', flush=True)"
    ),
    "child_returns": "import os\nif os.fork():\n    os.wait()\nelse:\n    print('child', flush=True)",
    "multiprocessing": (
        "import multiprocessing\ndef f(): print('child', flush=True)\nif __name__ == '__main__':\n"
        "    p = multiprocessing.get_context('fork').Process(target=f)\n    p.start()\n"
        "    p.join()\n    print(p.exitcode)"
    ),
}


def in_python(code: str, tmp_path) -> tuple[str, int]:
    (tmp_path / "program.py").write_text(code)
    (tmp_path / "input").write_text(INPUT)
    with open(tmp_path / "input") as file:
        done = subprocess.run(
            [sys.executable, "program.py"],
            stdin=file,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PYTHONUTF8": "1"},
        )
    return done.stdout, done.returncode


def compare(cage: Cage, code: str, tmp_path) -> None:
    stdout, status = in_python(code, tmp_path)
    result = cage.do(cage.pool.run(code, stdin=INPUT, with_stderr=False))
    assert result.stdout == stdout, result
    if result.exit_status is not None:
        assert result.exit_status == status
    else:
        assert result.status is (CellStatus.OK if status == 0 else CellStatus.ERROR), result


@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_does_what_it_does_in_python(cage, code, tmp_path):
    compare(cage, code, tmp_path)


@pytest.mark.parametrize("code", WITH_PROCESSES.values(), ids=WITH_PROCESSES)
@pytest.mark.parametrize("cage", ["namespaces"], indirect=True)
def test_a_program_with_processes_does_what_it_does_in_python(cage, code, tmp_path):
    compare(cage, code, tmp_path)
