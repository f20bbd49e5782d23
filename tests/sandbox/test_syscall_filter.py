"""The BPF program, interpreted here, for the machine that runs the tests and for the other one."""

import ctypes
import ctypes.util
import errno
import struct

import pytest

from gtpo.sandbox import syscall_filter

ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
SIGNALS = range(1, 65)
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(
    machine: str, number: int, *, arch: int | None = None, arguments: tuple[int, ...] = (), processes: bool = False
) -> int:
    """What the filter for `machine` answers to a system call."""
    data = struct.pack("=iIQ6Q", number, arch or ARCH[machine], 0, *(arguments + (0,) * (6 - len(arguments))))
    program = list(struct.iter_unpack("=HBBI", syscall_filter.build(machine, processes=processes)))
    accumulator = position = 0
    while True:
        code, if_true, if_false, value = program[position]
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x45:
            position += if_true if accumulator & value else if_false
        elif code == 0x15:
            position += if_true if accumulator == value else if_false
        else:
            assert code == 0x06
            return value


@pytest.mark.parametrize(
    ("machine", "numbers"),
    # read, write, openat, mmap, exit_group
    [("x86_64", (0, 1, 257, 9, 231)), ("aarch64", (63, 64, 56, 222, 94))],
)
def test_ordinary_calls_pass(machine, numbers):
    assert {verdict(machine, number) for number in numbers} == {ALLOW}


@pytest.mark.parametrize(
    ("machine", "numbers"),
    # socket, clone, execve, kill, ptrace, unshare, mount, io_uring_setup, bpf, a call of the future, an x32 call
    [
        ("x86_64", (41, 56, 59, 62, 101, 272, 165, 425, 321, 4095, 0x40000000)),
        ("aarch64", (198, 220, 221, 129, 117, 97, 40, 425, 280, 4095, 0x40000000)),
    ],
)
def test_dangerous_and_unknown_calls_fail(machine, numbers):
    assert {verdict(machine, number) for number in numbers} == {EPERM}
    assert verdict(machine, 435) == ENOSYS


@pytest.mark.parametrize(("machine", "fcntl", "ioctl", "prlimit"), [("x86_64", 72, 16, 302), ("aarch64", 25, 29, 261)])
def test_arguments_decide_for_some_calls(machine, fcntl, ioctl, prlimit):
    get_flags, set_owner, terminal, inject = 3, 8, 0x5401, 0x5412
    assert verdict(machine, fcntl, arguments=(0, get_flags)) == ALLOW
    assert verdict(machine, fcntl, arguments=(0, set_owner)) == EPERM
    assert verdict(machine, ioctl, arguments=(0, terminal)) == ALLOW
    assert verdict(machine, ioctl, arguments=(0, inject)) == EPERM
    assert verdict(machine, prlimit, arguments=(0,)) == ALLOW
    assert verdict(machine, prlimit, arguments=(1,)) == EPERM


@pytest.mark.parametrize(("machine", "rt_sigaction"), [("x86_64", 13), ("aarch64", 134)])
def test_every_signal_may_be_handled_but_that_of_children(machine, rt_sigaction):
    """Where it is ignored, the CPU time of children is lost."""
    for processes in (False, True):
        answers = {
            number: verdict(machine, rt_sigaction, arguments=(number,), processes=processes) for number in SIGNALS
        }
        assert {number for number, answer in answers.items() if answer != ALLOW} == {17}
        assert answers[17] == EPERM


@pytest.mark.parametrize("machine", ARCH)
def test_a_call_of_another_architecture_kills(machine):
    i386 = 0x40000003
    assert verdict(machine, 0, arch=i386) == KILL


def test_an_unknown_machine_is_refused():
    with pytest.raises(ValueError, match=r"one of \['aarch64', 'x86_64'\], got 'riscv64'"):
        syscall_filter.build("riscv64", processes=False)


@pytest.mark.parametrize(("machine", "clone", "kill"), [("x86_64", 56, 62), ("aarch64", 220, 129)])
def test_processes_and_threads_are_a_choice_and_namespaces_never_pass(machine, clone, kill):
    fork, thread = 0x01200011, 0x003D0F00
    for flags in (fork, thread, 0x8011):
        assert verdict(machine, clone, arguments=(flags,), processes=True) == ALLOW
        assert verdict(machine, clone, arguments=(flags,)) == EPERM
        for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
            assert verdict(machine, clone, arguments=(flags | namespace,), processes=True) == EPERM
    assert (verdict(machine, kill, processes=True), verdict(machine, kill)) == (ALLOW, EPERM)


@pytest.mark.parametrize("machine", ARCH)
def test_the_numbers_are_those_of_libseccomp(machine):
    """The library that knows every architecture's table; Debian has it, since systemd needs it."""
    name = ctypes.util.find_library("seccomp")
    if name is None:
        pytest.skip("needs libseccomp; the numbers are compared where it is installed")
    resolve = ctypes.CDLL(name).seccomp_syscall_resolve_name_arch
    calls = syscall_filter.allowed_calls(processes=True)[machine]
    resolved = {call: resolve(ctypes.c_uint32(ARCH[machine]), call.encode()) for call in calls}
    # Newer than some versions of the library.
    assert {call: number for call, number in resolved.items() if number != calls[call]} == {
        call: -1 for call, number in resolved.items() if number == -1
    }
    assert sum(number > -1 for number in resolved.values()) > len(calls) - 5
