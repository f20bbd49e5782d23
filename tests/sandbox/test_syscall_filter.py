"""The BPF program, interpreted here, for the machine that runs the tests and for the other one."""

import errno
import functools
import struct

import pytest

from gtpo.sandbox import syscall_filter, syscall_programs, syscall_rules

ALLOW, KILL = 0x7FFF0000, 0x80000000
GRANTED, EPERM, ENOSYS = 0x00050000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
SIGNALS = range(1, 65)
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


@functools.cache
def shipped(machine: str, processes: bool) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("=HBBI", syscall_filter.program(machine, processes=processes)))


def verdict(
    machine: str, number: int, *, arch: int | None = None, arguments: tuple[int, ...] = (), processes: bool = False
) -> int:
    """What the shipped filter for `machine` answers to a system call."""
    return run_filter(shipped(machine, processes), number, arch or ARCH[machine], arguments)


def run_filter(program: list[tuple[int, int, int, int]], number: int, arch: int, arguments: tuple[int, ...]) -> int:
    data = struct.pack("=IIQ6Q", number, arch, 0, *(arguments + (0,) * (6 - len(arguments))))
    accumulator = position = 0
    while True:
        code, if_true, if_false, value = program[position]
        position += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x54:
                accumulator &= value
            case 0x05:
                position += value
            case 0x15:
                position += if_true if accumulator == value else if_false
            case 0x25:
                position += if_true if accumulator > value else if_false
            case 0x35:
                position += if_true if accumulator >= value else if_false
            case 0x45:
                position += if_true if accumulator & value else if_false
            case _:
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
    # socket, clone, execve, kill, ptrace, unshare, mount, io_uring_setup, bpf, a call of the future
    [
        ("x86_64", (41, 56, 59, 62, 101, 272, 165, 425, 321, 4095)),
        ("aarch64", (198, 220, 221, 129, 117, 97, 40, 425, 280, 4095)),
    ],
)
def test_dangerous_and_unknown_calls_fail(machine, numbers):
    assert {verdict(machine, number) for number in numbers} == {EPERM}
    assert verdict(machine, 435) == ENOSYS


@pytest.mark.parametrize(("machine", "fcntl", "ioctl", "prlimit"), [("x86_64", 72, 16, 302), ("aarch64", 25, 29, 261)])
def test_arguments_decide_for_some_calls(machine, fcntl, ioctl, prlimit):
    get_flags, set_flags, set_owner, terminal, inject = 3, 4, 8, 0x5401, 0x5412
    assert verdict(machine, fcntl, arguments=(0, set_flags)) == EPERM
    assert verdict(machine, fcntl, arguments=(0, get_flags)) == ALLOW
    assert verdict(machine, fcntl, arguments=(0, set_owner)) == EPERM
    assert verdict(machine, ioctl, arguments=(0, terminal)) == ALLOW
    assert verdict(machine, ioctl, arguments=(0, inject)) == EPERM
    assert verdict(machine, prlimit, arguments=(0,)) == ALLOW
    assert verdict(machine, prlimit, arguments=(1,)) == EPERM


@pytest.mark.parametrize(("machine", "fcntl"), [("x86_64", 72), ("aarch64", 25)])
def test_of_locks_only_those_are_made_that_processes_of_one_session_need(machine, fcntl):
    get, set_it, wait, lease, notify, of_open_file = 5, 6, 7, 1024, 1026, (36, 37, 38)
    for command in (set_it, wait):
        assert verdict(machine, fcntl, arguments=(0, command), processes=True) == ALLOW
        assert verdict(machine, fcntl, arguments=(0, command)) == GRANTED
    for processes in (False, True):
        assert verdict(machine, fcntl, arguments=(0, get), processes=processes) == ALLOW
        for command in (lease, notify, *of_open_file):
            assert verdict(machine, fcntl, arguments=(0, command), processes=processes) == EPERM


@pytest.mark.parametrize(("machine", "futex"), [("x86_64", 202), ("aarch64", 98)])
def test_a_session_of_one_process_has_futexes_of_its_own_memory_only(machine, futex):
    private = 128
    for operation in (0, 1, 5, 9, 10):
        assert verdict(machine, futex, arguments=(0, operation | private)) == ALLOW
        assert verdict(machine, futex, arguments=(0, operation)) == EPERM
        assert verdict(machine, futex, arguments=(0, operation), processes=True) == ALLOW


@pytest.mark.parametrize(("machine", "madvise"), [("x86_64", 28), ("aarch64", 233)])
def test_advice_is_about_pages_of_the_process_itself(machine, madvise):
    dont_need, mergeable, cold, pageout, poison = 4, 12, 20, 21, 100
    assert verdict(machine, madvise, arguments=(0, 4096, dont_need)) == ALLOW
    for advice in (mergeable, cold, pageout, poison):
        assert verdict(machine, madvise, arguments=(0, 4096, advice)) == EPERM


@pytest.mark.parametrize("machine", ARCH)
def test_of_processes_a_session_without_numbers_of_its_own_may_ask_for_itself(machine):
    about_processes, clocks = TESTED_BY_ARGUMENT[machine][9:12], TESTED_BY_ARGUMENT[machine][12:]
    pid, real_time, thread_time, clock_of_another = 4711, 0, 3, ~4711 << 3 | 2
    for number in about_processes:
        assert verdict(machine, number, arguments=(0,)) == ALLOW
        for named in (pid, 1, 0xFFFF_FFFF):
            assert verdict(machine, number, arguments=(named,)) == EPERM
            assert verdict(machine, number, arguments=(named,), processes=True) == ALLOW
    for number in clocks:
        assert {verdict(machine, number, arguments=(clock,)) for clock in (real_time, 1, 2, thread_time, 11)} == {ALLOW}
        # the kernel looks at the low half only
        for clock in (clock_of_another & 0xFFFF_FFFF, clock_of_another & 2**64 - 1):
            assert verdict(machine, number, arguments=(clock,)) == EPERM
            assert verdict(machine, number, arguments=(clock,), processes=True) == ALLOW


