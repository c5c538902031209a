"""Python packages made on the fly, and an index that serves them: environments need no network in tests."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def make_wheel(folder: Path, name: str, version: str = "1.0", *, source: str = "") -> Path:
    """A wheel of one module, with a program of the same name that prints the module's version."""
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VERSION = {version!r}\n{source}\ndef main():\n    print(VERSION)\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))
    wheel.chmod(0o644)
    return wheel


class Index:
    """A package index on the loopback device.

    Attributes:
        url: what to give to pip.
        lookups: the projects that were asked for, once for each environment that was made.
        asked: set by the next download.
        open: while it is clear, downloads wait.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lookups: list[str] = []
        self.asked = threading.Event()
        self.open = threading.Event()
        self.open.set()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_error(405)

            def do_GET(self) -> None:
                body = index.answer(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/zip")
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # those who asked may be killed meanwhile

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple/"

    def answer(self, path: str) -> bytes | None:
        """What is at a path, if anything."""
        *_, project, name = path.split("/")
        if not name:
            self.lookups.append(project)
            links = [f'<a href="{wheel.name}">{wheel.name}</a>' for wheel in self.folder.glob(f"{project}-*.whl")]
            return f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode() if links else None
        self.asked.set()
        self.open.wait()
        return (self.folder / name).read_bytes()


@contextmanager
def serving(folder: Path) -> Iterator[Index]:
    """An index that serves the wheels in a folder."""
    index = Index(folder)
    thread = threading.Thread(target=index.server.serve_forever, kwargs={"poll_interval": 0.02}, name="index")
    thread.start()
    try:
        yield index
    finally:
        index.open.set()
        index.server.shutdown()
        index.server.server_close()
        thread.join()
