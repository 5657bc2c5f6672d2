import re
from pathlib import Path

from server.gateway import settings

TEXT = (Path(__file__).parents[4] / "docs" / "gateway.md").read_text()
SOURCES = (Path(__file__).parents[4] / "server" / "gateway").glob("*.py")


def test_the_page_shows_every_setting_and_its_default():
    example = re.search(r"```toml\n(.*?)```", TEXT, re.DOTALL)[1]
    shown = settings.parse(example, name="docs/gateway.md")
    for name, section in settings.GatewayConfig.model_fields.items():
        given = getattr(shown, name)
        assert given.model_fields_set == section.annotation.model_fields.keys()
        defaults = {key: field.default for key, field in type(given).model_fields.items() if not field.is_required()}
        assert {key: getattr(given, key) for key in defaults} == defaults


def test_the_page_explains_every_reason():
    written = "".join(path.read_text() for path in SOURCES)
    told = re.findall(r"Refused\(\d+, \"([a-z_]+)\"", written)
    cut = re.findall(r"_refuse\(\"([a-z_]+)\"", written) + re.findall(r"log\.write\([^)]*?, \"([a-z_]+)\"", written)
    reasons = {*told, *cut, "revoked", "not_in_roster", "slow_answer", "superlink"}
    assert {"path", "body_size", "slow_header", "connections", "bundle_not_listed"} <= reasons
    assert {reason for reason in reasons if f"`{reason}`" not in TEXT} == set()
