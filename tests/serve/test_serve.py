"""Explanation and simulation through the real openai client and `transformers serve`, on loopback, with the bundled model.

With RECORD=1 the replies become the fixtures of tests/test_language_models.py (data/fixtures/chat).
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from toy_features import record, show

from saelib import autointerp, language_models, models, prompts
from saelib.paths import DATA, ROOT

pytestmark = pytest.mark.serve
HERE, EXTRAS, MODEL = Path(__file__).parent, DATA / "serve-extras", "smollm2-135m-instruct"


def install():
    """The server's few packages, into a folder of their own; skips the tests where they cannot be had."""
    wanted, done = (HERE / "requirements.txt").read_text(), EXTRAS / "installed"
    if done.exists() and done.read_text() == wanted:
        return
    shutil.rmtree(EXTRAS, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", "--target", EXTRAS]
    found = subprocess.run([*pip, "-r", HERE / "requirements.txt"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"cannot install the server's packages: {found.stderr.splitlines()[-1]}")
    done.write_text(wanted)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(base URL, model name) of a running server; its end is awaited."""
    install()
    folder = Path(models.locate(MODEL))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", folder.name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(EXTRAS), "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("serve") / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=folder.parent, env=environment, stdout=out, stderr=out)
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            break
        except (urllib.error.URLError, OSError):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1", folder.name
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def chat(server, folder, **options):
    url, model = server
    return language_models.Chat(folder, model=model, base_url=url, cap=100_000, max_retries=1, **options)


def test_explanation_and_simulation_through_the_real_client(server, tmp_path, monkeypatch):
    """Whatever a model of this size says, each feature ends as a score or as a counted malformed reply; then offline."""
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-that-must-not-be-kept")
    model, judged = chat(server, tmp_path), 0
    explainer, simulator = prompts.PhraseExplainer(model, show), prompts.ChatSimulator(model, show)
    records = [record(number) for number in range(3)]
    phrases = [explainer.explain(one) for one in records]
    assert all(phrases)
    rows, malformed = autointerp.score_all(records, explainer, simulator)
    assert len(rows) + malformed == 3
    for judge in (prompts.detection, prompts.fuzzing):
        try:
            generator = torch.Generator().manual_seed(0)
            judged += 0 <= judge(model, phrases[0], records[0], show, generator=generator) <= 1
        except autointerp.Malformed:
            pass
    assert model.requests >= 3 + 3 + 2 and model.spent > 0
    print(f"{phrases}\n{len(rows)} scored, {malformed} malformed, {judged} of 2 judged, {model.spent} tokens")
    assert "a-key-that-must-not-be-kept" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    again = chat(("http://127.0.0.1:1/v1", server[1]), tmp_path)
    assert autointerp.score_all(records, prompts.PhraseExplainer(again, show), prompts.ChatSimulator(again, show)) == (
        rows,
        malformed,
    )
    assert again.requests == 0
    if os.environ.get("RECORD"):
        target = ROOT / "data" / "fixtures" / "chat"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(tmp_path, target)


def test_a_model_that_the_server_does_not_have(server, tmp_path):
    with pytest.raises(language_models.EndpointError, match="Replies so far are kept"):
        chat((server[0], "no-such-model"), tmp_path).complete([{"role": "user", "content": "hello"}], 4)
