"""Where image paths start: the source file's folder, one folder for all, or one for each file.

The last is InternVL's meta file, which MMPR comes with: a JSON object whose entries name an
annotation file and the root of its images ({"name": {"root": ..., "annotation": ...}, ...}).
"""

from pathlib import Path, PurePosixPath

from data_shards.sources import json_text
from data_shards.sources.rows import SourceError


class ImageRoots:
    """The folder for each source file.

    Raises:
        SourceError: the meta file cannot be read, or names no folder that is there.
    """

    def __init__(self, image_root: str | None, files: list[Path]) -> None:
        self._folders: dict[Path, Path] = {}
        if image_root is None:
            self._folders = {path: path.parent for path in files}
        elif image_root.endswith(".json"):
            by_name = _read_meta(Path(image_root))
            for path in files:
                if path.name not in by_name:
                    raise SourceError(f"{image_root} has no annotation {path.name}; see {path}")
                self._folders[path] = _found(Path(image_root), by_name[path.name])
        else:
            self._folders = {path: Path(image_root) for path in files}

    def of(self, file: Path) -> Path:
        """Where the image paths of this file start."""
        return self._folders[file]


def _read_meta(path: Path) -> dict[str, str]:
    """Name of an annotation file -> root of its images, as written."""
    try:
        meta = json_text.parse_object(path.read_bytes())
        return {
            PurePosixPath(entry["annotation"]).name: str(entry["root"]) for entry in meta.values()
        }
    except OSError as error:
        raise SourceError(f"{path} cannot be opened ({error.strerror}); correct the path") from None
    except (json_text.JsonError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path} is not a meta file of annotations with their roots ({error}); restore it, or "
            "name a folder in image_root"
        ) from None


def _found(meta: Path, root: str) -> Path:
    """The folder `root` below that of its meta file. Roots are written as seen from where their
    makers kept the data set, so leading folders are dropped until one is there."""
    parts = [part for part in PurePosixPath(root).parts if part != "/"]
    if ".." not in parts:
        for first in range(max(len(parts) - 1, 1)):
            folder = meta.parent.joinpath(*parts[first:])
            if folder.is_dir():
                return folder
    raise SourceError(
        f"{meta} names the image folder {root}, which is not below {meta.parent}; unpack the "
        "images there"
    )
