"""A trainer that is killed while it asks for a loader leaves no traceback of a library behind."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from multiprocessing import forkserver
from bridle.processes.template import start_template
start_template()
if sys.argv[1] == "half":
    asked = forkserver.connect_to_new_process([])  # the child is forked and waits to hear what to do
    os.read(asked[0], 8)
    os.write(asked[1], b"\\x80\\x04\\x95")  # the beginning of a pickle
else:
    asked = forkserver.connect_to_new_process([])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["before a word", "half"])
def test_a_trainer_killed_in_a_request_leaves_no_traceback(moment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, moment],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )  # returns when the last of its processes has closed its output
    assert done.returncode == -9
    assert done.stdout == ""
