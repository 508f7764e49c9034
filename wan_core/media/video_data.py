"""A clip whose frames are read on demand."""

import operator
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .pixels import to_eight_bit
from .reader import Clip, MediaError, frame_files, frames, probe
from .writer import save_frames


class VideoData:
    """A video, an animation, or a folder of frames as a sequence of RGB pictures, in order of time.

    It is accepted wherever a list of pictures is. Reading in order is cheap; going back decodes the clip again from its
    start.

    Attributes:
        height, width: frames are cropped at the centre and resized to this, in pixels; None leaves them unchanged.
        length: the number of frames, None for all.
    """

    def __init__(
        self,
        video_file: str | Path | None = None,
        image_folder: str | Path | None = None,
        height: int | None = None,
        width: int | None = None,
        file_list: Sequence[str] | None = None,
    ) -> None:
        """Give a file or a folder; of a folder `file_list` names the pictures, or they are ordered by the numbers in
        their names.

        Raises:
            MediaError: there is none, or it cannot be read.
            ValueError: neither or both are given, or a side is not above 0.
        """
        if (video_file is None) == (image_folder is None):
            raise ValueError("VideoData needs video_file or image_folder, and not both.")
        self._source: list[Path] | Clip
        if image_folder is not None:
            folder = Path(image_folder)
            self._source = frame_files(folder) if file_list is None else [folder / name for name in file_list]
        elif video_file is not None:
            self._source = probe(Path(video_file))
        self._decoder: Iterator[np.ndarray] = iter(())
        self._next = 0
        self._last: np.ndarray | None = None
        self.length: int | None = None
        self.set_shape(height, width)

    def __len__(self) -> int:
        return self._stored if self.length is None else self.length

    def __getitem__(self, index: int) -> Image.Image:
        """Frame `index`; negative numbers count from the end.

        Raises:
            IndexError: there is no such frame.
            MediaError: it cannot be decoded.
        """
        place = operator.index(index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        picture = Image.fromarray(to_eight_bit(self._levels(place)))
        if self.height is None or self.width is None or picture.size == (self.width, self.height):
            return picture
        return _cropped(picture, self.width, self.height).resize((self.width, self.height))

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[index] for index in range(len(self)))

    @property
    def _stored(self) -> int:
        return len(self._source) if isinstance(self._source, list) else self._source.num_frames

    def _levels(self, place: int) -> np.ndarray:
        if isinstance(self._source, list):
            return next(frames(self._source[place]))
        if place < self._next - 1:
            self._next = 0
        if self._next == 0:
            self._decoder = frames(self._source.path)
        while self._last is None or self._next <= place:
            self._last = next(self._decoder, None)
            if self._last is None:
                raise MediaError(f"{self._source.path}: frame {self._next} cannot be decoded")
            self._next += 1
        return self._last

    def raw_data(self) -> list[Image.Image]:
        """All frames at once."""
        return list(self)

    def set_length(self, length: int | None) -> None:
        """Let the first `length` frames count; None for all.

        Raises:
            ValueError: there are fewer.
        """
        if length is not None and not 1 <= operator.index(length) <= self._stored:
            raise ValueError(f"length must be from 1 to {self._stored}, the frames that there are; got {length}.")
        self.length = length

    def set_shape(self, height: int | None, width: int | None) -> None:
        """Bring frames to this size; None for either leaves them as they are.

        Raises:
            ValueError: a side is not above 0.
        """
        for name, side in (("height", height), ("width", width)):
            if side is not None and not (isinstance(side, (int, np.integer)) and side > 0):
                raise ValueError(f"{name} must be a whole number above 0; got {side!r}.")
        self.height, self.width = height, width

    def shape(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        width, height = self[0].size
        return height, width

    def save_images(self, folder: str | Path) -> None:
        """Write each frame as `<number>.png` into `folder`, in place of what is there.

        Raises:
            ValueError: it cannot be written to.
        """
        save_frames(self, folder)


def _cropped(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The largest part around the centre that has the shape of `width` x `height`; sides are rounded down."""
    if picture.height / picture.width < height / width:
        kept = int(picture.height / height * width), picture.height
    else:
        kept = picture.width, int(picture.width / width * height)
    left, top = (picture.width - kept[0]) // 2, (picture.height - kept[1]) // 2
    return picture.crop((left, top, left + kept[0], top + kept[1]))
