import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.supercore.protobuf import translation
from google.protobuf.descriptor import FieldDescriptor

from server.gateway import bundles, rules
from server.gateway.bundles import StartRunRequest
from server.gateway.members import Members, Site
from server.gateway.refusals import Refused
from server.run import link

KEY = ec.derive_private_key(5, ec.SECP384R1()).public_key()
PEM = KEY.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
NODE_KEY = hashlib.sha256(KEY.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
TLS, OTHER, OPERATOR = "a" * 64, "b" * 64, "c" * 64
KNOWN = Members({TLS: Site("alder", NODE_KEY, b""), OTHER: Site("birch", "0" * 64, b"")}, frozenset({OPERATOR}))


def refusal(call, *given, **named) -> tuple[int, str]:
    with pytest.raises(Refused) as told:
        call(*given, **named)
    return told.value.status, told.value.reason


def key_header(value: bytes = PEM) -> tuple[bytes, bytes]:
    return b"flwr-public-key", base64.b64encode(value)


def test_the_listed_paths_are_flowers_less_those_that_register():
    fleet = {path for method, path in translation.PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert fleet - rules.FLEET_PATHS == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert fleet > rules.FLEET_PATHS
    assert {("POST", path) for path in rules.CONTROL_PATHS} <= translation.PROTOBUF_REQUEST_TYPES.keys()


def test_the_control_paths_are_those_that_the_link_calls(monkeypatch):
    called = set()

    class Client:
        def _unary_unary(self, *, path, request, response_type, **_):
            called.add(path)
            return (
                response_type(run_id=1)
                if path == rules.START_RUN
                else response_type(run_dict={1: {}})
                if (path.endswith("list-runs"))
                else response_type()
            )

        def _unary_stream(self, *, path, **_):
            called.add(path)
            return iter(())

    for name in ("RegisterNode", "ListNodes", "StartRun", "ListRuns", "StreamLogs"):
        monkeypatch.setattr(Client, name, getattr(link.ControlHttpClient, name), raising=False)
    connected = link.Link(Client())
    connected.register(b"key", name="alder")
    connected.online_node_ids()
    connected.start_run({}, bundle=b"")
    connected.state(1)
    connected.log_of(1)
    assert called == rules.CONTROL_PATHS


@pytest.mark.parametrize(
    ("method", "path", "query", "told"),
    [
        ("POST", b"/v1/fleet/register-node", b"", (404, "path")),
        ("GET", b"/docs", b"", (404, "path")),
        ("POST", b"/v1/fleet/get-run/", b"", (404, "path")),
        ("POST", b"/v1/fleet/../fleet/get-run", b"", (404, "path")),
        ("POST", b"/v1/fleet/get%2drun", b"", (404, "path")),
        ("POST", b"/v1/fleet/GET-RUN", b"", (404, "path")),
        ("POST", b"/v1/fleet/get-run", b"a", (404, "path")),
        ("POST", b"", b"", (404, "path")),
        ("GET", b"/v1/fleet/get-run", b"", (405, "method")),
        ("post", b"/v1/fleet/get-run", b"", (405, "method")),
    ],
)
def test_only_listed_paths_pass(method, path, query, told):
    assert refusal(rules.check_path, method, path, query, allowed=rules.FLEET_PATHS) == told


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ([], (411, "content_length")),
        ([(b"content-length", b"101")], (413, "body_size")),
        ([(b"content-length", b"+1")], (400, "content_length")),
        ([(b"content-length", b"1" * 16)], (400, "content_length")),
        ([(b"content-length", b"1"), (b"content-length", b"1")], (400, "content_length")),
        ([(b"content-length", b"1"), (b"transfer-encoding", b"chunked")], (400, "content_length")),
        ([(b"content-length", b"1"), (b"content-encoding", b"gzip")], (400, "compressed")),
        ([(b"content-length", b"1"), (b"content-encoding", b"identity, br")], (400, "compressed")),
        ([(b"content-length", b"1"), (b"x", b"a" * 1000)], (431, "header_size")),
        ([(b"content-length", b"1"), *[(b"x", b"")] * 64], (431, "header_size")),
    ],
)
def test_headers_that_are_refused(headers, told):
    assert refusal(rules.check_headers, headers, max_bytes=1000, max_body_bytes=100) == told


@pytest.mark.parametrize(
    ("header", "size_bytes"), [((b"content-length", b"100"), 100), ((b"transfer-encoding", b"chunked"), None)]
)
def test_control_headers_in_order_pass(header, size_bytes):
    given = [header, (b"content-encoding", b"Identity")]
    assert rules.check_headers(given, max_bytes=1000, max_body_bytes=100).size_bytes == size_bytes


