"""Write the golden files anew."""

import tempfile
from pathlib import Path

from tests.slurm.golden import CLUSTERS, DIRECTORY, written


def main() -> None:
    for path in DIRECTORY.glob("*.sh"):
        path.unlink()
    for cluster in CLUSTERS:
        with tempfile.TemporaryDirectory() as directory:
            for name, text in written(cluster, Path(directory).resolve()).items():
                (DIRECTORY / name).write_text(text, encoding="utf-8")
    print(f"wrote {len(list(DIRECTORY.glob('*.sh')))} scripts to {DIRECTORY}")


if __name__ == "__main__":
    main()