@pytest.mark.parametrize(("machine", "rt_sigaction"), [("x86_64", 13), ("aarch64", 134)])
def test_every_signal_may_be_handled_but_that_of_children(machine, rt_sigaction):
    """Where it is ignored, the CPU time of children is lost."""
    for processes in (False, True):
        answers = {
            number: verdict(machine, rt_sigaction, arguments=(number,), processes=processes) for number in SIGNALS
        }
        assert {number for number, answer in answers.items() if answer != ALLOW} == {17}
        # the kernel looks at the low half only
        for sigchld in (17, 17 | 1 << 32):
            assert verdict(machine, rt_sigaction, arguments=(sigchld,), processes=processes) == EPERM


@pytest.mark.parametrize(("machine", "mmap"), [("x86_64", 9), ("aarch64", 222)])
def test_memory_is_mapped_but_not_shared_without_a_file(machine, mmap):
    shared, private, anonymous, huge, validated = 1, 2, 0x20, 0x40000, 3
    for flags, answer in (
        (private | anonymous, ALLOW),
        (private | anonymous | 0x4000, ALLOW),
        (private, ALLOW),
        (shared, ALLOW),
        (shared | anonymous, EPERM),
        (validated | anonymous, EPERM),
        (shared | anonymous | 1 << 32, EPERM),
        (private | anonymous | huge, EPERM),
    ):
        assert verdict(machine, mmap, arguments=(0, 4096, 3, flags), processes=True) == answer


@pytest.mark.parametrize("machine", ARCH)
def test_a_call_of_another_architecture_kills(machine):
    i386 = 0x40000003
    assert verdict(machine, 0, arch=i386) == KILL
    x32_getpid = 0x40000000 | 39
    assert verdict("x86_64", x32_getpid) == KILL


def test_an_unknown_machine_is_refused():
    with pytest.raises(ValueError, match=r"one of \['aarch64', 'x86_64'\], got 'riscv64'"):
        syscall_filter.program("riscv64", processes=False)


@pytest.mark.parametrize(("machine", "clone", "kill"), [("x86_64", 56, 62), ("aarch64", 220, 129)])
def test_processes_and_threads_are_a_choice_and_namespaces_never_pass(machine, clone, kill):
    fork, thread = 0x01200011, 0x003D0F00
    for flags in (fork, thread, 0x8011):
        assert verdict(machine, clone, arguments=(flags,), processes=True) == ALLOW
        assert verdict(machine, clone, arguments=(flags,)) == EPERM
        for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
            assert verdict(machine, clone, arguments=(flags | namespace,), processes=True) == EPERM
    assert (verdict(machine, kill, processes=True), verdict(machine, kill)) == (ALLOW, EPERM)


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("machine", syscall_rules.MACHINES)
def test_the_shipped_program_is_what_libseccomp_makes_of_the_rules(machine, processes):
    """Byte for byte with the version that made it; with another, which may order the checks anew, in its verdicts."""
    regenerated = syscall_rules.generate(machine, processes=processes)
    if f"libseccomp {syscall_rules.library_version()}" == syscall_programs.MADE_BY:
        assert regenerated == syscall_filter.program(machine, processes=processes)
    other = list(struct.iter_unpack("=HBBI", regenerated))
    values = [*range(24), *(1 << bit for bit in range(32)), *(1 << bit | 0x11 for bit in range(32))]
    values += [value for _, _, allowed in syscall_rules.ALLOWED_FOR for value in allowed]
    values += [0x21, 0x22, 0x40022, *(operation | 128 for operation in range(12))]
    for number in [*range(470), 0x40000000, 0xFFFFFFFF]:
        for value in values if number in TESTED_BY_ARGUMENT[machine] else [0]:
            for arguments in ((value, 0), (0, value), (0, 0, value), (0, 0, 0, value)):
                assert run_filter(other, number, ARCH[machine], arguments) == verdict(
                    machine, number, arguments=arguments, processes=processes
                )


# ioctl, fcntl, prlimit64, prctl, rt_sigaction, mmap, clone, madvise, futex; getpgid, getsid, sched_getaffinity,
# clock_gettime, clock_getres, clock_nanosleep
TESTED_BY_ARGUMENT = {
    "x86_64": (16, 72, 302, 157, 13, 9, 56, 28, 202, 121, 124, 204, 228, 229, 230),
    "aarch64": (29, 25, 261, 167, 134, 222, 220, 233, 98, 155, 156, 123, 113, 114, 115),
}


@pytest.mark.parametrize("machine", ARCH)
def test_as_many_calls_pass_as_are_named(machine):
    """A name that libseccomp did not know on a machine would be left out; these have no such call there."""
    only_x86 = (
        "dup2 pipe open access stat lstat readlink mkdir rmdir unlink rename select poll pause alarm getpgrp time"
    )
    names = set(syscall_rules.ALLOWED.split())
    with_processes = names | set(syscall_rules.ALLOWED_WITH_PROCESSES.split()) - {"futex"}
    if machine == "aarch64":
        names -= set(only_x86.split())
        with_processes -= {*only_x86.split(), "link"}
    by_argument = set(TESTED_BY_ARGUMENT[machine])
    for processes, expected in ((False, names), (True, with_processes)):
        passing = [n for n in range(470) if verdict(machine, n, processes=processes) == ALLOW and n not in by_argument]
        assert len(passing) == len(expected)
