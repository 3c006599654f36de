"""An S3 server on loopback for tests: moto's, which implements the real API and records requests."""

from __future__ import annotations

import logging
import re
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

_REQUEST = re.compile(r"([A-Z]+) (/\S*) HTTP")


class ObjectStore(logging.Handler):
    """A server, and the requests that it has received."""

    environment: Mapping[str, str]
    """What services find and are let into it with."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.requests: list[tuple[str, str]] = []
        """Method and path."""
        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )

    def emit(self, record: logging.LogRecord) -> None:
        if match := _REQUEST.search(record.getMessage()):
            self.requests.append((match[1], match[2]))

    def fetched(self) -> list[str]:
        """Objects that were read."""
        return [path for method, path in self.requests if method == "GET" and "list-type" not in path]

    def reset(self) -> None:
        """Empty it: what it holds belongs to the process, not to the server."""
        urllib.request.urlopen(f"{self.environment['AWS_ENDPOINT_URL']}/moto-api/reset", b"").close()

    def upload(self, folder: Path, bucket: str, prefix: str = "") -> None:
        """Everything below a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.put_object(Bucket=bucket, Key=f"{prefix}{path.relative_to(folder)}", Body=path.read_bytes())


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """An empty one."""
    S3FileSystem.clear_instance_cache()  # one that an earlier test made has the address of that test's server
    log = logging.getLogger("werkzeug")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=True)
    server.start()
    host, port = server.get_host_and_port()
    store = ObjectStore(f"http://{host}:{port}")
    log.setLevel(logging.INFO)
    log.addHandler(store)
    log.propagate = False
    try:
        yield store
    finally:
        store.reset()
        log.removeHandler(store)
        store.client.close()
        server.stop()
