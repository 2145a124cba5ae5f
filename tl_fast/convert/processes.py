"""A function over many items in forked processes, with the results in order; their large buffers come back through
shared memory.

concurrent.futures' process pool copies every result through a pipe, and its three threads compete with the caller for
the GIL. Here each process has a pipe of its own and the processes get items in turn, so only the caller's thread is
needed.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Self

AHEAD = 4  # items of a process whose results are not yet consumed
SLOT = (
    8 << 20
)  # bytes of shared memory for one result; pages are allocated at their first use. Larger results are piped


class ProcessDied(RuntimeError):
    """A process ended without an answer."""


class Forked:
    """`count` processes that run `function`. They are forked when the context is entered, and see the caller's objects
    as they were then.

    function: picklable argument -> picklable result, whose PickleBuffers (pickle protocol 5) arrive as memoryviews that
    hold until the next result is asked for. An exception of the function is raised in the caller; it is pickled, so it
    must be one that its message alone makes.
    """

    def __init__(self, count: int, function: Callable[[Any], Any]) -> None:
        self._count, self._function = count, function
        self._slots = [mmap.mmap(-1, SLOT) for _ in range(count * AHEAD)]
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("fork")
        for number in range(self._count):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            process = context.Process(target=self._serve, args=(number, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            theirs.close()
        return self

    def _serve(self, number: int, pipe: Connection) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to act on
        for other in self._pipes:  # so that the pipe ends when the caller does, however it ends
            other.close()
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            for turn in itertools.count():
                item = pipe.recv()
                try:
                    pipe.send(self._pack((True, self._function(item)), self._slot(number, turn)))
                except (BrokenPipeError, ConnectionResetError):
                    return
                except BaseException as error:
                    pipe.send(((), pickle.dumps((False, error))))

    def _slot(self, number: int, turn: int) -> mmap.mmap:
        return self._slots[number * AHEAD + turn % AHEAD]

    @staticmethod
    def _pack(answer: tuple[bool, Any], slot: mmap.mmap) -> tuple[list[int], bytes]:
        """(sizes of the buffers that were put into `slot`, the rest of the answer pickled)."""
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(answer, 5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        sizes = [view.nbytes for view in views]
        if sum(sizes) > SLOT:
            return [], pickle.dumps(answer, 5)
        start = 0
        for view, size in zip(views, sizes, strict=True):
            slot[start : start + size] = view
            start += size
        return sizes, data

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """`map(function, items)`, with at most AHEAD items a process begun and not yet consumed. Raises ProcessDied."""
        begun = received = 0
        for item in items:
            with self._expect_alive(begun):
                self._pipes[begun % self._count].send(item)
            begun += 1
            if begun - received == self._count * AHEAD:
                yield self._receive(received)
                received += 1
        for number in range(received, begun):
            yield self._receive(number)

    def _receive(self, number: int) -> Any:
        with self._expect_alive(number):
            sizes, data = self._pipes[number % self._count].recv()
        slot = memoryview(self._slot(number % self._count, number // self._count))
        ends = list(itertools.accumulate(sizes))
        ok, result = pickle.loads(data, buffers=[slot[end - size : end] for size, end in zip(sizes, ends, strict=True)])
        if not ok:
            raise result
        return result

    @contextlib.contextmanager
    def _expect_alive(self, number: int) -> Iterator[None]:
        try:
            yield
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            process = self._processes[number % self._count]
            process.join(1)
            raise ProcessDied(
                f"a worker process ended by itself (exit code {process.exitcode}; -9 usually means that the machine ran"
                " out of memory)"
            ) from error

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():  # in a read that does not end
                process.kill()
                process.join()
