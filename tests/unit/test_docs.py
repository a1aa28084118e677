"""What the documents say is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_features_name_their_tests():
    """Every row of docs/features.md names a test, and it exists."""
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| ") and "| feature |" not in row]
    assert rows
    for row in rows:
        (path, name), *rest = re.findall(r"`(tests/\w+/\w+\.py)::(\w+)`", row)
        assert not rest
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), row
        assert re.search(r"\| (works|engine does not start|request refused) \|", row), row
