"""Bulk work on a Ray cluster, and the codes of a Ray Data pipeline. Needs ``pip install 'bridle[ray]'``.

Ray decides where things run, starts again what dies, and moves and spills data; nothing of that is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from bridle.errors import MistakeError
from bridle.tokens.bulk import Prepared
from bridle.tokens.parts import Part, read_parts
from bridle.tokens.state import State

if TYPE_CHECKING:
    import ray.data

SAMPLES_AT_ONCE = 32


@dataclass(frozen=True)
class ModelSource:
    """What an actor loads its model from: a folder that every machine sees, or a hub id."""

    folder: str
    dtype: str = "float32"
    device: str = "cpu"

    def load(self) -> Any:
        """The model, on this actor's device; Ray shows an actor its own GPU as the first."""
        from bridle.model_folder import load

        return load(self.folder, "cuda" if self.device.startswith("cuda") else self.device, self.dtype)


def tokenize(
    dataset: ray.data.Dataset,
    model: str,
    *,
    column: str = "bytes",
    concurrency: int | tuple[int, int] = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    device: str | None = None,
    dtype: str = "float32",
    batch_size: int = SAMPLES_AT_ONCE,
) -> ray.data.Dataset:
    """Adds codes to a Ray Data set of encoded files, as ``ray.data.read_binary_files`` and others give.

    New columns: `codes` (M lists of N), `grid` (a struct), `duration_s`, and `error`: why a file has no codes. All
    others stay. Codes are what ``bridle.load(model).tokenize`` gives for the file.

    Args:
        model: folder that every machine sees, or hub id. column: of the files' bytes.
        concurrency: actors, or (fewest, most) for a pool that grows. num_cpus, num_gpus: of an actor.
        device, dtype: of the model; by default a GPU where `num_gpus` is above 0. batch_size: files an actor is given.
    """
    source = ModelSource(model, dtype, device or ("cuda" if num_gpus else "cpu"))
    return dataset.map_batches(
        _Tokenize,
        fn_constructor_args=(source, column),
        batch_format="pyarrow",
        batch_size=batch_size,
        concurrency=concurrency,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


class _Tokenize:
    """The actor of `tokenize`: batches windows across the files it is given."""

    def __init__(self, source: ModelSource, column: str) -> None:
        from bridle.tokens.stage import Tokenizer

        self.tokenizer, self.column = Tokenizer(source.load()), column

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        if self.column not in table.column_names:
            raise MistakeError(f"column '{self.column}' is not in {table.column_names}; name the bytes' with column=")
        found = list(self.tokenizer(table.column(self.column).to_pylist()))
        axes = self.tokenizer.model.modality.axes
        codes = [None if one.stream is None else one.stream.codes.T.tolist() for one in found]
        grids = [None if one.stream is None else dict(one.stream.grid) for one in found]
        seconds = [None if one.stream is None else one.stream.duration_s for one in found]
        columns = {
            "codes": pa.array(codes, pa.list_(pa.list_(pa.int32()))),
            "grid": pa.array(grids, pa.struct([(axis, pa.int32()) for axis in axes])),
            "duration_s": pa.array(seconds, pa.float64()),
            "error": pa.array([one.error for one in found], pa.string()),
        }
        for name, values in columns.items():
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, values)
        return table


def run_job(state: State, source: ModelSource, actors: int | None = None, num_gpus: float = 0) -> list[Part]:
    """A bulk job, unit by unit, by a pool of actors that grows with the cluster; the files are those of `Job.run`.

    The output must be a place that every machine sees. A unit whose actor dies is done again.

    Args:
        actors: of the pool, at most; none: one for each unit. num_gpus: of an actor.

    Raises:
        ImportError: Ray is missing.
        TooManySkippedError, ShardError, OSError, ValueError: see `Job.run`; or this machine does not see the output.
    """
    import ray
    import ray.data

    prepared = state.prepared
    state.look()
    missing = state.missing
    if missing:
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False  # the command has its own
        units = ray.data.from_items([{"unit": unit} for unit in missing], override_num_blocks=len(missing))
        rows = units.map(
            cast(Any, _Unit),
            fn_constructor_args=(prepared, source),
            concurrency=(1, min(actors or len(missing), len(missing))),
            num_cpus=1,
            num_gpus=num_gpus,
            max_restarts=-1,
            max_task_retries=-1,
        )
        for row in rows.iter_rows():
            (part,) = read_parts(prepared.store, [prepared.inputs.units[row["unit"]].name])
            if part is None:
                raise OSError(f"{prepared.store.address}: an actor wrote there, and this machine does not see it")
            state.add(row["unit"], part, here=True)
    return state.in_order()


class _Unit:
    """The actor of `run_job`: one unit after the other, decoded in its own process."""

    def __init__(self, prepared: Prepared, source: ModelSource) -> None:
        from bridle.tokens.engine import Engine

        self.prepared = prepared
        self.engine = Engine(source.load(), prepared.inputs, batch=prepared.batch, workers=0)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        from bridle.tokens.job import write_part

        (finished,) = self.engine.run(iter([int(row["unit"])]))
        write_part(self.prepared, finished)
        return {"unit": row["unit"]}
