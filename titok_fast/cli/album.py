"""Where the pictures of a command go: single files, a sheet, both or nowhere."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from titok_fast.io.images import grid, save_png


class Album:
    """Where pictures go: a folder of PNG files, one sheet, both, or nowhere.

    Args:
        names: file names in order, one per picture.
        out: folder, made if need be; None writes no single files.
        sheet: PNG file that shows all pictures in rows; None writes none.
        force: existing files may be replaced.
        columns: pictures in a row of the sheet; by default it is as square as it gets.

    Raises:
        ValueError: the sheet's name does not end in .png, or there is nothing to put on it.
        OSError: a file to write exists (without `force`), or a folder cannot be had.
    """

    def __init__(
        self,
        names: Sequence[str],
        out: Path | None,
        sheet: Path | None,
        *,
        force: bool,
        columns: int | None = None,
    ) -> None:
        self.paths = [out / name for name in names] if out else []
        self.sheet, self.columns, self.done = sheet, columns, 0
        self._kept: list[Image.Image] = []
        if sheet is not None and (sheet.suffix.lower() != ".png" or not names):
            raise ValueError(f"--grid wants a name ending in .png, and a picture; got {sheet}")
        refuse_existing([*self.paths, *([sheet] if sheet else [])], force=force)
        if sheet is not None:
            sheet.parent.mkdir(parents=True, exist_ok=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)

    def add(self, pictures: list[Image.Image]) -> None:
        """Write the next pictures."""
        for picture in pictures:
            if self.paths:
                save_png(self.paths[self.done], picture)
            if self.sheet is not None:
                self._kept.append(picture)
            self.done += 1

    def close(self) -> None:
        """Write the sheet, if one is wanted."""
        if self.sheet is not None:
            save_png(self.sheet, grid(self._kept, self.columns))


def refuse_existing(paths: Sequence[Path], *, force: bool) -> None:
    """Raise FileExistsError if a file would be replaced without `force`."""
    existing = [path for path in paths if path.exists()]
    folders = [path for path in existing if path.is_dir()]
    if folders:
        raise IsADirectoryError(f"{folders[0]} is a folder; a file is to be written there")
    if existing and not force:
        count = f"{len(existing)} outputs exist" if len(existing) > 1 else "the output exists"
        raise FileExistsError(f"{count} already: {existing[0]}; pass --force to overwrite")
