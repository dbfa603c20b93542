"""Run by test_node_data.py as each of two ranks: opens the built-in sample, and says how many headers it read."""

from __future__ import annotations

import hashlib
import json
import sys

from bridle.config import DataSettings, DataSource
from bridle.data import local_index
from bridle.training.node_data import open_on_node
from bridle.training.rendezvous import join, leave

read = []
original = local_index.index.read_header
local_index.index.read_header = lambda path: read.append(path) or original(path)
ranks = join()
settings = DataSettings(cache=sys.argv[1])
shards = open_on_node([DataSource(shards=["builtin:audio"])], ["ogg", "flac"], settings, ranks)
digest = hashlib.sha256(b"".join(shards.data(i) for i in range(len(shards)))).hexdigest()
sys.stdout.write(json.dumps([ranks.rank, len(read), len(shards), digest]) + "\n")  # in one piece: two ranks share it
leave()
