"""Programs that take turns in processes of their own, so that none disturbs another.

Libraries bring their own thread pools (three OpenMP runtimes come with torch, scikit-learn and pomegranate), whose idle
threads wait by spinning: in one process they take the cores from whoever's turn it is. Importing pomegranate alone made
a torch program three times as slow on two cores.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable
from typing import Any

_REST = 0.3  # seconds before a run, in which the threads of the run before stop spinning (OpenMP's wait up to 0.2)

Build = Callable[[], Callable[..., Any]]


class Apart:
    """A program in a process of its own, forked here: nothing may have started threads before.

    build: makes the program, in that process (there its library is imported). summary: what of its result is handed over.
    """

    def __init__(self, build: Build, summary: Callable[[Any], Any] = lambda result: None) -> None:
        context = multiprocessing.get_context("fork")
        self._here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, build, summary), daemon=True)
        process.start()
        there.close()

    def seconds(self, *args: Any) -> float:
        """The time of one run; what hands its result over is not part of it."""
        time.sleep(_REST)
        return float(self._ask(False, args))

    def result(self, *args: Any) -> Any:
        """The summary of one run."""
        return self._ask(True, args)

    def _ask(self, wanted: bool, args: tuple[Any, ...]) -> Any:
        self._here.send((wanted, args))
        answer = self._here.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Any, build: Build, summary: Callable[[Any], Any]) -> None:
    warnings.simplefilter("ignore")  # peers warn that they did not converge, as they were told
    program: Callable[..., Any] | None = None
    while True:
        try:
            wanted, args = pipe.recv()
        except EOFError:
            return
        try:
            program = program or build()
            begin = time.perf_counter()
            found = program(*args)
            seconds = time.perf_counter() - begin
            pipe.send(summary(found) if wanted else seconds)
        except Exception as error:
            pipe.send(error)
