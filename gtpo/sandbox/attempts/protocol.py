"""Lies to the keeper over the control channel, and silence."""

from __future__ import annotations

from gtpo.sandbox.attempts.attempt import CPU, CRASH, ERROR, OK, TIMEOUT, ends

_CHANNEL = ("the cell wrote to the interpreter's control channel",)
FRAME = "import os\ndef frame(b): os.write(3, len(b).to_bytes(4, 'big') + b)\n"

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
            "import os\nfor pid in (1, 0, 2, 10**9, 2**32 - 1): os.write(6, pid.to_bytes(4))\nwhile True: pass",
            (CRASH, TIMEOUT),
            (*_CHANNEL, *CPU),
        ),
        "forged_snapshot_after_the_true_one": (
            "import os, time\ntime.sleep(0.1)\nfor pid in (1, 0, 2, 10**9, 2**32 - 1): os.write(6, pid.to_bytes(4))\n"
            "os._exit(0)",
            (CRASH,),
            ("the interpreter exited with status 0", *_CHANNEL),
        ),
        "snapshot_without_its_first_thread": (
            FRAME + "import ctypes, json, threading, time\n"
            'frame(b\'{"cell":2,"status":"ok","error":""}\')\n'
            "length = int.from_bytes(os.read(3, 4), 'big')\n"
            "assert json.loads(os.read(3, length))['cell'] == 3\n"
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
            "os.write(6, (child + 1).to_bytes(4))\n"
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
            "b = len(b).to_bytes(4, 'big') + b\nwhile b: b = b[os.write(3, b):]\nwhile True: pass",
            (CRASH,),
            _CHANNEL,
        ),
        "two_answers": (
            FRAME + 'b = b\'{"cell":2,"status":"ok","error":""}\'\n'
            "os.write(3, (len(b).to_bytes(4, 'big') + b) * 2)\nwhile True: pass",
            (CRASH,),
            _CHANNEL,
        ),
        "deep_nesting": (FRAME + "frame(b'[' * 100_000)\nwhile True: pass", (CRASH,), _CHANNEL),
        "not_json": (FRAME + "frame(b'\\xff' * 9)\nwhile True: pass", (CRASH,), _CHANNEL),
        "half_a_frame": ("import os\nos.write(3, b'\\0\\0\\0\\x09{')\nwhile True: pass", (TIMEOUT,), CPU),
        "huge_length": ("import os\nos.write(3, b'\\xff' * 4)\nwhile True: pass", (CRASH,), _CHANNEL),
        "eats_the_next_request": (
            "import os\ntry:\n    os.set_blocking(3, False)\n    os.read(3, 99)\nexcept OSError: pass\nos._exit(0)",
            (CRASH,),
            (),
        ),
        "closes_everything": ("import os\nos.closerange(0, 64)", (CRASH,), ("the interpreter",)),
        "replaces_descriptors": (
            "import os\nr, w = os.pipe()\nfor fd in range(5): os.dup2(w, fd)",
            (CRASH, TIMEOUT, OK),
            (),
        ),
        "exit": ("import sys\nsys.exit(0)", (ERROR,), ("SystemExit",)),
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
