"""A browser's requests to the page for blind ranking."""

import asyncio

import httpx

TOKEN = "a-token-of-the-test"


class Client:
    """A browser's requests, one at a time."""

    def __init__(self, app) -> None:
        self._app = app

    def request(self, method, path, **options):
        async def send():
            transport = httpx.ASGITransport(app=self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path):
        return self.request("GET", path)

    def post(self, path, **options):
        return self.request("POST", path, **options)


def post(client, path, body, **options):
    return client.post(f"/{TOKEN}/{path}", json=body, **options)
