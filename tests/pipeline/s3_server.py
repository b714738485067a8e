"""A real S3 API on loopback."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "an-access-key-of-the-tests", "a-secret-of-the-tests"


@dataclass(frozen=True)
class S3:
    """A server, and what Snakemake needs in its environment to use it."""

    endpoint: str

    def environment(self) -> dict[str, str]:
        values = {"ENDPOINT_URL": self.endpoint, "ACCESS_KEY": ACCESS_KEY, "SECRET_KEY": SECRET_KEY}
        return {f"SNAKEMAKE_STORAGE_S3_{name}": value for name, value in values.items()}

    def client(self):
        import boto3

        keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def sync(self, bucket: str, prefix: str, folder: Path) -> Path:
        """Copy all objects below a prefix into a folder, as `aws s3 sync` does."""
        client = self.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page["Contents"]:
                path = folder / entry["Key"].removeprefix(prefix).lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket, entry["Key"], str(path))
        return folder


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[S3]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield S3(f"http://127.0.0.1:{port}")
    finally:
        server.kill()
        server.wait()
