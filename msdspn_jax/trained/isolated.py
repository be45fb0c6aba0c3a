"""An exported program run in a process of its own: what it does there ends nothing here.

A damaged or made-up program can crash the compiler, loop for ever or take all memory. Here each of
them is a `UserError`. This guards against accidents and hurried files, it is no sandbox: a program
is native code and has the rights of whoever runs it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from jaxtyping import Float

from msdspn_jax.errors import UserError
from msdspn_jax.trained.program import signature

#: Of resident memory; more than a batch of a hundred images of any of our models takes.
MEMORY_LIMIT = 2**33
_MAX_WORDS = 2**20
_CHILD = "from msdspn_jax.trained.isolated import serve; serve()"


class IsolatedProgram:
    """A program in a process of its own, as a context manager.

    Attributes:
        settings: what its ``settings.json`` holds.
        source: the file.

    Example:
        >>> with IsolatedProgram("model.zip") as program:  # doctest: +SKIP
        ...     objects = program.predict(images).result()
    """

    def __init__(
        self,
        path: str | Path,
        *,
        task: str = "clevr",
        time_limit: float = 600.0,
        memory_limit: int = MEMORY_LIMIT,
    ):
        """Start the process and let it read the program.

        Args:
            path: what `program.save_program` wrote, or `set_program.save_set_program`.
            task: clevr or sets.
            time_limit: seconds that reading it, and every batch, may take.
            memory_limit: bytes of memory the process may have (watched on Linux only).

        Raises:
            UserError: as `program.load_program`; or the process did not outlive it.
        """
        self.source = str(path)
        self._time_limit, self._memory_limit = time_limit, memory_limit
        self._since: float | None = None
        self._reason = ""
        # What can be imported here can be there, and (-P) nothing from the folder we are in.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, os.path.abspath(path), self.source, task],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            self.settings = json.loads(self._pool.submit(self._ask, None, _MAX_WORDS).result())
            self._signature = signature(self.settings)
        except BaseException:
            self.close()
            raise

    def predict(
        self, *inputs: np.ndarray
    ) -> concurrent.futures.Future[Float[np.ndarray, "batch n d"]]:
        """Predict a batch of images; of the task sets, of inputs and, where these are sets, masks.

        The future raises a `UserError` where the program does not run.
        """
        arrays = [
            np.ascontiguousarray(array, dtype)
            for array, (dtype, _) in zip(inputs, self._signature.inputs, strict=True)
        ]
        return self._pool.submit(self._predict, arrays)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._pool.shutdown()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> IsolatedProgram:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _predict(self, arrays: list[np.ndarray]) -> np.ndarray:
        shape = (len(arrays[0]), *self._signature.output)
        size = 4 * int(np.prod(shape))
        answer = self._ask(b"".join(array.tobytes() for array in arrays), size)
        if len(answer) != size:
            self._fail()
        return np.frombuffer(answer, "<f4").reshape(shape)

    def _ask(self, question: bytes | None, limit: int) -> bytes:
        self._since = time.monotonic()
        try:
            if question is not None:
                _write(self._process.stdin, b"Q", question)
            kind, answer = _read(self._process.stdout, max(limit, _MAX_WORDS))
        except (OSError, EOFError, ValueError):
            self._fail()
        finally:
            self._since = None
        if kind == b"E":
            raise UserError(answer.decode(errors="replace"))
        return answer

    def _fail(self) -> NoReturn:
        self._process.kill()
        code = self._process.wait()
        reason = self._reason
        if not reason and code < 0:
            names = {s.value: s.name for s in signal.Signals}
            reason = f"it crashed, with {names.get(-code, -code)}"
        raise UserError(
            f"{self.source}: the program was stopped: {reason or 'its process ended by itself'}"
        )

    def _watch(self) -> None:
        """Kill the process where it takes too long or too much; who waits for it then wakes."""
        while self._process.poll() is None:
            since = self._since
            if since is not None and time.monotonic() - since > self._time_limit:
                self._reason = f"no answer in {self._time_limit:g} seconds"
            elif _resident(self._process.pid) > self._memory_limit:
                self._reason = (
                    f"more than {self._memory_limit / 2**30:.3g} GiB of memory;"
                    " smaller batches may do"
                )
            if self._reason:
                self._process.kill()
                return
            time.sleep(0.05)


def serve() -> None:
    """What the process does: read a program, answer batches until there are no more."""
    # Whatever is printed here, by the program or the compiler, is no answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    path, source, task = sys.argv[1:]
    try:
        import jax

        from msdspn_jax._cache import enable_compilation_cache
        from msdspn_jax.trained.program import load_program

        enable_compilation_cache()
        program = load_program(path, task=task)
        predict, inputs = jax.jit(program.predict), signature(program.settings).inputs
        _write(answers, b"A", json.dumps(program.settings).encode())
        while True:
            try:
                _, question = _read(sys.stdin.buffer, 2**40)
            except EOFError:
                return
            try:
                found = np.asarray(predict(*_arrays(question, inputs)), "<f4")
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise UserError(f"{path}: the program does not run ({lines[0][:300]})") from error
            _write(answers, b"A", found.tobytes())
    except Exception as error:
        # The name as it was given, not as it had to be to be found.
        words = str(error).replace(path, source)
        _write(answers, b"E", words.encode(errors="backslashreplace")[:_MAX_WORDS])


def _arrays(
    data: bytes, inputs: Sequence[tuple[np.dtype, tuple[int, ...]]]
) -> Iterator[np.ndarray]:
    """The arrays of a batch, which follow each other in ``data``."""
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in inputs]
    batch, start = len(data) // sum(sizes), 0
    for size, (dtype, shape) in zip(sizes, inputs, strict=True):
        part = data[start : start + batch * size]
        yield np.frombuffer(part, dtype).reshape(batch, *shape)
        start += batch * size


def _write(stream: IO[bytes] | None, kind: bytes, data: bytes) -> None:
    assert stream is not None
    stream.write(kind + len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def _read(stream: IO[bytes] | None, limit: int) -> tuple[bytes, bytes]:
    assert stream is not None
    head = stream.read(9)
    length = int.from_bytes(head[1:], "little")
    if len(head) < 9:
        raise EOFError
    if length > limit:
        raise ValueError(f"expected at most {limit} bytes, got {length}")
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return head[:1], data


def _resident(process: int) -> int:
    """Bytes of memory of a process; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGESIZE")
