"""What a cell can do to the interpreter that runs it."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts.attempt import ANY, CRASH, ERROR, OK, ends

ATTEMPTS = ends(
    "interpreter",
    {
        "replaced_builtins": (
            "import builtins, json\nbuiltins.print = builtins.len = json.dumps = None\nraise ValueError('x')",
            (ERROR, CRASH),
            (),
        ),
        "replaced_os": ("import os\nos.write = os.read = os.getpid = os._exit = None", ANY, ()),
        "cleared_modules": ("import sys\nsys.modules.clear()", (OK, CRASH), ()),
        "cleared_frames": (
            "import sys\nf = sys._getframe()\nwhile f: f.f_locals.clear(); f = f.f_back",
            (OK, ERROR, CRASH),
            (),
        ),
        "trace_function": ("import sys\nsys.settrace(lambda *a: exec('raise ValueError'))\nint()", ANY, ()),
        "audit_hook": (
            "import sys\ndef hook(*a): raise RuntimeError\nsys.addaudithook(hook)\nopen('x')",
            (ERROR, CRASH),
            (),
        ),
        "exit_functions": ("import atexit\natexit.register(lambda: exec('while True: pass'))", (OK,), ()),
        "shadowed_modules": (
            "for name in ('tempfile', 'json', 'random', 'threading', 'select'):\n"
            "    with open(f'{name}.py', 'w') as f: f.write('raise SystemExit(3)')",
            (OK,),
            (),
        ),
        "exit_with_hostile_code": (
            "class Code(int):\n    def __and__(s, o): raise s\n    __index__ = __int__ = __and__\n"
            "class Exit(SystemExit):\n    code = property(lambda s: 1 / 0)\n"
            "try: raise SystemExit(Code(7))\nexcept SystemExit as e: kept = e\nraise Exit(kept)",
            (ERROR,),
            (),
        ),
        "closed_loop_of_the_keeper": (
            "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ in ('Keeper', 'Plan', 'socket'):\n"
            "        for n in list(getattr(o, '__dict__', {})):\n            try: setattr(o, n, None)\n"
            "            except BaseException: pass",
            ANY,
            (),
        ),
        "random_memory": (
            "import ctypes, random\nbase = id(object()) & ~0xFFF\nfor _ in range(10**5):\n"
            "    ctypes.memset(base + random.randrange(2**16), 255, 1)",
            ANY,
            (),
        ),
        "null_in_the_source": ("a = 1\x00", (ERROR,), ()),
        "many_parentheses": ("(" * 5000, (ERROR,), ()),
        "many_minuses": ("-" * 90_000 + "1", ANY, ()),
        "empty": ("", (OK,), ()),
        "long_source": ("#" + "x" * 200_000, (ERROR, OK), ()),
        "subinterpreter": (
            "import _xxsubinterpreters as s\ni = s.create()\ns.run_string(i, 'import os; os._exit(0)')",
            (CRASH, ERROR),
            (),
        ),
        "import_of_the_sandbox": ("import gtpo.sandbox", (ERROR,), ("ModuleNotFoundError",)),
        "import_of_the_trainer": ("import torch", (ERROR,), ("ModuleNotFoundError",)),
    },
)
ATTEMPTS += ends(
    "interpreter",
    {
        "own_code": (
            "import sys\nm = sys.modules.get('gtpo.sandbox.cell')\nif m: m._send = m._run = m._serve = lambda *a: None",
            ANY,
            (),
        ),
    },
    waits=True,
)
