"""The fault corpus: each fault, the rule that must catch it, and whether it did.

python tests/benchmarks/bench_faults.py            prints the table; exits with 1 if a fault was missed
python tests/benchmarks/bench_faults.py --write    also writes the table into docs/faults.md
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

from harness import ROOT
from rich.console import Console
from rich.table import Table

DOCS, MARK = ROOT / "docs" / "faults.md", "| fault | caught by | and by |\n"


def main() -> None:
    from tests.components.data.faults import Corpus, table_of_faults

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder))
        clean = corpus.judge(corpus.clean)
        rows = table_of_faults(corpus)
    caught = sum(right for *_, right in rows)
    table = Table("fault", "caught by", "and by", "", title=f"{caught} of {len(rows)} faults are caught by their rules")
    for fault, rule, also, right in rows:
        table.add_row(fault, rule, also, "yes" if right else "NO")
    Console().print(table)
    print(f"broken on clean data: {sorted(clean) or 'nothing'}")
    if "--write" in sys.argv[1:]:
        head, _, _ = DOCS.read_text().partition(MARK)
        lines = [f"| {fault} | `{rule}` | {', '.join(f'`{one}`' for one in also.split(', ') if one)} |\n"
                 for fault, rule, also, _ in rows]  # fmt: skip
        DOCS.write_text(head + MARK + "| --- | --- | --- |\n" + "".join(lines))
    if clean or caught < len(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
