"""The way of a published tag, rehearsed: a stand-in of the hub on the loopback serves small random weights under the
published repositories' names. Nothing here leaves the machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save

pytestmark = pytest.mark.slow  # three starts of Python and open_clip

FILE = "open_clip_model.safetensors"
WHOLE, CUT, WRONG = (
    ("ViT-B-16-plus-240", "laion400m_e31"),
    ("ViT-B-32", "openai"),
    ("ViT-B-16", "openai"),
)
MISSING = ("ViT-L-14", "openai")

CHILD = """
import json, sys, time, traceback, warnings
import open_clip
from pathlib import Path
for path in Path(sys.argv[1]).glob("*.json"):
    open_clip.add_model_config(path)
from clipad.backbone import load_backbone
for name, tag in json.loads(sys.argv[2]):
    start, said = time.perf_counter(), {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backbone = load_backbone(name, pretrained=tag, device="cpu")
        said = {"hash": backbone.weights_hash, "activation": backbone.activation, "is": repr(backbone)}
    except OSError as error:
        said = {"error": str(error)}
    print("RESULT", json.dumps(said | {"seconds": time.perf_counter() - start}))
"""


class Hub(ThreadingHTTPServer):
    """Answers as the hub does for files in large-file storage: the ETag of a file is its SHA-256."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files  # repository -> content
        self.cut, self.wrong = (
            set(),
            set(),
        )  # repositories that break off, and that serve something else
        self.asked = []  # the repository of every download
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        repository, _, file = self.path.lstrip("/").partition("/resolve/main/")
        content = self.server.files.get(repository)
        if content is None or file != FILE:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if content else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        for key, value in {
            "ETag": etag,
            "X-Linked-ETag": etag,
            "X-Linked-Size": len(content),
            "X-Repo-Commit": "0" * 40,
            "Accept-Ranges": "bytes",
            "Content-Length": len(content) - start,
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if head:
            return
        self.server.asked.append(repository)
        if repository in self.server.wrong:
            content = content[:-4] + b"\0" * 4
        if repository in self.server.cut:
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])


def repository(name, tag):
    return open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rstrip("/")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Three starts: with a hub that breaks off once and serves one wrong file; with a good one; without a network."""
    folder = tmp_path_factory.mktemp("hub")
    files = {}
    for seed, (name, tag) in enumerate([WHOLE, CUT, WRONG, MISSING]):
        config = open_clip.get_model_config("ViT-B-16-plus-240")
        config["embed_dim"] = 32
        config["vision_cfg"] |= {"width": 64, "head_width": 32, "layers": 4}
        config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1}
        (folder / f"{name}.json").write_text(json.dumps(config))
        torch.manual_seed(seed)
        files[repository(name, tag)] = save(open_clip.CLIP(**config).state_dict())
    hub = Hub(files)
    hub.cut, hub.wrong = {repository(*CUT)}, {repository(*WRONG)}

    def start(*tags):
        environment = {
            k: v for k, v in os.environ.items() if "proxy" not in k.lower() and "HF_" not in k
        }
        environment |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "TQDM_POSITION": "-1",  # a progress bar as in a terminal
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        run = subprocess.run(
            [sys.executable, "-c", CHILD, str(folder), json.dumps(tags)],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
        return [json.loads(line.removeprefix("RESULT")) for line in lines], run.stderr

    first, told = start(WHOLE, CUT, WRONG)
    hub.cut.clear()
    begun = len(hub.asked)
    second, _ = start(WHOLE, CUT)
    again = hub.asked[begun:]
    hub.shutdown()
    hub.server_close()
    third, _ = start(WHOLE, MISSING)
    return {"first": first, "second": second, "third": third, "told": told, "again": again}


def test_a_tag_is_downloaded_with_a_progress_bar(rehearsal):
    whole = rehearsal["first"][0]
    assert "open_clip tag laion400m_e31" in whole["is"]
    assert whole["activation"] == "GELU"
    assert FILE in rehearsal["told"]
    assert "100%" in rehearsal["told"]


def test_a_download_that_breaks_off_says_so_and_is_made_good_at_the_next_start(rehearsal):
    assert "openai" in rehearsal["first"][1]["error"]
    assert rehearsal["second"][1]["activation"] == "QuickGELU"  # of the tag, under a plain name
    assert set(rehearsal["again"]) == {repository(*CUT)}  # what was whole is not asked for again


def test_a_file_with_another_content_than_promised_is_refused(rehearsal):
    assert "SHA-256" in rehearsal["first"][2]["error"]


def test_a_later_start_needs_no_network(rehearsal):
    assert {rehearsal[start][0]["hash"] for start in ("first", "second", "third")} == {
        rehearsal["first"][0]["hash"]
    }


def test_without_network_and_cache_it_says_within_seconds_what_to_do(rehearsal):
    refused = rehearsal["third"][1]
    assert repository(*MISSING) in refused["error"]
    assert FILE in refused["error"]
    assert refused["seconds"] < 20  # five tries with pauses in between take 23
