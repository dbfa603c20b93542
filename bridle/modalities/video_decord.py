"""decord as the decoder: for shards you trust and content it is known to decode exactly; all else it refuses."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import av

from bridle.modalities.clip import UndecodableError, WrongKindError
from bridle.modalities.video_crop import Frame, Prepare

if TYPE_CHECKING:
    from bridle.modalities.video_decode import PyAVSource

EXACT = {("mov", "h264"), ("matroska", "h264"), ("matroska", "vp9"), ("mov", "mpeg4")}
"""Containers and codecs whose frames equal PyAV's, tested. Not HEVC (wrong frames), AV1 (not decoded) nor MPEG-TS
(hangs); playlists, which decord follows to other files and hosts, never get here."""


class DecordSource:
    """A `Source` by decord, of bytes that `PyAVSource` has opened, checked and counted."""

    def __init__(self, data: bytes, checked: PyAVSource) -> None:
        import decord  # not above: the package has no build for some machines

        found = (checked.container_name, checked.codec)
        if found not in EXACT:
            raise WrongKindError(f"video: decord is not exact on {found[1]} in {found[0]}; set clip.decoder: pyav")
        if any(packet.is_discard for packet in checked.packets):
            raise WrongKindError("video: decord ignores the file's edit list; set clip.decoder: pyav")
        if checked.mirrored():
            raise WrongKindError("video: decord does not mirror as the display matrix says; set clip.decoder: pyav")
        if _has_open_groups(checked.packets):
            raise WrongKindError("video: decord gives wrong frames in open groups of pictures; set clip.decoder: pyav")
        try:
            self._reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
        except decord.DECORDError as error:
            raise UndecodableError(f"video: corrupt or truncated (decord: {str(error).splitlines()[-1]})") from error
        self.count = len(self._reader)
        if self.count != checked.count:
            raise WrongKindError(
                f"video: decord counts {self.count} frames, its container holds {checked.count}; set clip.decoder: pyav"
            )

    def pick(self, indices: Sequence[int], prepare: Prepare) -> Iterator[Frame]:
        """See `Source`."""
        for index in indices:
            yield self._frame(index, prepare)

    def walk(self, stride: int, prepare: Prepare) -> Iterator[Frame]:
        """See `Source`."""
        for index in range(self.count):
            yield self._frame(index, prepare if index % stride == 0 else None)

    def _frame(self, index: int, prepare: Prepare | None) -> Frame:
        first = float(self._reader.get_frame_timestamp(0)[0])
        start, end = (float(second) - first for second in self._reader.get_frame_timestamp(index))
        rgb = self._reader[index].asnumpy()  # upright: decord applies the display matrix
        pixels = prepare(av.VideoFrame.from_ndarray(rgb, format="rgb24")) if prepare else None
        return Frame(index, start, end, pixels)


def _has_open_groups(packets: Sequence[Any]) -> bool:
    """Whether a picture stored after a key frame is shown before it, so that a jump to that key cannot give it."""
    key = None
    for packet in packets:
        if packet.is_keyframe:
            key = packet.pts
        elif key is not None and packet.pts is not None and packet.pts < key:
            return True
    return False
