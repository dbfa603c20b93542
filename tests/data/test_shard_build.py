"""Building shards: every layout, whole or not at all, and a second run goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shard_inputs import Tree, build, clips, samples

from bridle.cli import main
from bridle.data import index
from bridle.data.errors import ShardError
from bridle.data.importers import RawDataSet, plan
from bridle.data.shards import open_shards


def test_folder_keeps_bytes_labels_and_sources(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"dog/a.wav": b"1", "cat/deep/b.WAV": b"2", "top.wav": b"3", "notes.txt": b"x", ".hidden/c.wav": b"4"}
    assert build("folder", tree({**files, "dog/empty.wav": b""}), tmp_path / "out") == 0
    found = samples(tmp_path / "out")
    assert {key: sample.data for key, sample in found.items()} == {"dog/a": b"1", "cat/deep/b": b"2", "top": b"3"}
    assert found["cat/deep/b"].about == {"label": "cat", "source": "cat/deep/b.WAV"}
    assert found["dog/a"].labels == ["dog"] and found["top"].labels == []
    told = capsys.readouterr().err
    assert "1 other files left out" in told and "1 files are missing or empty: dog/empty.wav" in told
    assert (tmp_path / "out" / "missing.txt").read_text() == "dog/empty.wav\n"


def test_keys_have_no_dots_and_do_not_meet(tree: Tree, tmp_path: Path) -> None:
    names = ["v1.0_a.wav", "v1.0_b.wav", "v1_0_a.wav", "x.wav", "x.flac", "ü.wav", "ö.wav"]
    root = tree({name: name.encode() for name in names})
    keys = {sample.source.name: sample.key for sample in plan("folder", RawDataSet(root)).samples}
    assert len(set(keys.values())) == len(names) and not any("." in key for key in keys.values())
    assert keys["v1.0_b.wav"] == "v1_0_b"
    assert keys == {sample.source.name: sample.key for sample in plan("folder", RawDataSet(root)).samples}
    assert build("folder", root, tmp_path / "out") == 0
    assert len(samples(tmp_path / "out", "wav")) == 6


def test_esc50_reads_its_table(tree: Tree, tmp_path: Path) -> None:
    table = b"filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,dog,True,100032,A\n"
    table += b"5-gone-A-49.wav,5,49,hand_saw,False,9,A\n"
    root = tree({"meta/esc50.csv": table, "audio/1-100032-A-0.wav": b"bark"})
    assert build("esc50", root, tmp_path / "out") == 0
    (sample,) = samples(tmp_path / "out").values()
    assert (sample.key, sample.data) == ("1-100032-A-0", b"bark")
    assert sample.about == {"label": "dog", "target": 0, "fold": 1, "source": "1-100032-A-0.wav"}
    assert (tmp_path / "out" / "missing.txt").read_text() == "5-gone-A-49.wav\n"


def test_a_label_that_was_put_right_is_built_again(tree: Tree, tmp_path: Path) -> None:
    table = b"filename,fold,target,category\n1-1-A-0.wav,1,0,cat\n"
    root = tree({"meta/esc50.csv": table, "audio/1-1-A-0.wav": b"bark"})
    for label in ("cat", "dog"):
        (root / "meta/esc50.csv").write_bytes(table.replace(b"cat\n", f"{label}\n".encode()))
        assert build("esc50", root, tmp_path / "out") == 0
        (sample,) = samples(tmp_path / "out").values()
        assert sample.labels == [label]


@pytest.mark.parametrize("template", ["{}", "Y{}", "{}_30.000", "{}_30000_40000", "Y{}_30.000_40.000", "{}-30-40"])
def test_audioset_finds_files_under_their_usual_names(tree: Tree, tmp_path: Path, template: str) -> None:
    table = b"# Segments csv created\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\n"
    table += b'--aE2O5G5WE, 30.000, 40.000, "/m/03fwl,/m/04rlf"\n-0gone_xyz1, 0.000, 10.000, "/m/09x0r"\n'
    root = tree({"balanced_train_segments.csv": table, f"audio/{template.format('--aE2O5G5WE')}.wav": b"sound"})
    assert build("audioset", root, tmp_path / "out") == 0
    (sample,) = samples(tmp_path / "out").values()
    assert (sample.key, sample.labels) == ("--aE2O5G5WE_30000", ["/m/03fwl", "/m/04rlf"])
    assert sample.about["start_s"] == 30.0 and sample.about["end_s"] == 40.0
    assert (tmp_path / "out" / "missing.txt").read_text() == "-0gone_xyz1 (line 5)\n"


@pytest.mark.parametrize(
    ("kind", "files", "match"),
    [
        (
            "folder",
            {"a.txt": b"1"},
            r"no sample of kind folder found \(0 files are missing or empty, 1 others do not belong",
        ),
        ("esc50", {"audio/a.wav": b"1"}, r"esc50\.csv: No such file or directory; is this the folder"),
        (
            "esc50",
            {"meta/esc50.csv": b"filename,fold\na.wav,1\n"},
            "column 'category' is missing; found: filename, fold",
        ),
        (
            "esc50",
            {"meta/esc50.csv": b"filename,fold,target,category\na.wav,x,1,dog\n"},
            "line 2: fold 'x' is not a whole",
        ),
        ("esc50", {"meta/esc50.csv": b"filename,fold,target,category\na.wav,1\n"}, "line 2 has too few fields"),
        ("audioset", {"a.wav": b"1"}, "expected one table of segments, found none; name it with --table FILE.csv"),
        ("audioset", {"x_segments.csv": b"abc, 1.0\n"}, r"line 1: found \['abc', '1\.0'\], expected YTID"),
    ],
)
def test_a_source_laid_out_otherwise_is_refused(
    tree: Tree, tmp_path: Path, kind: str, files: dict[str, bytes], match: str
) -> None:
    with pytest.raises(ShardError, match=match):
        plan(kind, RawDataSet(tree(files)))
    assert build(kind, tree(files), tmp_path / "out") == 1
    assert not list(tmp_path.glob("out/*.tar"))


def test_shards_keep_their_bounds_and_their_bytes(tree: Tree, tmp_path: Path) -> None:
    root = tree(clips(20))
    assert build("folder", root, tmp_path / "few", "--samples-per-shard", "6") == 0
    headers = [index.read_header(path) for path in sorted((tmp_path / "few").glob("*.index"))]
    assert [header.samples for header in headers] == [6, 6, 6, 2] and all(header.sha256 for header in headers)
    assert build("folder", root, tmp_path / "small", "--shard-size", "0.01") == 0
    assert all(path.stat().st_size <= 20_480 for path in (tmp_path / "small").glob("*.tar"))
    assert samples(tmp_path / "few").keys() == samples(tmp_path / "small").keys()
    assert build("folder", root, tmp_path / "again", "--samples-per-shard", "6") == 0
    for path in (tmp_path / "few").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_second_run_keeps_finished_shards_and_repairs_others(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tree(clips(12)), tmp_path / "out"
    build("folder", root, out, "--samples-per-shard", "4")
    whole = {path.name: path.read_bytes() for path in out.glob("shard-*")}
    first, second, third = sorted(out.glob("*.tar"))
    times = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:2000])
    third.with_name(third.name + ".index").unlink()
    (out / ".shard-000002.tar.x.partial").write_bytes(b"torn")
    capsys.readouterr()
    assert build("folder", root, out, "--samples-per-shard", "4") == 0
    assert "3 shards, 2 of them from an earlier run, 12 samples" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.glob("shard-*")} == whole
    assert first.stat().st_mtime_ns == times and not list(out.glob(".*.partial"))


def test_parts_built_side_by_side_are_the_whole_build(tree: Tree, tmp_path: Path) -> None:
    root = tree({**clips(23), "a/empty.wav": b""})
    assert build("folder", root, tmp_path / "whole", "--samples-per-shard", "4") == 0
    parts = [
        subprocess.Popen(
            [sys.executable, "-m", "bridle.cli", "shards", "build", "--kind", "folder", str(root),
             str(tmp_path / "parts"), "--samples-per-shard", "4", "--part", f"{i}/3"]
        )
        for i in range(3)
    ]  # fmt: skip
    assert [part.wait(120) for part in parts] == [0, 0, 0]
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("shard-*")}
    assert len(files) == 12
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").glob("shard-*")} == files
    assert (tmp_path / "parts/missing-0-of-3.txt").read_bytes() == (tmp_path / "whole/missing.txt").read_bytes()
    assert not list((tmp_path / "parts").glob(".*.partial"))


def test_a_part_that_cannot_be_is_refused(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build("folder", tree(clips(2)), tmp_path / "out", "--part", "3/3")
    assert ended.value.code == 2 and "'3/3': expected I/N with I from 0 to N - 1" in capsys.readouterr().err


def test_shards_of_another_build_are_not_mixed_in(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tree(clips(12)), tmp_path / "out"
    build("folder", root, out, "--samples-per-shard", "4")
    assert build("folder", root, out, "--samples-per-shard", "12") == 1
    assert "holds shards that are not of this build (shard-000001.tar and 1 more)" in capsys.readouterr().err
    assert len(samples(out)) == 12


def run_limited(root: Path, out: Path, limit: int) -> subprocess.CompletedProcess[str]:
    """`bridle shards build` in a process whose files may not grow beyond `limit` bytes."""
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    code += "from bridle.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "shards", "build", "--kind", "folder", str(root), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_full_disk_is_one_line_and_leaves_no_torn_file(tree: Tree, tmp_path: Path) -> None:
    root, out = tree(clips(10, 5000)), tmp_path / "out"
    ended = run_limited(root, out, 30_000)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"bridle: error: {out}/shard-000000.tar: could not be written") and "free space in" in last
    assert "Traceback" not in ended.stderr
    assert [path.name for path in out.iterdir()] == [".build.lock"]
    assert run_limited(root, out, 10_000_000).returncode == 0
    assert len(samples(out)) == 10


def test_a_killed_build_goes_on_where_it_stopped(tree: Tree, tmp_path: Path) -> None:
    root, out = tree(clips(60, 20_000)), tmp_path / "out"
    options = ["folder", str(root), str(out), "--samples-per-shard", "1"]
    command = [sys.executable, "-m", "bridle.cli", "shards", "build", "--kind", *options]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 5 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    for path in out.glob("*.tar"):
        index.scan(path)  # whole, or not there
    assert build("folder", root, out, "--samples-per-shard", "1") == 0
    assert len(samples(out)) == 60 and not list(out.glob(".*.partial"))


def test_check_names_every_fault_and_exits_1(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    build("folder", tree(clips(9)), out, "--samples-per-shard", "3")
    assert main(["shards", "check", f"{out}/*.tar"]) == 0
    first, second, third = sorted(out.glob("*.tar"))
    changed = bytearray(first.read_bytes())
    changed[600] ^= 1
    first.write_bytes(changed)
    second.write_bytes(second.read_bytes()[:2000])
    capsys.readouterr()
    assert main(["shards", "check", f"{out}/*.tar"]) == 1
    told = capsys.readouterr()
    assert f"{first}: sha256" in told.out and f"{second}: " in told.out
    assert f"{third}: 3 samples, {third.stat().st_size} bytes: good" in told.err
    assert "3 shards, 6 samples, 2 faults" in told.out


def test_check_decodes_with_a_modality(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = open_shards(["builtin:audio-heldout"], extensions=["flac"])
    out = tmp_path / "out"
    build("folder", tree({"good/a.flac": shards.read(0).data, "bad/b.flac": b"no sound"}), out)
    capsys.readouterr()
    assert main(["shards", "check", f"{out}/*.tar", "--modality", "audio"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and f"{out}/shard-000000.tar: sample 'bad/b' (flac): " in told[0]
    assert main(["shards", "check", f"{out}/*.tar"]) == 0


def test_index_command_writes_hashes(tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build("folder", tree(clips(4)), out)
    beside = out / "shard-000000.tar.index"
    before = beside.read_bytes()
    beside.unlink()
    samples(out)
    assert json.loads(beside.read_text().splitlines()[0])["sha256"] is None
    assert main(["shards", "index", f"{out}/*.tar"]) == 0
    assert beside.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "--kind", "folders", "a", "b"],
        ["check"],
        ["build", "--kind", "folder", "a", "b", "--shard-size", "0"],
        ["build", "--kind", "folder", "a", "s3://bucket/b"],
    ],
)
def test_wrong_arguments_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["shards", *arguments])
    assert ended.value.code == 2


def test_missing_shards_exit_1_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "check", "no/such-*.tar"]) == 1
    assert capsys.readouterr().err.startswith("bridle: error: shards 'no/such-*.tar': matches nothing; check the path")
