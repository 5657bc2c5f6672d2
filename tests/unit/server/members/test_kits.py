import hashlib
import json
import subprocess
import tomllib

import pytest

from common.errors import ConfigError
from common.run import config
from common.trust import kit
from server.cli import app as cli
from tests.samples.federations import TEXT


def test_a_kit_holds_no_private_key_and_sums_that_sha256sum_reads(joined, tmp_path):
    folder = joined.unpack(joined.join("cedar"), tmp_path / "kit")
    for path in folder.iterdir():
        assert b"PRIVATE KEY" not in path.read_bytes()
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)
    assert {path.name for path in folder.iterdir()} == {
        *kit.REQUIRED,
        "SHA256SUMS",
        "SHA256SUMS.sig",
        "policy.toml",
        "node.toml",
        "compose.yaml",
        "silotune-agent.service",
        "silotune-link.service",
        "silotune-courier.service",
    }
    written = joined.folder / "kits" / "cedar"
    assert all((written / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())


def test_the_templates_are_what_their_readers_expect(joined):
    folder = joined.folder / "kits" / "alder"
    node = config.load_node(folder / "node.toml")
    assert (node.site.name, node.agent.courier_group) == ("alder", "silotune")
    policy = tomllib.loads((folder / "policy.toml").read_text())
    assert policy["federation"] == {"id": "onco-eu", "operators": [], "roster_epoch_min": 2}
    assert (policy["lora"]["targets"], policy["models"]["allow"]) == ([], [])
    agent = (folder / "silotune-agent.service").read_text()
    for line in ("PrivateNetwork=yes", "ProtectSystem=strict", "NoNewPrivileges=yes", "LimitCORE=0"):
        assert f"\n{line}\n" in agent
    assert "FLWR_TELEMETRY_ENABLED=0" in agent
    for name in ("courier", "link"):
        unit = (folder / f"silotune-{name}.service").read_text()
        assert "User=silotune-courier" in unit
        assert "InaccessiblePaths=-/data" in unit
    link = (folder / "silotune-link.service").read_text()
    assert "--gateway gateway.onco.example:9443" in link
    assert "--node /etc/silotune/node.toml" in link
    assert "-/etc/silotune" not in link.split("InaccessiblePaths=")[1].splitlines()[0]
    own = (folder / "node.toml").read_text()
    named = config.parse_node(own.replace("# proxy", "proxy"), name="node.toml").link
    assert (named.proxy, named.proxy_auth_file[:9]) == ("http://proxy.hospital.example:3128", "/var/lib/")
    with pytest.raises(ConfigError, match=r"agent\.policy_signer  is not filled in: write your own value"):
        config.parse_node(own.replace("# policy", "policy").replace("# identity", "identity"), name="node.toml")


def test_in_the_compose_file_the_agent_has_no_network_and_the_courier_no_rows(joined):
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((joined.folder / "kits" / "alder" / "compose.yaml").read_text())["services"]
    assert services["agent"]["network_mode"] == "none"
    for name in ("link", "courier"):
        assert not any("/data" in volume or "agent" in volume for volume in services[name]["volumes"])
        assert services[name]["user"] != services["agent"]["user"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_the_same_kit_gives_the_same_tar(joined):
    from server.members import kits

    files = {path.name: path.read_bytes() for path in (joined.folder / "kits" / "alder").iterdir()}
    packed = kits.tar("alder", files)
    assert packed == (joined.folder / "kits" / "alder.tar").read_bytes()
    assert hashlib.sha256(packed).digest() == hashlib.sha256(kits.tar("alder", files)).digest()


def test_commands_tell_people_and_programs(tmp_path, capsys):
    from client.cli import app as client_cli
    from common import cli as common_cli

    def told(app, *arguments: object) -> dict:
        with pytest.raises(SystemExit) as end:
            common_cli.run(app, [*map(str, arguments), "--json"])
        assert end.value.code == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    (tmp_path / "federation.toml").write_text(TEXT)
    folder, keys = tmp_path / "onco-eu", tmp_path / "keys"
    signers = [f"--governance={folder}/governance/{number}.key" for number in (1, 3)]
    words = told(cli.app, "provision", tmp_path / "federation.toml", "--out", folder)["words"]
    request = told(client_cli.app, "enroll", "--federation", "onco-eu", "--name", "alder", "--out", keys)
    given = ["admit", request["request"], "--federation", folder, "--words", request["words"], *signers]
    admitted = told(cli.app, *given)
    assert admitted["epoch"] == 2
    kit_folder = folder / "kits" / "alder"
    installed = told(client_cli.app, "install", kit_folder, "--keys", keys, "--words", words)
    assert installed["expires_at"] == admitted["expires_at"]
    renewal = told(client_cli.app, "renew", keys)["request"]
    assert told(cli.app, "rotate", renewal, "--federation", folder, *signers)["epoch"] == 3
    assert told(client_cli.app, "install", kit_folder, "--keys", keys)["epoch"] == 3
    assert told(cli.app, "reissue", "--federation", folder).keys() == {"gateway", "superlink", "operator", "night"}
    birch = tmp_path / "birch"
    request = told(client_cli.app, "enroll", "--federation", "onco-eu", "--name", "birch", "--out", birch)
    given = ["admit", request["request"], "--federation", folder, "--words", request["words"], *signers]
    second = told(cli.app, *given)
    assert (admitted["others"], second["others"]) == ([], ["alder"])
    who = [step.partition(":")[0] for step in second["next"]]
    assert who == ["gateway", "birch", "other sites", "without it", "members"]
    for expected in (
        f"install -m 644 {folder}/roster.json {folder}/revoked.txt /etc/silotune/",
        f"send {folder}/kits/birch.tar; there: silotune-client install birch.tar --keys KEYS --words WORDS",
        "other sites: alder: ",
        f"send {folder}/roster.json; there: silotune-client roster roster.json --keys KEYS",
    ):
        assert expected in "\n".join(second["next"])
    revoked = told(cli.app, "revoke", "alder", "--federation", folder, *signers)
    assert (revoked["epoch"], revoked["others"], "kit" in revoked) == (5, ["birch"], False)
