"""What a site gets: certificates, roster, templates of its policy, units and containers; all of it signed."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import jinja2

from common.trust import governance, kit
from server.members import folder
from server.members.folder import Registry

TEMPLATES: Final = Path(__file__).with_name("kit")
LINK_PORT: Final = 9092


def make(held: Registry, *, name: str, chain: bytes) -> dict[str, bytes]:
    """Make a site's kit, without roster and checksums. It holds no secret: the private keys are at the site already.

    Args:
        chain: Its certificate and the issuer's, PEM.

    Returns:
        File name to content.
    """
    return {
        kit.PINNED: held.pinned.to_bytes(),
        kit.CA: governance.read(held.folder / folder.ISSUERS / "root.pem"),
        kit.CERTIFICATE: chain,
        **render(held, name=name),
    }


def render(held: Registry, *, name: str) -> dict[str, bytes]:
    """Fill in the templates for a site."""
    environment = jinja2.Environment(  # noqa: S701  the files are no HTML, and all values are checked names
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    host, port = held.config.federation.host_names[0], held.config.federation.fleet_port
    values = {
        "name": name,
        "federation_id": held.pinned.federation_id,
        "epoch": held.roster.epoch + 1,
        "quorum": held.pinned.quorum,
        "gateway": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "link_port": LINK_PORT,
    }
    names = sorted(path.name for path in TEMPLATES.glob("*.j2"))
    return {file.removesuffix(".j2"): environment.get_template(file).render(values).encode() for file in names}


def tar(name: str, files: Mapping[str, bytes]) -> bytes:
    """Pack a kit into one folder of a tar file; the same files give the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for file, data in sorted(files.items()):
            entry = tarfile.TarInfo(f"{name}/{file}")
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()
