# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a command in a guest: a User-Mode Linux of kernel.build that sees a few folders of the host, and writes to one.

    python3 -m kernel.guest --cpus 2 --memory 1024 --out /tmp/out -- python -m pytest tests/real/test_devices.py

The guest has /usr, this Python, the project and the cache of kernels and QEMUs, all for reading only; the folder
--out, at its own path, for writing; and /tmp, /run and /dev/shm of its own. Nothing else of the host is there: neither
/etc nor /home nor a network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernel import build, cache, confine
from kernel.build import PROJECT, Kernel
from kernel.cache import BuildError, UnavailableError

COMPLAINT = re.compile(r"\bBUG\b|WARNING|\bOops\b|Call Trace|Kernel panic|possible .* detected|suspicious RCU")
"""What a kernel's log has in it when something is wrong with the kernel or a driver."""

TIMED_OUT = 124
GUEST_FAILED = 125

MERGED = ("bin", "sbin", "lib", "lib64", "lib32")
"""Folders that are links into /usr, since Debian 12."""

MOUNT_POINTS = ("proc", "sys", "dev", "tmp", "run", "root", "etc")

PASSWD = "root:x:0:0:root:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
ETC = {
    "passwd": PASSWD,
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


class GuestError(Exception):
    """The guest did not come to the end of its command. The text says why."""


@dataclass(frozen=True)
class Module:
    """A module that is loaded before the command runs."""

    file: Path
    parameters: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class UserModeLinux:
    """What the guest is made of, and what it may see of the host."""

    kernel: Kernel
    modules: Sequence[Module] = ()
    cpus: int = 2
    memory_mib: int = 1024
    readable: Sequence[Path] = ()
    """Folders of the host besides those that each guest has."""
    writable: Path | None = None
    """The one folder that the guest writes to."""
    timeout_s: float = 600.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CommandOutcome:
    """What came of a command in a guest."""

    status: int
    """The command's exit status."""
    complaints: tuple[str, ...]
    """Lines of the kernel's log that say that something is wrong with it."""
    dmesg: str

    @property
    def ok(self) -> bool:
        """The command ended with 0, and the kernel had nothing to complain of."""
        return self.status == 0 and not self.complaints


def complaints(dmesg: str) -> tuple[str, ...]:
    """The lines of a kernel's log that say that something is wrong with it."""
    return tuple(line for line in dmesg.splitlines() if COMPLAINT.search(line))


def exit_status(text: str) -> int:
    """The command's status, as the guest's init wrote it. Raises GuestError if it wrote none."""
    if not re.fullmatch(r"\d{1,3}\n", text):
        raise GuestError("the guest ended before its command did")
    return int(text)


def run(guest: UserModeLinux, command: Sequence[str], output: Callable[[bytes], None]) -> CommandOutcome:
    """Run a command in the guest, in the project's folder. `output` gets what it prints, as it comes.

    The guest is gone when this returns, and also if it raises. Raises GuestError if the guest does not come to the
    command's end, TimeoutError if that takes longer than the guest's timeout.
    """
    with tempfile.TemporaryDirectory(prefix="proto-v3-guest-") as folder:
        root = Path(folder) / "root"
        make_root(root, guest, command)
        console = boot(guest, root, output)
        try:
            status = exit_status((root / "status").read_text("utf-8"))
            dmesg = (root / "dmesg").read_text("utf-8", "replace")
        except (OSError, GuestError):
            last = build.last_lines(console.decode(errors="replace"), 30)
            raise GuestError(f"the guest ended before its command did; its console:\n{last}") from None
    return CommandOutcome(status, complaints(dmesg), dmesg)


def make_root(root: Path, guest: UserModeLinux, command: Sequence[str]) -> None:
    """The folder that is the guest's root: what init.sh wants, mount points, and an /etc of a few lines."""
    for name in MOUNT_POINTS:
        (root / name).mkdir(parents=True)
    for name, text in ETC.items():
        (root / "etc" / name).write_text(text, encoding="utf-8")
    if Path("/etc/ld.so.cache").exists():
        shutil.copyfile("/etc/ld.so.cache", root / "etc/ld.so.cache")
    for name in MERGED:
        if Path("/", name).is_symlink():
            (root / name).symlink_to(os.readlink(f"/{name}"))
    shutil.copy(guest.kernel.busybox, root / "busybox")
    shutil.copy(PROJECT / "kernel/init.sh", root / "init")
    (root / "init").chmod(0o755)
    mounts = mounted(guest)
    for path in mounts:
        (root / path.relative_to("/")).mkdir(parents=True, exist_ok=True)
    (root / "mounts").write_text("".join(f"{access} {path}\n" for path, access in mounts.items()), "utf-8")
    (root / "modules").write_text("".join(f"{module_line(each)}\n" for each in guest.modules), encoding="utf-8")
    (root / "command").write_text(command_script(environment(guest), PROJECT, command), encoding="utf-8")


def mounted(guest: UserModeLinux) -> dict[Path, str]:
    """The folders of the host that the guest has, and whether "ro" or "rw". One that lies in another comes later."""
    seen = [Path("/usr"), PROJECT, cache.folder(), *pythons(), *guest.readable]
    seen += [Path("/", name) for name in MERGED if Path("/", name).is_dir() and not Path("/", name).is_symlink()]
    readable = {path.resolve() for path in seen if path.is_dir()} | {path for path in seen if path.is_dir()}
    found = dict.fromkeys(outermost(readable), "ro")
    if guest.writable is not None:
        found[guest.writable.resolve()] = "rw"
    return dict(sorted(found.items()))


def outermost(paths: Iterable[Path]) -> list[Path]:
    """Those of the paths that do not lie in another one of them."""
    every = set(paths)
    return sorted(path for path in every if not every.intersection(path.parents))


def pythons() -> list[Path]:
    """Where this Python and the project's virtual environment have their files."""
    programs = [path for path in (Path(sys.executable), PROJECT / ".venv/bin/python") if path.exists()]
    homes = [path.resolve().parents[1] for path in programs]
    return [Path(sys.prefix), Path(sys.base_prefix), *homes]


def environment(guest: UserModeLinux) -> dict[str, str]:
    """The variables of the command: none of this process's own but where the cache and the writable folder are."""
    programs = [str(PROJECT / ".venv/bin"), str(Path(sys.prefix) / "bin"), "/usr/local/sbin", "/usr/local/bin"]
    writable = {} if guest.writable is None else {"PROTO_V3_OUT": str(guest.writable.resolve())}
    return {
        "PATH": ":".join(dict.fromkeys([*programs, "/usr/sbin", "/usr/bin", "/sbin", "/bin"])),
        "HOME": "/tmp",
        "USER": "root",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(PROJECT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PROTO_V3_CACHE": str(cache.folder()),
        "PROTO_V3_GUEST": guest.kernel.name,
        "PROTO_V3_CONFINED": str(int(confine.landlock_version() > 0)),
        **writable,
        **guest.environment,
    }


def command_script(variables: Mapping[str, str], folder: Path, command: Sequence[str]) -> str:
    """A shell script that runs the command in this folder, with these variables."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join([*exports, f"cd {shlex.quote(str(folder))}", f"exec {shlex.join(command)}", ""])


def module_line(module: Module) -> str:
    """The arguments of insmod, quoted as xargs wants it."""
    words = [str(module.file), *(f"{name}={value}" for name, value in module.parameters.items())]
    return " ".join(shlex.quote(word) for word in words)


def command_line(guest: UserModeLinux, root: Path, memory: Path, output: int) -> list[str]:
    """User-Mode Linux with its options (`linux --help`), started so that it opens no other files of the host.

    It tries a pseudo-terminal too, and does without.
    """
    folders = mounted(guest)
    read = [path for path, access in folders.items() if access == "ro"]
    write = [path for path, access in folders.items() if access == "rw"]
    seen = [f"--read={path}" for path in [*read, guest.kernel.root, Path("/proc/cpuinfo")]]
    seen += [f"--write={path}" for path in [*write, root.parent, memory, Path("/dev/null")]]
    return [
        *(sys.executable, "-I", str(PROJECT / "kernel/confine.py"), *seen, "--", str(guest.kernel.linux)),
        *(f"mem={guest.memory_mib}M", f"ncpus={guest.cpus}", "seccomp=on", f"uml_dir={root.parent}/uml"),
        *("rootfstype=hostfs", f"rootflags={root}", "ro", "init=/init"),
        *("con=null", "con0=null,fd:1", "ssl=null", f"ssl0=null,fd:{output}", "loglevel=4", "log_buf_len=1M"),
    ]


def boot(guest: UserModeLinux, root: Path, output: Callable[[bytes], None]) -> bytes:
    """Boot the guest and wait for its end. Returns what its console printed. Raises TimeoutError."""
    output_end, guests_output = os.pipe()
    console_end, guests_console = os.pipe()
    console = bytearray()
    memory = Path(tempfile.mkdtemp(prefix="proto-v3-guest-", dir=memory_folder(guest.memory_mib)))
    try:
        process = subprocess.Popen(
            command_line(guest, root, memory, guests_output),
            stdin=subprocess.DEVNULL,
            stdout=guests_console,
            stderr=subprocess.STDOUT,
            pass_fds=(guests_output,),
            env={"TMPDIR": str(memory), "PATH": "/usr/bin:/bin"},
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(guests_output)
        os.close(guests_console)
    try:
        RUNNING.add(process)
        with selectors.DefaultSelector() as selector:
            selector.register(output_end, selectors.EVENT_READ, output)
            selector.register(console_end, selectors.EVENT_READ, console.extend)
            end = time.monotonic() + guest.timeout_s
            while selector.get_map() and time.monotonic() < end:
                for key, _ in selector.select(max(0.0, end - time.monotonic())):
                    data = os.read(key.fd, 1 << 16)
                    if data:
                        key.data(data)
                    else:
                        selector.unregister(key.fd)
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the guest was killed after {guest.timeout_s:.0f} s") from None
    finally:
        kill(process)
        RUNNING.discard(process)
        memory.rmdir()
        os.close(output_end)
        os.close(console_end)
    return bytes(console)


RUNNING: set[subprocess.Popen[bytes]] = set()
"""The guests of all threads."""


def kill_all() -> None:
    """Kill the guests of all threads: each run() ends as if its guest had ended by itself."""
    for process in list(RUNNING):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the guest with all of its processes: it leads their session, and they die with it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def memory_folder(memory_mib: int) -> Path:
    """Where the file goes that is the guest's memory: it has the room, and may be executed."""
    for path in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        try:
            status = os.statvfs(path)
        except OSError:
            continue
        if status.f_bavail * status.f_frsize >> 20 > memory_mib and not status.f_flag & os.ST_NOEXEC:
            return path
    raise GuestError(f"neither /dev/shm nor {tempfile.gettempdir()} has {memory_mib} MiB for the guest's memory")


def standard_modules(kernel: Kernel, parameters: Mapping[str, int | str] | None = None) -> list[Module]:
    """The sample driver's module for this kernel, if the project has it. mtty is part of the kernel."""
    file = build.module(kernel)
    return [Module(file, parameters or {})] if file else []


def to_stdout(data: bytes) -> None:
    """Print what the guest printed, at once."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main(arguments: Sequence[str]) -> int:
    """Run a command in a guest. The status is the command's; 124: it took too long; 125: there is no guest."""
    parser = argparse.ArgumentParser(prog="python3 -m kernel.guest", description="Run a command in a guest.")
    parser.add_argument("--cpus", type=int, default=2, help="1 to 4")
    parser.add_argument("--memory", type=int, default=1024, help="MiB")
    parser.add_argument("--debug", action="store_true", help="the kernel with lockdep")
    parser.add_argument("--out", type=Path, help="a folder that the guest writes to; made if it is not there")
    parser.add_argument("--see", type=Path, action="append", default=[], help="another folder that the guest reads")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds until the guest is killed")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the module")
    parser.add_argument("command", nargs="+", help="the command, after --")
    options = parser.parse_args(arguments)
    cache.stop_on_signals()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the command's
            (kernel,) = build.get(["um-debug" if options.debug else "um"])
            modules = standard_modules(kernel, dict(each.partition("=")[::2] for each in options.set))
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        guest = UserModeLinux(
            kernel=kernel,
            modules=modules,
            cpus=options.cpus,
            memory_mib=options.memory,
            readable=[path.absolute() for path in options.see],
            writable=options.out,
            timeout_s=options.timeout,
        )
        outcome = run(guest, options.command, to_stdout)
    except BrokenPipeError:  # as `| head` does
        sys.stdout = None
        return 128 + signal.SIGPIPE
    except (UnavailableError, BuildError, GuestError) as error:
        print(f"guest: {error}", file=sys.stderr)
        return GUEST_FAILED
    except TimeoutError as error:
        print(f"guest: {error}", file=sys.stderr)
        return TIMED_OUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    for line in outcome.complaints:
        print(f"guest: the kernel's log: {line}", file=sys.stderr)
    return outcome.status or int(bool(outcome.complaints))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
