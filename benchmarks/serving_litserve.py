"""LitServe with the same functions as the service; started by serving.py.

python benchmarks/serving_litserve.py MODEL_DIR PORT MAX_BATCH BATCH_TIMEOUT THREADS WORKERS
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import torch

import bridle


class Tokenize(litserve.LitAPI):  # type: ignore[misc]
    """A request's windows are decoded where the model is, as LitServe does it."""

    folder = ""
    threads = 1

    def setup(self, device: str) -> None:
        """Once in each worker."""
        torch.set_num_threads(self.threads)
        self.model = bridle.load(self.folder)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads annotations
        """A multipart form to the file's windows."""
        return [clip.values for clip in self.model.modality.windows(request["file"].file.read())]

    def batch(self, inputs: list[Any]) -> Any:
        """Requests as they are: they have different numbers of windows."""
        return inputs

    def predict(self, inputs: Any) -> Any:
        """The windows of all requests in batches."""
        windows = [window for one in inputs for window in one]
        codes = []
        for start in range(0, len(windows), self.max_batch_size):
            codes += self.model.codes(torch.stack(windows[start : start + self.max_batch_size])).cpu().tolist()
        rest = iter(codes)
        return [[next(rest) for _ in one] for one in inputs]

    def unbatch(self, output: Any) -> Any:
        """As they are."""
        return output

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        """Windows of N lists of M codes."""
        return {"clips": output}


if __name__ == "__main__":
    folder, port, batch, timeout, threads, workers = sys.argv[1:]
    api = Tokenize(max_batch_size=int(batch), batch_timeout=float(timeout))
    api.folder, api.threads = folder, int(threads)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers), timeout=120)
    server.run(host="127.0.0.1", port=int(port), log_level="error", generate_client_file=False)
