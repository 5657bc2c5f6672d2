"""A small HTTP proxy on loopback, for tests of the way to the gateway."""

import base64
import socket
import ssl
import threading
from contextlib import suppress

from client.courier import proxy
from common.run import config


class ConnectProxy:
    """A small HTTP proxy on loopback that passes bytes on after CONNECT, or does what `answer` does instead."""

    def __init__(self, *, password: str = "", answer=None, opens_tls: ssl.SSLContext | None = None) -> None:
        self._password, self._answer, self._opens_tls = password, answer, opens_tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(20)
        self.port = self._listener.getsockname()[1]
        self.asked: list[bytes] = []
        self.passed = bytearray()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "ConnectProxy":
        return self

    def __exit__(self, *_) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread up
        self._thread.join()
        self._listener.close()

    def way(self, tmp_path, *, password: str = "") -> proxy.Proxy:
        """As a site's own file names it."""
        path = tmp_path / "proxy.auth"
        if password:
            path.touch(0o600)
            path.write_text(password + "\n")
        settings = {"proxy": f"http://127.0.0.1:{self.port}", "proxy_auth_file": str(path) if password else ""}
        return proxy.of_site(config.LinkConfig.model_validate(settings))

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                with near:
                    self._serve(near)

    def _serve(self, near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += near.recv(4096)
        self.asked.append(head)
        if self._answer is not None:
            with suppress(OSError):
                self._answer(near)
            return
        given = base64.b64encode(self._password.encode())
        if self._password and b"Proxy-Authorization: Basic " + given + b"\r\n" not in head:
            near.sendall(b"HTTP/1.1 407 No\r\nproxy-authenticate: Basic realm=x\r\ncontent-length: 0\r\n\r\n")
            return
        near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        if self._opens_tls is not None:  # as an inspecting proxy does
            with suppress(OSError), self._opens_tls.wrap_socket(near, server_side=True) as opened:
                self.passed += opened.recv(4096)
            return
        host, _, port = head.split()[1].decode().rpartition(":")
        with socket.create_connection((host, int(port))) as far:
            back = threading.Thread(target=self._pass, args=(far, near), daemon=True)
            back.start()
            self._pass(near, far)
            back.join()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.passed += data
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
