"""python tests/lines FOLDER MINIMUM: the share of lines that ran, and which did not."""

import json
import sys
from pathlib import Path

from coverage import Coverage, CoverageData

ROOT = Path(__file__).parents[2]


def main(folder: str, minimum: str) -> None:
    file = Path(folder, "lines.coverage")
    file.unlink(missing_ok=True)
    data = CoverageData(str(file))
    ours = {str(path) for path in (ROOT / "bdpo_plugin").rglob("*.py")}
    data.add_lines({path: [] for path in ours})
    for saved in Path(folder).glob("*.json"):
        lines = json.loads(saved.read_text())
        data.add_lines({path: lines[path] for path in ours & lines.keys()})
    data.write()
    report = Coverage(data_file=str(file), config_file=str(ROOT / "pyproject.toml"))
    report.load()
    total = report.report(show_missing=True, skip_covered=True, skip_empty=True)
    if total < float(minimum):
        sys.exit(f"{total:.1f} % of the lines of bdpo_plugin ran, less than {minimum} %.")


if __name__ == "__main__":
    main(*sys.argv[1:])