@pytest.mark.parametrize(
    ("headers", "fingerprint", "reason"),
    [
        ([key_header()], "d" * 64, "not_in_roster"),
        ([key_header()], OPERATOR, "not_in_roster"),
        ([key_header()], OTHER, "node_key_other"),
        ([], TLS, "node_key_missing"),
        ([key_header(), key_header()], TLS, "node_key_malformed"),
        ([key_header(b"")], TLS, "node_key_malformed"),
        ([key_header(PEM + PEM)], TLS, "node_key_malformed"),
        ([key_header(PEM.replace(b"PUBLIC", b"PRIVATE"))], TLS, "node_key_malformed"),
        ([(b"flwr-public-key", b"%%%")], TLS, "node_key_malformed"),
        ([(b"flwr-public-key", "é".encode("latin-1"))], TLS, "node_key_malformed"),
    ],
)
def test_a_certificate_is_tied_to_its_node_key(headers, fingerprint, reason):
    assert refusal(rules.check_site, headers, fingerprint, known=KNOWN) == (403, reason)


def test_control_a_site_with_its_own_node_key_and_an_operator_pass():
    rules.check_site([key_header()], TLS, known=KNOWN)
    rules.check_operator(OPERATOR, known=KNOWN)
    assert refusal(rules.check_operator, TLS, known=KNOWN) == (403, "not_in_roster")


def test_revoked_keys_are_told_from_unknown_ones():
    revoked = Members(KNOWN.sites, KNOWN.operators, frozenset({TLS, OPERATOR}))
    assert refusal(rules.check_site, [key_header()], TLS, known=revoked) == (403, "revoked")
    assert refusal(rules.check_operator, OPERATOR, known=revoked) == (403, "revoked")


def test_only_flowers_headers_reach_the_superlink_and_come_back():
    sent = [(b"host", b"a"), (b"authorization", b"b"), (b"x-forwarded-for", b"c"), (b"accept-encoding", b"gzip")]
    kept = [(b"content-type", b"application/protobuf"), (b"flwr-signature", b"d")]
    assert rules.forwarded([*sent, *kept]) == [*kept, (b"accept-encoding", b"identity")]
    back = [(b"Content-Type", b"a"), (b"Location", b"b"), (b"Set-Cookie", b"c"), (b"Connection", b"close")]
    assert rules.returned(back) == [(b"content-type", b"a")]


BUNDLE = b"a bundle"
LISTED = frozenset({hashlib.sha256(BUNDLE).hexdigest()})


def start(**fields) -> StartRunRequest:
    request = StartRunRequest(**fields)
    request.fab.content = request.fab.content or BUNDLE
    request.fab.hash_str = "not looked at"
    request.override_config["resume"].bool = True
    return request


def test_a_listed_bundle_passes_unchanged():
    body = start().SerializeToString(deterministic=True)
    assert bundles.check_start(body, bundles=LISTED) == body


def test_without_a_list_only_this_versions_bundle_may_start():
    own = frozenset({hashlib.sha256(link.build_bundle()).hexdigest()})
    assert bundles.allowed(()) == own
    assert bundles.allowed(("a" * 64, "b" * 64)) == {"a" * 64, "b" * 64}
    assert refusal(bundles.check_start, start().SerializeToString(), bundles=own) == (403, "bundle_not_listed")


def test_fields_that_this_version_does_not_know_do_not_reach_the_superlink():
    known = start().SerializeToString(deterministic=True)
    assert bundles.check_start(known + b"\xf8\x3f\x01", bundles=LISTED) == known  # field 1023


def test_every_other_field_of_a_start_is_refused():
    others = [field for field in StartRunRequest.DESCRIPTOR.fields if field.name not in ("fab", "override_config")]
    assert {"app_spec", "series_id", "user_prompt", "federation"} <= {field.name for field in others}
    for field in others:
        request = start()
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(request, field.name).SetInParent()
        else:
            value = "x" if field.type == FieldDescriptor.TYPE_STRING else 1
            setattr(request, field.name, value) if not hasattr(getattr(request, field.name), "append") else getattr(
                request, field.name
            ).append(value)
        status, reason = refusal(bundles.check_start, request.SerializeToString(), bundles=LISTED)
        assert (status, reason) in {(403, "start_run_field"), (403, "bundle_by_reference")}, field.name


def test_a_start_that_cannot_be_read_or_names_a_stored_bundle_is_refused():
    assert refusal(bundles.check_start, b"\xff\xff", bundles=LISTED) == (400, "start_run_malformed")
    stored = start()
    stored.fab.content = b""
    assert refusal(bundles.check_start, stored.SerializeToString(), bundles=LISTED) == (403, "bundle_by_reference")
    signed = start()
    signed.fab.verifications["key"] = "value"
    assert refusal(bundles.check_start, signed.SerializeToString(), bundles=LISTED) == (403, "start_run_field")
