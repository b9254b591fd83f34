"""Kills a command at a chosen moment: in a forked process, before or after the n-th call of a function."""

import importlib
import os
import signal
import sys
import tempfile
import traceback

from fastdpo.cli.main import main
from fastdpo.references.cache import LogpsCache


def killed(words, where, call=1, *, after=False):
    """Runs the command in a process of its own, which SIGKILL ends at the call. Fails if the command ends before.

    Args:
        where: "package.module:function" or "package.module:Class.method", as the command looks it up.
        call: number of the call, from 1.
        after: whether the function still runs.
    """
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                with open(2, "w", buffering=1, closefd=False) as sys.stdout:  # pytest's own would keep what is printed
                    sys.stderr = sys.stdout
                    _kill_at(where, call, after)
                    print("exit code", main([str(word) for word in words]))
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        said = output.read()[-2000:]
    assert os.WIFSIGNALED(status), f"{where} was called fewer than {call} times:\n{said}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def written_from_now_on(monkeypatch):
    """A list that gets the keys of all log-probs which are written to a cache."""
    found, write = [], LogpsCache.write

    def counted(cache, keys, logps):
        found.extend(keys)
        return write(cache, keys, logps)

    monkeypatch.setattr(LogpsCache, "write", counted)
    return found


def _kill_at(where, call, after):
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, deadly)
    for other in [module for name, module in sys.modules.items() if name.startswith("fastdpo")]:
        for name in [name for name, value in vars(other).items() if value is function]:  # imported by name before
            setattr(other, name, deadly)
