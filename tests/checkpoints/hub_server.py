"""A server on this machine that plays the Hugging Face hub."""

import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse


class HubServer:
    """Serves folders as repositories, to be used as a context manager.

    Attributes:
        repositories: dict of `"user/model"` to a dict of revision to folder.
        gated: dict of `"user/model"` to the tokens that may read its files.
        requests: list of `(method, path, token)`.
        url: str.
    """

    def __init__(self):
        self.repositories = {}
        self.gated = {}
        self.requests = []

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloaded(self):
        """The names of the files that were asked for, each once."""
        return sorted(
            {
                path.rsplit("/", 1)[1]
                for method, path, _ in self.requests
                if "/resolve/" in path and method == "GET"
            }
        )


def commit_of(folder):
    """A commit's hash, made up from a folder's path."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def log_message(self, *args):
        pass

    def _answer(self, body):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server_hub.requests.append((self.command, path, token or None))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, (kind, revision) = "/".join(parts[2:4]), parts[4:6]
        else:
            repository, (kind, revision) = "/".join(parts[:2]), parts[2:4]
        revisions = self.server_hub.repositories.get(repository)
        if revisions is None:
            return self._refuse(401, "RepoNotFound")
        by_commit = {commit_of(folder): folder for folder in revisions.values()}
        folder = revisions.get(revision) or by_commit.get(revision)
        if folder is None:
            return self._refuse(404, "RevisionNotFound")
        files = [file for file in pathlib.Path(folder).iterdir() if file.is_file()]
        if kind == "revision":
            siblings = [{"rfilename": file.name} for file in files]
            return self._json(
                {"id": repository, "sha": commit_of(folder), "siblings": siblings}, body
            )
        if kind == "tree":
            return self._json(
                [
                    {
                        "type": "file",
                        "path": file.name,
                        "size": file.stat().st_size,
                        "oid": commit_of(file),
                    }
                    for file in files
                ],
                body,
            )
        allowed = self.server_hub.gated.get(repository)
        if allowed is not None and token not in allowed:
            return self._refuse(403 if token else 401, "GatedRepo")
        file = pathlib.Path(folder, parts[-1])
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit_of(folder), "ETag": f'"{commit_of(file)}"'}
        self._send(file.read_bytes(), headers, body)

    def _json(self, content, body):
        headers = {"Content-Type": "application/json"}
        self._send(json.dumps(content).encode(), headers, body)

    def _send(self, content, headers, body):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
