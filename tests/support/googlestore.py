"""A store with the XML interface of Google Cloud Storage, as far as uploads and reads need it.

It follows https://cloud.google.com/storage/docs/xml-api/reference-methods: objects have a
generation and an entity tag, which is the MD5 checksum only of an object that was stored with one
request; ``x-goog-if-generation-match: 0`` refuses to replace an object; parts have at least 5 MiB,
except the last one, and are joined by the list of the last request.

It also takes the requests of an S3 client for uploads in parts and for reads, because their forms
are the same.  Of credentials, only `GoogleStore.expired` is checked.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_MIN_PART_BYTES: Final = 5 << 20
_NO_KEY: Final = (404, "NoSuchKey")
_NO_UPLOAD: Final = (404, "NoSuchUpload")


@dataclass(frozen=True, slots=True)
class Stored:
    """An object."""

    content: bytes
    etag: str
    generation: int


@dataclass
class GoogleStore:
    """The state of a store with one bucket, ``golden``.

    Attributes:
        port: Its port on loopback.
        objects: The object of each key.
        uploads: The parts of each upload that was neither completed nor aborted.
        log: What each request did: ``start``, ``part 1``, ``complete``, ``abort``, ``put``,
            ``head``, ``get`` or ``delete``.
        lost: The answers of these requests are lost, each once.
        on_request: Called with what a request did, before its answer is sent.
        damages: Whether the content of uploads is damaged.
        expired: The access keys of S3 clients, and the bearer tokens, that are refused.
        signed: The access key or the bearer token of each request that has one.
    """

    port: int = 0
    objects: dict[str, Stored] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    on_request: Callable[[str], object] = lambda _: None
    damages: bool = False
    expired: set[str] = field(default_factory=set)
    signed: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def variables(self, certificate: Path) -> dict[str, str]:
        """Return what the environment must have to use the store."""
        base = f"https://localhost:{self.port}"
        key = {"gcs_base_url": base, "disable_oauth": True, "client_email": ""}
        account = json.dumps({**key, "private_key": "", "private_key_id": ""})
        return {"GOOGLE_SERVICE_ACCOUNT_KEY": account, "SSL_CERT_FILE": str(certificate)}

    def s3_variables(self, certificate: Path) -> dict[str, str]:
        """Return what the environment of an S3 client must have, besides a key."""
        endpoint = f"https://localhost:{self.port}"
        return {"AWS_ENDPOINT_URL": endpoint, "SSL_CERT_FILE": str(certificate)}

    def save(self, key: str, content: bytes, *, is_whole: bool = True) -> Stored:
        """Store an object; ``is_whole`` is whether it was sent with one request."""
        if self.damages and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        generation = 1_600_000_000_000_000 + len(self.log)
        etag = hashlib.md5(content).hexdigest() if is_whole else f"-CKih{generation}ICEAE="  # noqa: S324  no secret
        self.objects[key] = Stored(content, f'"{etag}"', generation)
        return self.objects[key]


@contextmanager
def serving_google(certificate: Path) -> Iterator[GoogleStore]:
    """Run the store for the block; the directory of the certificate has ``key.pem``."""
    store = GoogleStore()

    class Handler(_Handler):
        state = store

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    state: GoogleStore

    def parse_request(self) -> bool:
        """Return whether the request can be handled; answer a request whose key has expired."""
        if not super().parse_request():
            return False
        found = re.search("(?:Bearer |Credential=)([^/]+)", self.headers["Authorization"] or "")
        if not found:
            return True
        with self.state.lock:
            self.state.signed.append(found[1])
            if found[1] not in self.state.expired:
                return True
            self._content()
            self._answer("refused", 400, "ExpiredToken")
        return False

    def do_PUT(self) -> None:
        """Store an object, or a part of one."""
        content = self._content()
        upload = self._query("uploadId")
        with self.state.lock:
            if not upload:
                if self.headers["x-goog-if-generation-match"] == "0" and self._key in self._objects:
                    self._answer("put", 412, "PreconditionFailed")
                else:
                    self._answer_stored("put", self.state.save(self._key, content))
            elif upload not in self.state.uploads:
                self._answer("part", *_NO_UPLOAD)
            else:
                number = int(self._query("partNumber"))
                self.state.uploads[upload][number] = content
                etag = hashlib.md5(content).hexdigest()  # noqa: S324  no secret
                self._answer(f"part {number}", 200, headers={"ETag": f'"{etag}"'})

    def do_POST(self) -> None:
        """Start or complete an upload in parts."""
        content = self._content()
        upload = self._query("uploadId")
        with self.state.lock:
            if not upload:
                upload = f"upload-{len(self.state.log)}"
                self.state.uploads[upload] = {}
                self._answer("start", 200, body=f"<UploadId>{upload}</UploadId>", root="Initiate")
            elif upload not in self.state.uploads:
                self._answer("complete", *_NO_UPLOAD)
            else:
                self._complete(upload, content.decode())

    def _complete(self, upload: str, request: str) -> None:
        """Join the parts that the request lists."""
        parts = self.state.uploads[upload]
        numbers = [int(found) for found in re.findall("<PartNumber>([0-9]+)</PartNumber>", request)]
        if not set(numbers) <= set(parts) or numbers != sorted(numbers):
            self._answer("complete", 400, "InvalidPart")
        elif any(len(parts[number]) < _MIN_PART_BYTES for number in numbers[:-1]):
            self._answer("complete", 400, "EntityTooSmall")
        else:
            del self.state.uploads[upload]
            content = b"".join(parts[number] for number in numbers)
            stored = self.state.save(self._key, content, is_whole=False)
            etag = stored.etag.replace('"', "&quot;")
            self._answer_stored("complete", stored, f"<ETag>{etag}</ETag>", "Complete")

    def do_DELETE(self) -> None:
        """Delete an object, or abort an upload."""
        self._content()
        upload = self._query("uploadId")
        with self.state.lock:
            if upload:
                found = self.state.uploads.pop(upload, None)
                self._answer("abort", *((204, "") if found is not None else _NO_UPLOAD))
            else:
                gone = self.state.objects.pop(self._key, None)
                self._answer("delete", *(_NO_KEY if gone is None else (204, "")))

    def do_GET(self) -> None:
        """Send an object, or a range of it."""
        with self.state.lock:
            stored = self._objects.get(self._key)
        name = self.command.lower()
        if stored is None:
            self._answer(name, *_NO_KEY)
            return
        if self.headers["If-Match"] not in {None, stored.etag}:
            self._answer(name, 412, "PreconditionFailed")
            return
        content, size = stored.content, len(stored.content)
        found = re.fullmatch("bytes=([0-9]+)-([0-9]+)", self.headers["Range"] or "")
        headers = {}
        if found:
            first, last = int(found[1]), min(int(found[2]), size - 1)
            content = content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._answer_stored(name, stored, content, status=206 if found else 200, **headers)

    do_HEAD = do_GET  # noqa: N815  the name of the base class

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    @property
    def _objects(self) -> dict[str, Stored]:
        return self.state.objects

    @property
    def _key(self) -> str:
        """The key of the object; the first part of the path is the bucket."""
        return unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]

    def _query(self, name: str) -> str:
        """Return a parameter of the request; empty if it is missing."""
        return parse_qs(urlsplit(self.path).query).get(name, [""])[0]

    def _content(self) -> bytes:
        """Return the content of the request."""
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def _answer_stored(
        self,
        name: str,
        stored: Stored,
        content: bytes | str = b"",
        root: str = "",
        status: int = 200,
        **headers: str,
    ) -> None:
        """Answer with the properties of an object."""
        headers["ETag"] = stored.etag
        headers["x-goog-generation"] = str(stored.generation)
        headers["Last-Modified"] = formatdate(1.7e9, usegmt=True)
        self._answer(name, status, headers=headers, body=content, root=root)

    def _answer(
        self,
        name: str,
        status: int,
        code: str = "",
        *,
        headers: dict[str, str] | None = None,
        body: bytes | str = b"",
        root: str = "",
    ) -> None:
        """Record what the request did and send the answer, unless `GoogleStore.lost` has it."""
        self.state.log.append(name if status < 300 else f"{name} {status}")
        self.state.on_request(name)
        if name in self.state.lost:
            self.state.lost.remove(name)
            self.close_connection = True
            return
        if code:
            body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
        elif root:
            body = f"<{root}MultipartUploadResult>{body!s}</{root}MultipartUploadResult>"
        raw = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for each, value in (headers or {}).items():
            self.send_header(each, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)
