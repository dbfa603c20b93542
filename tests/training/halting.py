"""A moment at which a training process waits for its test: however busy the machine is, it is not missed.

    halt = Halt("[1 encoder] the end of step 4", tmp_path / "halt")
    words, variables = halt.put_in(words, variables)
    process = WarmProcess(words, variables, ...)
    ...                                    # wait until halt.reached(); signals, kills
    halt.end()

A moment is a place that the watchdog is told of, or "row 4": metrics.jsonl has so many rows. Rank 0 waits there, once.
"""

from __future__ import annotations

import os
import runpy
import time
from pathlib import Path


class Halt:
    """The test's side of it. file: there while the process waits."""

    def __init__(self, at: str, file: Path) -> None:
        self.at, self.file = at, file

    def put_in(self, words: list[str], variables: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """The command and the environment of one of our programs, with this moment in them."""
        self.file.unlink(missing_ok=True)  # of one that was killed here
        program = next(word for word in words if word.endswith(".py"))
        more = {"HALT_AT": self.at, "HALT_FILE": str(self.file), "HALT_PROGRAM": program}
        return [__file__ if word == program else word for word in words], {**variables, **more}

    def reached(self) -> bool:
        """Whether the process waits."""
        return self.file.exists()

    def end(self) -> None:
        """Lets it go on."""
        self.file.unlink()


def install(at: str, file: Path) -> None:
    """In the process itself."""
    from bridle.training.metrics import RunLog
    from bridle.training.watchdog import Watchdog

    tell, write, due = Watchdog.at, RunLog.write, [at]

    def wait() -> None:
        due.clear()
        file.touch()
        while file.exists():
            time.sleep(0.01)

    def telling(self: Watchdog, place: str) -> None:
        tell(self, place)
        if place in due:
            wait()

    def writing(self: RunLog, row: dict) -> None:
        write(self, row)
        if due and due[0] == f"row {len(self.path.read_text().splitlines())}":
            wait()

    Watchdog.at, RunLog.write = telling, writing  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":
        install(os.environ["HALT_AT"], Path(os.environ["HALT_FILE"]))
    runpy.run_path(os.environ["HALT_PROGRAM"], run_name="__main__")
