"""The page of all keys says what the schema says."""

from pipelines.config import Config
from pipelines.config.reference import REFERENCE_FILE, reference_text, tables


def test_the_page_is_in_step():
    assert REFERENCE_FILE.read_text(encoding="utf-8") == reference_text(), "run python -m pipelines.config.reference"


def test_every_key_of_the_schema_is_on_the_page():
    schema = Config.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    expected = sorted(
        name
        for section in sections
        for name, entry in section.get("properties", {}).items()
        if "const" not in entry  # the tag of a kind is its table's title
    )
    shown = sorted(name for keys in tables() if "`adapter` of" not in keys.title for name in keys.properties)
    assert shown == expected


def test_every_key_is_explained():
    silent = [f"{keys.title}: {name}" for keys in tables() for name, entry in keys.properties.items()
              if not entry.get("description")]  # fmt: skip
    assert not silent, "Field(description=…) is missing"
