"""Runs a program as on Windows, as far as Linux can act it: python other_system.py PROGRAM.py [ARGUMENTS]

Modules of this repository get what Windows has of the standard library: no fcntl, no os.fork, no SIGUSR1; what they do
to files fails as there (nothing is moved over a file that exists, or away with an open file in it; folders are not
opened; links to folders are forbidden). Other packages, which have versions for Windows of their own, see Linux. A
program starts its processes anew (spawn), and they are under the same rules.
"""

import builtins
import errno
import fcntl
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

OURS = ("ssm_ops", "ssm_models", "ssm_train", "ssm_mm", "detection", "segmentation", "analyze")
NO_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
NOT_THERE = {
    "os": """O_ASYNC O_CLOEXEC O_DIRECTORY O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC RTLD_GLOBAL RTLD_NOW WNOHANG
        chown fchdir fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp
        getpriority getsid getuid killpg lchown mkfifo nice openpty pathconf pipe2 posix_fadvise posix_fallocate
        posix_spawn pread pwrite readv register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile
        setgid setpgid setpriority setsid setuid statvfs sync sysconf ttyname uname wait wait3 wait4 waitid writev""",
    "signal": """SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2
        alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigwait""",
    "time": "clock_gettime tzset",
}


def open_files_under(path) -> list[str]:
    """Of this process: those in the folder `path`, or `path` itself."""
    names = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if number_is_open(number)]
    return [name for name in names if Path(name).is_relative_to(Path(path).absolute())]


def number_is_open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")  # that of the listing is closed again


def refuse_open(path) -> None:
    if open_files_under(path):
        raise PermissionError(errno.EACCES, "in use by another process (32)", str(path))


def windows_open(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied: a folder", str(path))
    return os.open(path, *args, **kwargs)


def windows_rename(source, target, **kwargs):
    refuse_open(source)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "there already (183)", str(target))
    os.rename(source, target, **kwargs)


def windows_replace(source, target, **kwargs):
    refuse_open(source)
    refuse_open(target)
    if os.path.isdir(target):
        raise PermissionError(errno.EACCES, "Access is denied (5)", str(target))
    os.replace(source, target, **kwargs)


def windows_symlink(source, target, **kwargs):
    raise OSError(errno.EINVAL, "A required privilege is not held by the client (1314)", str(target))


real_unlink = os.unlink


def windows_unlink(path, *, dir_fd=None):
    if dir_fd is None and Path(path).absolute().is_relative_to(Path.cwd()):
        refuse_open(path)
    real_unlink(path, dir_fd=dir_fd)


def windows_locking(handle: int, mode: int, count: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # also between two openings in one process, as there
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


class Narrowed(ModuleType):
    """A module without some of its names, and with others in their place."""

    def __init__(self, module: ModuleType, missing: str, **changed) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(
            {name: value for name, value in vars(module).items() if name not in missing.split()} | changed
        )


GIVEN = {
    "os": Narrowed(
        os,
        NOT_THERE["os"],
        name="nt",
        open=windows_open,
        rename=windows_rename,
        replace=windows_replace,
        symlink=windows_symlink,
        O_BINARY=0,
    ),
    "signal": Narrowed(signal, NOT_THERE["signal"]),
    "time": Narrowed(time, NOT_THERE["time"]),
}
msvcrt = ModuleType("msvcrt")
msvcrt.locking, msvcrt.LK_NBLCK = windows_locking, 2
linux_import = builtins.__import__


def windows_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    root = name.partition(".")[0]
    if level or importer not in OURS:
        return linux_import(name, globals, locals, fromlist, level)
    if root in NO_MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if name == "msvcrt":
        return msvcrt
    found = linux_import(name, globals, locals, fromlist, level)
    return found if name == "os.path" and fromlist else GIVEN.get(root, found)


# not under `if`: processes that are started anew import this file, too
builtins.__import__ = windows_import
os.unlink = windows_unlink

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    program = sys.argv[1]
    del sys.argv[0]
    runpy.run_path(program, run_name="ssm_train.program")
