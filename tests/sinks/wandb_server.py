"""A local fake of W&B's server: enough of its protocol to begin, feed and end a run."""

import contextlib
import gzip
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def well_behaved(server, path, body):
    """Answer as W&B does."""
    if path != "/graphql":
        return 200, b"{}"
    query = json.loads(body)
    given = query.get("variables", {})
    if "UpsertBucket" in query["query"]:
        bucket = {
            "id": "1",
            "name": given["name"],
            "displayName": given["displayName"],
            "project": {"name": given["project"], "entity": {"name": "team"}},
        }
        return answer(upsertBucket={"bucket": bucket, "inserted": True})
    if "CreateRunFiles" in query["query"]:
        files = [
            {"name": name, "uploadUrl": f"{server.url}/upload/{name}"} for name in given["files"]
        ]
        return answer(createRunFiles={"runID": "1", "uploadHeaders": [], "files": files})
    # A table is an artifact: its type is asked for, and what is committed needs no upload.
    if "query ArtifactType" in query["query"]:
        return answer(project=None)
    if "mutation CreateArtifact" in query["query"]:
        sequence = {"id": "1", "latestArtifact": None}
        artifact = {"id": "1", "state": "COMMITTED", "artifactSequence": sequence}
        return answer(createArtifact={"artifact": artifact})
    if "viewer" in query["query"]:
        return answer(viewer={"id": "1", "username": "me", "entity": "team", "flags": "{}"})
    return answer()


def answer(**data):
    return 200, json.dumps({"data": data}).encode()


class Server:
    """The fake server for a test: the requests so far, and ``respond``, which a test may replace."""

    def __init__(self, respond):
        self.respond = respond
        self.requests = []
        self.closing = threading.Event()


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        """Say nothing of a client that has gone: that is what some tests are about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve(respond=well_behaved):
    state = Server(respond)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            state.requests.append((self.path, body))
            status, data = state.respond(state, self.path, body)
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_request

        def log_message(self, *_):
            pass

    server = QuietServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def stop():
        """Go away: nobody listens any more, and who is connected is cut off."""
        state.respond = cut_off
        server.shutdown()
        server.server_close()

    state.stop = stop
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()


def cut_off(server, path, body):
    """Answer nothing and close the connection."""
    raise ConnectionResetError


def never(server, path, body):
    """Answer when the test is over."""
    server.closing.wait()
    return 500, b""
