"""The script that a command is about: it is imported and run as Python would, and its prints go to stderr."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from accumkern.checks import describe
from accumkern.planning.derived import setup_of
from accumkern.planning.protocol import WANTED


class Script:
    """A script and a name in it, such as ``train.py:setup``, with the arguments that the script is to see.

    Attributes:
        path: of the script, absolute from the beginning, so that it stays the same when the script changes directory.
        name: what is looked up in it.
        arguments: of its own; ``sys.argv`` is the path and these.
    """

    def __init__(self, target: str, arguments: Sequence[str] = ()) -> None:
        """Find a script.

        Raises:
            ValueError: ``target`` is not of the form ``script.py:name``.
            FileNotFoundError: there is no such script.
        """
        path, colon, self.name = target.rpartition(":")
        if not colon or not path or not self.name.isidentifier():
            raise ValueError(f"target is {target!r}; it must be a script and a name in it, such as 'train.py:setup'")
        self.path = Path(path).expanduser().resolve()
        self.arguments = list(arguments)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no script {path!r}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Return a block for all that runs code of the script: ``sys.argv`` is its own, and its prints are no result.

        Whatever goes to stdout there, also from C and from other processes, goes to stderr. ``sys.argv`` and
        ``sys.path`` are afterwards as they were.
        """
        argv, path = sys.argv, list(sys.path)
        sys.argv = [str(self.path), *self.arguments]
        try:
            with _stdout_to_stderr():
                yield
        finally:
            sys.argv, sys.path[:] = argv, path

    def load(self) -> tuple[ModuleType, Any]:
        """Import the script, in the block of :meth:`running`; return it, and what it has under the name.

        Its folder is first on ``sys.path``, as where Python runs a script. If it is named like another module, such as
        ``random.py``, the folder comes last and the script is imported under a name of its own, so that it hides
        nothing.

        Raises:
            ValueError: it is no Python script.
            RuntimeError: it raised an error of its own.
            AttributeError: it has nothing under that name.
        """
        name, folder = self.path.stem, str(self.path.parent)
        is_free = self._is_free(name)
        if not is_free:  # of another module; the path makes it unlike that of a third one
            name = f"script_{name.replace('.', '_')}_{hashlib.sha256(bytes(self.path)).hexdigest()[:8]}"
        spec = importlib.util.spec_from_file_location(name, self.path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{str(self.path)!r} is not a Python script; its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look a class's module up there
        sys.path.insert(0 if is_free else len(sys.path), folder)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            hint = "; arguments of its own go after --" if isinstance(error, SystemExit) else ""
            raise RuntimeError(f"{self.path.name} raised {describe(error)} while it was imported{hint}") from error
        if not hasattr(module, self.name):
            raise AttributeError(
                f"{self.path.name} has no {self.name!r}; name a function that returns {WANTED}, or one of the things "
                "that docs/setups.md lists"
            )
        return module, getattr(module, self.name)

    def _is_free(self, name: str) -> bool:
        """Return whether no other module has or would get a name; one of this script, loaded before, is none."""
        if name in sys.modules:
            return getattr(sys.modules[name], "__file__", None) == str(self.path)
        if "." in name:
            return False
        found = importlib.util.find_spec(name)
        return found is None or found.origin == str(self.path)

    def last_frame(self, error: BaseException, own: Sequence[Path]) -> traceback.FrameSummary | None:
        """Return where an error passed last through code of the script's folder.

        Args:
            error: that was raised.
            own: folders whose code is not the script's, wherever it lies; what came before it is left out.
        """
        frames = [(frame, Path(frame.filename).parents) for frame in traceback.extract_tb(error.__traceback__)]
        while frames and not set(own) & set(frames[0][1]):
            del frames[0]
        found = [frame for frame, parents in frames if self._has(parents, own)]
        return found[-1] if found else None

    def _has(self, folders: Sequence[Path], own: Sequence[Path]) -> bool:
        """Return whether code in these folders is the script's, or of a neighbour, and not of a library beside it."""
        is_library = any(folder.name == "site-packages" for folder in folders)
        return self.path.parent in folders and not is_library and not set(own) & set(folders)


class ScriptSetup:
    """A setup function that knows its script: a sweep of another one, or with other arguments, is another sweep.

    Attributes:
        arguments: of the script's own.
    """

    def __init__(self, script: Script, **options: bool) -> None:
        """Import a script, in the block of :meth:`Script.running`; ``options`` are those of :func:`setup_of`."""
        module, thing = script.load()
        self.arguments = script.arguments
        self._script, self._options = script, options
        self.__wrapped__ = thing if inspect.isfunction(thing) else module  # for inspect to find the source of
        self._setup = setup_of(thing, **options)

    def __call__(self) -> Any:
        """Return what :func:`accumkern.planning.protocol.run_setup` takes."""
        return self._setup()

    def __reduce__(self) -> Any:
        """Let another process import the script anew."""
        return _imported_anew, (self._script, self._options)


def _imported_anew(script: Script, options: dict[str, bool]) -> ScriptSetup:
    return ScriptSetup(script, **options)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Return a block whose output to stdout, by Python, by C and by other processes, goes to stderr."""
    stdout = sys.stdout
    stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()  # what was written past sys.stdout, and waits in a buffer
        ctypes.CDLL(None).fflush(None)  # and in those of C
        sys.stdout = stdout
        os.dup2(saved, 1)
        os.close(saved)
