"""Lies to the keeper over the control channel, and silence."""

from __future__ import annotations

from gtpo.sandbox import layout
from gtpo.sandbox.abuse.attempts.attempt import CPU, CRASH, ERROR, OK, TIMEOUT, ends

_CHANNEL = ("the cell wrote to the interpreter's control channel",)
_CONTROL, _CLONES = str(layout.CONTROL_FD), str(layout.CLONES_FD)
FRAME = f"import os\ndef frame(b): os.write({_CONTROL}, len(b).to_bytes(4, 'big') + b)\n"

ATTEMPTS = ends(
    "protocol",
    {
        "garbage_on_every_descriptor": (
            "import os\nfor fd in range(64):\n    try: os.write(fd, b'x' * 99)\n    except OSError: pass",
            (CRASH,),
            _CHANNEL,
        ),
        "answer_of_another_cell": (
            FRAME + 'frame(b\'{"cell":7,"status":"ok","error":""}\')\nwhile True: pass',
            (CRASH,),
            _CHANNEL,
        ),
        "forged_infra_error": (
            FRAME + 'frame(b\'{"cell":2,"status":"infra_error","error":""}\')\nwhile True: pass',
            (CRASH,),
            _CHANNEL,
        ),
        "forged_snapshot": (
            f"import os\nfor pid in (1, 0, 2, 10**9, 2**32 - 1): os.write({_CLONES}, pid.to_bytes(4))\n"
            "while True: pass",
            (CRASH, TIMEOUT),
            (*_CHANNEL, *CPU),
        ),
        "forged_snapshot_after_the_true_one": (
            "import os, time\ntime.sleep(0.1)\n"
            f"for pid in (1, 0, 2, 10**9, 2**32 - 1): os.write({_CLONES}, pid.to_bytes(4))\n"
            "os._exit(0)",
            (CRASH,),
            ("the interpreter exited with status 0", *_CHANNEL),
        ),
        "snapshot_without_its_first_thread": (
            FRAME + "import ctypes, json, threading, time\n"
            'frame(b\'{"cell":2,"status":"ok","error":""}\')\n'
            f"length = int.from_bytes(os.read({_CONTROL}, 4), 'big')\n"
            f"assert json.loads(os.read({_CONTROL}, length))['cell'] == 3\n"
            "read_end, write_end = os.pipe()\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    if os.fork() == 0:\n"
            "        threading.Thread(target=time.sleep, args=(99,)).start()\n"
            "        os.write(write_end, b'x')\n"
            "        ctypes.CDLL(None).pthread_exit(0)\n"
            "    os._exit(0)\n"
            "os.waitpid(child, 0)\n"
            "os.read(read_end, 1)\n"
            f"os.write({_CLONES}, (child + 1).to_bytes(4))\n"
            "time.sleep(0.05)\n"
            "os._exit(0)",
            (OK,),
            (),
        ),
        "answer_of_wrong_types": (
            FRAME + 'frame(b\'{"cell":2,"status":"ok","error":3,"line":[1]}\')\nwhile True: pass',
            (CRASH,),
            _CHANNEL,
        ),
        "answer_too_long_for_the_trainer": (
            FRAME + 'b = b\'{"cell":2,"status":"ok","error":"","value":"\' + b\'x\' * 130_900 + b\'"}\'\n'
            "b = len(b).to_bytes(4, 'big') + b\n"
            f"while b: b = b[os.write({_CONTROL}, b):]\nwhile True: pass",
            (CRASH,),
            _CHANNEL,
        ),
        "two_answers": (
            FRAME + 'b = b\'{"cell":2,"status":"ok","error":""}\'\n'
            f"os.write({_CONTROL}, (len(b).to_bytes(4, 'big') + b) * 2)\nwhile True: pass",
            (CRASH,),
            _CHANNEL,
        ),
        "deep_nesting": (FRAME + "frame(b'[' * 100_000)\nwhile True: pass", (CRASH,), _CHANNEL),
        "not_json": (FRAME + "frame(b'\\xff' * 9)\nwhile True: pass", (CRASH,), _CHANNEL),
        "half_a_frame": (f"import os\nos.write({_CONTROL}, b'\\0\\0\\0\\x09{{')\nwhile True: pass", (TIMEOUT,), CPU),
        "huge_length": (f"import os\nos.write({_CONTROL}, b'\\xff' * 4)\nwhile True: pass", (CRASH,), _CHANNEL),
        "eats_the_next_request": (
            f"import os\ntry:\n    os.set_blocking({_CONTROL}, False)\n    os.read({_CONTROL}, 99)\n"
            "except OSError: pass\nos._exit(0)",
            (CRASH,),
            (),
        ),
        "closes_everything": ("import os\nos.closerange(0, 64)", (CRASH,), ("the interpreter",)),
        "replaces_descriptors": (
            f"import os\nr, w = os.pipe()\nfor fd in (0, 1, 2, *range({_CONTROL}, {_CLONES})): os.dup2(w, fd)",
            (CRASH, TIMEOUT, OK),
            (),
        ),
        "exit": ("import sys\nsys.exit(0)", (OK,), ()),
        "exit_with_a_message": ("import sys\nsys.exit('no')", (ERROR,), ("SystemExit: no",)),
        "exit_for_good": ("import os\nos._exit(0)", (CRASH,), ("the interpreter exited with status 0",)),
        "base_exception": ("class E(BaseException): pass\nraise E", (ERROR,), ("E",)),
        "exception_without_text": (
            "class E(Exception):\n    def __str__(s): raise s\nraise E",
            (ERROR,),
            ("the cell raised an exception that",),
        ),
        "exception_with_a_forged_name": (
            "class E(Exception): pass\nE.__qualname__ = 'OK'\nE.__module__ = 'builtins'\nraise E('1')",
            (ERROR,),
            ("OK: 1",),
        ),
    },
)
