"""Downloads against a server on this machine: complete, altered, broken off and missing."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hyperax.fewshot.datasets import fetch

pytest.importorskip("pooch")
pytest.importorskip("requests")

BODY = bytes(range(256)) * 400
DIGEST = "md5:" + hashlib.md5(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    failures = 0
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        if "missing" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        broken = "broken" in self.path or ("flaky" in self.path and type(self).requests <= type(self).failures)
        self.wfile.write(BODY[: len(BODY) // 2] if broken else BODY)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    handler = type("Counting", (Handler,), {"requests": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", handler
        httpd.shutdown()
        thread.join()


def test_good_files_get_their_names_and_are_loaded_once(tmp_path, server):
    url, handler = server
    digests = {"a.zip": DIGEST, "b.zip": "sha256:" + hashlib.sha256(BODY).hexdigest()}
    paths = fetch("omniglot", str(tmp_path), base_url=url, digests=digests)
    assert paths == [tmp_path / "omniglot" / "a.zip", tmp_path / "omniglot" / "b.zip"]
    assert [path.read_bytes() for path in paths] == [BODY, BODY]
    assert fetch("omniglot", str(tmp_path / "omniglot"), base_url=url, digests=digests) == paths
    assert handler.requests == 2
    assert sorted(file.name for file in paths[0].parent.iterdir()) == ["a.zip", "b.zip"]


def test_an_existing_file_with_other_bytes_is_kept(tmp_path, server):
    url, handler = server
    (tmp_path / "omniglot").mkdir()
    mine = tmp_path / "omniglot" / "a.zip"
    mine.write_bytes(b"repacked")
    with pytest.raises(ValueError, match=r"already there with other bytes.*delete it and fetch again"):
        fetch("omniglot", str(tmp_path), base_url=url, digests={"a.zip": DIGEST})
    assert mine.read_bytes() == b"repacked"
    assert handler.requests == 0


@pytest.mark.parametrize(
    ("file", "digest", "message"),
    [
        ("a.zip", "md5:" + "0" * 32, "does not have the digest md5:0000.*was not kept"),
        ("broken.zip", DIGEST, r"broke off after 1 attempt\(s\)"),
        ("missing.zip", DIGEST, "missing.zip answered 404"),
    ],
)
def test_failures_are_one_clear_error_and_leave_nothing(tmp_path, server, file, digest, message):
    with pytest.raises(ValueError, match=message):
        fetch("omniglot", str(tmp_path), base_url=server[0], digests={file: digest}, retries=0)
    assert list((tmp_path / "omniglot").iterdir()) == []


def test_a_transfer_that_broke_off_is_tried_again(tmp_path, server, monkeypatch):
    url, handler = server
    handler.failures = 1
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (path,) = fetch("omniglot", str(tmp_path), base_url=url, digests={"flaky.zip": DIGEST}, retries=2)
    assert path.read_bytes() == BODY
    assert handler.requests == 2


def test_nobody_listens(tmp_path):
    with pytest.raises(ValueError, match="check the connection"):
        fetch("omniglot", str(tmp_path), base_url="http://127.0.0.1:9/", digests={"a.zip": DIGEST}, retries=0)


@pytest.mark.parametrize(("name", "message"), [("cifar", "known are omniglot"), ("miniimagenet", "ImageNet's terms")])
def test_what_cannot_be_downloaded(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        fetch(name, str(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--data-dir"):
        fetch("omniglot", str(tmp_path / "file"), base_url="http://127.0.0.1:9/", retries=0)
