"""The chat client against a real HTTP server in this process, recorded replies of a real model, and a model in process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from toy_features import record, show

from saelib import autointerp, files, language_models, prompts
from saelib.autointerp import Malformed
from saelib.language_models import CapReached, Chat, EndpointError, Reply
from saelib.paths import ROOT

KEY = "sk-a-secret-that-must-stay-one"
HELLO = [{"role": "user", "content": "hello"}]
FIXTURES = ROOT / "data" / "fixtures" / "chat"


def completion(text, top=None, tokens=50):
    content = top and [{"token": token, "logprob": 0.0, "bytes": None, "top_logprobs": [
        {"token": other, "logprob": value, "bytes": None} for other, value in candidates.items()]}
        for token, candidates in top]  # fmt: skip
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": tokens - 10, "completion_tokens": 10, "total_tokens": tokens}
    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
    return head | {"choices": [choice | {"logprobs": content and {"content": content}}]}


@pytest.fixture
def endpoint(monkeypatch):
    """A server whose `answer(request body, headers)` the test sets: (status, body, bytes to cut off); `asked` counts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            status, reply, cut = server.answer(body, self.headers)
            reply = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(reply[: len(reply) - cut])
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer = [], lambda body, headers: (200, completion("fine"), 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_MODEL", "m")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def chat(endpoint, tmp_path):
    return Chat(tmp_path / "cache", cap=1_000_000, max_retries=2)


def simulator_answers(text="digit", gives_top=False):
    """What a model that follows the rules would say: a phrase, or a line per numbered token."""

    def answer(body, headers):
        asked = body["messages"][-1]["content"]
        if "Tokens:" not in asked:
            return 200, completion(text), 0
        lines = asked.split("Tokens:\n")[1].splitlines()
        said = "\n".join(f"{line.split(' ')[0]} {9 if line.split(' ', 1)[1] in '37' else 0}" for line in lines)
        return 200, completion(said), 0

    return answer


def test_a_reply_is_paid_for_once(endpoint, chat):
    assert chat.complete(HELLO, 5) == chat.complete(HELLO, 5) == Reply("fine", None, 50)
    assert len(endpoint.asked) == chat.requests == 1
    assert endpoint.asked[0]["top_logprobs"] == 15 and endpoint.asked[0]["temperature"] == 0
    assert Chat(chat.folder, cap=100).spent == 50


def test_a_sound_model_scores_near_one_and_its_run_replays_without_key_or_network(endpoint, chat, monkeypatch):
    endpoint.answer = simulator_answers()
    run = lambda model: autointerp.score_all(  # noqa: E731
        [record(0)], prompts.PhraseExplainer(model, show), prompts.ChatSimulator(model, show)
    )
    rows, malformed = run(chat)
    assert rows[0]["both"] > 0.99 and rows[0]["explanation"] == "digit" and malformed == 0
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    before = len(endpoint.asked)
    assert run(Chat(chat.folder, cap=0)) == (rows, malformed)
    assert len(endpoint.asked) == before == 11


def test_a_killed_run_goes_on_where_it_was(endpoint, chat):
    sound, calls = simulator_answers(), []

    def dies(body, headers):
        calls.append(body)
        return sound(body, headers) if len(calls) <= 4 else (401, {"error": {"message": "gone"}}, 0)

    endpoint.answer = dies
    explainer, simulator = prompts.PhraseExplainer(chat, show), prompts.ChatSimulator(chat, show)
    with pytest.raises(EndpointError):
        autointerp.score(record(0), explainer, simulator)
    assert len(list(chat.folder.glob("*.json"))) == 4
    endpoint.answer, endpoint.asked[:] = sound, []
    assert autointerp.score(record(0), explainer, simulator)["both"] > 0.99
    assert len(endpoint.asked) == 7


def test_expected_values_come_from_the_log_probabilities(endpoint, chat):
    half = {" 4": -0.6931472, " 8": -0.6931472, "x": -9.0}
    top = [("1", {"1": 0.0}), (" 4", half), ("\n", {"\n": 0.0}), ("2", {"2": 0.0}), (" 0", {" 0": 0.0})]
    endpoint.answer = lambda body, headers: (200, completion("1 4\n2 0", top), 0)
    assert prompts.parse_digits(chat.complete(HELLO, 5), 2) == pytest.approx([6.0, 0.0])
    assert prompts.parse_digits(Reply("1 4\n2 0", None, 0), 2) == [4.0, 0.0]


def test_an_endpoint_that_refuses_log_probabilities_is_asked_without(endpoint, chat):
    def answer(body, headers):
        return (422, {"detail": "unused field"}, 0) if "logprobs" in body else (200, completion("fine"), 0)

    endpoint.answer = answer
    assert chat.complete(HELLO, 5).top is None
    chat.complete(HELLO, 6)
    assert ["logprobs" in body for body in endpoint.asked] == [True, False, False]


def test_a_passing_fault_is_retried(endpoint, chat):
    faults = [(429, {}, 0), (503, {}, 0)]
    endpoint.answer = lambda body, headers: faults.pop() if faults else (200, completion("fine"), 0)
    assert chat.complete(HELLO, 5).text == "fine" and len(endpoint.asked) == 3


@pytest.mark.parametrize(
    ("status", "reply", "cut", "says"),
    [
        (401, {"error": {"message": f"bad key {KEY}"}}, 0, "refuses the key.*OPENAI_API_KEY"),
        (403, {"error": {"message": "no"}}, 0, "refuses the key"),
        (404, {"error": {"message": "no such model"}}, 0, "does not know the model 'm'.*OPENAI_MODEL"),
        (429, {"error": {"message": "slow down"}}, 0, "rate-limiting.*all 3 attempts"),
        (500, {"error": {"message": f"oh {KEY}"}}, 0, "answers 500.*<key>"),
        (200, completion("cut"), 20, "broke off.*RemoteProtocolError"),
    ],
)
def test_a_faulty_endpoint_is_named_and_what_was_paid_for_is_kept(endpoint, chat, status, reply, cut, says):
    chat.complete(HELLO, 5)
    endpoint.answer = lambda body, headers: (status, reply, cut)
    with pytest.raises(EndpointError, match=says) as caught:
        chat.complete(HELLO, 6)
    assert KEY not in str(caught.value) and "goes on from there" in str(caught.value)
    assert caught.value.__cause__ is None
    assert chat.complete(HELLO, 5).text == "fine" and len(list(chat.folder.iterdir())) == 1


def test_an_endpoint_that_is_down(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1:1/v1/ cannot be reached.*ConnectError"):
        Chat(tmp_path, cap=1000, max_retries=0).complete(HELLO, 5)


def test_no_model_named(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    with pytest.raises(EndpointError, match="set OPENAI_MODEL"):
        Chat(tmp_path, cap=1)


@pytest.mark.parametrize("reply", [b"<html>hello</html>", b"[1, 2]", b'"text"', {"choices": []}, {"error": "odd"}])
def test_what_is_no_completion_is_malformed_and_not_kept(endpoint, chat, reply):
    endpoint.answer = lambda body, headers: (200, reply, 0)
    with pytest.raises(Malformed, match="no chat completion"):
        chat.complete(HELLO, 5)
    assert not list(chat.folder.glob("*.json"))


def test_an_empty_reply_is_kept_counted_and_skipped(endpoint, chat):
    endpoint.answer = lambda body, headers: (200, completion(None), 0)
    rows, malformed = autointerp.score_all(
        [record(0)], prompts.PhraseExplainer(chat, show), prompts.ChatSimulator(chat, show)
    )
    assert rows == [] and malformed == 1 and len(list(chat.folder.glob("*.json"))) == 1


@pytest.mark.parametrize("text", ["", "1 4", "1 4\n2 x", "1 4\n3 0", "1 4\n2 10", "Sure:\n1 4\n2 0", "1 4\n2 0\n3 0"])
def test_a_simulation_in_another_form_is_malformed(text):
    with pytest.raises(Malformed, match="wanted 2 lines"):
        prompts.parse_digits(Reply(text, None, 0), 2)


def test_the_key_is_in_no_file_and_in_no_text_of_the_client(endpoint, chat, capfd):
    endpoint.answer = lambda body, headers: (200, completion(f"your key is {headers['Authorization']}"), 0)
    assert chat.complete(HELLO, 5).text == "your key is Bearer <key>"
    written = "".join(path.read_text() for path in chat.folder.rglob("*.json"))
    assert KEY not in written + str(vars(chat)) + repr(chat) + "".join(capfd.readouterr())


def test_the_cap_stops_before_it_is_passed(endpoint, tmp_path):
    bound = len("hello") + 16 + 5
    model = Chat(tmp_path, cap=50 + bound)
    model.complete(HELLO, 5)
    with pytest.raises(CapReached, match="was not sent"):
        model.complete(HELLO, 6)
    with pytest.raises(CapReached):  # what an earlier run paid counts
        Chat(tmp_path, cap=50).complete(HELLO, 6)
    assert len(endpoint.asked) == 1 and model.spent == 50


def test_the_estimate_names_every_request_and_bounds_what_is_asked(endpoint, chat):
    records = [record(0), record(1)]
    expected = prompts.estimate(records, show)
    assert expected["requests"] == 22
    endpoint.answer = simulator_answers()
    autointerp.score_all(records, prompts.PhraseExplainer(chat, show), prompts.ChatSimulator(chat, show))
    assert len(endpoint.asked) == 22
    sent = sum(len(message["content"].encode()) for body in endpoint.asked for message in body["messages"]) / 4
    assert expected["prompt tokens"] / 2 < sent <= expected["prompt tokens"]  # it assumes an explanation of 200 letters


def test_the_explanation_prompt_shows_the_five_fragments_and_the_active_tokens_again():
    one = record(2)
    system, user = prompts.explanation_messages(one, show)
    assert "phrase" in system["content"]
    assert user["content"].startswith(
        "\n".join(f"{prompts._line(show(t))}\t{10 * (t == 1)}" for t in one.explain[0].tolist())
    )
    assert user["content"].count("Of these, above 0:\n sea\t10") >= 1


@pytest.mark.parametrize("judge", [prompts.detection, prompts.fuzzing])
def test_detection_and_fuzzing_reward_the_judge_that_is_right(endpoint, chat, judge):
    """A judge that looks for the word sea (bare, or marked) is right about the feature that fires on it."""
    target = "<<" if judge is prompts.fuzzing else " sea"

    def answer(body, headers):
        fragments = body["messages"][0]["content"].split("\n\nReply with")[0].split("\n\n")[2:]
        wanted = [("<< sea>>" in text) if target == "<<" else (target in text) for text in fragments]
        return 200, completion(",".join(str(int(one)) for one in wanted)), 0

    endpoint.answer = answer
    generator = torch.Generator().manual_seed(0)
    assert judge(chat, "sea", record(2), show, generator=generator) == 1.0
    endpoint.answer = lambda body, headers: (200, completion("yes, all of them"), 0)
    with pytest.raises(Malformed, match="wanted 10 digits"):
        judge(chat, "hills", record(2), show, generator=generator)


def test_the_replies_of_a_real_server_replay_offline(monkeypatch):
    """Recorded by `make serve-test` with RECORD=1: explanations that say little, simulations that are malformed."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    recorded = [files.read_json(path) for path in sorted(FIXTURES.glob("*.json"))]
    assert len(recorded) >= 8
    model = Chat(FIXTURES, cap=0, model=recorded[0]["request"]["model"], base_url="http://127.0.0.1:1/v1")
    explainer, simulator = prompts.PhraseExplainer(model, show), prompts.ChatSimulator(model, show)
    phrases = [explainer.explain(record(number)) for number in range(3)]
    assert set(phrases) <= {" ".join(one["reply"]["text"].split()) for one in recorded}
    rows, malformed = autointerp.score_all([record(number) for number in range(3)], explainer, simulator)
    assert len(rows) + malformed == 3 and model.requests == 0


@pytest.fixture(scope="module")
def local(llama):
    return language_models.Local(llama)


def test_a_local_model_explains_and_its_unknowns_do_not_depend_on_what_follows(local):
    text = local.tokenizer.decode
    tokens = torch.tensor(local.tokenizer.encode("the sea is green and a cat sleeps")[:6])[None]
    simulator = prompts.LocalSimulator(local, lambda token: text([token]))
    whole, part = simulator.simulate("the sea", tokens), simulator.simulate("the sea", tokens[:, :3])
    assert whole.shape == tokens.shape and ((whole > 0) & (whole < 9)).all() and whole.std() > 0
    torch.testing.assert_close(whole[:, :3], part, rtol=1e-4, atol=1e-4)
    assert prompts.PhraseExplainer(local, show).model.complete(HELLO, 4).tokens > 4


def test_explainer_and_simulator_by_name(endpoint, tmp_path, llama):
    options = {"length": 4, "model": llama, "replies": tmp_path, "cap": 10}
    rules, same = prompts.choose("tokens", show, **options)
    assert rules is same and rules.length == 4
    chat, local = (prompts.choose(kind, show, **options) for kind in ("chat", "local"))
    assert chat[0].model.cap == chat[1].model.cap == 10 and isinstance(local[1], prompts.LocalSimulator)
    with pytest.raises(ValueError, match="use tokens, chat or local"):
        prompts.choose("oracle", show, **options)
